"""Figures hold the numbers of their results, and are readable without color."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import plotly.graph_objects as go
import pytest
import torch
from results import make_comparison, make_settings, score_of

import tv_lens as tv
from tv_lens import Conflict, Evaluation, Experiment, Sweep, TaskResult, TaskVectors, TopTokens

EVIL = "<script>%{x}</script>"
SHOWN = "&lt;script&gt;%&#123;x}&lt;/script&gt;"


SWEEP = Sweep((2, 0, 3), (score_of(8), score_of(0), score_of(8)), n_layers=4)
EVALUATION = Evaluation(
    2, score_of(1), score_of(9), score_of(8), {"random": score_of(0), "other": score_of(2), "shuffled": score_of(4)}
)
CONFLICT = Conflict(EVIL, "rival", 2, score_of(9), score_of(0), score_of(3), score_of(7))
RESULTS = tuple(
    TaskResult(
        name,
        "c",
        SWEEP,
        EVALUATION if name == "b" else Evaluation(3, score_of(5), score_of(5), score_of(5), controls),
        None,
        ("dev",) * 10,
        ("test",) * 10,
        ("query",) * 10,
    )
    for name, controls in ((EVIL, {"random": score_of(3)}), ("b", {}))
)
EXPERIMENT = Experiment(make_settings(tasks=(EVIL, "b")), RESULTS)
ROWS = (([0, 1], EVIL), ([1, 2, 2], "b"), ([0], "c"))
ALIKE = tv.compare_tasks([TaskVectors(torch.eye(3)[rows, None], "tiny", name) for rows, name in ROWS], 0)
MAP = tv.map_vectors([TaskVectors(torch.eye(4)[:3, None], "m", EVIL), TaskVectors(torch.eye(4)[3:, None], "m", "b")], 0)
TOKENS = TopTokens(EVIL, 3, (("a", "b\n"), ("\ufffd", "\ufffd")), ((7, 8), (9, 10)), ((0.5, 0.25), (0.75, 0.125)))
EFFECTS = tv.HeadEffects(torch.eye(2)[None].repeat(3, 1, 1), torch.zeros(3), "m", EVIL, (0, 1), 2)
COMPARISON = make_comparison({EVIL: EVIL, "b": ""}, {"extract": {}, EVIL: {}, "mean_state": {}})
CONDITIONS = tv.Conditions({EVIL: {"no vector": score_of(1), EVIL: score_of(5), "other": score_of(3)}})

FIGURES = {
    "sweep": lambda: SWEEP.plot(zero_shot=score_of(1), few_shot=score_of(9)),
    "task": lambda: RESULTS[0].plot(),
    "evaluation": lambda: EVALUATION.plot(),
    "conflict": lambda: CONFLICT.plot(),
    "experiment": lambda: EXPERIMENT.plot(),
    "similarities": lambda: ALIKE.plot(),
    "map": lambda: MAP.plot(),
    "tokens": lambda: TOKENS.plot(),
    "heads": lambda: EFFECTS.plot(),
    "conditions": lambda: CONDITIONS.plot(),
    "comparison": lambda: COMPARISON.plot(),
}


def trace(figure: go.Figure, name: str) -> go.BaseTraceType:
    [actual] = [each for each in figure.data if each.name == name]
    return actual


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_names_its_axes_and_escapes_text(name: str) -> None:
    figure = FIGURES[name]()
    assert isinstance(figure, go.Figure)
    assert figure.layout.title.text
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text
    # A task's name is neither markup nor a hover template.
    whole = str(figure.to_dict())
    assert "<script>" not in whole
    assert "%{x}&lt;" not in whole
    assert (SHOWN in whole) == (name not in ("sweep", "evaluation"))  # these two do not name a task


@pytest.mark.parametrize("name", FIGURES)
def test_no_two_series_differ_by_color_alone(name: str) -> None:
    series = [each for each in FIGURES[name]().data if each.showlegend is not False and each.type != "heatmap"]
    if name == "evaluation":
        return  # each bar is labeled by its name on the axis

    def look(each: go.BaseTraceType) -> tuple[object, ...]:
        if each.type == "bar":
            return (
                "bar",
                each.marker.pattern.shape,
                each.marker.color if each.name in ("zero-shot", "patched", "no vector", SHOWN) else "",
            )
        return "line", each.mode, each.fill, each.line.dash, each.marker.symbol

    assert len({look(each) for each in series}) == len(series)
    if name == "experiment":  # one of the two bars without a pattern is much brighter
        assert brightness("#BFBFBF") > 2 * brightness("#0072B2")
        assert (trace(FIGURES[name](), "zero-shot").marker.color, trace(FIGURES[name](), "patched").marker.color) == (
            "#BFBFBF",
            "#0072B2",
        )


def brightness(color: str) -> float:
    """WCAG's relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_a_sweep_is_drawn_by_layer_with_its_intervals_and_depths() -> None:
    figure = SWEEP.plot(zero_shot=score_of(1), few_shot=score_of(9))
    line, band = trace(figure, "patched"), trace(figure, "95% interval")
    assert (line.x, line.y) == ((0, 2, 3), (0.0, 0.8, 0.8))
    assert band.x == (0, 2, 3, 3, 2, 0)
    # 0 of 10 reaches up to 1 - 0.025 ** (1 / 10), by Clopper and Pearson's closed form.
    assert (band.y[-1], band.y[0]) == pytest.approx((0.0, 1 - 0.025**0.1))
    assert trace(figure, "best, 2 tied").x == (2, 3)
    assert set(trace(figure, f"zero-shot {score_of(1)}").y) == {0.1}
    assert set(trace(figure, f"few-shot {score_of(9)}").y) == {0.9}
    assert figure.layout.xaxis2.ticktext == ("0.25", "0.50", "0.75", "1.00")  # block 3 of 4 is the last
    assert figure.layout.xaxis2.tickvals == (0, 1, 2, 3)
    assert len(SWEEP.plot().data) == len(figure.data) - 2
    assert Sweep(SWEEP.layers, SWEEP.scores).plot().layout["xaxis"].title.text == "layer (output of block)"
    assert "xaxis2" not in Sweep(SWEEP.layers, SWEEP.scores).plot().layout  # the depth is not known


