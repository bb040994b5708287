from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from models import make_twins

import tv_lens as tv
from tv_lens import Rule, Task, Template, exact_match, first_token, starts_with
from tv_lens.tasks import fingerprint

WORDS = [f"w{i}" for i in range(30)]
TASK = Task("upper", tuple(WORDS), str.upper)


def test_a_prompt_never_shows_its_query_nor_an_example_twice() -> None:
    for seed in range(20):
        prompts = TASK.sample(30, shots=10, seed=seed)
        assert sorted(prompt.query for prompt in prompts) == sorted(WORDS)
        for prompt in prompts:
            shown = [example.input for example in prompt.examples]
            assert len({prompt.query, *shown}) == 11
            assert all(output == text.upper() for text, output in prompt.examples)
            assert (prompt.answer, prompt.task) == (prompt.query.upper(), "upper")


def test_a_substitute_is_neither_query_nor_demonstration() -> None:
    for seed in range(20):
        prompts = TASK.sample(30, shots=10, seed=seed)
        for prompt, queries in zip(prompts, TASK.substitutes(prompts, 19, seed=seed), strict=True):
            assert len({prompt.query, *(example.input for example in prompt.examples), *queries}) == 30


def test_split_parts_share_nothing_and_lose_nothing() -> None:
    dev, test = TASK.split(0.4, seed=1)
    assert (len(dev), len(test)) == (12, 18)
    assert {*dev.inputs, *test.inputs} == set(WORDS)
    assert TASK.split(0.4, seed=1)[0].inputs == dev.inputs != TASK.split(0.4, seed=2)[0].inputs


def test_split_parts_accept_what_the_task_accepts() -> None:
    """Alternatives of an answer, and those that only some inputs have."""
    mapping = {"big": ["small", "little"], "light": ["dark", "heavy"], "bright": "dark", "hot": "cold"}
    task = Task.from_mapping("opposites", mapping)
    for seed in range(4):
        for part in task.split(0.5, seed=seed):
            for query in part.inputs:
                for answer in ("little", "heavy"):
                    expected = task.right(answer, task.answer(query), query=query)
                    assert part.right(answer, part.answer(query), query=query) == expected
                    assert expected == ((query, answer) in {("big", "little"), ("light", "heavy")})


def test_fewer_prompts_are_the_first_of_more() -> None:
    assert TASK.sample(5, shots=3, seed=4) == TASK.sample(20, shots=3, seed=4)[:5]
    assert TASK.sample(5, shots=3, seed=4) != TASK.sample(5, shots=3, seed=5)


