"""A few-shot prompt as a value, and how it is written down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

# Half of a surrogate pair is no character: no tokenizer and no file takes it.
half_character = re.compile("[\ud800-\udfff]").search


class Example(NamedTuple):
    """One demonstration: an input and the output that goes with it."""

    input: str
    output: str


@dataclass(frozen=True)
class Template:
    r"""How demonstrations and the query are written.

    `example` holds `{input}` and then `{output}`, each once; whatever else it holds, braces included,
    is written as it stands. The query is `example` up to just before `{output}`, trailing spaces
    dropped, so that the answer's own leading space stays with the answer's token.

    >>> Template().show(Example("hot", "cold"))
    'hot -> cold'
    >>> Template("Q: {input}\nA: {output}", separator="\n\n").ask("hot")
    'Q: hot\nA:'

    The paper's form is `Template("example:{input}->{output}")`.

    Raises:
        ValueError: `{input}` or `{output}` is missing, repeated or in the wrong order, or the separator is empty.
    """

    example: str = "{input} -> {output}"
    separator: str = "\n"

    def __post_init__(self) -> None:
        for field in ("{input}", "{output}"):
            if self.example.count(field) != 1:
                raise ValueError(
                    f"template {self.example!r} has {field} {self.example.count(field)} times; "
                    "write {input} and {output} once each, as in '{input} -> {output}'"
                )
        if self.example.index("{input}") > self.example.index("{output}"):
            raise ValueError(
                f"template {self.example!r} has {{output}} before {{input}}; the model answers "
                "what comes last, so write {input} first"
            )
        if not self.separator:
            raise ValueError("the template's separator is empty, so no answer would end; use '\\n' or another text")

    # Cut and joined rather than formatted: braces in the data, and in the rest of the template, are data.
    def _parts(self) -> tuple[str, str, str]:
        before, rest = self.example.split("{input}")
        between, after = rest.split("{output}")
        return before, between, after

    def show(self, example: Example) -> str:
        """The text of one demonstration."""
        before, between, after = self._parts()
        return before + example.input + between + example.output + after

    def ask(self, query: str) -> str:
        """The text that asks for the output of `query`."""
        before, between, _ = self._parts()
        return (before + query + between).rstrip(" ") if between else before + query

    def cut(self, text: str) -> str:
        r"""The answer in a completion: up to the separator, without what the template writes behind an
        output, and without white space around it.

        >>> Template().cut(" cold\nbig -> small")
        'cold'
        """
        *_, after = self._parts()
        answer = text.split(self.separator, 1)[0].strip()
        return answer.removesuffix(after.strip()).rstrip()


# How the paper writes its prompts.
PAPER = Template("example:{input}->{output}")


@dataclass(frozen=True)
class Prompt:
    """Demonstrations and a query; `answer` is the expected output, `task` the task it was sampled from.

    >>> prompt = Prompt((Example("hot", "cold"), Example("big", "small")), "tall", answer="short")
    >>> print(prompt.text)
    hot -> cold
    big -> small
    tall ->
    >>> prompt.zero_shot().text
    'tall ->'
    """

    examples: tuple[Example, ...]
    query: str
    answer: str | None = None
    template: Template = Template()
    task: str = ""

    def __post_init__(self) -> None:
        # Pairs become Examples at the door.
        object.__setattr__(self, "examples", tuple(Example(*pair) for pair in self.examples))

    @property
    def text(self) -> str:
        """The whole prompt as the model sees it."""
        shown = [self.template.show(example) for example in self.examples]
        return self.template.separator.join([*shown, self.template.ask(self.query)])

    @property
    def shots(self) -> int:
        """How many demonstrations it has."""
        return len(self.examples)

    @property
    def inputs(self) -> frozenset[str]:
        """Every input that it shows or asks."""
        return frozenset((self.query, *(example.input for example in self.examples)))

    def zero_shot(self) -> Prompt:
        """The query alone, without demonstrations."""
        return replace(self, examples=())

    def asking(self, query: str) -> Prompt:
        """The same demonstrations with another query, whose answer is not known."""
        return replace(self, query=query, answer=None)


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raises ValueError where there are no prompts or something else than prompts."""
    if isinstance(prompts, Prompt) or not len(prompts):
        raise ValueError(
            f"expected a list of at least one Prompt, not {prompts!r}; task.sample(n, shots=..., seed=...) makes one"
        )
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise ValueError(
                f"prompt {i} is a {type(prompt).__name__}; write it as Prompt(examples, query), or "
                "Prompt((), text, template=...) for a query alone"
            )
