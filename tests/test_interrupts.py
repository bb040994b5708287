"""Ctrl-C at any time: no hook and no half-written file is left, and the next call gives the right result."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from models import Twins
from test_no_trace import CALLS, PROMPTS, SUBSTITUTES, TASK, assert_same, state_of, touched
from transformer_lens import hook_points
from transformer_lens.model_bridge import bridge_core

import tv_lens as tv
from tv_lens import files
from tv_lens.evidence import experiments, tuning
from tv_lens.vector_files import read_notes

__all__ = ["touched"]  # a fixture

# How many lines of each call are interrupted, spread evenly; more for a long run.
POINTS = int(os.environ.get("TV_LENS_PLACES", "4"))
HOUSE = str(Path(tv.__file__).parent)
# Python cannot guard the gap between the end of a block and the first line of its cleanup. The functions that the
# cleanup calls are interrupted too.
UNGUARDED = {"tokenizer_unchanged", "model_unchanged", "computing", "output_hooks", "session", "finish"}

pytestmark = pytest.mark.usefixtures("as_users_run_it")


@contextmanager
def interrupt_at(line: int, under: str = HOUSE) -> Iterator[list[str]]:
    """Raises KeyboardInterrupt at the given line of our own code, in the order run; yields all lines passed."""
    passed: list[str] = []

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(under) or frame.f_code.co_name in UNGUARDED:
            return None
        if event == "line":
            passed.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(passed) == line:
                raise KeyboardInterrupt(passed[-1])
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield passed
    finally:
        sys.settrace(before)


def outcome(actual: Any) -> Any:
    """The result of a call, in a form that can be compared."""
    if isinstance(actual, tv.TaskVectors):
        return actual.values.tolist()
    if isinstance(actual, torch.Tensor):
        return actual.tolist()
    if isinstance(actual, tv.HeadEffects):
        return actual.values.tolist(), actual.baseline.tolist()
    return actual.texts if isinstance(actual, tv.Completions) else actual


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line_leaves_nothing_behind(touched: Twins, call: str) -> None:
    engine = tv.LocalEngine(touched.bridge, batch_size=2, progress=False)
    vectors = tv.TaskVectors(torch.ones(4, 4, 32), "tiny-gpt2", "t")
    expected = outcome(CALLS[call](engine, vectors))  # the checks made once per model are made now
    with interrupt_at(0) as lines:
        assert outcome(CALLS[call](engine, vectors)) == expected
    before = state_of(touched)
    assert len(lines) > 100
    for point in range(POINTS):
        line = 1 + (2 * point + 1) * len(lines) // (2 * POINTS)
        with pytest.raises(KeyboardInterrupt), interrupt_at(line):
            CALLS[call](engine, vectors)
        assert_same(before, state_of(touched))
    assert outcome(CALLS[call](engine, vectors)) == expected


@pytest.mark.parametrize("call", ["extract", "patched_logits"])
def test_an_interrupt_while_hooks_change_leaves_nothing_behind(llama: Twins, call: str) -> None:
    """TransformerLens's own lines: a Ctrl-C between them leaves the hooks of a read on the model."""
    engine = tv.LocalEngine(llama.bridge, progress=False)
    vectors = tv.TaskVectors(torch.ones(4, 4, 32), "tiny-llama", "t")
    expected = outcome(CALLS[call](engine, vectors))  # the first run, at which TransformerLens hooks layer norms
    before = state_of(llama)
    for under in (hook_points.__file__, bridge_core.__file__):
        with interrupt_at(0, under) as lines:
            CALLS[call](engine, vectors)
        for point in range(4 * POINTS):
            line = 1 + (2 * point + 1) * len(lines) // (8 * POINTS)
            with pytest.raises(KeyboardInterrupt), interrupt_at(line, under):
                CALLS[call](engine, vectors)
            assert_same(before, state_of(llama))
    assert outcome(CALLS[call](engine, vectors)) == expected