def test_bars_hold_accuracies_intervals_and_controls() -> None:
    figure = EXPERIMENT.plot()
    patched = trace(figure, "patched")
    assert (patched.y, patched.x) == ((SHOWN, "b"), (0.5, 0.8))
    low, high = score_of(8).interval
    assert (0.8 - patched.error_x.arrayminus[1], 0.8 + patched.error_x.array[1]) == pytest.approx((low, high))
    assert (trace(figure, "control: shuffled").y, trace(figure, "control: shuffled").x) == (("b",), (0.4,))
    assert trace(figure, "control: random").x == (0.3, 0.0)
    assert figure.layout.yaxis.autorange == "reversed"  # the first task on top


def test_an_evaluation_has_a_bar_for_each_condition() -> None:
    bars = EVALUATION.plot().data
    assert [bar.x[0] for bar in bars] == ["zero-shot", "few-shot", "patched", "random", "other", "shuffled"]
    assert [bar.y[0] for bar in bars] == [0.1, 0.9, 0.8, 0.0, 0.2, 0.4]


def test_a_conflict_is_scored_as_either_task() -> None:
    figure = CONFLICT.plot()
    assert trace(figure, "as it is").y == (0.9, 0.0)
    assert trace(figure, "with the vector written in").y == (0.3, 0.7)
    assert trace(figure, "as it is").x == (f"the demonstrated task,<br>{SHOWN}", "the vector's task,<br>rival")


def test_a_heat_map_holds_mean_cosines_and_leaves_out_missing_ones() -> None:
    [actual] = ALIKE.plot().data
    assert actual.x == actual.y == (SHOWN, "b", "c")
    half = (0.0, 1 / 6, 0.5), (1 / 6, 1 / 3, 0.0), (0.5, 0.0, None)
    for row, expected in zip(actual.z, half, strict=True):
        for value, each in zip(row, expected, strict=True):
            assert (value is None or math.isnan(value)) if each is None else value == pytest.approx(each)


def test_a_map_has_a_point_for_each_vector() -> None:
    first, second = MAP.plot().data
    assert (first.name, second.name, len(first.x), len(second.x)) == (SHOWN, "b", 3, 1)
    assert first.marker.symbol != second.marker.symbol


