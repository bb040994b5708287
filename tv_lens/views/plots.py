"""Results as Plotly figures (extra `plots`).

Every figure can be read without colour: lines differ by dash and marker, bars by pattern, and the colours (Okabe and
Ito's) differ in brightness. Layers stand at the bottom, the depth they are at (the fraction of the model's blocks that
have been run) at the top. Text from tasks and models is text, never markup.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tv_lens.vectors import depth, place

try:
    import plotly.graph_objects as go
except ImportError as error:
    raise ImportError('a figure needs Plotly; pip install "tv_lens[plots]"') from error

if TYPE_CHECKING:
    from tv_lens.evidence.results import Conflict, Evaluation, Experiment, Score, Sweep
    from tv_lens.geometry import Similarities, VectorMap
    from tv_lens.readout import TopTokens

# Okabe and Ito's colours, in the order in which they are told apart best.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down", "pentagon", "hexagram")
_PATTERNS = ("", "/", "x", ".", "-", "+", "|", "\\")
_GREY = "#595959"

# The conditions keep their look through all figures.
_LOOKS: Mapping[str, tuple[str, str]] = {
    "zero-shot": ("#BFBFBF", ""),
    "few-shot": ("#E69F00", "/"),
    "patched": ("#0072B2", ""),
}


def plot_sweep(
    sweep: Sweep, *, zero_shot: Score | None = None, few_shot: Score | None = None, note: str = ""
) -> go.Figure:
    """Accuracy by layer in a band of its exact 95% intervals, the best layer marked, and the accuracies without a
    patch as lines, where they are given; `note` stands below the title.
    """
    order = sorted(range(len(sweep.layers)), key=lambda i: sweep.layers[i])
    layers = [sweep.layers[i] for i in order]
    scores = [sweep.scores[i] for i in order]
    low, high = zip(*(score.interval for score in scores), strict=True)
    colour = _LOOKS["patched"][0]
    figure = _figure(
        f"Patched accuracy by layer: best at {place(sweep.best, sweep.n_layers)}, {sweep.at(sweep.best)}", note
    )
    figure.add_scatter(
        x=[*layers, *reversed(layers)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor="rgba(0, 114, 178, 0.2)",
        mode="lines",
        line={"width": 0},
        hoverinfo="skip",
        name="95% interval",
    )
    figure.add_scatter(
        x=layers,
        y=[score.accuracy for score in scores],
        mode="lines+markers",
        line={"color": colour, "width": 2},
        marker={"size": 6},
        customdata=[str(score) for score in scores],
        hovertemplate="layer %{x}: %{customdata}<extra></extra>",
        name="patched",
    )
    figure.add_scatter(
        x=list(sweep.ties),
        y=[sweep.at(layer).accuracy for layer in sweep.ties],
        mode="markers",
        marker={"size": 14, "symbol": "circle-open", "color": "#000000", "line": {"width": 2}},
        hoverinfo="skip",
        name="best" if len(sweep.ties) == 1 else f"best, {len(sweep.ties)} tied",
    )
    for name, score, line in (
        ("zero-shot", zero_shot, {"color": _GREY, "dash": "dot", "width": 2}),
        ("few-shot", few_shot, {"color": "#B36B00", "dash": "dash", "width": 2}),
    ):
        if score is not None:
            # A line of its own between the outermost layers, so that it stands in the legend and in print.
            ends = [layers[0] - 0.5, layers[-1] + 0.5]
            figure.add_scatter(
                x=ends,
                y=[score.accuracy] * 2,
                mode="lines",
                line=line,
                name=f"{name} {score}",
                hovertemplate=f"{name} {score}<extra></extra>",
            )
    every = max(1, math.ceil((layers[-1] - layers[0] + 1) / 16))
    figure.update_xaxes(title="layer (output of block)", range=[layers[0] - 0.5, layers[-1] + 0.5], dtick=every)
    _accuracy_axis(figure, "y")
    _depth_axis(figure, layers, sweep.n_layers)
    return figure


def plot_evaluation(evaluation: Evaluation) -> go.Figure:
    """A bar for each condition, with its exact 95% interval."""
    names = list(evaluation.conditions)
    figure = _figure(f"Accuracy by condition, patched at {place(evaluation.layer, evaluation.n_layers)}")
    for i, name in enumerate(names):
        colour, pattern = _LOOKS.get(name, ("#009E73", _PATTERNS[2 + i % 6]))
        figure.add_bar(**_bars([_text(name)], [evaluation.conditions[name]], name, colour, pattern))
    figure.update_traces(offsetgroup=None)  # each has its own place already
    figure.update_layout(showlegend=False, barmode="overlay", bargap=0.35)
    figure.update_xaxes(title="condition", type="category")
    _accuracy_axis(figure, "y")
    return figure


def plot_experiment(experiment: Experiment) -> go.Figure:
    """For each task a bar for zero-shot, few-shot and patched accuracy with their exact 95% intervals, and over the
    patched bar a symbol for each control.
    """
    results = experiment.results
    tasks = [_text(result.task) for result in results]
    figure = _figure(f"Accuracy by task, {experiment.settings['model']}, {experiment.settings['scoring']}")
    for name, (colour, pattern) in _LOOKS.items():
        scores = [result.evaluation.conditions[name] for result in results]
        figure.add_bar(**_bars(tasks, scores, name, colour, pattern, lying=True))
    controls = dict.fromkeys(name for result in results for name in result.evaluation.controls)
    for i, name in enumerate(controls):
        having = [result for result in results if name in result.evaluation.controls]
        figure.add_scatter(
            y=[_text(result.task) for result in having],
            x=[result.evaluation.controls[name].accuracy for result in having],
            customdata=[str(result.evaluation.controls[name]) for result in having],
            hovertemplate="%{y}, control " + _text(name) + ": %{customdata}<extra></extra>",
            mode="markers",
            orientation="h",
            offsetgroup="patched",
            marker={
                "symbol": _SYMBOLS[1 + i % (len(_SYMBOLS) - 1)],
                "size": 9,
                "color": "#FFFFFF",
                "line": {"color": "#000000", "width": 1.5},
            },
            name=f"control: {_text(name)}",
        )
    figure.update_layout(
        barmode="group",
        scattermode="group",
        bargap=0.25,
        height=170 + 52 * len(tasks),
    )
    figure.update_yaxes(automargin=True, title="task", type="category", autorange="reversed")  # the first on top
    _accuracy_axis(figure, "x")
    return figure


def plot_conflict(conflict: Conflict) -> go.Figure:
    """Accuracy scored as the demonstrated task and as the vector's, without and with the vector."""
    figure = _figure(
        f"Demonstrations of {conflict.task}, vector of {conflict.rival}: what is answered?",
        f"the vector at {place(conflict.layer, conflict.n_layers)}",
    )
    as_what = [f"the demonstrated task,<br>{_text(conflict.task)}", f"the vector's task,<br>{_text(conflict.rival)}"]
    plain, patched = "as it is", "with the vector written in"
    for name, look, scores in (
        (plain, "few-shot", [conflict.plain_task, conflict.plain_rival]),
        (patched, "patched", [conflict.patched_task, conflict.patched_rival]),
    ):
        figure.add_bar(**_bars(as_what, scores, name, *_LOOKS[look]))
    figure.update_layout(barmode="group", bargap=0.35)
    figure.update_xaxes(title="answers scored as", type="category")
    _accuracy_axis(figure, "y")
    return figure


