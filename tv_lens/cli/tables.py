"""Tables that fit the terminal. What is not printed on a terminal is as wide as it needs to be."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

# Wider than any table, so that rich does not break the cells of a file's table into several lines.
_UNLIMITED = 10_000
# A narrower terminal shows a table that does not fit row by row, and a wider one in parts.
_NARROW = 60

_EIGHTHS = " ▏▎▍▌▋▊▉█"


def print_table(rows: pd.DataFrame, title: str | None, keys: int = 1, bold_row: int | None = None) -> None:
    """Print a table in the width of the terminal: whole, in parts that all begin with its first `keys` columns, or row
    by row. The row `bold_row` is bold.
    """
    if not sys.stdout.isatty():
        if title is not None:
            print(title)
        Console(width=_UNLIMITED).print(_table(rows, _names(rows), bold_row))
        return
    console = Console(highlight=False)
    if title is not None:
        console.print(Text(title))
    for part in _fitted(console, rows, keys, bold_row):
        console.print()
        console.print(part)
    console.print()


def _fitted(console: Console, rows: pd.DataFrame, keys: int, bold_row: int | None) -> Iterator[RenderableType]:
    """The table, or what it is shown as if it does not fit."""
    names = [name for name in _names(rows) if any(_written(cell) for cell in rows[name])]
    if _fits(console, rows, names):
        yield _table(rows, names, bold_row)
    elif console.width < _NARROW or len(rows) == 1:
        yield from _blocks(rows[names], keys, bold_row, console.width)
    else:
        first, part = names[:keys], list[str]()
        for name in names[keys:]:
            if part and not _fits(console, rows, [*first, *part, name]):
                yield _table(rows, [*first, *part], bold_row)
                part = []
            part.append(name)
        yield _table(rows, [*first, *part], bold_row)


def _fits(console: Console, rows: pd.DataFrame, names: Sequence[str]) -> bool:
    options = console.options.update(max_width=_UNLIMITED)
    return console.measure(_table(rows, names, None), options=options).maximum <= console.width


def _table(rows: pd.DataFrame, names: Sequence[str], bold_row: int | None) -> Table:
    import pandas as pd

    # On a terminal two columns are two spaces apart.
    narrow: dict[str, Any] = {"padding": (0, 1, 0, 0), "show_edge": False} if sys.stdout.isatty() else {}
    table = Table(box=SIMPLE_HEAD, pad_edge=False, **narrow)
    for name in names:
        table.add_column(name, justify="right" if pd.api.types.is_numeric_dtype(rows[name]) else "left")
    for i, row in enumerate(rows[list(names)].itertuples(index=False)):
        table.add_row(*(Text(_written(cell)) for cell in row), style="bold" if i == bold_row else None)
    return table


def _blocks(rows: pd.DataFrame, keys: int, bold_row: int | None, width: int) -> Iterator[Text]:
    """Each row as a block: its first columns, and below them each other column that is not empty."""
    first, names = _names(rows)[:keys], _names(rows)[keys:]
    indent = "  " if keys else ""
    available = max(width - len(indent) - 2, 12)
    longest = max((cell_len(_written(cell)) for name in names for cell in rows[name]), default=0)
    name_width = min(max((len(name) for name in names), default=0), max(available - longest, 10))
    for i, row in enumerate(rows.itertuples(index=False)):
        cells = [_written(cell) for cell in row]
        named = [_numbered(rows, name, cell) for name, cell in zip(first, cells, strict=False)]
        heading = _wrapped(", ".join(named), width)
        lines = [
            f"{indent}{one:{name_width}}  {other}"
            for name, cell in zip(names, cells[keys:], strict=True)
            for one, other in zip_longest(
                _wrapped(name, name_width), _wrapped(cell, available - name_width), fillvalue=""
            )
            if cell
        ]
        style = "bold" if keys and bold_row in (None, i) else ""
        yield Text("\n").join([*(Text(line, style) for line in heading), *map(Text, lines)])


def _numbered(rows: pd.DataFrame, name: str, cell: str) -> str:
    """The cell of a column of text, or the number with the column's name."""
    import pandas as pd

    return f"{name} {cell}" if pd.api.types.is_numeric_dtype(rows[name]) else cell


def _names(rows: pd.DataFrame) -> list[str]:
    return [str(name) for name in rows]


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, break_on_hyphens=False)


def _written(cell: Any) -> str:
    return f"{cell:.2f}" if isinstance(cell, float) else str(cell)


def small_bar(fraction: float) -> str:
    """A bar for a number from 0 to 1, in eighths of a column if the output can show them."""
    columns = 8 if sys.stdout.isatty() and Console().width < _NARROW else 20
    try:
        _EIGHTHS.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#" * round(fraction * columns)
    whole, rest = divmod(round(fraction * columns * 8), 8)
    return "█" * whole + _EIGHTHS[rest].strip()
