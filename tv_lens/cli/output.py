"""What commands print."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

import tv_lens as tv

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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


def show(
    table: pd.DataFrame | list[dict[str, Any]],
    data: Any,
    as_json: bool,
    title: str | None = None,
    *,
    keys: int = 1,
    bold_row: int | None = None,
) -> None:
    """Print the data as JSON, or the table, whose first `keys` columns name a row, and whose row `bold_row` is bold."""
    if as_json:
        from tv_lens.files import to_json

        print(to_json(data, indent=1).decode())
        return

    import pandas as pd

    from tv_lens.cli.tables import print_table

    print_table(pd.DataFrame(table), title, keys, bold_row)


def write_figure(figure: go.Figure, path: Path) -> None:
    """Write a figure as a page that works offline."""
    from tv_lens.files import write_whole

    write_whole(path, figure.to_html(include_plotlyjs=True).encode())


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
    with tqdm.external_write_mode(file=file or sys.stderr):  # above the bars, if there are any
        print(text, file=file or sys.stderr)