def plot_similarities(similarities: Similarities) -> go.Figure:
    """Mean cosines of tasks with tasks, each written into its field. Brightness alone tells them apart."""
    table = similarities.matrix()
    names = [_text(name) for name in similarities.tasks]
    values = [[None if math.isnan(float(x)) else float(x) for x in row] for row in table.to_numpy("float64").tolist()]
    figure = _figure("Cosine of task vectors, mean over pairs", str(similarities))
    figure.add_heatmap(
        x=names,
        y=names,
        z=values,
        colorscale="Cividis",
        texttemplate="%{z:.2f}" if len(names) <= 12 else None,
        hovertemplate="%{y} and %{x}: %{z:.3f}<extra></extra>",
        colorbar={"title": "mean cosine"},
        xgap=1,
        ygap=1,
    )
    side = 220 + 44 * len(names)
    figure.update_layout(height=max(360, side), width=max(520, side + 160))
    figure.update_xaxes(title="task", type="category", showgrid=False, tickangle=-40, automargin=True)
    figure.update_yaxes(title="task", type="category", showgrid=False, autorange="reversed", automargin=True)
    return figure


def plot_map(vectors: VectorMap) -> go.Figure:
    """A point for each vector; tasks differ by colour and by symbol."""
    figure = _figure(f"Task vectors at {place(vectors.layer, vectors.n_layers)}, one point a prompt")
    for i, name in enumerate(vectors.tasks):
        chosen = [row for row, owner in enumerate(vectors.owners) if owner == i]
        figure.add_scatter(
            x=vectors.points[chosen, 0].tolist(),
            y=vectors.points[chosen, 1].tolist(),
            mode="markers",
            marker={
                "color": _COLOURS[i % len(_COLOURS)],
                "symbol": _SYMBOLS[i % len(_SYMBOLS)],
                "size": 9,
                "line": {"color": "#FFFFFF", "width": 1},
            },
            name=_text(name),
            hovertemplate=_text(name) + "<extra></extra>",
        )
    figure.update_layout(legend_title="task")
    figure.update_xaxes(title=vectors.axes[0], zeroline=False)
    figure.update_yaxes(title=vectors.axes[1], zeroline=False)
    return figure


