"""Read pairs out of files, and check them."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Iterable
from typing import Any

from tv_lens.prompts import half_character


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def are_texts(value: object) -> bool:
    return is_text(value) or (isinstance(value, list) and bool(value) and all(map(is_text, value)))


# As long as an error can well be, also of a cell of a million characters or a list nested a thousand deep.
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80
short = _brief.repr


def check_characters(task: str, texts: Iterable[str]) -> None:
    """Raises ValueError where a text holds half of a surrogate pair: no tokenizer and no file takes it."""
    for text in texts:
        if half_character(text):
            raise ValueError(
                f"task {short(task)}: {short(text)} holds half of a surrogate pair, which is no character; write the "
                "whole character, or save the data as UTF-8"
            )


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a repeated key is seen rather than overwritten."""


def json_pairs(text: str) -> list[tuple[str, Any]]:
    try:
        data = json.loads(text, object_pairs_hook=_Object)
    except RecursionError as error:
        raise ValueError("nested too deeply for a task") from error
    if not isinstance(data, list):
        raise ValueError(f"holds a {type(data).__name__}; expected an object of inputs and outputs, or a list of pairs")
    kind = "key" if isinstance(data, _Object) else "pair"
    return [(f"{kind} {i}", pair) for i, pair in enumerate(data, start=1)]


def csv_pairs(text: str) -> list[tuple[str, Any]]:
    if "\0" in text:
        raise ValueError("holds NUL characters; is it UTF-16? Save it as UTF-8")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(f"line {reader.line_num}", row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["input", "output"]:
        rows = rows[1:]
    return rows
