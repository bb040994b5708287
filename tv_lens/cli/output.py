"""What commands print."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import tv_lens as tv

if TYPE_CHECKING:
    import pandas as pd


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records"))  # type: ignore[no-any-return]


@contextmanager
def resumable(folder: Path | None) -> Iterator[None]:
    """If the user interrupts, say how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        if folder is None:
            advice = "with --folder, finished tasks would be kept and the same command would resume"
        else:
            advice = f"the same command resumes from {folder}"
        print(f"tv-lens: interrupted; {advice}", file=sys.stderr)
        raise


def show(table: pd.DataFrame | list[dict[str, Any]], data: Any, as_json: bool, title: str | None = None) -> None:
    if as_json:
        from tv_lens.files import to_json

        print(to_json(data, indent=1).decode())
        return

    import pandas as pd
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = pd.DataFrame(table)
    table_to_print = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in rows:
        table_to_print.add_column(str(name), justify="right" if pd.api.types.is_numeric_dtype(rows[name]) else "left")
    for row in rows.itertuples(index=False):
        table_to_print.add_row(*(Text(f"{cell:.2f}" if isinstance(cell, float) else str(cell)) for cell in row))
    if title is not None:
        print(title)
    # At its full width: rich would break the cells of a wide table into several lines.
    Console(width=10_000).print(table_to_print)


def warn_in_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of tv_lens as one line, without the line of code that raised it."""
    if issubclass(category, tv.TvLensWarning):
        text = "tv-lens: warning: " + " ".join(str(message).split())
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(text, file=file or sys.stderr)