def plot_top_tokens(found: TopTokens) -> go.Figure:
    """A bar for each token, the first vector's likeliest on top; several vectors are told apart by pattern."""
    figure = _figure(f"Top tokens of {found.task} at {place(found.layer, found.n_layers)}")
    for vector, (tokens, ids, probabilities) in enumerate(
        zip(found.tokens, found.ids, found.probabilities, strict=True)
    ):
        colour, pattern = _COLOURS[vector % len(_COLOURS)], _PATTERNS[vector % len(_PATTERNS)]
        figure.add_bar(
            # Two tokens may read alike, such as two parts of characters.
            y=[
                _text(repr(word)) + (f" ({i})" if tokens.count(word) > 1 else "")
                for word, i in zip(tokens, ids, strict=True)
            ],
            x=list(probabilities),
            orientation="h",
            marker={"color": colour, "pattern": {"shape": pattern}},
            name=f"vector {vector}",
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    rows = len({token for tokens in found.tokens for token in tokens})
    figure.update_layout(showlegend=len(found.tokens) > 1, height=160 + 26 * rows, barmode="group")
    figure.update_yaxes(autorange="reversed", title="token", automargin=True)
    figure.update_xaxes(title="probability", rangemode="tozero")
    return figure


# What all have in common


def _figure(title: str, subtitle: str = "") -> go.Figure:
    figure = go.Figure()
    below = {"subtitle": {"text": _text(subtitle), "font": {"size": 12}}} if subtitle else {}
    figure.update_layout(
        template="simple_white",
        title={"text": _text(title), "x": 0, "xref": "paper", "font": {"size": 15}, **below},
        font={"size": 13, "color": "#1A1A1A"},
        legend={"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left", "yanchor": "top"},
        margin={"l": 70, "r": 30, "t": 70, "b": 60},
        width=860,
        height=440,
    )
    return figure


def _bars(
    places: Sequence[str], scores: Sequence[Score], name: str, colour: str, pattern: str, lying: bool = False
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
    label = "%{y}" if lying else "%{x}"
    return {
        **({"y": places, "x": values, "orientation": "h"} if lying else {"x": places, "y": values}),
        "error_x" if lying else "error_y": error,
        "marker": {
            "color": colour,
            "pattern": {"shape": pattern, "fgcolor": "#1A1A1A", "size": 6, "solidity": 0.25},
            "line": {"color": "#1A1A1A", "width": 1},
        },
        "customdata": [str(score) for score in scores],
        "hovertemplate": f"{label}, {_text(name)}: %{{customdata}}<extra></extra>",
        "name": _text(name),
        "offsetgroup": name,
    }


def _accuracy_axis(figure: go.Figure, axis: str) -> None:
    update = figure.update_xaxes if axis == "x" else figure.update_yaxes
    update(title="accuracy (95% interval)", range=[-0.03, 1.03], showgrid=True, gridcolor="#E5E5E5", dtick=0.2)


def _depth_axis(figure: go.Figure, layers: Sequence[int], n_layers: int | None) -> None:
    """A second axis at the top, in fractions of the model; left out where its depth is not known."""
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
    # An axis is drawn only where something is drawn on it.
    figure.add_scatter(x=ticks, y=[None] * len(ticks), xaxis="x2", showlegend=False, hoverinfo="skip")


def _text(text: str) -> str:
    """Text for a figure: Plotly reads labels as a little HTML, and `%{...}` in what it shows under the pointer."""
    return html.escape(text, quote=False).replace("{", "&#123;")
