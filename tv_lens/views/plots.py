"""Results as Plotly figures (extra `plots`).

`plot` draws every result; a figure for another class is registered with `plot.register`. Layers are at the bottom of a
figure, their depth (the fraction of the model's blocks that have been run) at the top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from tv_lens.errors import UnsupportedError
from tv_lens.evidence.comparisons import Comparison
from tv_lens.evidence.results import Conditions, Conflict, Evaluation, Experiment, Score, Sweep, TaskResult
from tv_lens.geometry import Similarities, VectorMap
from tv_lens.heads import HeadEffects
from tv_lens.inspection import TokenTable
from tv_lens.methods.learning import Learned
from tv_lens.readout import TopTokens
from tv_lens.vectors import layer_label
from tv_lens.views.comparison import plot_comparison
from tv_lens.views.drawing import (
    COLORS,
    GRAY,
    LOOKS,
    PATTERNS,
    SEQUENTIAL,
    SYMBOLS,
    accuracy_axis,
    bars,
    depth_axis,
    go,
    method_looks,
    new_figure,
    plain,
    set_height,
)
from tv_lens.views.heads import plot_conditions, plot_head_effects
from tv_lens.views.learning import plot_learned


@singledispatch
def plot(result: Any, **options: Any) -> go.Figure:
    """A figure of the result. The options depend on its class.

    Raises:
        UnsupportedError: there is no figure for this class.
    """
    raise UnsupportedError(f"there is no figure for a {type(result).__name__}; register one with plot.register")


@plot.register
def plot_sweep(
    sweep: Sweep, *, zero_shot: Score | None = None, few_shot: Score | None = None, note: str = ""
) -> go.Figure:
    """Accuracy by layer with a band of its exact 95% intervals, the best layer marked, and lines for the accuracies
    without a patch, if they are given; `note` is shown below the title.
    """
    order = sorted(range(len(sweep.layers)), key=lambda i: sweep.layers[i])
    layers = [sweep.layers[i] for i in order]
    scores = [sweep.scores[i] for i in order]
    low, high = zip(*(score.interval for score in scores), strict=True)
    color = LOOKS["patched"][0]
    figure = new_figure(
        f"Patched accuracy by layer: best at {layer_label(sweep.best, sweep.n_layers)}, {sweep.at(sweep.best)}", note
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
        line={"color": color, "width": 2},
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
        ("zero-shot", zero_shot, {"color": GRAY, "dash": "dot", "width": 2}),
        ("few-shot", few_shot, {"color": "#B36B00", "dash": "dash", "width": 2}),
    ):
        if score is not None:
            # A separate line between the outermost layers, so that it is in the legend and in print.
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
    accuracy_axis(figure, "y")
    depth_axis(figure, layers, sweep.n_layers)
    return figure


@plot.register
def plot_evaluation(evaluation: Evaluation) -> go.Figure:
    """One bar per condition, with its exact 95% interval."""
    names = list(evaluation.conditions)
    figure = new_figure(f"Accuracy by condition, patched at {layer_label(evaluation.layer, evaluation.n_layers)}")
    for i, name in enumerate(names):
        color, pattern = LOOKS.get(name, ("#009E73", PATTERNS[2 + i % 6]))
        figure.add_bar(**bars([plain(name)], [evaluation.conditions[name]], name, color, pattern))
    figure.update_traces(offsetgroup=None)  # each condition has its own category
    figure.update_layout(showlegend=False, barmode="overlay", bargap=0.35)
    figure.update_xaxes(title="condition", type="category")
    accuracy_axis(figure, "y")
    return figure


@plot.register
def plot_experiment(experiment: Experiment) -> go.Figure:
    """For each task bars for zero-shot, few-shot and patched accuracy with their exact 95% intervals, and a symbol for
    each control on the patched bar. Several methods have a patched bar each, next to each other.
    """
    results = experiment.results
    methods = list(dict.fromkeys(result.method for result in results))
    tasks = list({result.task: result for result in results}.values())
    figure = new_figure("Accuracy by task", f"{experiment.settings['model']}, {experiment.settings['scoring']}")
    for name in ("zero-shot", "few-shot"):
        _add_bars(figure, tasks, name, name, LOOKS[name])
    looks = method_looks(methods)
    for i, method in enumerate(methods):
        chosen = [result for result in results if result.method == method]
        if len(methods) == 1:
            _add_bars(figure, chosen, "patched", "patched", LOOKS["patched"])
        else:
            _add_bars(
                figure, chosen, "patched", method, (looks[method][0], _METHOD_PATTERNS[i % len(_METHOD_PATTERNS)])
            )
    controls = dict.fromkeys(name for result in results for name in result.evaluation.controls)
    for i, name in enumerate(controls):
        first = next(result.method for result in results if name in result.evaluation.controls)
        for method in methods:
            having = [r for r in results if r.method == method and name in r.evaluation.controls]
            bar = plain(method) if len(methods) > 1 else "patched"
            figure.add_scatter(
                y=[plain(result.task) for result in having],
                x=[result.evaluation.controls[name].accuracy for result in having],
                customdata=[str(result.evaluation.controls[name]) for result in having],
                hovertemplate=f"%{{y}}, {bar}, control {plain(name)}: %{{customdata}}<extra></extra>",
                mode="markers",
                orientation="h",
                offsetgroup=bar,
                marker={
                    # Empty and of different sizes, so that symbols at the same spot can be distinguished.
                    "symbol": f"{SYMBOLS[1 + i % (len(SYMBOLS) - 1)]}-open",
                    "size": max(15 - 4 * i if len(methods) == 1 else 11 - 3 * i, 5),
                    "color": "#000000",
                    "line": {"color": "#000000", "width": 1.5},
                },
                name=f"control: {plain(name)}",
                legendgroup=f"control: {plain(name)}",
                showlegend=method == first,
            )
    per_task = 52 if len(methods) == 1 else 20 + 15 * (2 + len(methods))
    figure.update_layout(
        barmode="group",
        scattermode="group",
        bargap=0.25 if len(methods) == 1 else 0.15,
        margin_t=80,
    )
    set_height(figure, 180 + per_task * len(tasks))
    figure.update_yaxes(automargin=True, title="task", type="category", autorange="reversed")  # the first on top
    accuracy_axis(figure, "x")
    return figure


# Without the stripes of few-shot.
_METHOD_PATTERNS = ("", "x", ".", "-", "+", "|", "\\")


def _add_bars(
    figure: go.Figure, results: Sequence[TaskResult], condition: str, name: str, look: tuple[str, str]
) -> None:
    scores = [result.evaluation.conditions[condition] for result in results]
    figure.add_bar(**bars([plain(result.task) for result in results], scores, name, *look, horizontal=True))


@plot.register
def plot_conflict(conflict: Conflict) -> go.Figure:
    """Accuracy scored as the demonstrated task and as the vector's, without and with the vector."""
    figure = new_figure(
        f"Demonstrations of {conflict.task}, vector of {conflict.rival}: what is answered?",
        f"the vector at {layer_label(conflict.layer, conflict.n_layers)}",
    )
    scored_as = [f"the demonstrated task,<br>{plain(conflict.task)}", f"the vector's task,<br>{plain(conflict.rival)}"]
    for name, look, scores in (
        ("as it is", "few-shot", [conflict.plain_task, conflict.plain_rival]),
        ("with the vector written in", "patched", [conflict.patched_task, conflict.patched_rival]),
    ):
        figure.add_bar(**bars(scored_as, scores, name, *LOOKS[look]))
    figure.update_layout(barmode="group", bargap=0.35)
    figure.update_xaxes(title="answers scored as", type="category")
    accuracy_axis(figure, "y")
    return figure


