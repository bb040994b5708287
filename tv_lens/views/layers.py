"""Methods side by side, layer by layer: a figure with a panel for each task, and the same as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tv_lens.evidence.results import Experiment, Sweep
from tv_lens.views.drawing import accuracy_axis, go, make_subplots, method_looks, plain, set_height, style

_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
# Heights in pixels: the least of a panel, a line of the legend, what is between two panels, above the first and below
# the last; and the most panels in a row.
_PANEL, _LINE, _BETWEEN, _ABOVE, _BELOW, _IN_A_ROW = 150, 20, 56, 100, 60, 3


class LayersTable(NamedTuple):
    """A row for each task and layer, with an accuracy for each method, or none if it was not swept there."""

    caption: str
    methods: tuple[str, ...]
    rows: list[tuple[str, int, list[float | None]]]


@dataclass(frozen=True)
class LayerAccuracies:
    """The accuracy on dev prompts of each task and method at each layer, of all seeds together. Each seed's is at the
    strength that was chosen for it.

    Attributes:
        experiments: one for each seed, on the same tasks with the same methods.
    """

    experiments: tuple[Experiment, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' names."""
        return tuple(self.experiments[0].settings.methods)

    @cached_property
    def values(self) -> dict[tuple[str, str], dict[int, float]]:
        """By task and method, the accuracy at each layer that was tried."""
        sweeps: dict[tuple[str, str], list[Sweep]] = {}
        for experiment in self.experiments:
            for result in experiment.results:
                sweeps.setdefault((result.task, result.method), []).append(result.sweep)
        return {key: dict(_pooled(some)) for key, some in sweeps.items()}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(dict.fromkeys(task for task, _ in self.values))

    @property
    def is_swept(self) -> bool:
        """Whether there is more than one layer to show."""
        return any(len(values) > 1 for values in self.values.values())

    def table(self) -> LayersTable:
        """The numbers of the figure; no rows if there is but one layer."""
        seeds = ", all seeds together" if len(self.experiments) > 1 else ""
        caption = f"Accuracy on dev prompts by layer{seeds}, at the strength that was chosen."
        rows = [
            (task, layer, [self.values.get((task, method), {}).get(layer) for method in self.methods])
            for task in self.tasks
            for layer in sorted(
                {layer for (name, _), values in self.values.items() if name == task for layer in values}
            )
        ]
        return LayersTable(caption, self.methods, rows if self.is_swept else [])

    def plot(self) -> go.Figure:
        """A panel for each task, and in it a line for each method."""
        n_columns = min(_IN_A_ROW, len(self.tasks))
        n_rows = math.ceil(len(self.tasks) / n_columns)
        inner = max(n_rows * _PANEL + (n_rows - 1) * _BETWEEN, _LINE * len(self.methods))
        figure = make_subplots(
            rows=n_rows,
            cols=n_columns,
            specs=[
                [{} if n_columns * i + j < len(self.tasks) else None for j in range(n_columns)] for i in range(n_rows)
            ],
            vertical_spacing=_BETWEEN / inner if n_rows > 1 else 0,
            horizontal_spacing=0.05,
        )
        style(
            figure, "Accuracy on dev prompts by layer", f"{self.experiments[0].settings.model}, a line for each method"
        )
        figure.update_layout(margin={"l": 60, "t": _ABOVE, "b": _BELOW})
        set_height(figure, _ABOVE + inner + _BELOW)
        layers = [layer for values in self.values.values() for layer in values]
        for i, task in enumerate(self.tasks):
            row, column = divmod(i, n_columns)
            self._draw_panel(figure, task, layers, row=row + 1, col=column + 1)
        return figure

    def _draw_panel(self, figure: go.Figure, task: str, layers: Sequence[int], *, row: int, col: int) -> None:
        looks = method_looks(self.methods)
        for i, method in enumerate(self.methods):
            values = self.values.get((task, method), {})
            color, symbol = looks[method]
            figure.add_scatter(
                x=list(values),
                y=list(values.values()),
                mode="lines+markers",
                line={"color": color, "width": 1.5, "dash": _DASHES[i % len(_DASHES)]},
                marker={"symbol": symbol, "size": 7, "color": color},
                hovertemplate=f"{plain(method)}, layer %{{x}}: %{{y:.2f}}<extra></extra>",
                name=plain(method),
                legendgroup=plain(method),
                showlegend=row == col == 1,
                row=row,
                col=col,
            )
        is_lowest = (row - 1) * _IN_A_ROW + col + _IN_A_ROW > len(self.tasks)
        few = sorted(set(layers)) if len(set(layers)) <= 8 else None
        accuracy_axis(figure, "y", row=row, col=col)
        figure.update_yaxes(title="accuracy" if col == 1 else None, row=row, col=col)
        figure.update_xaxes(
            title="layer" if is_lowest else None,
            range=[min(layers) - 0.5, max(layers) + 0.5],
            tickvals=few,
            row=row,
            col=col,
        )
        figure.add_annotation(
            text=f"<b>{plain(task)}</b>",
            x=0,
            y=1,
            xref="x domain",
            yref="y domain",
            xanchor="left",
            yanchor="bottom",
            showarrow=False,
            row=row,
            col=col,
        )


def _pooled(sweeps: Sequence[Sweep]) -> Iterator[tuple[int, float]]:
    """Each layer, from the first on, with the share of right answers at it."""
    for layer in sorted({layer for sweep in sweeps for layer in sweep.layers}):
        right = [correct for sweep in sweeps if layer in sweep.layers for correct in sweep.at(layer).correct]
        yield layer, sum(right) / len(right)
