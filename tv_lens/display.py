"""The way from a result to its table or figure.

Results know what to show; `tv_lens.views` knows how. The views are imported only when something is shown, so that
results can be made, saved and loaded without Plotly.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


def html_table(table: pd.DataFrame, caption: str, formats: Mapping[str, str] | None = None) -> str:
    """The table as HTML for a notebook, in the notebook's colors (`tv_lens.views.tables.to_html`)."""
    html: str = import_module("tv_lens.views.tables").to_html(table, caption, formats)
    return html


def figure(result: Any, **options: Any) -> go.Figure:
    """The result as a Plotly figure (`tv_lens.views.plots.plot`).

    Raises:
        MissingExtraError: the extra `plots` is not installed.
    """
    return import_module("tv_lens.views.plots").plot(result, **options)


def write_report(result: Any, path: str | Path) -> None:
    """Write the result as an HTML page (`tv_lens.views.report.write_report`).

    Raises:
        MissingExtraError: the extra `plots` is not installed.
        OSError: the folder is missing or cannot be written to.
    """
    import_module("tv_lens.views.report").write_report(result, path)
