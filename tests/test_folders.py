"""The folder of a run: more tasks and methods continue in it, and what is in it can be read at any time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from models import Twins

import tv_lens as tv
from tv_lens.evidence import experiments
from tv_lens.evidence.folders import read_folder
from tv_lens.evidence.tuning import tune

WORDS = tuple(f"{a}{b}" for a in "abcdef" for b in "uvwx")
UPPER = tv.Task("upper", WORDS, str.upper, category="letters")
DOUBLE = tv.Task("double", WORDS, lambda text: text * 2, category="letters")
REVERSE = tv.Task("reverse", WORDS, lambda text: text[::-1], category="order")
LAST = tv.Task("last", WORDS, lambda text: text[-1], category="letters")
SMALL: dict[str, Any] = {"shots": 2, "n_dev": 3, "n_test": 3, "max_new_tokens": 1, "layers": [0, 2]}


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """The tasks that are swept, each with the names of the vectors."""
    calls: list[tuple[str, tuple[str, ...]]] = []

    def changed(engine: Any, task: Any, prompts: Any, candidates: Any, **options: Any) -> Any:
        calls.append((task.name, tuple(candidates)))
        return tune(engine, task, prompts, candidates, **options)

    monkeypatch.setattr(experiments, "tune", changed)
    return calls


def refuse(*args: Any, **options: Any) -> None:
    raise AssertionError("the model was run")


def run(model: Any, tasks: Sequence[tv.Task], methods: Sequence[tv.Method], folder: Path | None) -> tv.Experiment:
    return tv.run_experiment(model, tasks, methods=methods, folder=folder, **SMALL)


ALL = ("patched", "random", "other task", "shuffled")


@pytest.mark.slow
def test_more_tasks_continue_in_a_folder(
    llama: Twins, tmp_path: Path, swept: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are run alone. Of the others only those controls are run again that another task's vector is in, if one of
    the new tasks is less similar; so the results are those of a run of all tasks.
    """
    methods = [tv.Extraction(substitutes=1)]
    run(llama.bridge, [UPPER, DOUBLE], methods, tmp_path)
    vectors = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    swept.clear()
    actual = run(llama.bridge, [REVERSE, UPPER, DOUBLE], methods, tmp_path)
    late = ("random", "other task")
    assert swept == [("reverse", ALL), ("upper", late), ("double", late)]  # "reverse" is of another category
    assert {path: path.read_bytes() for path in vectors} == vectors
    swept.clear()
    again = run(llama.bridge, [LAST, REVERSE, UPPER, DOUBLE], methods, tmp_path)
    assert swept[0] == ("last", ALL)
    assert {"upper", "double"}.isdisjoint(task for task, _ in swept)  # "reverse" is the only one of another category
    assert actual == run(llama.bridge, [REVERSE, UPPER, DOUBLE], methods, None)
    assert again == run(llama.bridge, [LAST, REVERSE, UPPER, DOUBLE], methods, None)
    monkeypatch.setattr(tv.LocalEngine, "forward", refuse)
    assert run(llama.bridge, [UPPER, DOUBLE, REVERSE, LAST], methods, tmp_path).results == (
        *again.results[2:],
        again.results[1],
        again.results[0],
    )


def test_more_methods_continue_in_a_folder(llama: Twins, tmp_path: Path, swept: list[Any]) -> None:
    tasks = [UPPER, REVERSE]
    run(llama.bridge, tasks, [tv.Extraction(substitutes=1)], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "settings.json"}
    swept.clear()
    methods = [tv.MeanState(), tv.Extraction(substitutes=1)]
    actual = run(llama.bridge, tasks, methods, tmp_path)
    assert swept == [("upper", ALL), ("reverse", ALL)]
    assert {path: path.read_bytes() for path in before} == before
    fresh = run(llama.bridge, tasks, methods, None)
    assert actual == fresh
    assert actual.vectors.keys() == fresh.vectors.keys()