def test_tokens_with_equal_texts_are_distinguished() -> None:
    first, second = TOKENS.plot().data
    assert first.y == ("'a'", r"'b\n'")
    assert second.y == ("'\ufffd' (9)", "'\ufffd' (10)")
    assert second.x == (0.75, 0.125)


def test_without_plotly_the_error_names_the_extra() -> None:
    code = """
import sys; sys.modules["plotly"] = sys.modules["plotly.graph_objects"] = None
import tv_lens
score = tv_lens.Score(("a",), ("a",), (True,))
try:
    tv_lens.Sweep((0,), (score,)).plot()
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "tv_lens[plots]"' in run.stdout


def contrast(one: str, other: str) -> float:
    """WCAG's ratio, of 1 to 21."""
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)


def on_scale(scale: tuple[tuple[float, str], ...], share: float) -> str:
    """The color between two of a scale, as Plotly draws it: each channel is linear between them."""
    below, above = next((x, y) for x, y in pairwise(scale) if x[0] <= share <= y[0])
    part = (share - below[0]) / (above[0] - below[0])
    channels = [(int(below[1][i : i + 2], 16), int(above[1][i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(low + part * (high - low)):02X}" for low, high in channels)


@pytest.mark.parametrize("name", ["similarities", "heads"])
def test_the_text_of_a_heat_map_is_readable_on_every_color(name: str) -> None:
    [cells] = FIGURES[name]().data
    shades = [on_scale(cells.colorscale, i / 500) for i in range(501)]
    assert len(set(shades)) > 100
    assert min(contrast(cells.textfont.color, shade) for shade in shades) >= 4.5


def test_more_is_darker_in_a_heat_map() -> None:
    """Brightness alone shows the order of similarities."""
    shades = [brightness(on_scale(ALIKE.plot().data[0].colorscale, i / 20)) for i in range(21)]
    assert shades == sorted(shades, reverse=True)


def test_the_text_of_tokens_is_readable() -> None:
    from tv_lens.views.plots import _ROLE_COLORS

    for shade in _ROLE_COLORS.values():
        assert min(contrast(text, shade) for text in ("#1A1A1A", "#595959")) >= 4.5


def test_methods_have_colors_that_show_on_white_and_on_dark_paper() -> None:
    from tv_lens.views.drawing import IN_THE_DARK, METHOD_COLORS

    for color in METHOD_COLORS:
        assert contrast(color, "#FFFFFF") >= 3
        assert contrast(IN_THE_DARK.get(color, color), IN_THE_DARK["#FFFFFF"]) >= 3
    for text in ("#1A1A1A", "rgb(36,36,36)", "#595959"):  # the figure's text, its template's and gray lines
        assert contrast(IN_THE_DARK[text], IN_THE_DARK["#FFFFFF"]) >= 4.5


def test_several_methods_have_bars_next_to_each_other() -> None:
    """Each task has one bar for zero-shot and for few-shot, one for each method, and its controls on that bar."""
    experiment = COMPARISON.experiments[0]
    figure = experiment.plot()
    tasks = (SHOWN, "b")
    bars = {each.name: each for each in figure.data if each.type == "bar"}
    assert list(bars) == ["zero-shot", "few-shot", "extract", SHOWN, "mean_state"]
    assert all(bar.y == tasks for bar in bars.values())
    assert len({bar.offsetgroup for bar in bars.values()}) == 5
    for method, shown in (("extract", "extract"), (EVIL, SHOWN), ("mean_state", "mean_state")):
        results = [result for result in experiment.results if result.method == method]
        assert bars[shown].x == tuple(sum(each.evaluation.patched.correct) / 10 for each in results)
        [marks] = [each for each in figure.data if each.name == "control: random" and each.offsetgroup == shown]
        assert marks.x == tuple(sum(each.evaluation.controls["random"].correct) / 10 for each in results)
    looks = {(bar.marker.color, bar.marker.pattern.shape) for bar in bars.values()}
    assert len(looks) == 5
    assert [each.name for each in figure.data if each.showlegend is not False].count("control: random") == 1