def test_sampling_is_the_same_in_every_process() -> None:
    code = (
        "from tv_lens import Task; t = Task('t', tuple('abcdefghij'), str.upper); p = t.sample(4, shots=3, seed=7);"
        "print([q.text for q in p], t.substitutes(p, 2, seed=7), t.split(0.5, seed=7)[0].inputs)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TASK.sample(31, shots=1, seed=0), "31 prompts need 31 different queries and there are 30"),
        (lambda: TASK.sample(1, shots=30, seed=0), "30 shots and a query need 31 different inputs and there are 30"),
        (lambda: TASK.sample(0, shots=1, seed=0), "cannot sample 0 prompts"),
        (
            lambda: TASK.substitutes(TASK.sample(2, shots=28, seed=0), 2, seed=0),
            "prompt 0: 2 substitutes are asked for and 1 of the 30 inputs",
        ),
        (lambda: TASK.substitutes([], 0, seed=0), "0 substitutes"),
        (lambda: TASK.split(0.01, seed=0), "0.01 of 30 inputs leaves 0 and 30"),
        (lambda: Task("t", ("a", "b", "a"), str.upper), "1 duplicate inputs .'a'."),
    ],
)
def test_too_few_inputs_says_how_many(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()


def test_numbers_in_a_mapping_are_refused(as_users_run_it: None) -> None:
    with pytest.raises(ValueError, match="'two' -> 2 is not a pair of texts"):
        Task.from_mapping("count", {"two": 2})  # type: ignore[dict-item]


def test_alternatives_of_one_answer_count_for_their_own_input() -> None:
    """Which of them count depends on the input, in any order of the mapping; without an input it is an error."""
    big, large = ["small", "little"], ["small", "tiny"]
    mappings: tuple[dict[str, Any], ...] = (
        {"big": big, "large": large},
        {"large": large, "big": big},
        {"big": big, "large": "small"},
        {"large": "small", "big": big},
    )
    for mapping in mappings:
        task = Task.from_mapping("t", mapping)
        assert task.answers("small", "big") == ("small", "little")
        assert task.answers("small", "large") == (("small", "tiny") if mapping["large"] is large else ("small",))
        assert task.right("little", "small", query="big")
        assert not task.right("little", "small", query="large")
        assert task.right("tiny", "small", query="large") is (mapping["large"] is large)
        assert not task.right("tiny", "small", query="big")
        for half in task.split(0.5, seed=0):
            assert half.answers("small", "big") == ("small", "little")
        with pytest.raises(tv.TvLensError, match="which alternatives of 'small' count depends on the input"):
            task.right("little", "small")
        # A prompt's own answer is judged by its own alternatives, which are not those of the task's answer.
        assert task.answers("huge", "big") == ("huge",)
    task = Task.from_mapping("t", {"big": big, "large": big, "hot": "cold"})
    assert task.answers("small") == ("small", "little")
    assert task.answers("small", "big") == task.answers("small", "of another task") == ("small", "little")


def test_a_score_judges_each_answer_for_its_query() -> None:
    task = Task.from_mapping("t", {"big": ["small", "little"], "large": ["small", "tiny"]})
    prompts = [tv.Prompt((), "big"), tv.Prompt((), "large"), tv.Prompt((), "big"), tv.Prompt((), "large")]
    assert tv.score(task, prompts, ["little", "little", "tiny", "tiny"]).correct == (True, False, False, True)


def test_the_fingerprint_holds_the_alternatives_of_each_input() -> None:
    mappings: tuple[dict[str, Any], ...] = (
        {"big": ["small", "little"], "large": ["small", "tiny"]},
        {"big": ["small", "tiny"], "large": ["small", "little"]},
        {"big": ["small", "little"], "large": ["small", "little"]},
        {"big": ["small", "little"], "large": "small"},
        {"big": "small", "large": "small"},
    )
    digests = [fingerprint(Task.from_mapping("t", mapping)) for mapping in mappings]
    assert len(set(digests)) == len(digests)
    # As version 0.1 wrote it, so that folders of older runs can be resumed.
    pairs = [["big", "small", "little"], ["large", "small", "little"]]
    assert digests[2] == hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def test_an_answer_that_contains_the_separator_is_refused() -> None:
    task = Task.from_mapping("poem", {"a": "roses", "b": "red\nand\n\nblue", "c": "violets", "d": "one\ntwo"})
    with pytest.raises(tv.TvLensError) as raised:
        task.sample(1, shots=1, seed=0)
    for part in (
        "the answer 'red\\nand\\n\\nblue' of 'b' contains '\\n'",
        "2 of 4 answers do",
        "use Template('example:{input}->{output}', separator='\\n\\n\\n')",
    ):
        assert part in str(raised.value)
    [proposed] = task.sample(1, shots=3, seed=0, template=Template(tv.PAPER.example, separator="\n\n\n"))
    assert [tv.PAPER.cut(example.output + "\n\n\nmore") for example in proposed.examples]
    for text in task.inputs:  # with what is proposed, each answer can be right
        answer = task.answer(text)
        assert task.right(Template(tv.PAPER.example, separator="\n\n\n").cut(f" {answer}\n\n\nmore"), answer)
    assert task.sample(1, shots=1, seed=0, template=Template(separator="|"))
    Task.from_mapping("t", {"a": " x\n", "b": "y"}).sample(1, shots=1, seed=0)  # white space around it is dropped


def test_a_mapping_is_copied() -> None:
    table = {"hot": "cold", "big": "small"}
    task = Task.from_mapping("antonyms", table)
    table["hot"] = "wrong"
    assert task.answer("hot") == "cold"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", '{"hot": "cold", "größe": "a, \\"b\\"\\n{c}"}'),
        ("t.json", '\ufeff[["hot", "cold"], ["größe", "a, \\"b\\"\\n{c}"]]'),
        ("t.csv", 'hot,cold\r\ngröße,"a, ""b""\n{c}"\r\n'),
        ("T.CSV", '\ufeffInput,Output\nhot,cold\n\ngröße,"a, ""b""\n{c}"'),
    ],
)
def test_files_hold_what_was_written(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    task = Task.from_file(tmp_path / name)
    assert task.name == name.split(".")[0]
    assert {text: task.answer(text) for text in task.inputs} == {"hot": "cold", "größe": 'a, "b"\n{c}'}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"hot cold", r"t.txt: a task is read from .json, .csv, .jsonl.* or .*, not '.txt'"),
        ("t.json", b'{"hot": "cold"', r"t.json: .*delimiter"),
        ("t.json", b'"hot"', r"t.json: holds a str; expected an object"),
        ("t.json", b'{"two": true}', r"t.json, key 1: .'two', True. is not a pair of non-empty texts"),
        ("t.json", b'{"two": null}', r"t.json, key 1: .'two', None. is not a pair of non-empty texts"),
        ("t.json", b'[["a", "b"], ["c"]]', r"t.json, pair 2: .'c'. is not a pair"),
        ("t.json", b"[" * 100_000, r"t.json: nested too deeply"),
        ("t.json", b"{}", r"t.json: no pairs"),
        ("t.csv", b"", r"t.csv: no pairs"),
        ("t.csv", b"a,b\nc,d,e\n", r"t.csv, line 2: .'c', 'd', 'e'. is not a pair"),
        ("t.csv", b"a,b\nc,\n", r"t.csv, line 2: .'c', ''. is not a pair"),
        ("t.csv", b'a,b\n"c,d\n', r"t.csv: line 2: unexpected end of data"),
        ("t.csv", "größe,b\n".encode("latin-1"), r"t.csv: not UTF-8"),
    ],
)
def test_a_bad_file_says_where_and_what(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Task.from_file(tmp_path / name)


def test_a_file_of_many_rows_reads_like_the_mapping(tmp_path: Path) -> None:
    table = {f"word {i}": f"out {i}" for i in range(5000)}
    (tmp_path / "many.json").write_text(json.dumps(table))
    assert Task.from_file(tmp_path / "many.json").inputs == tuple(table)


@pytest.mark.parametrize(
    ("rule", "prediction", "answer", "right"),
    [
        (exact_match, " cold ", "cold", True),
        (exact_match, "COLD", "cold", False),
        (exact_match, "cold and", "cold", False),
        (starts_with, "cold and wet", "cold", True),
        (starts_with, "New", "New York", True),
        (starts_with, "N", "New York", False),
        (starts_with, "T", "Taipei", False),
        (starts_with, "", "Taipei", False),
        (starts_with, "", "", True),
        (starts_with, "the cold", "cold", False),
        (starts_with, "colder", "cold", False),
        (starts_with, "30", "3", False),
        (starts_with, "3.", "3", True),
        (starts_with, "running_fast()", "running", True),
        (starts_with, "冷的", "冷", True),
        # Numbers and their groups
        (starts_with, "3,000", "3", False),
        (starts_with, "3.5", "3", False),
        (starts_with, "3'000", "3", False),
        (starts_with, "3\u202f000", "3", False),
        (starts_with, "٣٬٠٠٠", "٣", False),
        (starts_with, "3, 4 and 5", "3", True),
        (starts_with, "3. Then", "3", True),
        (starts_with, "3rd", "3", False),
        (starts_with, "3,000", "3,000", True),
        # Words in scripts with spaces
        (starts_with, "ספרים", "ספר", False),
        (starts_with, "ספר טוב", "ספר", True),
        (starts_with, "كتابة", "كتاب", False),
        (starts_with, "كتاب جديد", "كتاب", True),
        (starts_with, "서울은", "서울", False),
        (starts_with, "서울 시", "서울", True),
        (starts_with, "किताबें", "किताब", False),
        (starts_with, "किताब है", "किताब", True),
        (starts_with, "Москвы", "Москв", False),
        (starts_with, "don't", "don", False),
        (starts_with, "l’eau", "l", False),
        (starts_with, "cold'", "cold", True),
        # A character does not end before its marks
        (starts_with, "e\u0301tat", "e", False),
        (starts_with, "कि", "क", False),
        (starts_with, "👩‍👩‍👧", "👩", False),
        (starts_with, "🦊🦊", "🦊", True),
        (starts_with, "冷\u0301", "冷", False),
        # Scripts without spaces
        (starts_with, "冷水", "冷", True),
        (starts_with, "ひらがな", "ひら", True),
        (starts_with, "ภาษาไทย", "ภาษา", True),
        (starts_with, "cold冷", "cold", True),
        (starts_with, "冷3", "冷", True),
    ],
)
def test_what_counts_as_right(rule, prediction: str, answer: str, right: bool) -> None:  # type: ignore[no-untyped-def]
    assert rule(prediction, answer) is right


def test_a_first_token_is_complete_and_tokenized_in_context() -> None:
    """By hand: the tiny tokenizer knows " cold" as one token, and "->zebra" ends in z, e, br, a."""
    bridge = make_twins("llama").bridge
    assert bridge.tokenizer.tokenize("x -> cold")[-1] == "Ġcold"
    assert bridge.tokenizer.tokenize("x->zebra")[-4:] == ["z", "e", "br", "a"]
    spaced, tight = first_token(bridge, Template()), first_token(bridge, Template("{input}->{output}"))
    assert spaced(" cold", "cold")
    assert spaced("zebra crossing", "zebra")
    assert tight("z", "zebra")
    for rule, wrong, answer in (
        (spaced, "c", "cold"),
        (spaced, "", "zebra"),
        (tight, "ze", "zebra"),
        (tight, "e", "zebra"),
    ):
        assert not rule(wrong, answer)


def test_a_first_token_that_is_only_part_of_a_character_is_not_accepted() -> None:
    """The tiny tokenizer writes 北 and 東 as three byte tokens each, which all read as U+FFFD."""
    rule = first_token(make_twins("llama").bridge, Template("{input}->{output}"))
    assert not rule("\ufffd", "東京")
    assert rule("東京", "東京")
    assert not rule("x", "")


def test_the_template_goes_into_the_prompts() -> None:
    template = Template("Q: {input} A: {output}", " | ")
    [prompt] = TASK.sample(1, shots=1, seed=0, template=template)
    assert prompt.text.startswith("Q: w")
    assert " | Q: w" in prompt.text


# Rules and their names


def named_rule(prediction: str, answer: str) -> bool:
    return prediction in {answer, answer.upper(), answer.lower()}


def rule_with_limit(prediction: str, answer: str, limit: int) -> bool:
    return prediction[:limit] == answer[:limit]


def rule_factory(allowed: int) -> Any:
    def rule(prediction: str, answer: str) -> bool:
        return len(prediction) <= allowed

    return rule


class Callable_:
    def __call__(self, prediction: str, answer: str) -> bool:
        return True


def test_functions_have_names_and_what_hides_its_state_has_none() -> None:
    assert Rule.of(exact_match).name == "exact_match"
    assert Rule.of(starts_with).name == "starts_with"
    assert re.fullmatch(r"named_rule \(source [0-9a-f]{8}\)", Rule.of(named_rule).name)
    # Two rules of one factory, two partials and two lambdas would have one name each.
    for hiding in (rule_factory(3), partial(rule_with_limit, limit=2), lambda p, a: True, Callable_()):
        assert not Rule.of(hiding).is_named
        with pytest.raises(tv.TvLensError, match="task 't': its rule is .* which has no name"):
            Rule.of(hiding).check_named("t")
    assert Rule.of(Rule("mine", rule_factory(3))).name == "mine"


@pytest.mark.slow
def test_a_rules_name_is_the_same_in_every_process(tmp_path: Path) -> None:
    """Also if it holds a set, whose order depends on the hashing of the process."""
    (tmp_path / "rules_of_mine.py").write_text(inspect.getsource(named_rule))
    code = "import rules_of_mine; from tv_lens.tasks.rules import Rule; print(Rule.of(rules_of_mine.named_rule).name)"
    names = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(names) == 1
    assert "named_rule (source " in names.pop()


@pytest.mark.parametrize(
    "hiding",
    [rule_factory(3), partial(rule_with_limit, limit=2), lambda p, a: True],
    ids=["closure", "partial", "lambda"],
)
def test_a_folder_is_refused_for_a_rule_without_a_name(hiding: Any, tmp_path: Path) -> None:
    bridge = make_twins("gpt2").bridge
    small: dict[str, Any] = {"shots": 1, "n_dev": 2, "n_test": 2, "max_new_tokens": 2, "layers": [1]}
    task = Task("upper", tuple("abcdefgh"), str.upper, hiding)
    tv.run_experiment(bridge, [task], **small)
    with pytest.raises(tv.TvLensError, match="has no name, so a run kept in a folder"):
        tv.run_experiment(bridge, [task], folder=tmp_path / "run", **small)
    assert not (tmp_path / "run").exists()


def test_defaults_agree_everywhere() -> None:
    """One default template and one default rule, in Python and on the command line."""
    from tv_lens import cli

    rules = [Task("t", ("a",), str.upper).rule, Task.from_mapping("t", {"a": "b"}).rule]
    rules += [inspect.signature(Task.from_file).parameters["accepts"].default, tv.library()["antonyms"].rule]
    assert {Rule.of(rule).name for rule in rules} == {"starts_with"}
    templates = [tv.Prompt((), "a").template, Task("t", ("a", "b"), str.upper).sample(1, shots=1, seed=0)[0].template]
    templates += [
        inspect.signature(function).parameters["template"].default for function in (tv.run_experiment, tv.first_token)
    ]
    assert set(templates) == {tv.PAPER}
    for command in (cli.run, cli.extract, cli.sweep):
        options = inspect.signature(command).parameters
        assert options["template"].default == tv.PAPER.example
        assert options["separator"].default.replace(r"\n", "\n") == tv.PAPER.separator
        if "rule" in options:
            assert options["rule"].default == "starts_with"
