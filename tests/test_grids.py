"""Grids on several workers: the same table as in one process, and nothing lost or done twice if something fails."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import cells
import pandas as pd
import pytest
import torch

import tv_lens as tv
from tv_lens.evidence import grids
from tv_lens.evidence.comparing import default_conditions

PAGE = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"^```python (\w+)\n(.*?)^```$", PAGE, re.M | re.S))


@pytest.fixture(scope="module")
def one_process() -> tv.Comparison:
    return tv.compare(cells.boot(), cells.TASKS, cells.methods(), **cells.OPTIONS)


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def forkserver() -> str:
    """The way to start processes of which only the first has to import everything."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["transformers", "tv_lens.evidence.grids"])
    return "forkserver"


def run(executor: Executor, folder: Path, **options: Any) -> tv.Comparison:
    """The comparison on an executor; the folder has the results, and what the first method writes."""
    given = {**cells.OPTIONS, **options}
    return tv.compare(cells.boot, cells.TASKS, cells.methods(folder), folder=folder / "run", executor=executor, **given)


def assert_same(actual: tv.Comparison, expected: tv.Comparison) -> None:
    """The same table and results; the methods differ in the folder that they are watched from."""
    assert [each.results for each in actual.experiments] == [each.results for each in expected.experiments]
    tables = [each.estimates().drop(columns="seconds") for each in (actual, expected)]
    pd.testing.assert_frame_equal(tables[0], tables[1])


def calls(folder: Path) -> Counter[str]:
    """How often the first method was called, by task and seed."""
    lines = (folder / "calls").read_text().splitlines()
    return Counter(line.rsplit(" ", 1)[0] for line in lines)


def finished(folder: Path, kind: str = "json") -> dict[Path, int]:
    """The files of finished vectors or results, with the times they were written at."""
    return {path: path.stat().st_mtime_ns for path in folder.glob(f"run/seed-*/task-*.{kind}")}


def test_a_grid_equals_one_process(
    threads: Executor, one_process: tv.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    booted = []
    really = cells.boot

    def boot() -> tv.LocalEngine:
        booted.append(threading.current_thread())
        return really()

    with monkeypatch.context() as patched:
        patched.setattr(cells, "boot", boot)
        actual = run(threads, tmp_path)
    assert len(booted) == 1  # threads share the process and its model
    assert_same(actual, one_process)
    for experiment, expected in zip(actual.experiments, one_process.experiments, strict=True):
        assert experiment.vectors.keys() == expected.vectors.keys()
        for name, vectors in expected.vectors.items():
            assert experiment.vectors[name].values.equal(vectors.values)
    once = {f"{task.name} {seed}": 1 for task in cells.TASKS for seed in (0, 4)}
    assert calls(tmp_path) == once
    before = finished(tmp_path)
    assert len(before) == 2 * 2 * 3
    assert_same(run(threads, tmp_path), one_process)
    assert (finished(tmp_path), calls(tmp_path)) == (before, once)
    assert not list(tmp_path.rglob("*.partial"))


def test_one_process_resumes_what_a_grid_has_begun(threads: Executor, tmp_path: Path) -> None:
    options: dict[str, Any] = {"shots": 2, "n_dev": 3, "n_test": 3, "max_new_tokens": 1, "layers": [1]}
    options["folder"] = tmp_path / "run"
    actual = tv.run_experiment(cells.boot, cells.TASKS, executor=threads, **options)
    for path in [*tmp_path.glob("run/*double*"), *tmp_path.glob("run/*upper.json")]:
        path.unlink()
    again = tv.run_experiment(cells.model(), cells.TASKS, **options)
    assert again == actual
    assert [result.cost for result in again.results] == [result.cost for result in actual.results[:1]] + [
        again.results[1].cost,
        actual.results[2].cost,
    ]


def test_a_grid_with_more_tasks_continues_in_a_folder(threads: Executor, tmp_path: Path) -> None:
    """The vectors of the other tasks are not made again; their control `other task` may be."""
    options: dict[str, Any] = {"shots": 2, "n_dev": 3, "n_test": 3, "max_new_tokens": 1, "layers": [1]}
    options["methods"] = cells.methods(tmp_path)
    folder, tasks = tmp_path / "run", cells.TASKS
    tv.run_experiment(cells.boot, tasks[:2], folder=folder, executor=threads, **options)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    actual = tv.run_experiment(cells.boot, tasks, folder=folder, executor=threads, **options)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}.items()
    assert set(calls(tmp_path).values()) == {2}  # for the vectors, and for the control `shuffled`
    assert actual.results == tv.run_experiment(cells.model(), tasks, **options).results


