"""Tables for notebooks and pages: in the colours of what is around them, light or dark."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# A grey that shows on white and on black; text keeps the colour of the notebook.
_LINE = "rgba(128, 128, 128, 0.4)"
_MOST = 60


def to_html(table: pd.DataFrame, caption: str, formats: Mapping[str, str] | None = None) -> str:
    """The table under its caption, all text in it escaped; of a long one the first rows, which the caption says.

    Numbers get two decimals and what is missing is left blank, unless `formats` has another format of the column.
    """
    from pandas.io.formats.style import Styler

    shown = table.head(_MOST).reset_index(drop=True)
    if len(shown) < len(table):
        caption += f" (the first {len(shown)} of {len(table)} rows; to_pandas() has all)"
    kinds = [dtype.kind for dtype in shown.dtypes]
    decimals = {name: "{:.2f}" for name, kind in zip(shown.columns, kinds, strict=True) if kind == "f"}
    left = [i for i, kind in enumerate(kinds, start=1) if kind not in "iuf"]
    # The id ties the style to this table; the same table gets the same, so that a notebook run again stays as it was.
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
