"""The README shows what runs."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Twins
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = ROOT / "examples" / "quickstart.py"


def block(name: str, page: str = README) -> str:
    page = page if "\n" in page else (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.search(rf"^```{name}\n(.*?)^```$", page, re.M | re.S)[1]  # type: ignore[index]


def test_the_readme_has_two_commands_of_one_line() -> None:
    assert len(re.findall(r"^```bash", README, re.M)) == 2
    for name in ("bash quickstart", "bash tests"):
        assert block(name).count("\n") == 1
    assert "```bash tests" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")  # which runs that block


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_the_readmes_code_prints_what_it_shows(
    demo: TransformerBridge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracies may differ by two of twenty answers elsewhere."""
    monkeypatch.setattr(tv, "demo_model", lambda: tv.LocalEngine(demo, progress=False))
    exec(block("python"), {})
    shown, printed = block("text").splitlines(), capsys.readouterr().out.splitlines()
    assert [outline(line) for line in printed] == [outline(line) for line in shown]
    for expected, line in zip(shown, printed, strict=True):
        assert numbers(line) == pytest.approx(numbers(expected), abs=0.11)


def test_the_readmes_code_has_twelve_lines() -> None:
    assert sum(bool(line.strip()) for line in block("python").splitlines()) <= 12


def test_the_shown_code_is_the_quickstarts() -> None:
    shown = block("python quickstart", "getting_started.md")
    assert textwrap.indent(shown, "    ") in QUICKSTART.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_guide_to_extensions_shows_tested_code() -> None:
    source = (ROOT / "tests" / "test_extending.py").read_text(encoding="utf-8")
    tested = dict(re.findall(r"^# --- docs: (\w+)\n(.*?)^# --- docs: end$", source, re.M | re.S))
    guide = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^```python (\w+)\n(.*?)^```$", guide, re.M | re.S))
    assert {name: code.strip() for name, code in shown.items()} == {name: code.strip() for name, code in tested.items()}
    [imports] = re.findall(r"^```python\n(.*?)^```$", guide, re.M | re.S)
    subprocess.run([sys.executable, "-c", "\n".join([imports, *shown.values()])], check=True)


