"""A few-shot prompt as a value, and how it is written as text."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from tv_lens.errors import TvLensError

# What a piece of a prompt's text is for. "separator" is the text between an input and its output, "boundary" the text
# between two demonstrations, "template" everything else that the format adds.
SegmentRole = Literal["input", "separator", "output", "query", "boundary", "template"]


class Example(NamedTuple):
    """One demonstration: an input and the output that goes with it."""

    input: str
    output: str


class Segment(NamedTuple):
    """A piece of a prompt's text, and what it is for."""

    text: str
    role: SegmentRole


def has_lone_surrogate(text: str) -> bool:
    """Whether the text holds half of a surrogate pair: not a character, and refused by tokenizers and UTF-8 files."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


# Every prompt format by its class name, so that files can name theirs.
_FORMATS: dict[str, type[PromptFormat]] = {}


class PromptFormat(ABC):
    """How demonstrations and a query are written, and how an answer is cut out of what follows.

    A custom format is a frozen dataclass that derives from this class and defines `segments` and `cut`. It is saved by
    its class name and its fields, so these must be JSON values, and the class must be imported before a file that
    names it is loaded.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _FORMATS[cls.__name__] = cls

    @abstractmethod
    def segments(self, examples: Sequence[Example], query: str) -> Sequence[Segment]:
        """The prompt in pieces, in order. Their texts joined are what the model sees."""

    @abstractmethod
    def cut(self, text: str) -> str:
        """The answer in a completion of the prompt."""

    @property
    def stop(self) -> str | None:
        """An answer ends where this text begins. None: it ends only where the model ends it."""
        return None

    def continuation(self, query: str, answer: str) -> str:
        """`answer` as it is written after the query: what a model that knows it would generate."""
        return answer

    def write(self, examples: Sequence[Example], query: str) -> str:
        """The whole prompt as the model sees it."""
        return "".join(segment.text for segment in self.segments(examples, query))

    def to_dict(self) -> dict[str, Any]:
        """The format as JSON values; `format_from_dict` reads them back."""
        if not dataclasses.is_dataclass(self):
            raise TvLensError(
                f"{type(self).__name__} is not a dataclass, so it cannot be saved; add @dataclass(frozen=True)"
            )
        return {"kind": type(self).__name__, **dataclasses.asdict(self)}


def format_from_dict(data: Mapping[str, Any]) -> PromptFormat:
    """The format that `PromptFormat.to_dict` wrote.

    Raises:
        TvLensError: a format of an unknown class, or fields that it does not have.
    """
    fields = dict(data)
    kind = fields.pop("kind", "Template")
    if not isinstance(kind, str) or kind not in _FORMATS:
        raise TvLensError(f"prompt format {kind!r} is not known; import the module that defines it, then load the file")
    known = _FORMATS[kind]
    names = {field.name for field in dataclasses.fields(known)} if dataclasses.is_dataclass(known) else set[str]()
    if set(fields) - names:
        raise TvLensError(f"prompt format {kind!r} has no {sorted(set(fields) - names)}")
    try:
        return known(**fields)
    except TypeError as error:
        raise TvLensError(f"prompt format {kind!r}: {error}") from error


@dataclass(frozen=True)
class Template(PromptFormat):
    r"""How demonstrations and the query are written.

    `example` holds `{input}` and then `{output}`, each once. Everything else in it, other braces included, is written
    literally. The query is `example` up to just before `{output}`, without trailing spaces, so that the answer's own
    leading space stays with the answer's token.

    >>> Template().show(Example("hot", "cold"))
    'hot -> cold'
    >>> Template("Q: {input}\nA: {output}", separator="\n\n").ask("hot")
    'Q: hot\nA:'

    The paper's form, which is the default of prompts, is `PAPER`: `Template("example:{input}->{output}")`.

    Raises:
        TvLensError: `{input}` or `{output}` is missing, repeated or in the wrong order, or the separator is empty.
    """

    example: str = "{input} -> {output}"
    separator: str = "\n"

    def __post_init__(self) -> None:
        if not (isinstance(self.example, str) and isinstance(self.separator, str)):
            raise TvLensError(f"a template's example and separator are texts, not {self.example!r}, {self.separator!r}")
        for field in ("{input}", "{output}"):
            if self.example.count(field) != 1:
                raise TvLensError(
                    f"template {self.example!r} has {field} {self.example.count(field)} times; "
                    "write {input} and {output} once each, as in '{input} -> {output}'"
                )
        if self.example.index("{input}") > self.example.index("{output}"):
            raise TvLensError(
                f"template {self.example!r} has {{output}} before {{input}}; the model answers "
                "what comes last, so write {input} first"
            )
        if not self.separator:
            raise TvLensError("the template's separator is empty, so no answer would end; use '\\n' or another text")

    @property
    def stop(self) -> str:
        """The separator between demonstrations."""
        return self.separator

    # Split and joined instead of formatted: braces in the data, and in the rest of the template, are literal text.
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

    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        """Demonstrations, each followed by the separator, then the query without trailing spaces."""
        before, between, after = self._parts()
        segments = []
        for example in examples:
            segments += [
                Segment(before, "template"),
                Segment(example.input, "input"),
                Segment(between, "separator"),
                Segment(example.output, "output"),
                Segment(after, "template"),
                Segment(self.separator, "boundary"),
            ]
        # `ask` leaves out trailing spaces.
        rest = len(self.ask(query))
        for last in (Segment(before, "template"), Segment(query, "query"), Segment(between, "separator")):
            segments.append(last._replace(text=last.text[: max(0, rest)]))
            rest -= len(last.text)
        return [segment for segment in segments if segment.text]

    def continuation(self, query: str, answer: str) -> str:
        """The answer, with the spaces that `ask` left out before it."""
        before, between, _ = self._parts()
        return (before + query + between)[len(self.ask(query)) :] + answer

    def cut(self, text: str) -> str:
        r"""The answer in a completion: up to the separator, without what the template writes after an
        output, and without white space around it.

        >>> Template().cut(" cold\nbig -> small")
        'cold'
        """
        *_, after = self._parts()
        answer = text.split(self.separator, 1)[0].strip()
        return answer.removesuffix(after.strip()).rstrip()


