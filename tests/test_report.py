"""The page of an experiment, opened in a real browser."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browsers import fetched, open_browser, texts
from models import make_twins
from test_cli import call

import tv_lens as tv

PLAIN = "Braces {{ }} %{x}"
EVIL = "up<script>document.title = 'run'</script>"
OUTPUT = "<script>document.title=1</script>"


@pytest.fixture(scope="module")
def experiment() -> tv.Experiment:
    """Two tasks of a random model, whose name, inputs and outputs hold what could be mistaken for markup or script."""
    words = tuple(f"{a}{b}<i>" for a in "abcdefgh" for b in "uvwx")
    evil = tv.Task(
        EVIL,
        words,
        lambda text: OUTPUT,
        lambda prediction, answer: len(prediction) % 2 == 1,
        category="</script><b>",
    )
    plain = tv.Task(PLAIN, words, lambda text: text * 2, lambda prediction, answer: len(prediction) % 3 == 1)
    return tv.run_experiment(
        make_twins("llama").bridge, [evil, plain], shots=2, n_dev=6, n_test=16, max_new_tokens=3, seed=2
    )


@pytest.fixture(scope="module")
def page(experiment: tv.Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    experiment.report(path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from open_browser()


def test_it_opens_without_an_error_and_draws(browser: Any, page: Path, experiment: tv.Experiment) -> None:
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    assert browser.title == "Task vectors of tiny-llama"  # no text was run as a script
    assert texts(browser, "#results tbody tr td:first-child") == [EVIL, PLAIN]
    cells = texts(browser, "#results tbody tr:first-child td")
    actual = experiment.results[0].evaluation
    assert cells[1] == "</script><b>"
    assert cells[2:6] == ["16", str(actual.zero_shot), str(actual.few_shot), str(actual.patched)]
    assert set(texts(browser, "[data-figure=overview] .ytick text")) == {EVIL, PLAIN}
    assert len(browser.find_elements("css selector", "[data-figure=overview] .barlayer .point")) == 6
    # Nothing is fetched: everything is in the page.
    assert fetched(browser) == []


@pytest.mark.parametrize("column", ["zero-shot", "patched", "p", "task"])
def test_the_table_sorts_both_ways(browser: Any, page: Path, experiment: tv.Experiment, column: str) -> None:
    browser.get(page.as_uri())
    keys: dict[str, Callable[[Any], Any]] = {
        "task": lambda result: result.task,  # B before u in every language
        "zero-shot": lambda result: result.evaluation.zero_shot.accuracy,
        "patched": lambda result: result.evaluation.patched.accuracy,
        "p": lambda result: result.evaluation.p_value,
    }
    key = keys[column]
    up = [result.task for result in sorted(experiment.results, key=key)]

    def key_of(names: list[str]) -> list[Any]:
        return [key(next(result for result in experiment.results if result.task == name)) for name in names]

    [heading] = [
        each for each in browser.find_elements("css selector", "#results th") if each.text.split(" ")[0] == column
    ]
    for direction, expected in (("ascending", up), ("descending", up[::-1])):
        heading.find_element("css selector", "button").click()
        assert heading.get_attribute("aria-sort") == direction
        shown = texts(browser, "#results tbody td:first-child")
        assert key_of(shown) == key_of(expected)  # the order of two equal ones does not matter
    assert browser.get_log("browser") == []


def test_a_task_opens_with_its_figure_and_answers(browser: Any, page: Path, experiment: tv.Experiment) -> None:
    browser.get(page.as_uri())
    result = experiment.results[0]
    assert not browser.find_element("css selector", "#task-1").get_attribute("open")
    browser.find_element("css selector", "#results a").click()
    assert browser.find_element("css selector", "#task-1").get_attribute("open")
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 20).until(lambda _: texts(browser, "#task-1 .figure .gtitle"))
    assert texts(browser, "#task-1 .figure .gtitle")[0].startswith("Patched accuracy by layer: best at layer")
    right = sum(result.evaluation.patched.correct)
    headings = texts(browser, "#task-1 h3")
    assert headings[:2] == [
        f"Patched answers that are right: {right} of 16",
        f"Patched answers that are wrong: {16 - right} of 16",
    ]
    assert 0 < right < 16  # otherwise one of the tables would be missing
    shown = texts(browser, "#task-1 h3 + .wide tbody td:nth-child(2)")
    assert shown == [OUTPUT] * (min(right, 10) + min(16 - right, 10))
    assert browser.title == "Task vectors of tiny-llama"
    assert browser.get_log("browser") == []


def wait_for_text_in(browser: Any, color: str) -> None:
    """Until the figure's text has this color."""
    from selenium.webdriver.support.ui import WebDriverWait

    script = "return document.querySelector('[data-figure=overview]').layout.font.color"
    WebDriverWait(browser, 20).until(lambda _: browser.execute_script(script) == color)