def test_the_quickstart_prints_what_is_shown(demo: TransformerBridge) -> None:
    """Line by line, but for the model's own words; accuracies may differ by two of twenty answers elsewhere."""
    run = subprocess.run(
        [sys.executable, str(QUICKSTART)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    shown, printed = block("text", "getting_started.md").rstrip().splitlines(), run.stdout.rstrip().splitlines()
    assert len(shown) == len(printed)
    for expected, line in zip(shown, printed, strict=True):
        assert outline(line) == outline(expected)
        assert numbers(line) == pytest.approx(numbers(expected), abs=0.11 if "->" not in line else 1e9)


def test_the_session_on_meaning_gives_what_it_shows(demo: TransformerBridge) -> None:
    names = ("present_to_gerund", "present_to_past", "singular_to_plural", "antonyms", "to_upper", "place_to_continent")
    known: dict[str, Any] = {"tv": tv, "model": tv.LocalEngine(demo)}
    for name, short in zip(names, ("gerund", "past", "plural", "antonyms", "upper", "continents"), strict=True):
        task = tv.library()[name]
        prompts = task.sample(15, shots=5, seed=0, template=tv.PAPER)
        known[short] = tv.extract(known["model"], prompts, task.substitutes(prompts, 2, seed=0))
    session = doctest.DocTestParser().get_doctest(block("pycon", "meaning.md"), known, "meaning.md", None, 0)
    assert len(session.examples) == 4
    assert doctest.DocTestRunner().run(session).failed == 0


def test_the_keywords_do_what_their_comments_say(demo: TransformerBridge) -> None:
    """Each line runs, and gives what its comment says."""
    task = tv.library()["antonyms"]
    prompts = task.sample(3, shots=2, seed=0, template=tv.Template("{input} -> {output}"))
    known: dict[str, Any] = {"model": tv.LocalEngine(demo, progress=False), "prompts": prompts, "dev": task}
    known |= {"extract": tv.extract, "patch_generate": tv.patch_generate}
    known["vectors"] = tv.extract(known["model"], prompts, task.substitutes(prompts, 2, seed=0))
    code = [line for line in block("python keywords", "writing.md").splitlines() if line]
    statements = [line for line in code if re.match(r"from |\w+ = ", line)]
    exec("\n".join(statements), known)
    lines = [line for line in code if line not in statements]
    steered, several, separators, heads, logprobs, divergence, shown = [eval(line, known) for line in lines]
    assert [len(each) for each in (steered, several, separators)] == [2, 3, 3]
    assert (heads.site, logprobs.shape, divergence.shape) == (tv.HEADS, (3,), (3,))
    assert (divergence > 0).all()
    assert tv.generate(known["model"], ["hot ->", "tall ->"]).texts != steered.texts
    outputs = [role == "output" for role in shown.roles]
    assert sum(outputs) >= 2
    assert list(shown.edited) == outputs


def test_the_page_on_tokens_shows_what_show_tokens_prints(demo: TransformerBridge) -> None:
    page = block("pycon", (ROOT / "docs" / "tokens.md").read_text(encoding="utf-8"))
    session = doctest.DocTestParser().get_doctest(page, {"tv": tv, "model": demo}, "tokens.md", None, 0)
    assert len(session.examples) == 3
    assert doctest.DocTestRunner().run(session).failed == 0


def test_the_page_on_statistics_shows_what_its_functions_return() -> None:
    page = (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")
    session = "\n".join(re.findall(r"^```pycon\n(.*?)^```$", page, re.M | re.S))
    examples = doctest.DocTestParser().get_doctest(session, {}, "statistics.md", None, 0)
    assert len(examples.examples) == 24
    assert doctest.DocTestRunner().run(examples).failed == 0


@pytest.mark.slow
def test_the_page_on_comparing_runs(llama: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "comparing.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python (\w+)\n(.*?)^```$", page, re.M | re.S)
    assert [name for name, _ in blocks] == ["compare", "names"]
    words = tuple(f"{a}{b}" for a in "abcdef" for b in "uvwx")
    tasks = {"task": tv.Task("upper", words, str.upper), "other_task": tv.Task("double", words, lambda text: text * 2)}
    known: dict[str, Any] = {"model": tv.LocalEngine(llama.bridge, progress=False), **tasks}
    for _, code in blocks:
        code = re.sub(r"(n_train=|n_dev=|n_test=)\d+", r"\g<1>4", code)  # fewer prompts and tokens, to be quick
        exec(code.replace("n_dev=", "max_new_tokens=1, n_dev="), known)
    assert tv.Comparison.load("comparison.json") == known["comparison"]
    assert {path.name for path in tmp_path.iterdir()} == {"results", "comparison.html", "comparison.json"}
    assert set(known["methods"]) == {"extract", "extract, added", "learn", "learn, overwritten"}


PAGES = (
    "getting_started.md",
    "coming_from.md",
    "evidence.md",
    "meaning.md",
    "methods/extraction.md",
    "methods/mean_state.md",
)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.filterwarnings("ignore:these vectors were read from:tv_lens.TvLensWarning")
def test_the_code_of_a_page_runs(page: str, llama: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its named blocks, one after the other, with fewer prompts and tokens to be quick."""
    monkeypatch.chdir(tmp_path)
    Path("antonym.json").write_text('{"hot": "cold", "big": "small", "wet": "dry", "up": "down", "on": "off"}')
    Path("top_heads.json").write_text('{"top_heads": [[2, 1], [0, 3]]}')
    words = tuple(f"{a}{b}" for a in "abcdef" for b in "uvwx")
    known: dict[str, Any] = {
        "tv": tv,
        "bridge": llama.bridge,
        "model": tv.LocalEngine(llama.bridge, progress=False),
        "task": tv.Task("upper", words, str.upper),
        "other_task": tv.Task("double", words, lambda text: text * 2),
        "control": SimpleNamespace(directions={layer: torch.ones(32) for layer in (3, 2, 1)}),
        "steering": SimpleNamespace(layer_activations={layer: torch.ones(32) for layer in (0, 1)}),
    }
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python (?!quickstart)\w+\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    for code in blocks:
        code = re.sub(r"(sample\()(?!1\b)\d+", r"\g<1>4", re.sub(r"(n_dev=|n_test=)\d+", r"\g<1>2", code))
        for options in ("n_dev=", "dev=prompts"):
            code = code.replace(f" {options}", f" max_new_tokens=1, {options}")
        exec(code, known)


def test_the_tests_that_pages_name_are_there() -> None:
    named = {
        name for path in (ROOT / "docs").rglob("*.md") for name in re.findall(r"`(test_\w+)`", path.read_text("utf-8"))
    }
    there = {
        name
        for path in (ROOT / "tests").glob("*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)
    }
    assert len(named) > 10
    assert named <= there


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda path: path.stem)
def test_code_without_a_name_is_python(path: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S):
        compile(code, path.name, "exec")


@pytest.mark.parametrize(
    ("example", "shown"),
    [
        (("own_data.py",), "best layer on dev: "),
        (("conflict.py",), "demonstrations of present_to_past, vector of present_to_gerund at layer"),
        (("experiment.py", "results", "to_upper"), "to_upper: patched at layer"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_other_examples_run(demo: TransformerBridge, example: tuple[str, ...], shown: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example[0]), *example[1:]],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown in run.stdout


def outline(line: str) -> str:
    line = re.sub(r"-> .* expected", "-> ... expected", line)
    return re.sub(r"#+|\[.*?\]|\d+\.\d+", "", line).rstrip()  # layers stay as they are


def numbers(line: str) -> list[float]:
    return [float(actual) for actual in re.findall(r"\d\.\d\d(?=$|\s)", line)]


@pytest.mark.parametrize("name", tv.__all__)
def test_public_names_say_what_they_are(name: str) -> None:
    assert getattr(tv, name).__doc__, name
