"""The figure of a training; `tv_lens.views.plots` registers it."""

from __future__ import annotations

import math
from typing import Any

from tv_lens.methods.learning import Learned
from tv_lens.views.drawing import COLORS, SYMBOLS, go, new_figure, plain

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_PANELS = {
    "loss": "training loss (nats)",
    "validation_loss": "validation loss (nats)",
    "validation_accuracy": "validation accuracy",
}


def plot_learned(learned: Learned) -> go.Figure:
    """Training loss, validation loss and validation accuracy by epoch, a line for each layer. Up to eight layers have a
    color, dash and marker each; of more, the best is drawn thick and the others pale, darker with depth.
    """
    vectors, best = learned.vectors, learned.best_layers[0] if learned.best_layers else None
    table = learned.to_pandas()
    panels = [name for name in _PANELS if table[name].notna().any()]
    figure = new_figure(
        f"Learning {vectors.task}, {vectors.model}" + ("" if best is None else f": best at layer {best}"),
        f"objective {vectors.options.get('objective')}, a line for each layer",
    )
    few = len(vectors.layers) <= len(COLORS)
    ordered = sorted(vectors.layers, key=lambda layer: layer == best)  # the best on top
    for panel, name in enumerate(panels):
        axis = "" if panel == 0 else str(panel + 1)
        for layer in ordered:
            rows = table[(table["layer"] == layer) & table[name].notna()]
            figure.add_scatter(
                x=rows["epoch"].tolist(),
                y=[float(value) for value in rows[name]],
                xaxis=f"x{axis}",
                yaxis=f"y{axis}",
                name=f"layer {layer}" + (" (best)" if layer == best else ""),
                legendgroup=str(layer),
                legendrank=layer,
                showlegend=panel == 0 and (few or layer in (best, vectors.layers[0], vectors.layers[-1])),
                mode="lines+markers",
                hovertemplate=f"layer {layer}, epoch %{{x}}: %{{y:.3f}}<extra></extra>",
                **_look(vectors.layers.index(layer), len(vectors.layers), layer == best),
            )
        figure.update_layout(
            {
                f"xaxis{axis}": {"domain": _domain(panel, len(panels)), "title": "epoch", "anchor": f"y{axis}"},
                f"yaxis{axis}": {"title": plain(_PANELS[name]), "anchor": f"x{axis}", "rangemode": "tozero"},
            }
        )
        if name == "validation_accuracy":
            figure.update_layout({f"yaxis{axis}": {"range": [-0.03, 1.03], "dtick": 0.2}})
    figure.update_xaxes(dtick=max(1, math.ceil(int(table["epoch"].max()) / 8)))
    figure.update_layout(width=max(520, 360 * len(panels)))
    return figure


def _look(i: int, n: int, is_best: bool) -> dict[str, Any]:
    """How the line of the `i`-th of `n` layers is drawn."""
    if n <= len(COLORS):
        line = {"color": COLORS[i], "dash": _DASHES[i % len(_DASHES)], "width": 3 if is_best else 2}
        return {"line": line, "marker": {"symbol": SYMBOLS[i], "size": 7, "color": COLORS[i]}}
    if is_best:
        return {"line": {"color": "#000000", "width": 3}, "marker": {"size": 7, "color": "#000000"}}
    share = i / (n - 1)
    color = f"rgb({round(190 - 190 * share)}, {round(215 - 100 * share)}, {round(235 - 57 * share)})"
    return {"line": {"color": color, "width": 1.2}, "marker": {"size": 3, "color": color}}


def _domain(panel: int, n: int) -> list[float]:
    gap = 0.09
    width = (1 - gap * (n - 1)) / n
    return [panel * (width + gap), min(1.0, panel * (width + gap) + width)]
