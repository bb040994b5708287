"""Values in error messages, and texts that no model or file accepts."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence

from tv_lens.errors import TvLensError
from tv_lens.prompts import has_lone_surrogate

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: object) -> str:
    """A value for an error message, however large it is."""
    return _SHORT.repr(value)


def some(values: Sequence[object], most: int = 5) -> str:
    """The first values of a list for an error message."""
    return ", ".join(map(short, values[:most])) + (", ..." if len(values) > most else "")


def surrogate_fault(text: str) -> str:
    """What is wrong with a text that holds half of a surrogate pair."""
    return (
        f"{short(text)} holds half of a surrogate pair, which is not a character; write the whole character, or save "
        "the data as UTF-8"
    )


def check_characters(task: str, texts: Iterable[str]) -> None:
    """Raise TvLensError if a text holds half of a surrogate pair, which no tokenizer and no file accepts."""
    for text in texts:
        if has_lone_surrogate(text):
            raise TvLensError(f"task {short(task)}: {surrogate_fault(text)}")
