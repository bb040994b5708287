"""Tables for notebooks and pages, in the colors of what is around them, light or dark."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# A gray that shows on white and on black; text keeps the notebook's color.
_LINE = "rgba(128, 128, 128, 0.4)"
_MAX_ROWS = 60


def to_html(table: pd.DataFrame, caption: str, formats: Mapping[str, str] | None = None) -> str:
    """The table under its caption, with all text escaped. Of a long table only the first rows are shown, and the
    caption says so.

    Numbers get two decimals and missing values are left blank, unless `formats` has another format for the column.
    """
    from pandas.io.formats.style import Styler

    shown = table.head(_MAX_ROWS).reset_index(drop=True)
    if len(shown) < len(table):
        caption += f" (the first {len(shown)} of {len(table)} rows; to_pandas() has all)"
    kinds = [dtype.kind for dtype in shown.dtypes]
    decimals = {name: "{:.2f}" for name, kind in zip(shown.columns, kinds, strict=True) if kind == "f"}
    left = [i for i, kind in enumerate(kinds, start=1) if kind not in "iuf"]
    # The id ties the style to this table. The same table gets the same id, so that a notebook that is run again does
    # not change.
    uuid = hashlib.sha256(repr((caption, shown.to_dict())).encode()).hexdigest()[:8]
    styled = Styler(shown, uuid=uuid, cell_ids=False, caption=html.escape(caption))
    styled.format({**decimals, **(formats or {})}, na_rep="", escape="html")
    styled.format_index(escape="html", axis=1).hide(axis="index")
    styled.set_table_styles(
        [
            {"selector": selector, "props": props}
            for selector, props in (
                ("caption", "caption-side: top; text-align: left; font-weight: 600; padding: 0 0 4px"),
                ("th, td", "padding: 2px 12px 2px 0; background: transparent; text-align: right"),
                ("thead th", f"border-bottom: 1px solid {_LINE}"),
                *((f"th:nth-child({i}), td:nth-child({i})", "text-align: left") for i in left),
            )
        ]
    )
    styled.set_table_attributes(
        'style="border-collapse: collapse; margin: 4px 0 12px; background: transparent; color: inherit"'
    )
    return styled.to_html()