def test_cells_that_fail_are_listed_and_the_others_continue(
    threads: Executor, one_process: tv.Comparison, tmp_path: Path
) -> None:
    (tmp_path / "fail reverse").touch()
    with pytest.raises(tv.GridError, match="1 of 6 cells failed, and 2 that need their vectors were not run") as raised:
        run(threads, tmp_path, seeds=(0,))
    assert "vectors of 'reverse', seed 0: ArithmeticError: no luck with reverse" in str(raised.value)
    assert set(raised.value.failures) == {"vectors of 'reverse', seed 0"}
    assert isinstance(raised.value.__cause__, ArithmeticError)
    # The results of "upper" need the vectors of "double" alone.
    before, vectors = finished(tmp_path), finished(tmp_path, "safetensors")
    assert {path.name.split("__")[0] for path in before} == {"task-upper"}
    assert (len(before), len(vectors)) == (2, 2 * 2)
    (tmp_path / "fail reverse").unlink()
    assert_same(run(threads, tmp_path, seeds=(0,)), tv.Comparison(one_process.experiments[:1]))
    assert before.items() <= finished(tmp_path).items()
    assert vectors.items() <= finished(tmp_path, "safetensors").items()
    assert calls(tmp_path) == {"upper 0": 1, "double 0": 1, "reverse 0": 2}


class Breaking(ThreadPoolExecutor):
    """An executor of which nothing is left after some cells, as after a shutdown."""

    def __init__(self, cells: int) -> None:
        super().__init__(1)
        self.left = cells

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """Have the function run, or raise RuntimeError."""
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("no workers are left")
        return super().submit(fn, *args, **options)


def test_an_executor_that_breaks_is_an_error_that_lists_what_is_missing(tmp_path: Path) -> None:
    with Breaking(1 + 3) as executor, pytest.raises(tv.GridError, match="3 of 6 cells failed"):
        run(executor, tmp_path, seeds=(0,))
    assert len(finished(tmp_path, "safetensors")) == 2 * 3
    assert not finished(tmp_path)


