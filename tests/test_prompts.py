from __future__ import annotations

import pytest

from tv_lens import Example, Prompt, Template

PAPER = Template("example:{input}->{output}")


def test_a_prompt_is_written_as_the_template_says() -> None:
    prompt = Prompt((Example("hot", "cold"), Example("big", "small")), "tall", "short", PAPER)
    assert prompt.text == "example:hot->cold\nexample:big->small\nexample:tall->"
    assert prompt.zero_shot().text == "example:tall->"
    assert prompt.zero_shot().answer == "short"
    assert prompt.asking("wet").text == "example:hot->cold\nexample:big->small\nexample:wet->"
    assert prompt.asking("wet").answer is None
    assert prompt.shots == 2


def test_the_query_ends_where_the_answer_begins() -> None:
    assert Template("{input} ->  {output}").ask("hot") == "hot ->"  # the space belongs to the answer's token
    assert Template("{input}\n{output}").ask("hot") == "hot\n"
    assert Template("{input} is {output}!").ask("hot ") == "hot  is"


def test_braces_in_data_are_data() -> None:
    prompt = Prompt((Example("{output}", "{input}"),), "{0} {x!r}", None, Template("{{{input}} = {output}"))
    assert prompt.text == "{{{output}} = {input}\n{{{0} {x!r}} ="


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ("{input} ->", "has {output} 0 times"),
        ("-> {output}", "has {input} 0 times"),
        ("{input} {input} {output}", "has {input} 2 times"),
        ("{output} <- {input}", "has {output} before {input}"),
    ],
)
def test_a_template_without_its_fields_says_so(example: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        Template(example)


def test_an_empty_separator_is_refused() -> None:
    with pytest.raises(ValueError, match="separator is empty"):
        Template(separator="")


@pytest.mark.parametrize(
    ("template", "completion", "answer"),
    [
        (Template(), " cold\nbig -> small", "cold"),
        (Template(), " cold", "cold"),
        (Template(), "\nbig", ""),
        (Template(separator=", "), " New York, big", "New York"),
        (Template("{input} is {output}."), " cold.\nbig", "cold"),
    ],
)
def test_the_answer_ends_at_the_separator(template: Template, completion: str, answer: str) -> None:
    assert template.cut(completion) == answer
