"""Figures of attention heads' effects and of conditions; `tv_lens.views.plots` registers them."""

from __future__ import annotations

import math
import textwrap

from tv_lens.edits import Head
from tv_lens.evidence.results import PLAIN, Conditions
from tv_lens.heads import HeadEffects
from tv_lens.views.drawing import COLORS, LOOKS, PATTERNS, TWO_SIDED, accuracy_axis, bars, go, new_figure, plain


def plot_head_effects(effects: HeadEffects, *, mark: int = 10) -> go.Figure:
    """Average effects as a heat map, layers from bottom to top, blue below 0 and orange above. The `mark` highest are
    numbered by rank; + and - mark the other heads whose effect is above or below 0 by the simultaneous 95% interval.
    """
    means, ranks = effects.mean(), {head: i + 1 for i, head in enumerate(effects.top(min(mark, len(effects.heads))))}
    low, high = effects.interval() if len(effects) > 1 else (means * math.nan, means * math.nan)
    signs, n_heads = _signs(effects), means.shape[1]
    every = [[Head(layer, head) for head in range(n_heads)] for layer in effects.layers]
    most = float(means.nan_to_num().abs().max()) or 1.0
    figure = new_figure(
        f"Effect of each head on {effects.task}, {effects.model}",
        f"mean change of {effects.measure} over {len(effects)} prompts, {effects.how}; numbers: the highest",
    )
    figure.add_heatmap(
        x=list(range(n_heads)),
        y=list(effects.layers),
        z=[[None if math.isnan(value) else value for value in row] for row in means.tolist()],
        zmin=-most,
        zmax=most,
        colorscale=TWO_SIDED,
        text=[[str(ranks[head]) if head in ranks else signs.get(head, "") for head in row] for row in every],
        texttemplate="%{text}",
        textfont={"size": 11, "color": "#000000"},
        customdata=[
            [f"{means[i, j]:+.4f} [{low[i, j]:+.4f}, {high[i, j]:+.4f}]" for j in range(n_heads)]
            for i in range(len(effects.layers))
        ],
        hovertemplate="layer %{y}, head %{x}: %{customdata}<extra></extra>",
        hoverongaps=False,
        colorbar={"title": f"effect ({plain(effects.measure)})"},
        xgap=1,
        ygap=1,
    )
    figure.update_layout(height=190 + 17 * len(effects.layers), width=max(560, 300 + 30 * n_heads))
    figure.update_xaxes(title="head", dtick=max(1, math.ceil(n_heads / 32)), showgrid=False)
    figure.update_yaxes(title="layer", dtick=max(1, math.ceil(len(effects.layers) / 32)), showgrid=False)
    if effects.diagnosis:
        lines = textwrap.wrap(f"Note: {'; '.join(effects.diagnosis)}.", width=max(80, 40 + 5 * n_heads))
        figure.update_layout(margin_b=80 + 14 * len(lines), height=figure.layout.height + 14 * len(lines))
        figure.add_annotation(
            text="<br>".join(map(plain, lines)),
            x=0,
            y=0,
            xref="paper",
            yref="paper",
            yshift=-58,
            xanchor="left",
            yanchor="top",
            align="left",
            showarrow=False,
            font={"size": 10},
        )
    return figure


def _signs(effects: HeadEffects) -> dict[Head, str]:
    """The sign of each effect that is not 0 by the simultaneous interval."""
    if len(effects) < 2:
        return {}
    low, high = effects.interval(simultaneous=True)
    cells = {head: (effects.layers.index(head.layer), head.head) for head in effects.heads}
    above = {head: "+" for head, cell in cells.items() if float(low[cell]) > 0}
    return above | {head: "-" for head, cell in cells.items() if float(high[cell]) < 0}


def plot_conditions(conditions: Conditions) -> go.Figure:
    """One group of bars per condition, one bar per vector, with exact 95% intervals."""
    figure = new_figure("Accuracy by condition")
    names = [plain(name) for name in conditions.scores]
    for i, vector in enumerate(conditions.vectors):
        looks = (LOOKS["zero-shot"][0], "") if vector == PLAIN else (COLORS[(i - 1) % 6], PATTERNS[(i - 1) % 8])
        scores = [scores[vector] for scores in conditions.scores.values()]
        figure.add_bar(**bars(names, scores, vector, *looks))
    figure.update_layout(barmode="group", bargap=0.25)
    figure.update_xaxes(title="condition", type="category")
    accuracy_axis(figure, "y")
    return figure