@pytest.mark.slow
def test_more_of_everything_continues_in_the_folder_of_a_comparison(llama: Twins, tmp_path: Path) -> None:
    """Log-probabilities, divergences and strengths are those of a fresh run, too."""

    def compare(tasks: Any, methods: Any, folder: Path | None) -> tv.Comparison:
        options = {**SMALL, "n_train": 3, "seeds": (0,), "strengths": (1.0, 2.0), "conditions": ()}
        return tv.compare(llama.bridge, tasks, methods, folder=folder, **options)

    methods = [tv.Extraction(substitutes=1), tv.MeanDifference()]
    compare([UPPER], methods[:1], tmp_path)
    actual, fresh = compare([UPPER, REVERSE], methods, tmp_path), compare([UPPER, REVERSE], methods, None)
    for one, other in zip(actual.experiments[0].results, fresh.experiments[0].results, strict=True):
        assert one.evaluation.control_layers == other.evaluation.control_layers
        assert one.evaluation.control_strengths == other.evaluation.control_strengths
        assert one.control_sweeps == other.control_sweeps
        assert list(one.evaluation.controls) == list(other.evaluation.controls) == list(ALL[1:])
        for name, score in other.evaluation.conditions.items():
            mine = one.evaluation.conditions[name]
            assert (mine.texts, mine.correct) == (score.texts, score.correct)
            assert mine.logprobs == pytest.approx(score.logprobs, abs=1e-4)
            assert mine.divergences == pytest.approx(score.divergences, abs=1e-4)


def test_fewer_tasks_or_methods_are_refused(llama: Twins, tmp_path: Path) -> None:
    methods = [tv.Extraction(substitutes=1), tv.MeanState()]
    run(llama.bridge, [UPPER], methods, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for tasks, chosen, message in (
        ([REVERSE], methods, "tasks was .*name the existing ones as well"),
        (
            [UPPER, REVERSE],
            methods[:1],
            r"\(method was extract, mean_state, is extract\);.*name the existing ones as well",
        ),
        ([UPPER, REVERSE], [tv.Extraction(substitutes=2), methods[1]], "methods was"),
    ):
        with pytest.raises(tv.TvLensError, match=message):
            run(llama.bridge, tasks, chosen, tmp_path)
        with pytest.raises(tv.TvLensError) as refused:
            run(llama.bridge, tasks, chosen, tmp_path)
        assert "data was" not in str(refused.value)  # a task that is missing has no other data
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_is_read_without_a_model(llama: Twins, tmp_path: Path) -> None:
    methods = [tv.Extraction(substitutes=1), tv.MeanState()]
    whole = run(llama.bridge, [UPPER, REVERSE], methods, tmp_path)
    kept = read_folder(tmp_path)
    assert (kept.results, kept.unfinished) == (whole, ())
    next(tmp_path.glob("*reverse*mean_state*.json")).unlink()
    kept = read_folder(tmp_path)
    assert isinstance(kept.results, tv.Experiment)
    assert (kept.results.results, kept.unfinished) == (whole.results[:2], ("reverse",))
    assert kept.results.settings.tasks == ("upper",)
    for path in tmp_path.glob("*mean_state*.json"):
        path.unlink()
    kept = read_folder(tmp_path)
    assert isinstance(kept.results, tv.Experiment)
    assert (kept.results.results, kept.unfinished) == ((whole.results[0], whole.results[2]), ("mean_state",))
    for path in tmp_path.glob("task-*.json"):
        path.unlink()
    with pytest.raises(tv.TvLensError, match="nothing is finished yet of upper, reverse"):
        read_folder(tmp_path)
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "is empty"), (".", "holds no experiment")):
        (tmp_path / "settings.json").unlink(missing_ok=True)
        with pytest.raises(tv.TvLensError, match=message):
            read_folder(tmp_path / folder)
    with pytest.raises(FileNotFoundError):
        read_folder(tmp_path / "nothing")


def test_the_folder_of_a_comparison_is_read_without_a_model(llama: Twins, tmp_path: Path) -> None:
    methods = [tv.Extraction(substitutes=1), tv.MeanState()]
    whole = tv.compare(
        llama.bridge,
        [UPPER, REVERSE],
        methods,
        seeds=(3, 10),
        folder=tmp_path,
        controls=(),
        conditions=(),
        n_train=3,
        **SMALL,
    )
    kept = read_folder(tmp_path)
    assert (kept.results, kept.unfinished) == (whole, ())
    next(tmp_path.glob("seed-10/*reverse*mean_state*.json")).unlink()
    kept = read_folder(tmp_path)  # two tasks of one seed, or one task of both
    assert isinstance(kept.results, tv.Comparison)
    assert (kept.results.seeds, kept.results.tasks, kept.unfinished) == ((3, 10), ("upper",), ("reverse",))
    next(tmp_path.glob("seed-10/*upper*mean_state*.json")).unlink()
    kept = read_folder(tmp_path)
    assert isinstance(kept.results, tv.Comparison)
    assert (kept.results.methods, kept.unfinished) == (("extract",), ("mean_state",))
    for path in tmp_path.glob("seed-10/task-*.json"):
        path.unlink()
    kept = read_folder(tmp_path)
    assert kept.results == tv.Comparison(whole.experiments[:1])
    assert kept.unfinished == ("seed 10",)