# How the paper writes its prompts; the default everywhere.
PAPER = Template("example:{input}->{output}")


@dataclass(frozen=True)
class PlainText(PromptFormat):
    """A text without demonstrations, continued until the model ends it. Completions are kept as they are."""

    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        """The text itself."""
        if examples:
            raise TvLensError("a plain text has no demonstrations; use a Template to write them")
        return [Segment(query, "query")]

    def cut(self, text: str) -> str:
        """All of it, white space included."""
        return text


@dataclass(frozen=True)
class FreeText(PromptFormat):
    """A sentence with `{input}` in it, without demonstrations, continued until the model ends it. The answer is all of
    the completion; a rule such as `occurs` looks for the expected one in it.

    >>> FreeText("The opposite of {input} is").write((), "hot")
    'The opposite of hot is'

    Raises:
        TvLensError: `{input}` is missing or repeated.
    """

    text: str = "{input} means"

    def __post_init__(self) -> None:
        if self.text.count("{input}") != 1:
            raise TvLensError(
                f"free text {self.text!r} has {{input}} {self.text.count('{input}')} times; write it once"
            )

    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        """The sentence around the query."""
        if examples:
            raise TvLensError("free text has no demonstrations; use a Template to write them")
        before, after = self.text.split("{input}")
        parts = (Segment(before, "template"), Segment(query, "query"), Segment(after, "separator"))
        return [part for part in parts if part.text]

    def continuation(self, query: str, answer: str) -> str:
        """The answer as the next word."""
        return answer if self.text.endswith(" ") else f" {answer}"

    def cut(self, text: str) -> str:
        """All of it, without white space around it."""
        return text.strip()


@dataclass(frozen=True)
class Prompt:
    """Demonstrations and a query; `answer` is the expected output, `task` the task it was sampled from.

    >>> prompt = Prompt((Example("hot", "cold"), Example("big", "small")), "tall", answer="short")
    >>> print(prompt.text)
    example:hot->cold
    example:big->small
    example:tall->
    >>> prompt.zero_shot().text
    'example:tall->'
    """

    examples: tuple[Example, ...]
    query: str
    answer: str | None = None
    template: PromptFormat = PAPER
    task: str = ""

    def __post_init__(self) -> None:
        # Convert plain pairs to `Example`.
        object.__setattr__(self, "examples", tuple(Example(*pair) for pair in self.examples))

    @property
    def text(self) -> str:
        """The whole prompt as the model sees it."""
        return self.template.write(self.examples, self.query)

    @property
    def segments(self) -> Sequence[Segment]:
        """The text in pieces, with what each is for."""
        return self.template.segments(self.examples, self.query)

    @property
    def shots(self) -> int:
        """The number of demonstrations."""
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
    """Raise TvLensError if `prompts` is empty or contains anything but `Prompt`."""
    if isinstance(prompts, (str, Prompt)) or not len(prompts):
        raise TvLensError(
            f"expected a list of at least one Prompt, not {prompts!r}; task.sample(n, shots=..., seed=...) makes one"
        )
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, Prompt):
            raise TvLensError(
                f"prompt {i} is a {type(prompt).__name__}; write it as Prompt(examples, query), or "
                "Prompt((), text, template=...) for a query alone"
            )


def as_prompts(prompts: Sequence[Prompt | str]) -> list[Prompt]:
    """The prompts, each plain string converted to a prompt (`PlainText`).

    Raises:
        TvLensError: no prompts, or something else than prompts and strings.
    """
    if isinstance(prompts, (str, Prompt)):
        check_prompts(prompts)  # type: ignore[arg-type]
    made = [Prompt((), each, template=PlainText()) if isinstance(each, str) else each for each in prompts]
    check_prompts(made)
    return made
