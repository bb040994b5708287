"""Read files of pairs, records and tables.

A reader takes a file's text and returns what is in it, in one of three forms:

    list[Located]   pairs or records, each with a description of where it is in the file
    Table           rows of cells
    Tree            nested data, in which the pairs are still to be located

`tv_lens.tasks.layout` picks inputs and outputs out of them. To read another kind of file, register a reader:

    @reader(".psv")
    def pairs_between_bars(text: str) -> list[Located]:
        return [(f"line {i}", line.split("|")) for i, line in enumerate(text.splitlines(), start=1)]
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from tv_lens.errors import TvLensError
from tv_lens.files import read_whole
from tv_lens.tasks.names import usual_columns

# Where a pair or record is in its file, and the pair (a list of two) or record (a mapping).
Located: TypeAlias = tuple[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of cells, each with where it is. Without `names` the first row may hold the columns' names."""

    rows: Sequence[Located]
    names: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Tree:
    """Lists and objects within each other. JSON objects are `Object`."""

    value: Any


class Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a duplicate key is seen instead of overwritten."""

    def __repr__(self) -> str:
        return repr(dict(self))


class Number(str):
    """A number in a file, as its digits are written there."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


Content: TypeAlias = list[Located] | Table | Tree
# A reader of pairs or records alone, `Callable[[str], list[Located]]`, is one of these.
Reader: TypeAlias = Callable[[str], Content]

_READERS: dict[str, Reader] = {}


def reader(suffix: str) -> Callable[[Reader], Reader]:
    """Register a function as the reader of files whose name ends in `suffix`."""

    def register(function: Reader) -> Reader:
        _READERS[suffix.lower()] = function
        return function

    return register


def kinds() -> str:
    """The endings of the files that can be read."""
    *others, last = _READERS
    return f"{', '.join(others)} or {last}"


def read_content(path: Path) -> Content:
    """What the reader of this kind of file returns.

    Raises:
        OSError: the file cannot be read.
        TvLensError: another kind of file, or text that cannot be read. The message names the file.
    """
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise TvLensError(f"{path}: a task is read from {kinds()}, not {path.suffix!r}")
    try:
        # Bytes first: a text-mode read would turn a "\r\n" inside a quoted CSV cell into "\n".
        return _READERS[suffix](read_whole(path).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TvLensError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
    except ValueError as error:
        raise TvLensError(f"{path}: {error}") from error


@reader(".json")
def _json(text: str) -> Tree:
    """An object of inputs and outputs, a list of pairs or records, or an object that holds one of these."""
    return Tree(_value(text))


@reader(".csv")
def _csv(text: str) -> Table:
    """Cells between commas, semicolons or tabs, whichever all rows agree on, without white space around them."""
    return _table(text, (",", ";", "\t"))


@reader(".jsonl")
def _json_lines(text: str) -> list[Located]:
    """A record or a pair on each line."""
    located = []
    for i, line in enumerate(text.split("\n"), start=1):  # other line ends may be inside a JSON text
        if line.strip():
            try:
                located.append((f"line {i}", _value(line)))
            except ValueError as error:
                raise TvLensError(f"line {i}: {error}") from error
    return located


@reader(".tsv")
def _tsv(text: str) -> Table:
    """Cells between tabs, without white space around them."""
    return _table(text, ("\t",))


def _value(text: str) -> Any:
    def number(digits: str) -> Number:
        int(digits)  # which refuses thousands of digits
        return Number(digits)

    try:
        return json.loads(text, object_pairs_hook=Object, parse_int=number, parse_float=Number)
    except RecursionError as error:
        raise TvLensError("nested too deeply for a task") from error


def _table(text: str, delimiters: Sequence[str]) -> Table:
    if "\0" in text:
        raise TvLensError("holds NUL characters; is it UTF-16? Save it as UTF-8")
    attempts = {delimiter: _rows(text, delimiter) for delimiter in delimiters}
    parsed = {delimiter: rows for delimiter, rows in attempts.items() if isinstance(rows, list)}
    first = attempts[delimiters[0]]
    if isinstance(first, TvLensError) and not any(map(_is_even, parsed.values())):
        raise first
    return Table(_agreed(parsed))


def _rows(text: str, delimiter: str) -> list[Located] | TvLensError:
    """The rows that are not empty, or what is wrong."""
    rows_of = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows = []
    try:
        for row in rows_of:
            cells = [cell.strip() for cell in row]
            if any(cells):
                rows.append((f"line {rows_of.line_num}", cells))
    except csv.Error as error:
        return TvLensError(f"line {rows_of.line_num}: {error}")
    return rows


def _is_even(rows: Sequence[Located]) -> bool:
    """Whether all rows have the same number of cells, two or more."""
    widths = {len(cells) for _, cells in rows}
    return len(widths) == 1 and min(widths) > 1


def _agreed(parsed: dict[str, list[Located]]) -> list[Located]:
    """The rows under the delimiter that splits all of them alike.

    Raises:
        TvLensError: there are several.
    """
    even = {delimiter: rows for delimiter, rows in parsed.items() if _is_even(rows)}
    if len(even) > 1:  # a usual header decides, then two columns
        even = (
            {each: rows for each, rows in even.items() if usual_columns(rows[0][1])}
            or {each: rows for each, rows in even.items() if len(rows[0][1]) == 2}
            or even
        )
    if len(even) > 1:
        names = " or ".join(map(repr, even))
        raise TvLensError(
            f"the cells may be separated by {names}; put quotes around cells that contain one of them, or write a "
            "first row input,output"
        )
    if even:
        [rows] = even.values()
        return rows
    # No delimiter fits all rows: the one that splits the first row, so that the others are reported.
    split = [rows for rows in parsed.values() if rows and len(rows[0][1]) > 1]
    return split[0] if split else next(iter(parsed.values()))
