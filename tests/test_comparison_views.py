"""What people see of a comparison: its figure, its page in a real browser, and the code that repeats it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import plotly.graph_objects as go
import pytest
from browsers import fetched, open_browser, texts
from models import make_twins
from results import make_comparison, score_of

import tv_lens as tv
from tv_lens import Comparison
from tv_lens.methods.base import METHODS

EVIL = "up<script>document.title = 'run'</script>"
BRACES = "Braces {{ }} %{x}"
TASKS = {EVIL: "letters", BRACES: "", "double": "letters", "lower": "</script><b>"}
NAMES = ("extract", "mean_state", EVIL)
N = 10


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return make_comparison(TASKS, {name: {"substitutes": 2} for name in NAMES}, n=N)


@pytest.fixture(scope="module")
def figure(comparison: Comparison) -> go.Figure:
    return comparison.plot()


def accuracy(comparison: Comparison, task: str, method: str) -> float:
    """By hand: the share of right answers; all seeds have as many prompts."""
    scores = [each.patched.correct for each in comparison.at(task, method).evaluations]
    return sum(map(sum, scores)) / (N * len(scores))


def shown(text: str) -> str:
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("{", "&#123;")


def points(figure: go.Figure, name: str) -> list[go.Scatter]:
    """The traces of a method, without its entry in the legend."""
    return [each for each in figure.data if each.name == shown(name) and each.showlegend is False]


def test_each_kind_of_task_has_a_panel(figure: go.Figure) -> None:
    headings = [each.text for each in figure.layout.annotations]
    assert headings == ["<b>letters</b>", "<b>other tasks</b>", "<b>&lt;/script&gt;&lt;b&gt;</b>"]
    axes = [figure.layout.yaxis, figure.layout.yaxis2, figure.layout.yaxis3]
    assert [axis.ticktext for axis in axes] == [(shown(EVIL), "double"), (shown(BRACES),), ("lower",)]
    assert all(axis.range[0] > axis.range[1] for axis in axes)  # the first task on top
    # A row is as high in every panel, and panels do not overlap.
    heights = [(axis.domain[1] - axis.domain[0]) / len(axis.ticktext) for axis in axes]
    assert heights == pytest.approx([heights[0]] * 3)
    assert all(above.domain[0] > below.domain[1] for above, below in pairwise(axes))


def test_each_task_and_method_has_a_point_with_its_interval(figure: go.Figure, comparison: Comparison) -> None:
    rows = comparison.estimates().set_index(["task", "method"])
    rows_of_panels = [[EVIL, "double"], [BRACES], ["lower"]]
    for method in NAMES:
        panels = points(figure, method)
        assert len(panels) == 3
        for tasks, trace in zip(rows_of_panels, panels, strict=True):
            for i, task in enumerate(tasks):
                expected = accuracy(comparison, task, method)
                assert trace.x[i] == pytest.approx(expected)
                low, high = trace.x[i] - trace.error_x.arrayminus[i], trace.x[i] + trace.error_x.array[i]
                assert (low, high) == pytest.approx((rows.low[task, method], rows.high[task, method]))
                assert abs(trace.y[i] - i) < 0.5  # in the task's row
                assert f"accuracy {expected:.2f}" in trace.text[i]
                assert shown(method) in trace.text[i]
                assert shown(task) in trace.text[i]


def test_methods_of_a_row_are_one_below_the_other(figure: go.Figure) -> None:
    heights = [points(figure, method)[0].y[0] for method in NAMES]
    apart = [below - above for above, below in pairwise(heights)]
    assert apart == pytest.approx([apart[0]] * (len(NAMES) - 1))
    assert apart[0] > 0.2


def test_a_symbol_is_filled_if_the_method_beats_every_control(figure: go.Figure, comparison: Comparison) -> None:
    rows = comparison.estimates().set_index(["task", "method"])
    beats = [rows.p_controls_holm[task, method] < 0.05 for method in NAMES for task in (EVIL, "double")]
    filled = [color != "#FFFFFF" for method in NAMES for color in points(figure, method)[0].marker.color]
    assert filled == beats
    assert {True, False} <= set(filled)  # otherwise this shows nothing


def test_lines_and_bars_are_few_shot_zero_shot_and_the_strongest_controls(
    figure: go.Figure, comparison: Comparison
) -> None:
    result = comparison.at(EVIL, "extract")
    for name in ("zero-shot", "few-shot"):
        line = next(each for each in figure.data if each.name == name)
        expected = sum(sum(each) for each in result.correct(name)) / (N * len(comparison.seeds))
        assert line.x[:3] == pytest.approx((expected,) * 3)
        assert (line.y[0], line.y[2]) == pytest.approx((-0.46, 0.46))  # across the row of the first task
    controls = next(each for each in figure.data if each.name == "strongest control")
    row = comparison.estimates().iloc[0]
    assert controls.x[0] == pytest.approx(row.control_accuracy)
    assert controls.y[0] == points(figure, "extract")[0].y[0]
    assert row.strongest_control in controls.text[0]


def test_the_title_and_the_legend_say_what_is_shown(figure: go.Figure) -> None:
    assert figure.layout.title.subtitle.text == "tiny, 2 shots, seeds 0, 1"
    entries = [each.name for each in figure.data if each.showlegend is not False]
    assert entries[:3] == ["zero-shot", "few-shot", "strongest control"]
    assert entries[3:6] == list(map(shown, NAMES))
    assert len(entries) == len(set(entries)) == 8  # and what a filled and an empty symbol mean
    one = make_comparison({"a": ""}, {"extract": {}, "learn": {}}, seeds=(3,), shots=1)
    assert one.plot().layout.title.subtitle.text == "tiny, 1 shot, seed 3"


def test_many_methods_and_tasks_stay_apart() -> None:
    """12 methods have 12 looks, and a figure grows with what it shows."""
    many = make_comparison({f"t{i}": "c" for i in range(9)}, {f"m{i}": {} for i in range(12)}, seeds=(0,), n=4)
    few = make_comparison({f"t{i}": "c" for i in range(3)}, {f"m{i}": {} for i in range(12)}, seeds=(0,), n=4)
    figure = many.plot()
    looks = {(each.marker.symbol, each.marker.line.color) for each in figure.data if (each.name or "").startswith("m")}
    assert len(looks) == 12
    pixels = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    assert pixels / (9 * 12) > 10  # for each symbol
    assert figure.layout.height - few.plot().layout.height == pytest.approx(pixels * 6 / 9)


def test_without_controls_nothing_is_marked() -> None:
    bare = make_comparison({"a": ""}, {"extract": {}, "learn": {}}, controls=())
    figure = bare.plot()
    assert next(each for each in figure.data if each.name == "strongest control").x in (None, ())
    assert {color for name in ("extract", "learn") for color in points(figure, name)[0].marker.color} == {"#FFFFFF"}


@pytest.fixture(scope="module")
def page(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    comparison.report(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from open_browser()


def table(browser: Any, name: str) -> list[dict[str, str]]:
    """A table's rows by heading, without the arrows of the headings."""
    script = "return [...document.querySelectorAll(arguments[0])].map(row => [...row.cells].map(c => c.textContent))"
    cells = browser.execute_script(script, f"#{name} tr")
    headings, *rows = cells
    return [dict(zip(headings, row, strict=True)) for row in rows]