def interrupting(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, interrupted at its `at`-th call."""
    times = [0]

    def wrapped(*args: Any, **options: Any) -> Any:
        times[0] += 1
        if times[0] == at:
            raise KeyboardInterrupt("here")
        return function(*args, **options)

    return wrapped


@pytest.mark.parametrize(
    ("point", "call"),
    [(point, call) for point in ("tokenizing", "a later batch") for call in ("extract", "sampled", "sweep_layers")]
    + [("decoding", "sampled"), ("decoding", "sweep_layers"), ("scoring", "sweep_layers"), ("scoring", "conflict")]
    + [("in a hook", "patch_generate"), ("in a hook", "sweep_layers")],
)
def test_named_points(touched: Twins, point: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = touched.bridge
    engine = tv.LocalEngine(bridge, batch_size=2, progress=False)
    vectors = tv.TaskVectors(torch.ones(4, 4, 32), "tiny-gpt2", "t")
    before = state_of(touched)
    expected = outcome(CALLS[call](engine, vectors))
    with monkeypatch.context() as patched:
        if point == "tokenizing":
            patched.setattr(engine.text, "to_ids", interrupting(engine.text.to_ids, 2))
        elif point == "a later batch":
            patched.setattr(engine, "forward", interrupting(engine.forward, 2))
        elif point == "decoding":
            patched.setattr(engine.text, "decode", interrupting(engine.text.decode, 2))
        elif point == "scoring":
            patched.setattr(tv.Task, "right", interrupting(tv.Task.right, 2))
        else:
            patched.setattr(torch.Tensor, "clone", interrupting(torch.Tensor.clone, 2))
        with pytest.raises(KeyboardInterrupt, match="here"):
            CALLS[call](engine, vectors)
    assert_same(before, state_of(touched))
    assert outcome(CALLS[call](engine, vectors)) == expected


def test_an_interrupt_in_a_sampler_or_a_rule(touched: Twins) -> None:
    before = state_of(touched)
    with pytest.raises(KeyboardInterrupt):
        tv.generate(touched.bridge, PROMPTS, max_new_tokens=3, sampler=interrupting(tv.sample(seed=1), 2))
    assert_same(before, state_of(touched))
    rule = interrupting(tv.exact_match, 3)
    vectors = tv.extract(touched.bridge, PROMPTS, SUBSTITUTES)
    with pytest.raises(KeyboardInterrupt):
        tv.sweep_layers(touched.bridge, replace(TASK, accepts=rule), PROMPTS, vectors, max_new_tokens=1)
    assert_same(before, state_of(touched))


# Files

SMALL: dict[str, Any] = {"shots": 1, "n_dev": 2, "n_test": 2, "substitutes": 1, "max_new_tokens": 1, "layers": [0, 3]}
TASKS = [TASK, tv.Task("lower", ("A", "BB", "COLD", "DOG", "FOX", "WET", "X"), str.lower)]


@pytest.fixture(scope="module")
def experiment(llama: Twins) -> tv.Experiment:
    return tv.run_experiment(llama.bridge, TASKS, **SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["v.safetensors", "e.json", "e.parquet"])
def test_every_line_of_saving_leaves_the_old_file_or_the_new(
    tmp_path: Path, experiment: tv.Experiment, name: str
) -> None:
    vectors = next(iter(experiment.vectors.values()))
    save = vectors.save if name.startswith("v") else experiment.save
    save(tmp_path / name)
    new, old = (tmp_path / name).read_bytes(), b"the old one"
    with interrupt_at(0, files.__file__) as lines:
        save(tmp_path / name)
    assert len(lines) > 5
    seen = set()
    for line in range(1, len(lines) + 1):
        (tmp_path / name).write_bytes(old)
        with pytest.raises(KeyboardInterrupt), interrupt_at(line, files.__file__):
            save(tmp_path / name)
        assert contents(tmp_path) in ({name: old}, {name: new})
        seen.add(contents(tmp_path)[name])
    assert seen == {old, new}
    (tmp_path / name).unlink()
    with interrupt_at(0, files.__file__) as lines:
        save(tmp_path / name)
    for line in range(1, len(lines) + 1):  # and if there was no old file
        (tmp_path / name).unlink(missing_ok=True)
        with pytest.raises(KeyboardInterrupt), interrupt_at(line, files.__file__):
            save(tmp_path / name)
        assert contents(tmp_path) in ({}, {name: new})


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_run_interrupted_at_any_of_its_files_resumes(
    llama: Twins, experiment: tv.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    whole = 1 + 2 * len(TASKS)  # the settings, and a vector and a result for each task
    for at in range(1, whole + 1):
        folder = tmp_path / f"run {at}"
        with monkeypatch.context() as patched:
            patched.setattr(os, step, interrupting(getattr(os, step), at))
            with pytest.raises(KeyboardInterrupt):
                tv.run_experiment(llama.bridge, TASKS, **SMALL, folder=folder)
        assert len(contents(folder)) == at - 1
        for path in folder.iterdir():
            if path.suffix == ".safetensors":
                tv.TaskVectors.load(path)
            else:
                assert path.suffix == ".json"
                files.from_json(path.read_bytes())
        assert tv.run_experiment(llama.bridge, TASKS, **SMALL, folder=folder) == experiment
        assert len(contents(folder)) == whole


def test_what_vectors_cost_survives_an_interrupt(llama: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stops after all vectors, before the first result."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(experiments, "tune", interrupting(tuning.tune, 1))
        with pytest.raises(KeyboardInterrupt):
            tv.run_experiment(llama.bridge, TASKS, **SMALL, folder=folder)
    kept = {task.name: read_notes(folder / f"task-{task.name}.safetensors") for task in TASKS}
    assert all(cost["positions"] > 0 and cost["seconds"] > 0 for cost in kept.values())
    actual = tv.run_experiment(llama.bridge, TASKS, **SMALL, folder=folder)
    assert {result.task: result.cost for result in actual.results} == {
        task: tv.Cost(**cost) for task, cost in kept.items()
    }
