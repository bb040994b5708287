"""The figure of a comparison; `tv_lens.views.plots` registers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tv_lens.evidence.comparisons import Comparison
from tv_lens.views.comparison_tables import is_known
from tv_lens.views.drawing import GRAY, accuracy_axis, go, make_subplots, method_looks, plain, style

# Heights in pixels: a method's line in a task's row, the least height of a row, and what is between rows, between
# panels, above the first panel and below the last.
_LINE, _ROW, _BETWEEN_ROWS, _BETWEEN_PANELS, _ABOVE, _BELOW = 14, 30, 8, 78, 92, 60
# A row takes this much of the axis on either side of its middle.
_HALF_ROW = 0.46

Row = Mapping[Any, Any]


def plot_comparison(comparison: Comparison) -> go.Figure:
    """A panel for each kind of task, a row for each task, and in it a symbol with its 95% interval for each method:
    filled if the method is better than every control after Holm's adjustment. Bars mark the strongest control of each
    method, lines across the row zero-shot and few-shot.
    """
    rows = comparison.estimates().to_dict("records")
    panels = _panels(rows)
    heights = [_panel_height(len(tasks), len(comparison.methods)) for tasks in panels.values()]
    between = _BETWEEN_PANELS * (len(panels) - 1)
    figure = make_subplots(
        rows=len(panels),
        cols=1,
        shared_xaxes=True,
        row_heights=heights,
        vertical_spacing=_BETWEEN_PANELS / (sum(heights) + between) if len(panels) > 1 else 0,
    )
    _set_layout(figure, comparison, sum(heights) + between)
    looks = method_looks(comparison.methods)
    for i, (category, tasks) in enumerate(panels.items(), start=1):
        chosen = [row for row in rows if row["task"] in tasks]
        _draw_panel(figure, i, category, tasks)
        _draw_lines(figure, i, tasks, chosen)
        _draw_controls(figure, i, tasks, comparison.methods, chosen)
        for method, look in looks.items():
            _draw_method(figure, i, tasks, comparison.methods, [row for row in chosen if row["method"] == method], look)
    _draw_legend(figure, looks)
    return figure


def _panels(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The tasks of each kind, in the order in which they come."""
    panels: dict[str, list[str]] = {}
    for row in rows:
        tasks = panels.setdefault(row["category"] or "other tasks", [])
        if row["task"] not in tasks:
            tasks.append(row["task"])
    return panels


def _panel_height(n_tasks: int, n_methods: int) -> int:
    return n_tasks * (max(_ROW, _LINE * n_methods) + _BETWEEN_ROWS)


def _set_layout(figure: go.Figure, comparison: Comparison, height: int) -> None:
    settings, seeds = comparison.settings, comparison.seeds
    shown = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}"
    shots = f"{settings.shots} shot" + ("" if settings.shots == 1 else "s")
    style(figure, "Accuracy by task and method", f"{settings.model}, {shots}, {shown}")
    figure.update_layout(
        height=_ABOVE + height + _BELOW,
        margin={"l": 30, "t": _ABOVE, "b": _BELOW},
        title={"yref": "container", "y": 1 - 20 / (_ABOVE + height + _BELOW), "yanchor": "top"},
        hovermode="closest",
        legend_tracegroupgap=0,
    )


def _draw_panel(figure: go.Figure, panel: int, category: str, tasks: Sequence[str]) -> None:
    """The axes of a panel, its heading, and a band behind every second task."""
    n = len(tasks)
    figure.update_yaxes(
        row=panel,
        col=1,
        tickvals=list(range(n)),
        ticktext=[plain(task) for task in tasks],
        range=[n - 0.5, -0.5],  # the first on top
        title="task" if panel == 1 else None,
        automargin=True,
        ticks="",
        zeroline=False,
    )
    accuracy_axis(figure, "x", row=panel, col=1)
    figure.update_xaxes(row=panel, col=1, zeroline=False, showticklabels=True)
    axis = "" if panel == 1 else str(panel)
    figure.add_annotation(
        text=f"<b>{plain(category)}</b>",
        x=0,
        y=1,
        xref=f"x{axis} domain",
        yref=f"y{axis} domain",
        xanchor="left",
        yanchor="bottom",
        showarrow=False,
    )
    for i in range(1, n, 2):
        figure.add_shape(
            type="rect",
            x0=0,
            x1=1,
            y0=i - 0.5,
            y1=i + 0.5,
            xref=f"x{axis} domain",
            yref=f"y{axis}",
            fillcolor="#F4F4F4",
            line={"width": 0},
            layer="below",
        )


