"""What all figures have in common: colors, axes, bars, and text that cannot become markup.

Every figure can be read without color: lines differ by dash and marker, bars by pattern, and the colors (Okabe and
Ito's) differ in brightness.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tv_lens.errors import MissingExtraError
from tv_lens.vectors import depth

try:
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots
except ImportError as error:
    raise MissingExtraError('a figure needs Plotly; pip install "tv_lens[plots]"') from error

__all__ = [
    "COLORS",
    "GRAY",
    "IN_THE_DARK",
    "LOOKS",
    "METHOD_COLORS",
    "PATTERNS",
    "SEQUENTIAL",
    "SYMBOLS",
    "TWO_SIDED",
    "accuracy_axis",
    "bars",
    "depth_axis",
    "go",
    "make_subplots",
    "method_looks",
    "new_figure",
    "plain",
    "style",
]

if TYPE_CHECKING:
    from tv_lens.evidence.results import Score

# Okabe and Ito's colors, in the order in which they are easiest to tell apart.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hexagram")
PATTERNS = ("", "/", "x", ".", "-", "+", "|", "\\")
GRAY = "#595959"

# Of methods: with a contrast of at least 3 to white and to the paper of a dark page, and none of them few-shot's.
METHOD_COLORS = ("#0072B2", "#D55E00", "#009E73", "#C0609A", "#9A7B00", "#2F94CC", "#000000", "#8C8C8C")

# Of heat maps: black text has a contrast of at least 4.5 to each.
SEQUENTIAL = ((0.0, "#FFF9E3"), (0.5, "#93C9E0"), (1.0, "#2384C6"))
TWO_SIDED = ((0.0, "#2384C6"), (0.5, "#FFFFFF"), (1.0, "#D55E00"))

# What a page does to the colors of figures if it is dark.
IN_THE_DARK: Mapping[str, str] = {
    **dict.fromkeys(("#1A1A1A", "#000000", "black", "rgb(36,36,36)"), "#E8E8E8"),
    **dict.fromkeys(("#FFFFFF", "white"), "#171717"),
    **dict.fromkeys(("#E5E5E5", "rgb(232,232,232)"), "#3A3A3A"),
    **dict.fromkeys((GRAY, "#8C8C8C"), "#B0B0B0"),
    "#F4F4F4": "#242424",
    "#E69F00": "#A87400",
    "#BFBFBF": "#777777",
}

# A condition looks the same in all figures.
LOOKS: Mapping[str, tuple[str, str]] = {
    "zero-shot": ("#BFBFBF", ""),
    "few-shot": ("#E69F00", "/"),
    "patched": ("#0072B2", ""),
}


def new_figure(title: str, subtitle: str = "") -> go.Figure:
    """An empty figure with a title."""
    figure = go.Figure()
    style(figure, title, subtitle)
    return figure


def style(figure: go.Figure, title: str, subtitle: str = "") -> None:
    """Give a figure its title, and the look that all figures have."""
    below = {"subtitle": {"text": plain(subtitle), "font": {"size": 12}}} if subtitle else {}
    figure.update_layout(
        template="simple_white",
        title={"text": plain(title), "x": 0, "xref": "paper", "font": {"size": 15}, **below},
        font={"size": 13, "color": "#1A1A1A"},
        legend={"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"},
        margin={"l": 70, "r": 30, "t": 70, "b": 60},
        width=860,
        height=440,
    )


def method_looks(methods: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Each method's color and symbol, the same in all figures of a page."""
    return {
        method: (METHOD_COLORS[i % len(METHOD_COLORS)], SYMBOLS[i % len(SYMBOLS)]) for i, method in enumerate(methods)
    }


def bars(
    labels: Sequence[str], scores: Sequence[Score], name: str, color: str, pattern: str, horizontal: bool = False
) -> dict[str, Any]:
    values = [score.accuracy for score in scores]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [score.interval[1] - score.accuracy for score in scores],
        "arrayminus": [score.accuracy - score.interval[0] for score in scores],
        "color": "#000000",
        "thickness": 1.5,
        "width": 3,
    }
    label = "%{y}" if horizontal else "%{x}"
    return {
        **({"y": labels, "x": values, "orientation": "h"} if horizontal else {"x": labels, "y": values}),
        "error_x" if horizontal else "error_y": error,
        "marker": {
            "color": color,
            "pattern": {"shape": pattern, "fgcolor": "#1A1A1A", "size": 6, "solidity": 0.25},
            "line": {"color": "#1A1A1A", "width": 1},
        },
        "customdata": [str(score) for score in scores],
        "hovertemplate": f"{label}, {plain(name)}: %{{customdata}}<extra></extra>",
        "name": plain(name),
        "offsetgroup": plain(name),
    }


def set_height(figure: go.Figure, height: int) -> None:
    """Make the figure so many pixels high, with its title at a fixed distance from the top."""
    figure.update_layout(
        height=height,
        title={"yref": "container", "y": 1 - 20 / height, "yanchor": "top"},
        legend_tracegroupgap=0,
    )


def accuracy_axis(figure: go.Figure, axis: str, **panel: int) -> None:
    """Make an axis that of accuracies: of the whole figure, or of the panel in this `row` and `col`."""
    update = figure.update_xaxes if axis == "x" else figure.update_yaxes
    update(title="accuracy (95% interval)", range=[-0.03, 1.03], showgrid=True, gridcolor="#E5E5E5", dtick=0.2, **panel)


def depth_axis(figure: go.Figure, layers: Sequence[int], n_layers: int | None) -> None:
    """A second axis at the top, in fractions of the model; left out if its depth is not known."""
    if n_layers is None:
        return
    every = max(1, math.ceil((layers[-1] - layers[0] + 1) / 8))
    ticks = list(range(layers[0], layers[-1] + 1, every))
    figure.update_layout(
        xaxis2={
            "title": {"text": "depth (fraction of blocks run)", "standoff": 4},
            "overlaying": "x",
            "matches": "x",
            "side": "top",
            "tickvals": ticks,
            "ticktext": [f"{depth(layer, n_layers):.2f}" for layer in ticks],
            "showgrid": False,
        },
        title_y=0.97,
        margin_t=130 if figure.layout.title.subtitle.text else 100,
    )
    # An axis is drawn only if something is drawn on it.
    figure.add_scatter(x=ticks, y=[None] * len(ticks), xaxis="x2", showlegend=False, hoverinfo="skip")


def plain(text: str) -> str:
    """Text for a figure. Plotly reads labels as a subset of HTML, and `%{...}` in hover texts as a placeholder."""
    return html.escape(text, quote=False).replace("{", "&#123;")