def test_the_page_opens_without_an_error_and_draws(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "Methods compared on tiny"  # no text was run as a script
    assert set(texts(browser, "[data-figure=overview] .ytick text, [data-figure=overview] .y2tick text")) >= {
        EVIL,
        BRACES,
    }
    assert fetched(browser) == []
    order = texts(browser, "h2")
    assert order == [
        "What was compared",
        "By method",
        "By task and method",
        "In other conditions",
        "How to read this",
        "How to repeat it",
    ]


def test_the_page_has_every_number_of_every_task_and_method(browser: Any, page: Path, comparison: Comparison) -> None:
    browser.get(page.as_uri())
    rows = table(browser, "results")
    assert [(row["task"], row["method"]) for row in rows] == [(task, method) for task in TASKS for method in NAMES]
    for row, expected in zip(rows, comparison.estimates().to_dict("records"), strict=True):
        task, method = row["task"], row["method"]
        cell = comparison.at(task, method)
        assert row["kind"] == TASKS[task]
        assert row["n"] == str(N * len(comparison.seeds))
        assert (
            row["accuracy"]
            == f"{accuracy(comparison, task, method):.2f} [{expected['low']:.2f}, {expected['high']:.2f}]"
        )
        assert row["p, better than every control (Holm)"] == f"{expected['p_controls_holm']:.1g}"
        assert row["better than every control?"] == ("yes" if expected["p_controls_holm"] < 0.05 else "")
        name = row["strongest control"].rsplit(" ", 1)[0]
        right = sum(sum(each) for each in cell.correct(name)) / (N * len(comparison.seeds))
        assert row["strongest control"] == f"{name} {right:.2f}"
        difference = accuracy(comparison, task, method) - accuracy(comparison, task, "extract")
        if method == "extract":
            assert (row["difference from extract"], row["p, different from extract (Holm)"]) == ("", "")
        else:
            assert row["difference from extract"].startswith(f"{difference:+.2f} [")
            assert row["p, different from extract (Holm)"] == f"{expected['p_first_holm']:.1g}"
        assert row["as good as few-shot?"] == ("yes" if expected["as_good"] else "")
        assert row["log P gain"].startswith(f"{expected['logprob_gain']:+.2f} [")
        assert (row["layers"], row["strengths"]) == ("1; 1", "2; 2")
        assert row["detectable"] == f"{5 / N:.2f}"  # 0.5 ** 5 < 0.05 <= 0.5 ** 4


def test_the_page_has_methods_and_conditions(browser: Any, page: Path, comparison: Comparison) -> None:
    browser.get(page.as_uri())
    rows = table(browser, "by-method")
    assert [row["method"] for row in rows] == list(NAMES)
    for i, (method, row) in enumerate(zip(NAMES, rows, strict=True)):
        mean = sum(accuracy(comparison, task, method) for task in TASKS) / len(TASKS)
        assert (row["tasks"], row["mean accuracy"]) == ("4", f"{mean:.2f}")
        assert (row["positions"], row["seconds"]) == (f"{100 * (i + 1)}", f"{1.5 * (i + 1):.1f}")
    conditions = table(browser, "conditions")
    assert len(conditions) == 4 * 3 * 2
    assert {row["condition"] for row in conditions} == {"shuffled few-shot", "another template"}
    result = comparison.at(EVIL, "extract").results
    right = [sum(each.conditions.scores["shuffled few-shot"]["patched"].correct) for each in result if each.conditions]
    assert conditions[0]["with the vector"] == f"{sum(right) / (N * len(comparison.seeds)):.2f}"


def test_the_page_says_what_was_compared(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    facts = dict(zip(texts(browser, "h2 + dl dt"), texts(browser, "h2 + dl dd"), strict=True))
    assert facts["model"] == "tiny, 4 layers, float32"
    assert facts["seeds"] == "0, 1"
    assert facts["methods"].startswith("extract; mean_state")
    assert "8 prompts to make vectors from, 10 to choose a layer and a strength, 10 to report" in facts["prompts"]
    assert facts["layers tried"] == "0-3"
    assert facts["strengths tried"].startswith("0.5, 1, 2")
    assert facts["scoring"] == "full answer by starts_with, at most 8 tokens"
    assert all(name in facts["controls"] for name in ("random", "other task", "shuffled"))
    assert "9.9" in texts(browser, "dl dd")  # torch's version
    how = " ".join(texts(browser, "ul li"))
    for wanted in ("other seeds", "dev prompts", "Holm", "few-shot gain", "0.1 below", "Detectable"):
        assert wanted in how


@pytest.mark.parametrize(("column", "is_number"), [("accuracy", True), ("method", False), ("share", True)])
def test_the_page_sorts_with_missing_numbers_first(
    browser: Any, page: Path, comparison: Comparison, column: str, is_number: bool
) -> None:
    browser.get(page.as_uri())
    heading = next(
        each for each in browser.find_elements("css selector", "#results th") if each.text.startswith(column)
    )
    i = browser.find_elements("css selector", "#results th").index(heading)
    for direction, sign in (("ascending", 1), ("descending", -1)):
        browser.execute_script("arguments[0].querySelector('button').click()", heading)
        assert heading.get_attribute("aria-sort") == direction
        cells = [list(row.values())[i] for row in table(browser, "results")]
        assert len(cells) == len(TASKS) * len(NAMES)
        if is_number:
            values = [sign * float(cell.split(" ")[0] or "-inf") for cell in cells]
            assert values == sorted(values)
        else:
            assert [cell for cell, next_one in pairwise(cells) if cell == next_one] != []
            assert len({cell for cell, next_one in pairwise([*cells, ""]) if cell != next_one}) == len(set(cells))
    assert browser.get_log("browser") == []


def test_the_page_fits_a_narrow_screen(browser: Any, page: Path) -> None:
    """Wide tables scroll; the page does not. The legend is below the title and above the first panel."""
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.get(page.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        title, legend, panel = (
            browser.execute_script("return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", what)
            for what in (".gtitle-subtitle, .gtitle", ".legend", ".plotbg, .bglayer .bg, .xy .gridlayer, .xy")
        )
        assert title["bottom"] <= legend["top"] + 1
        assert legend["bottom"] <= panel["top"] + 1
        assert browser.get_log("browser") == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_methods_are_next_to_each_other_at_each_layer(
    browser: Any, page: Path, figure: go.Figure, comparison: Comparison
) -> None:
    """A panel for each task with a line for each method, and a table with a column for each method. A seed counts with
    the strength that was chosen for it: made-up sweeps have 8 of 10 right at layer 1, and 7 or 8 at layer 2.
    """
    from tv_lens.views.layers import LayerAccuracies

    drawn = LayerAccuracies(comparison.experiments).plot()
    assert [each.text for each in drawn.layout.annotations] == [f"<b>{shown(task)}</b>" for task in TASKS]
    assert len(drawn.data) == len(TASKS) * len(NAMES)
    for i, task in enumerate(TASKS):
        panel = [each for each in drawn.data if each.xaxis == f"x{i + 1 if i else ''}"]
        assert [each.name for each in panel] == list(map(shown, NAMES)), task
        assert all(each.x == (1, 2) for each in panel)
        assert all(each.y == pytest.approx((0.8, 0.7 + 0.1 * (i % 2))) for each in panel)
    assert sum(each.showlegend for each in drawn.data) == len(NAMES)
    looks = {each.name: (each.marker.symbol, each.line.color) for each in drawn.data}
    assert len(set(looks.values())) == len(NAMES)
    assert all(looks[shown(name)][0] == points(figure, name)[0].marker.symbol for name in NAMES)
    browser.get(page.as_uri())
    browser.find_element("css selector", "[data-part=layers] table")
    script = "return [...document.querySelectorAll(arguments[0])].map(row => [...row.cells].map(c => c.textContent))"
    cells = browser.execute_script(script, "[data-part=layers] tr")
    expected = [
        [task, f"{at}", *[f"{0.8 if at == 1 else 0.7 + 0.1 * (i % 2):.2f}"] * 3]
        for i, task in enumerate(TASKS)
        for at in (1, 2)
    ]
    assert cells == [["task", "layer", *NAMES], *expected]


def test_a_method_that_has_one_layer_is_shown_at_it() -> None:
    """Layers of seeds that tried different ones are put together; a layer that a method did not try has no value."""
    from tv_lens.views.layers import LayerAccuracies

    first, second = make_comparison({"a": ""}, {"extract": {}, "learn": {}}).experiments
    sweeps = iter((sweep_of({1: 4, 3: 6}), sweep_of({3: 5}), sweep_of({1: 6, 3: 8}), sweep_of({2: 9})))
    changed = [
        replace(each, results=tuple(replace(result, sweep=next(sweeps)) for result in each.results))
        for each in (first, second)
    ]
    table = LayerAccuracies(tuple(changed)).table()
    assert table.rows == [("a", 1, [0.5, None]), ("a", 2, [None, 0.9]), ("a", 3, [0.7, 0.5])]
    single = [
        replace(each, results=tuple(replace(r, sweep=sweep_of({2: 1})) for r in each.results)) for each in changed
    ]
    assert LayerAccuracies(tuple(single)).table().rows == []  # nothing to compare


def sweep_of(right: dict[int, int]) -> tv.Sweep:
    """The first so many of ten answers are correct at each layer."""
    return tv.Sweep(tuple(right), tuple(map(score_of, right.values())), 4)


def test_a_figure_is_cut_between_tasks_in_print(browser: Any, tmp_path: Path) -> None:
    """Each task is on one printed page, each page fits A4 in landscape and has the legend, and afterward all is as it
    was.
    """
    tasks = {f"t{i:02}": "few" if i < 3 else "many" for i in range(18)}
    long = make_comparison(tasks, {"extract": {}, "learn": {}}, seeds=(0,), n=2, controls=(), measured=False)
    long.report(tmp_path / "long.html")
    browser.get((tmp_path / "long.html").as_uri())
    browser.find_element("css selector", "[data-figure=layers] .gtitle")  # the last that is drawn
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    pages = browser.execute_script("""
      const pages = [...document.querySelectorAll(".page")];
      return pages.filter(page => page.layout.title.text === "Accuracy by task and method").map(page => ({
        height: page.layout.height,
        tasks: Object.keys(page.layout).filter(name => name.startsWith("yaxis")).flatMap(name => {
          const [end, start] = page.layout[name].range;
          return page.layout[name].ticktext.filter((_, i) => start < i && i < end);
        }),
        legend: [...page.querySelectorAll(".legendtext")].map(each => each.textContent),
      }))""")
    assert len(pages) > 1
    assert [task for each in pages for task in each["tasks"]] == list(tasks)
    assert all(each["height"] <= 680 for each in pages)
    assert all({"zero-shot", "extract", "learn"} <= set(each["legend"]) for each in pages)
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    browser.implicitly_wait(0)
    assert browser.find_elements("css selector", ".page, .cut") == []
    browser.implicitly_wait(20)
    assert browser.get_log("browser") == []


def test_large_pages_are_small(tmp_path: Path) -> None:
    """A comparison of 108 rows, and an experiment of 36 with their answers."""
    methods: dict[str, dict[str, Any]] = {
        name: {} for name in ("extract", "mean_state", "function_vector", "learn", "linear_vector", "states")
    }
    tasks = {f"a task number {i}": "a kind" for i in range(18)}
    make_comparison(tasks, methods, seeds=(0, 1)).report(tmp_path / "comparison.html")
    few = dict(list(tasks.items())[:6])
    make_comparison(few, methods, seeds=(0,), n=25).experiments[0].report(tmp_path / "experiment.html")
    for name in ("comparison", "experiment"):
        assert (tmp_path / f"{name}.html").stat().st_size < 1_900_000, name


def test_the_page_needs_no_other_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for wanted in ("<link", "src=", "@import"):
        assert wanted not in text.split("<script>")[0]
    assert "default-src 'none'" in text


def test_a_page_of_one_method_without_measurements_leaves_columns_out(tmp_path: Path) -> None:
    one = make_comparison({"a": "c"}, {"extract": {}}, seeds=(0,), measured=False, controls=())
    one.report(tmp_path / "one.html")
    text = (tmp_path / "one.html").read_text(encoding="utf-8").split("<script>")[0]
    for absent in ("difference from", "different from", "log P gain", "strongest control<"):
        assert absent not in text.split("How to read this")[0]
    assert "given this model and the demonstrations" in " ".join(text.split())


def test_results_without_a_page_say_so(tmp_path: Path) -> None:
    from tv_lens.views.report import write_report

    with pytest.raises(tv.UnsupportedError, match="no page for a int"):
        write_report(3, tmp_path / "x.html")


@dataclass(frozen=True)
class Halved(tv.Method):
    """A method that the package does not know."""

    name: ClassVar[str] = "halved"
    factor: float = 0.5

    def __call__(self, engine: Any, task: Any, prompts: Any, seed: int) -> tv.TaskVectors:
        vectors = tv.Extraction()(engine, task, prompts, seed)
        return replace(vectors, values=vectors.values * self.factor, method=self.name)


def repeated(page: Path, own: dict[str, Any], model: Any) -> dict[str, Any]:
    """The names that the code of a page makes. What only the user can fill in is filled in."""
    text = unescape(page.read_text(encoding="utf-8"))
    code = text.split('<pre id="repeat">')[1].split("</pre>")[0]
    code = code.replace("own = {} ", "own = given ").replace("transformer_lens.TransformerBridge.boot_", "given_")
    actual: dict[str, Any] = {"given": own, "given_transformers": lambda name, dtype: model, "code": code}
    exec(code, actual)
    return actual


SMALL: dict[str, Any] = {"shots": 2, "n_train": 4, "n_dev": 3, "n_test": 4, "max_new_tokens": 2}


def test_the_page_says_how_to_repeat_a_comparison(tmp_path: Path) -> None:
    """The code on the page is run, and gives the same results again: methods under other names, a custom one, options
    that are not numbers, and settings that are not the defaults.
    """
    model = make_twins("gpt2").bridge
    methods = {
        "few": tv.Extraction(substitutes=1),
        "extract": tv.Extraction(site=tv.ATTN_OUT),
        "halved": Halved(0.25),
        "learn": tv.LearnedVector(layers=(1, 3), epochs=1, how=tv.add(2.0), keep=None),
        "written over": tv.LearnedVector(layers=(1,), epochs=1, how=tv.overwrite),
    }
    own = tv.Task("own", tuple("bcdfghjklmnpqrstvwxz"), str.upper)
    first = tv.compare(
        tv.LocalEngine(model, prepend_bos=False),
        [tv.library()["to_upper"], own],
        methods,
        **SMALL,
        seeds=(3, 1),
        strengths=(1.0, 0.25),
        layers=(1, 3),
    )
    first.save(tmp_path / "c.json")
    Comparison.load(tmp_path / "c.json").report(tmp_path / "c.html")
    actual = repeated(tmp_path / "c.html", {"own": own, "halved": methods["halved"]}, model)
    assert "'halved': own['halved'],  # a custom method, {'factor': 0.25}" in actual["code"]
    assert "'few': tv.Extraction(substitutes=1, site=tv.RESID_POST, positions='last')," in actual["code"]
    assert actual["comparison"] == first


def test_the_page_says_how_to_repeat_an_experiment_of_several_methods(tmp_path: Path) -> None:
    model = make_twins("gpt2").bridge
    first = tv.run_experiment(
        model,
        [tv.library()["to_upper"]],
        **SMALL,
        methods=[tv.MeanState(), tv.Extraction(positions="separators")],
        strengths=(0.5, 1.0),
        seed=2,
    )
    first.report(tmp_path / "e.html")
    actual = repeated(tmp_path / "e.html", {}, model)
    assert "n_train=4" in actual["code"]
    assert actual["experiment"].settings == first.settings
    assert actual["experiment"].results == first.results


def test_every_method_of_the_package_is_written_as_code_that_makes_it() -> None:
    from tv_lens.methods.base import settings_of
    from tv_lens.views.repeating import method_code, own_method

    own = [kind() for kind in METHODS.values() if kind.__module__.startswith("tv_lens.")]
    for method in [*own, tv.FunctionVector(heads=((1, 2), (3, 0))), tv.LearnedVector(how=tv.overwrite)]:
        saved = json.loads(json.dumps(settings_of(method.name, method)))
        made = own_method(method.name, saved)
        assert made == method
        assert eval(method_code(method), {"tv": tv}) == method
    assert own_method("halved", {"factor": 0.5}) is None
    assert own_method("learn", {"keep": 0}) is None  # refused by the method
    assert own_method("extract", {"of another version": 1}) is None