def _draw_lines(figure: go.Figure, panel: int, tasks: Sequence[str], rows: Sequence[Row]) -> None:
    """Zero-shot and few-shot, as a line across each task's row."""
    by_task = {row["task"]: row for row in rows}
    for key, name, line in _LINES:
        x, y, texts = list[float | None](), list[float | None](), list[str]()
        for i, task in enumerate(tasks):
            value = by_task[task][key]
            x += [value, value, value, None]
            y += [i - _HALF_ROW, i, i + _HALF_ROW, None]
            texts += [f"{plain(task)}, {name}: {value:.2f}"] * 4
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines",
            line=line,
            text=texts,
            hovertemplate="%{text}<extra></extra>",
            name=name,
            legendgroup=plain(name),
            showlegend=panel == 1,
            row=panel,
            col=1,
        )


_LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("zero_shot", "zero-shot", {"color": "#8C8C8C", "dash": "dot", "width": 2}),
    ("few_shot", "few-shot", {"color": "#B36B00", "dash": "dash", "width": 2}),
)


def _draw_controls(
    figure: go.Figure, panel: int, tasks: Sequence[str], methods: Sequence[str], rows: Sequence[Row]
) -> None:
    """The strongest control of each method, as a bar on the method's line."""
    having = [row for row in rows if row["strongest_control"]]
    figure.add_scatter(
        x=[row["control_accuracy"] for row in having],
        y=[_height_of(row, tasks, methods) for row in having],
        mode="markers",
        marker={"symbol": "line-ns", "size": 10, "line": {"color": "#000000", "width": 2}},
        text=[
            f"{plain(row['task'])}, {plain(row['method'])}<br>strongest control: {plain(row['strongest_control'])} "
            f"{row['control_accuracy']:.2f}"
            for row in having
        ],
        hovertemplate="%{text}<extra></extra>",
        name=_CONTROL,
        legendgroup=_CONTROL,
        showlegend=panel == 1,
        row=panel,
        col=1,
    )


_CONTROL = "strongest control"
_FILLED = "filled: beats every control"
_EMPTY = "empty: not shown to"


def _draw_method(
    figure: go.Figure,
    panel: int,
    tasks: Sequence[str],
    methods: Sequence[str],
    rows: Sequence[Row],
    look: tuple[str, str],
) -> None:
    """One method's accuracies with their intervals."""
    color, symbol = look
    figure.add_scatter(
        x=[row["accuracy"] for row in rows],
        y=[_height_of(row, tasks, methods) for row in rows],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row["high"] - row["accuracy"] for row in rows],
            "arrayminus": [row["accuracy"] - row["low"] for row in rows],
            "color": color,
            "thickness": 1.5,
            "width": 0,
        },
        mode="markers",
        marker={
            "symbol": symbol,
            "size": 9,
            "color": [color if _beats_controls(row) else "#FFFFFF" for row in rows],
            "line": {"color": color, "width": 2},
        },
        text=[_hover_text(row) for row in rows],
        hovertemplate="%{text}<extra></extra>",
        name=plain(rows[0]["method"]),
        legendgroup=plain(rows[0]["method"]),
        showlegend=False,
        row=panel,
        col=1,
    )


def _draw_legend(figure: go.Figure, looks: Mapping[str, tuple[str, str]]) -> None:
    """An entry for each method, and for what a filled and an empty symbol mean."""
    entries = [(method, symbol, color, color) for method, (color, symbol) in looks.items()]
    entries += [(_FILLED, "octagon", GRAY, GRAY), (_EMPTY, "octagon-open", GRAY, GRAY)]
    for name, symbol, fill, line in entries:
        figure.add_scatter(
            x=[None],
            y=[None],
            mode="markers",
            marker={"symbol": symbol, "size": 9, "color": fill, "line": {"color": line, "width": 2}},
            name=plain(name),
            legendgroup=plain(name),
            row=1,
            col=1,
        )


def _height_of(row: Row, tasks: Sequence[str], methods: Sequence[str]) -> float:
    """Where on the axis of tasks a method's line is: the first method's on top."""
    line = methods.index(row["method"])
    return tasks.index(row["task"]) + _HALF_ROW * ((2 * line + 1) / len(methods) - 1)


def _beats_controls(row: Row) -> bool:
    """Whether the method is better than every control after Holm's adjustment."""
    return is_known(row["p_controls_holm"]) and row["p_controls_holm"] < 0.05


def _hover_text(row: Row) -> str:
    lines = [
        f"<b>{plain(row['task'])}, {plain(row['method'])}</b>",
        f"accuracy {row['accuracy']:.2f} [{row['low']:.2f}, {row['high']:.2f}], n {row['n']}, layer {row['layers']}",
    ]
    if is_known(row["difference"]):
        lines.append(
            f"from the first method {row['difference']:+.2f} [{row['difference_low']:+.2f}, "
            f"{row['difference_high']:+.2f}], p {row['p_first_holm']:.1g} (Holm)"
        )
    if row["strongest_control"]:
        lines.append(
            f"strongest control {plain(row['strongest_control'])} {row['control_accuracy']:.2f}, "
            f"p {row['p_controls_holm']:.1g} (Holm)"
        )
    return "<br>".join(lines)
