"""Read input-output pairs out of files.

A reader takes a file's text and returns its pairs, each with a description of where it is in the file. To read another
kind of file, register one:

    @reader(".tsv")
    def tsv_pairs(text: str) -> list[Located]:
        return [(f"line {i}", line.split("\\t")) for i, line in enumerate(text.splitlines(), start=1)]
"""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

from tv_lens.errors import TvLensError
from tv_lens.files import read_whole
from tv_lens.prompts import has_lone_surrogate

# Where a pair is in its file, and the pair.
Located: TypeAlias = tuple[str, Any]
Reader: TypeAlias = Callable[[str], list[Located]]

_READERS: dict[str, Reader] = {}


def reader(suffix: str) -> Callable[[Reader], Reader]:
    """Register a function as the reader of files whose name ends in `suffix`."""

    def register(function: Reader) -> Reader:
        _READERS[suffix.lower()] = function
        return function

    return register


def read_pairs(path: Path) -> dict[str, str | list[str]]:
    """The pairs in a file, inputs to outputs.

    Raises:
        OSError: the file cannot be read.
        TvLensError: another kind of file, text that cannot be read, a row that is not a pair of non-empty texts, or a
            repeated input. The message names the file and the line or entry.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise TvLensError(f"{path}: a task is read from {' or '.join(_READERS)}, not {path.suffix!r}")
    try:
        # Bytes first: a text-mode read would turn a "\r\n" inside a quoted CSV cell into "\n".
        located = _READERS[suffix](read_whole(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TvLensError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    except ValueError as error:
        raise TvLensError(f"{path}: {error}") from error

    pairs: dict[str, str | list[str]] = {}
    for location, pair in located:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and _is_text(pair[0]) and _are_texts(pair[1])):
            raise TvLensError(f"{path}, {location}: {short(pair)} is not a pair of non-empty texts, input and output")
        if pair[0] in pairs:
            raise TvLensError(f"{path}, {location}: duplicate input {short(pair[0])}; keep one")
        pairs[pair[0]] = pair[1]
    if not pairs:
        raise TvLensError(f"{path}: no pairs in it")
    return pairs


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a repeated key is seen instead of overwritten."""


@reader(".json")
def _json_pairs(text: str) -> list[Located]:
    """An object of inputs and outputs, or a list of pairs; a list of outputs holds alternatives."""
    try:
        data = json.loads(text, object_pairs_hook=_Object)
    except RecursionError as error:
        raise TvLensError("nested too deeply for a task") from error
    if not isinstance(data, list):
        raise TvLensError(
            f"holds a {type(data).__name__}; expected an object of inputs and outputs, or a list of pairs"
        )
    kind = "key" if isinstance(data, _Object) else "pair"
    return [(f"{kind} {i}", pair) for i, pair in enumerate(data, start=1)]


@reader(".csv")
def _csv_pairs(text: str) -> list[Located]:
    """Two columns; a first row `input,output` is a header."""
    if "\0" in text:
        raise TvLensError("holds NUL characters; is it UTF-16? Save it as UTF-8")
    rows_of = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(f"line {rows_of.line_num}", row) for row in rows_of if row]
    except csv.Error as error:
        raise TvLensError(f"line {rows_of.line_num}: {error}") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["input", "output"]:
        rows = rows[1:]
    return rows


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return _is_text(value) or (isinstance(value, list) and bool(value) and all(map(_is_text, value)))


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: object) -> str:
    """A value for an error message, however large it is."""
    return _SHORT.repr(value)


def check_characters(task: str, texts: Iterable[str]) -> None:
    """Raise TvLensError if a text holds half of a surrogate pair, which no tokenizer and no file accepts."""
    for text in texts:
        if has_lone_surrogate(text):
            raise TvLensError(
                f"task {short(task)}: {short(text)} holds half of a surrogate pair, which is not a character; write "
                "the whole character, or save the data as UTF-8"
            )