def test_figures_have_the_colors_of_the_page(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    browser.find_element("css selector", "[data-figure=overview] .gtitle")
    wait_for_text_in(browser, "#1A1A1A")
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        wait_for_text_in(browser, "#E8E8E8")
        assert browser.find_element("css selector", "body").value_of_css_property("color") == "rgba(232, 232, 232, 1)"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    wait_for_text_in(browser, "#1A1A1A")
    assert browser.get_log("browser") == []


def test_everything_is_printed(browser: Any, page: Path) -> None:
    """All tasks are open with their figures, none wider than a page; afterward they are closed again."""
    browser.get(page.as_uri())
    browser.find_element("css selector", "[data-figure=overview] .gtitle")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.find_elements("css selector", "details[id][open]") == browser.find_elements(
        "css selector", "details[id]"
    )
    widths = browser.execute_script(
        "return [...document.querySelectorAll('[data-figure]')].map(each => each.layout.width)"
    )
    assert widths == [1000] * 3
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    browser.implicitly_wait(0)
    assert browser.find_elements("css selector", "details[id][open]") == []
    browser.implicitly_wait(20)
    assert browser.get_log("browser") == []


def test_every_figure_has_words_and_a_table(browser: Any, page: Path, experiment: tv.Experiment) -> None:
    browser.get(page.as_uri())
    figures = browser.find_elements("css selector", "[data-figure]")
    assert all(each.get_attribute("role") == "img" and each.get_attribute("aria-label") for each in figures)
    browser.find_element("css selector", "#results a").click()
    browser.find_element("css selector", "#task-1 details.numbers summary").click()
    rows = texts(browser, "#task-1 details.numbers tbody tr td:nth-child(3)")
    assert rows == [f"{score.accuracy:.2f}" for score in experiment.results[0].sweep.scores]


def test_the_page_is_small(page: Path) -> None:
    assert page.stat().st_size < 2_000_000


TEXTS = {
    "nothing": "",
    "one": "a",
    "repeated": "ab" * 3000 + "c" * 700,
    "numbers": " ".join(str(i * i % 9973) for i in range(4000)),
    "characters of many bytes": "".join(map(chr, range(32, 9000))),
    "script": "</script><!--<script>",
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_page_reads_what_is_packed(browser: Any, page: Path, name: str) -> None:
    from tv_lens.views.pages import pack

    packed = pack(TEXTS[name])
    assert "<" not in packed
    browser.get(page.as_uri())
    assert browser.execute_script("return unpacked(arguments[0])", packed) == TEXTS[name]


def test_the_page_is_made_for_screen_readers_and_keyboards(browser: Any, page: Path) -> None:
    """All is in one `main`, headings leave out no level, ids are unique, and no button is inside a picture. What
    scrolls can be reached and has a name.
    """
    browser.get(page.as_uri())
    browser.find_element("css selector", "#task-1 h3")
    browser.find_element("css selector", "[data-figure=overview] .gtitle")
    levels, outside, ids, nameless, inside = browser.execute_script("""
      const all = (what) => [...document.querySelectorAll(what)];
      return [
        all("h1, h2, h3, h4").map(each => Number(each.tagName[1])),
        [...document.body.children].filter(each => !each.matches("main, script, svg")).length,
        all("main [id]:not(svg *)").map(each => each.id),
        all(".wide").filter(each => each.tabIndex !== 0 || !each.matches("[aria-label], [aria-labelledby]")).length,
        all("[role=img] :is(a, button, [tabindex])").length,
      ]""")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(ids) == len(set(ids))
    assert (outside, nameless, inside) == (0, 0, 0)
    assert texts(browser, "[data-figure=overview] + .buttons button") == ["Save as PNG", "Reset zoom"]


def test_the_colors_of_the_page_are_readable() -> None:
    """Text has a contrast of at least 4.5 to the paper and to the shade of every second row, and the edge of a button
    one of 3, in the light, in the dark and in print.
    """
    style = (Path(tv.__file__).parent / "views" / "page.html").read_text(encoding="utf-8")
    palettes = [dict(re.findall(r"--(\w+): (#\w+);", each)) for each in re.findall(r":root {(.*?)}", style)]
    assert len(palettes) == 3
    light, dark, printed = palettes
    for palette in (light, dark, light | printed):
        for paper in ("paper", "shade"):
            for text in ("ink", "soft", "link", "right", "wrong"):
                assert contrast(palette[text], palette[paper]) >= 4.5, (text, paper, palette)
            assert contrast(palette["edge"], palette[paper]) >= 3


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colors, #abc or #aabbcc."""
    values = []
    for color in (one, other):
        digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        values.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(values) + 0.05) / (min(values) + 0.05)


SETTINGS = {
    "as it comes": {},
    "across, some layers, another template": {
        "across": True,
        "layers": [1, 3],
        "template": tv.Template("Q: {input}\nA: {output}<b>", "\n\n"),
        "substitutes": 3,
    },
    "first token": {"max_new_tokens": 1, "seed": 4},
}


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_the_page_says_how_to_repeat_the_run(changes: dict[str, Any], tmp_path: Path) -> None:
    """The code on the page is run, and gives the same results again."""
    model = make_twins("gpt2").bridge
    own = tv.Task("own", tuple("bcdfghjklmnpqrstvwxz"), str.upper)
    library = tv.library()
    tasks = [library["to_upper"], replace(library["to_lower"], accepts=tv.exact_match), own]
    engine = tv.LocalEngine(model, prepend_bos=False)
    small: dict[str, Any] = {"shots": 2, "n_dev": 6, "n_test": 6, "max_new_tokens": 2, **changes}
    experiment = tv.run_experiment(engine, tasks, **small)
    experiment.report(tmp_path / "report.html")
    text = unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    code = text.split('<pre id="repeat">')[1].split("</pre>")[0]
    assert "tv.library()['to_upper']" in code
    if "max_new_tokens" not in changes:  # that run has another rule
        assert "replace(tv.library()['to_lower'], accepts=tv.exact_match)" in code
    assert "TransformerBridge.boot_transformers('tiny-gpt2', dtype=torch.float32)" in code
    # What only the user can fill in: custom tasks, and a model that is not on the hub.
    code = code.replace("own = {} ", "own = given ").replace("transformer_lens.TransformerBridge.boot_", "given_")
    actual: dict[str, Any] = {"given": {"own": own}, "given_transformers": lambda name, dtype: model}
    exec(code, actual)
    assert actual["experiment"].settings == experiment.settings
    assert actual["experiment"].results == experiment.results
    for name, number in experiment.settings["versions"].items():
        assert f"<dt>{name}</dt><dd>{number}</dd>" in text
    assert f"<dd>{experiment.settings['template']['example']!r}, between demonstrations" in text


def test_incomplete_results_are_refused(experiment: tv.Experiment, tmp_path: Path) -> None:
    """A file must have everything that a page needs."""
    experiment.save(tmp_path / "whole.json")
    for lacking in ("layers", "rules"):
        data = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))
        del data["settings"][lacking]
        (tmp_path / "less.json").write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(
            ValueError, match=rf"less.json: not a saved experiment, .*missing required field `{lacking}`"
        ):
            tv.Experiment.load(tmp_path / "less.json")
    data = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))
    data["results"][0]["queries"] = []
    (tmp_path / "less.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="16 test prompts, 0 queries, for 6 and 16 answers"):
        tv.Experiment.load(tmp_path / "less.json")


def test_a_small_file_that_claims_a_huge_model_costs_nothing(experiment: tv.Experiment, tmp_path: Path) -> None:
    """100,000,000 layers in a file of some kilobytes: no list, axis or table of that many is made."""
    experiment.save(tmp_path / "claims.json")
    data = json.loads((tmp_path / "claims.json").read_text(encoding="utf-8"))
    claimed = 100_000_000
    data["settings"]["n_layers"] = claimed
    for result in data["results"]:
        result["sweep"]["n_layers"] = result["evaluation"]["n_layers"] = claimed
        result["sweep"]["layers"] = [0, 1, 2, claimed - 1]
    (tmp_path / "claims.json").write_text(json.dumps(data), encoding="utf-8")
    loaded = tv.Experiment.load(tmp_path / "claims.json")
    tracemalloc.start()
    try:
        loaded.report(tmp_path / "page.html")
        for result in loaded.results:
            result.sweep.plot()
            result.sweep.to_pandas()
        loaded.to_pandas()
        highest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert highest < 100 * 2**20


def test_the_page_needs_no_other_file(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for wanted in ("<link", "src=", "@import"):
        assert wanted not in text.split("<script>")[0]
    assert "default-src 'none'" in text


def test_the_command_makes_the_page_of_a_saved_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, experiment: tv.Experiment, page: Path
) -> None:
    saved, made = str(tmp_path / "run.json"), tmp_path / "page.html"
    experiment.save(saved)
    code, _, err = call(capsys, "report", saved, "--to", str(made))
    assert (code, err) == (0, "")
    assert made.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    code, _, err = call(capsys, "report", saved, "--to", str(tmp_path / "page.pdf"))
    assert (code, "must end in .html" in err) == (2, True)
    code, _, err = call(capsys, "report", str(page), "--to", str(made))
    assert (code, "not a saved experiment" in err) == (1, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run.json"]