@plot.register
def plot_similarities(similarities: Similarities) -> go.Figure:
    """Mean cosines of tasks with tasks, each written into its cell. Brightness alone tells them apart."""
    table = similarities.matrix()
    names = [plain(name) for name in similarities.tasks]
    values = [[None if math.isnan(float(x)) else float(x) for x in row] for row in table.to_numpy("float64").tolist()]
    figure = new_figure("Cosine of task vectors, mean over pairs", str(similarities))
    figure.add_heatmap(
        x=names,
        y=names,
        z=values,
        colorscale=SEQUENTIAL,
        texttemplate="%{z:.2f}" if len(names) <= 12 else None,
        textfont={"color": "#000000"},
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


@plot.register
def plot_map(vectors: VectorMap) -> go.Figure:
    """One point per vector; tasks differ by color and by symbol."""
    figure = new_figure(f"Task vectors at {layer_label(vectors.layer, vectors.n_layers)}, one point a prompt")
    for i, name in enumerate(vectors.tasks):
        chosen = [row for row, owner in enumerate(vectors.owners) if owner == i]
        figure.add_scatter(
            x=vectors.points[chosen, 0].tolist(),
            y=vectors.points[chosen, 1].tolist(),
            mode="markers",
            marker={
                "color": COLORS[i % len(COLORS)],
                "symbol": SYMBOLS[i % len(SYMBOLS)],
                "size": 9,
                "line": {"color": "#FFFFFF", "width": 1},
            },
            name=plain(name),
            hovertemplate=plain(name) + "<extra></extra>",
        )
    figure.update_layout(legend_title="task")
    figure.update_xaxes(title=vectors.axes[0], zeroline=False)
    figure.update_yaxes(title=vectors.axes[1], zeroline=False)
    return figure


@plot.register
def plot_top_tokens(top: TopTokens) -> go.Figure:
    """One bar per token, the first vector's most likely on top; several vectors differ by pattern."""
    figure = new_figure(f"Top tokens of {top.task} at {layer_label(top.layer, top.n_layers)}")
    for vector, (tokens, ids, probabilities) in enumerate(zip(top.tokens, top.ids, top.probabilities, strict=True)):
        color, pattern = COLORS[vector % len(COLORS)], PATTERNS[vector % len(PATTERNS)]
        figure.add_bar(
            # Two tokens can look the same, such as two parts of characters.
            y=[
                plain(repr(word)) + (f" ({i})" if tokens.count(word) > 1 else "")
                for word, i in zip(tokens, ids, strict=True)
            ],
            x=list(probabilities),
            orientation="h",
            marker={"color": color, "pattern": {"shape": pattern}},
            name=f"vector {vector}",
            hovertemplate="%{y}: %{x:.3f}<extra></extra>",
        )
    rows = len({token for tokens in top.tokens for token in tokens})
    figure.update_layout(showlegend=len(top.tokens) > 1, height=160 + 26 * rows, barmode="group")
    figure.update_yaxes(autorange="reversed", title="token", automargin=True)
    figure.update_xaxes(title="probability", rangemode="tozero")
    return figure


@plot.register
def plot_task(result: TaskResult) -> go.Figure:
    """The sweep on dev prompts, with the zero-shot and few-shot accuracy on test prompts."""
    test, n_dev, n_test = result.evaluation, len(result.dev_prompts), len(result.test_prompts)
    note = f"{result.task}: layers on {n_dev} dev prompts, lines on {n_test} test prompts"
    return plot_sweep(result.sweep, zero_shot=test.zero_shot, few_shot=test.few_shot, note=note)


# What the tokens of a prompt look like, by role.
_ROLE_COLORS = {
    "bos": "#D9D9D9",
    "template": "#F2F2F2",
    "boundary": "#F2F2F2",
    "input": "#CFE5F5",
    "separator": "#FBE3B5",
    "output": "#C9EBDD",
    "query": "#F3DCE9",
}


@plot.register
def plot_tokens(table: TokenTable) -> go.Figure:
    """The prompt as it is written, one cell per token: colored by role, framed if an edit writes to it."""
    per_line = 12
    figure = new_figure(f"{len(table.tokens)} tokens of {table.model}", table.bos)
    for i, (token, role, edited) in enumerate(zip(table.tokens, table.roles, table.edited, strict=True)):
        row, column = divmod(i, per_line)
        figure.add_shape(
            type="rect",
            x0=column + 0.03,
            x1=column + 0.97,
            y0=row + 0.08,
            y1=row + 0.92,
            fillcolor=_ROLE_COLORS[role],
            line={"color": "#000000", "width": 3} if edited else {"color": "#BFBFBF", "width": 1},
        )
        shown = repr(token)[1:-1].replace(" ", "\u00b7")
        figure.add_annotation(x=column + 0.5, y=row + 0.42, text=plain(shown), showarrow=False, font={"size": 12})
        figure.add_annotation(
            x=column + 0.5,
            y=row + 0.76,
            text=f"{table.positions[i]} {role}",
            showarrow=False,
            font={"size": 8, "color": GRAY},
        )
    n_rows = math.ceil(len(table.tokens) / per_line)
    # Shapes have no hover text, so invisible points carry it.
    figure.add_scatter(
        x=[i % per_line + 0.5 for i in range(len(table.tokens))],
        y=[i // per_line + 0.5 for i in range(len(table.tokens))],
        mode="markers",
        marker={"size": 22, "opacity": 0},
        text=[
            f"{plain(repr(token))}, id {number}, position {position}, {role}{', edited' if edited else ''}"
            for token, number, position, role, edited in zip(
                table.tokens, table.ids, table.positions, table.roles, table.edited, strict=True
            )
        ],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
    figure.update_xaxes(visible=False, range=[0, per_line], title="token")
    figure.update_yaxes(visible=False, range=[n_rows, 0], title="line")
    figure.update_layout(height=120 + 48 * n_rows, width=60 + 76 * per_line)
    return figure


plot.register(Comparison, plot_comparison)
plot.register(HeadEffects, plot_head_effects)
plot.register(Conditions, plot_conditions)
plot.register(Learned, plot_learned)
