"""How a prompt is written as text: the interface of prompt formats."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tv_lens.errors import TvLensError

# What a piece of a prompt's text is for. "separator" is the text between an input and its output, "boundary" the text
# between two demonstrations, "template" everything else that the format adds.
SegmentRole = Literal["input", "separator", "output", "query", "boundary", "template"]


class Example(NamedTuple):
    """One demonstration.

    Attributes:
        input: what is asked.
        output: the answer.

    Examples:
        >>> Example("hot", "cold").output
        'cold'
    """

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


def without_start_of(ending: str, text: str) -> str:
    r"""The text without the longest part at its end with which `ending` may begin.

    >>> without_start_of("\n\n", "cold\n"), without_start_of("\n\n", "cold")
    ('cold', 'cold')
    """
    starts = range(max(0, len(text) - len(ending)), len(text))
    return text[: next((i for i in starts if ending.startswith(text[i:])), len(text))]


# Every prompt format by its class name, so that files can name theirs.
_FORMATS: dict[str, type[PromptFormat]] = {}


class PromptFormat(ABC):
    """How demonstrations and a query are written, and how an answer is cut out of what follows.

    A custom format is a frozen dataclass that derives from this class and defines `segments` and `cut`. It is saved by
    its class name and its fields, so these must be JSON values, and the class must be imported before a file that names
    it is loaded.

    Examples:
        >>> isinstance(tv.PAPER, PromptFormat)
        True
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "cut" in vars(cls) and "settled" not in vars(cls):
            cls.settled = PromptFormat.settled  # type: ignore[method-assign]  # the inherited one is for another `cut`
        _FORMATS[cls.__name__] = cls

    @abstractmethod
    def segments(self, examples: Sequence[Example], query: str) -> Sequence[Segment]:
        """The prompt in pieces, in order. Their texts joined are what the model sees.

        Args:
            examples: the demonstrations.
            query: what is asked.

        Returns:
            The prompt in pieces, in order. Their texts joined are what the model sees.
        """

    @abstractmethod
    def cut(self, text: str) -> str:
        """The answer in a completion of the prompt.

        Args:
            text: what the model wrote after the prompt.

        Returns:
            The answer.
        """

    def settled(self, text: str) -> str:
        """The beginning of the answer that is the same in all completions that start with `text`: what `cut` returns,
        without what may turn out to end the answer. By default nothing is known, and sweeps generate whole answers.

        Args:
            text: the beginning of a completion.

        Returns:
            The part of the answer that is the same in all completions with that beginning.
        """
        return ""

    @property
    def stop(self) -> str | None:
        """An answer ends where this text begins. None: it ends only where the model ends it."""
        return None

    def continuation(self, query: str, answer: str) -> str:
        """`answer` as it is written after the query: what a model that knows it would generate.

        Args:
            query: what is asked.
            answer: its answer.

        Returns:
            The answer as a model that knows it would write it after the query.
        """
        return answer

    def write(self, examples: Sequence[Example], query: str) -> str:
        """The whole prompt as the model sees it.

        Args:
            examples: the demonstrations.
            query: what is asked.

        Returns:
            The whole prompt as the model sees it.
        """
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