def test_an_interrupt_cancels_what_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    futures: list[Future[Any]] = []

    class Remembering(ThreadPoolExecutor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
            futures.append(super().submit(fn, *args, **options))
            return futures[-1]

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(grids, "wait", interrupted)
    with Remembering(1) as executor, pytest.raises(KeyboardInterrupt):
        run(executor, tmp_path)
    assert sum(future.cancelled() for future in futures) >= 4
    assert not list(tmp_path.rglob("*.partial"))


def test_what_a_grid_needs_can_be_sent_to_other_processes() -> None:
    needed = (*tv.library().values(), *default_conditions(tv.PAPER, 2), tv.free_text("the {input} is"))
    for each in needed:
        assert type(pickle.loads(pickle.dumps(each))) is type(each)
    assert default_conditions(tv.PAPER, 2) == pickle.loads(pickle.dumps(default_conditions(tv.PAPER, 2)))
    error = pickle.loads(pickle.dumps(tv.GridError("some", {"a": ValueError()})))
    assert str(error) == "some"


def test_wrong_use_of_an_executor_says_what_to_do(threads: Executor, tmp_path: Path, as_users_run_it: None) -> None:
    def compare(model: Any, executor: Any, folder: Path | None = tmp_path / "run", **options: Any) -> None:
        given = {**cells.OPTIONS, **options}
        tv.compare(model, cells.TASKS, cells.methods(), executor=executor, folder=folder, **given)

    engine = cells.boot()
    for wrong in (engine, engine.bridge, "gpt2"):
        with pytest.raises(tv.TvLensError, match=f"model is a {type(wrong).__name__}.* pass a function"):
            compare(wrong, threads)
    with pytest.raises(tv.TvLensError, match="an executor needs folder="):
        compare(cells.boot, threads, folder=None)
    with pytest.raises(tv.TvLensError, match=r"executor is a object, not a concurrent.futures.Executor.*get_executor"):
        compare(cells.boot, object())
    with pytest.raises(tv.TvLensError, match="cannot run a NoneType"):
        compare(print, threads)
    with pytest.raises(tv.TvLensError, match="n_train=0"):
        compare(cells.boot, threads, n_train=0)
    with pytest.raises(tv.TvLensError, match="layer 9"):
        compare(cells.boot, threads, layers=[9])
    with pytest.raises(tv.TvLensError, match="give a list"):
        tv.compare(cells.boot, cells.WORDS, cells.methods(), executor=threads, folder=tmp_path)  # type: ignore[arg-type]
    compare(cells.boot, threads, seeds=(0,))
    with pytest.raises(tv.TvLensError, match="holds a run with other settings .shots was 2, is 3"):
        compare(cells.boot, threads, seeds=(0,), shots=3)
    unseen = grids.Grid(cells.boot, cells.TASKS, (), (), tmp_path / "elsewhere" / "marker")
    with pytest.raises(tv.TvLensError, match="does not see the folder .*elsewhere"):
        grids.open_grid(unseen)


def run_page(name: str, watched: Path, monkeypatch: pytest.MonkeyPatch) -> tv.Comparison:
    """What code of the page gives, on a tiny model and with a watched method."""
    module: Any = types.ModuleType("grid_model")
    module.boot = cells.boot
    monkeypatch.setitem(sys.modules, "grid_model", module)
    monkeypatch.chdir(watched)
    code = CODE[name].replace('"spawn"', '"forkserver"').replace("seeds=(0, 1, 2)", "**options")
    known: dict[str, Any] = {"__name__": "__main__", "options": cells.OPTIONS}
    known |= {"tasks": cells.TASKS, "methods": cells.methods(watched)}
    exec(code.replace('"results"', '"run"'), known)
    actual = known["comparison"]
    assert isinstance(actual, tv.Comparison)
    return actual


def test_a_pool_of_processes_of_which_one_is_killed(
    one_process: tv.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forkserver: str
) -> None:
    """The pool breaks, and the same call with a new pool runs what is missing."""
    (tmp_path / "kill reverse").touch()
    with pytest.raises(tv.GridError, match="BrokenProcessPool") as raised:
        run_page("pool", tmp_path, monkeypatch)
    assert isinstance(raised.value.__cause__, BrokenProcessPool)
    before = finished(tmp_path, "safetensors")
    assert 2 <= len(before) < 2 * 2 * 3
    assert_same(run_page("pool", tmp_path, monkeypatch), one_process)
    assert before.items() <= finished(tmp_path, "safetensors").items()
    assert len(finished(tmp_path)) == 2 * 2 * 3


def test_dask_workers_of_which_one_is_killed(
    one_process: tv.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forkserver: str
) -> None:
    """Dask starts another worker, which runs the cell again; the call does not notice."""
    dask = pytest.importorskip("dask", reason="the extra dask is not installed")
    before: dict[Path, int] = {}
    killed: list[int] = []

    def kill() -> None:
        """End the worker that made the first vectors, as soon as there is a result."""
        end = time.monotonic() + 120
        while not finished(tmp_path) and time.monotonic() < end:
            time.sleep(0.01)
        before.update(finished(tmp_path))
        killed.append(int((tmp_path / "calls").read_text().split()[2]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with dask.config.set({"distributed.worker.multiprocessing-method": forkserver}):
        actual = run_page("dask", tmp_path, monkeypatch)
    killer.join()
    assert killed
    assert 1 <= len(before) < 2 * 2 * 3
    assert_same(actual, one_process)
    assert before.items() <= finished(tmp_path).items()
    assert len(finished(tmp_path)) == 2 * 2 * 3
    assert {path.suffix for path in (tmp_path / "run").rglob("task-*")} == {".json", ".safetensors"}


def test_submitit_jobs_are_futures(one_process: tv.Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter of the page, with jobs that run in this process."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    code = CODE["submitit"].split("\nexecutor = ")[0]
    known: dict[str, Any] = {}
    exec(code, known)
    with known["Jobs"](known["submitit"].AutoExecutor(folder=tmp_path / "jobs", cluster="debug")) as executor:
        assert_same(run(executor, tmp_path, seeds=(0,)), tv.Comparison(one_process.experiments[:1]))


def test_the_rest_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """What boots a model does, and what needs SLURM can at least be compiled."""
    assert set(CODE) == {"boot", "pool", "dask", "slurm", "submitit"}
    monkeypatch.setattr(tv, "demo_model", cells.model)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    known: dict[str, Any] = {}
    exec(CODE["boot"], known)
    assert tv.engine_for(known["boot"]()).name == "tiny-llama"
    for name in ("slurm", "submitit"):
        compile(CODE[name], name, "exec")
