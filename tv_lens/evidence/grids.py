"""Experiments on the workers of an executor, which keep what they make in a folder that all of them see.

The unit of work is a cell: for one task and seed the vectors of all methods, or the results of all methods. It is not
smaller, because the methods share what is run: the reads of a prompt, the answers without vectors, and what comes
before a vector. The results of a task need the vectors of others, for the control `other task`; they are read from the
folder.
"""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from tv_lens.engines import Engine, Model, engine_for
from tv_lens.errors import GridError, TvLensError
from tv_lens.evidence.checkpoints import Checkpoints
from tv_lens.evidence.experiments import Design, Run, check_tasks, prepare
from tv_lens.evidence.other_tasks import dissimilar, least_similar
from tv_lens.evidence.results import Experiment
from tv_lens.evidence.settings import Settings
from tv_lens.progress import Bar, whole_bar
from tv_lens.tasks import Task

# What workers call to get their model. They import it by its name, so it is a function of a module, not a lambda.
Boot: TypeAlias = Callable[[], Model]

_SEE_PAGE = "see docs/clusters.md"


@dataclass(frozen=True)
class Cell:
    """A unit of work: the vectors of a task by all methods, or their results. `design` and `task` are numbers."""

    kind: Literal["vectors", "results"]
    design: int
    task: int


@dataclass(frozen=True)
class Grid:
    """What is run, as every worker gets it. `marker` is a file by which a worker knows that it sees the folder."""

    boot: Boot
    tasks: tuple[Task, ...]
    designs: tuple[Design, ...]
    folders: tuple[Path, ...]
    marker: Path

    def name(self, cell: Cell) -> str:
        """The cell in words."""
        return f"{cell.kind} of {self.tasks[cell.task].name!r}, seed {self.designs[cell.design].seed}"

    def cells(self) -> list[Cell]:
        """All cells: the vectors first."""
        every = [(design, task) for design in range(len(self.designs)) for task in range(len(self.tasks))]
        return [Cell("vectors", *each) for each in every] + [Cell("results", *each) for each in every]

    def missing(self, kept: Sequence[Checkpoints]) -> dict[Cell, set[Cell]]:
        """The cells that are not in the folders, and for each the missing cells that it needs."""
        missing: dict[Cell, set[Cell]] = {}
        for cell in self.cells():
            name, own = self.tasks[cell.task].name, kept[cell.design]
            if cell.kind == "vectors":
                early = [control.name for control in self.designs[cell.design].early_controls]
                if own.lacks_vectors(name, early):
                    missing[cell] = set()
            elif own.without_result(name) or not self._is_current(cell, own):
                sources = [Cell("vectors", cell.design, i) for i in (cell.task, *dissimilar(cell.task, self.tasks))]
                missing[cell] = {source for source in sources if source in missing}
        return missing

    def _is_current(self, cell: Cell, own: Checkpoints) -> bool:
        """Whether the results of a task have the control `other task` of the tasks that there are now, so far as their
        vectors are known.
        """
        sources = (cell.task, *dissimilar(cell.task, self.tasks))
        for method in own.settings.methods:
            vectors = {j: own.vectors.get((self.tasks[j].name, method)) for j in sources}
            known = {j: each for j, each in vectors.items() if each is not None}
            if len(known) < len(vectors):
                return False
            other = least_similar(cell.task, self.tasks, known.__getitem__)
            name = None if other is None else self.tasks[other].name
            if own.results[self.tasks[cell.task].name, method].other_task != name:
                return False
        return True


def run_grid(
    boot: Model | Boot,
    tasks: Sequence[Task],
    designs: Mapping[str, Design],
    folder: str | Path | None,
    executor: Executor,
) -> list[Experiment]:
    """The experiments of these designs, each kept in the subfolder of its name.

    Raises:
        TvLensError: a model instead of a function that boots one, no folder, something else than an executor, a folder
            that a worker does not see, or as in one process.
        GridError: cells that failed. All others have been run, and the same call runs only what is missing.
    """
    check_tasks(tasks)
    boot, shared = _checked(boot, folder, executor)
    shared.mkdir(parents=True, exist_ok=True)
    marker = shared / f".{uuid.uuid4().hex}.partial"
    grid = Grid(boot, tuple(tasks), tuple(designs.values()), tuple(shared / name for name in designs), marker)
    marker.touch()
    try:
        opened = executor.submit(open_grid, grid).result()
        pairs = list(zip(grid.folders, opened.settings, strict=True))
        missing = grid.missing([Checkpoints(*pair) for pair in pairs])
        done = len(grid.cells()) - len(missing)
        with whole_bar(len(grid.cells()), "cells", shown=opened.progress) as shown:
            shown.skip(done)
            failed = _run_cells(grid, missing, executor, shown)
    finally:
        marker.unlink(missing_ok=True)
    if failed:
        raise _error(grid, missing, failed, shared) from next(iter(failed.values()))
    kept = [Checkpoints(*pair) for pair in pairs]
    unseen = [grid.name(cell) for cell in grid.missing(kept) if cell.kind == "results"]
    if unseen:
        raise TvLensError(
            f"{shared}: the workers finished {'; '.join(unseen)}, but their files are not there; if the folder is on a "
            "network, call again in a moment"
        )
    return [each.experiment() for each in kept]


def _checked(boot: Model | Boot, folder: str | Path | None, executor: Executor) -> tuple[Boot, Path]:
    if not isinstance(executor, Executor):
        raise TvLensError(
            f"executor is a {type(executor).__name__}, not a concurrent.futures.Executor; of a Dask client pass "
            f"client.get_executor(), and for submitit {_SEE_PAGE}"
        )
    if engine_for.dispatch(type(boot)) is not engine_for.dispatch(object) or not callable(boot):
        raise TvLensError(
            f"model is a {type(boot).__name__}, which cannot be sent to the workers of an executor; pass a function of "
            f"a module that boots and returns it, {_SEE_PAGE}"
        )
    if folder is None:
        raise TvLensError(f"an executor needs folder=, one that all of its workers see, {_SEE_PAGE}")
    return boot, Path(folder).absolute()  # workers may run elsewhere


def _run_cells(
    grid: Grid, cells: Mapping[Cell, set[Cell]], executor: Executor, shown: Bar
) -> dict[Cell, BaseException]:
    """Have every cell run, after those that it needs, and return the errors of those that failed."""
    waiting = {cell: set(needs) for cell, needs in cells.items()}
    running: dict[Future[None], Cell] = {}
    failed: dict[Cell, BaseException] = {}
    try:
        while waiting or running:
            for cell in [cell for cell, needs in waiting.items() if not needs]:
                del waiting[cell]
                try:
                    running[executor.submit(run_cell, grid, cell)] = cell
                except RuntimeError as broken:  # all workers are gone, or the executor was shut down
                    failed[cell] = broken
            if not running:  # what is left needs the vectors of a cell that failed
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                error = CancelledError("it was cancelled") if future.cancelled() else future.exception()
                if error is not None:
                    failed[cell] = error
                    shown.describe(f"{len(failed)} failed")
                    continue
                shown.update()
                for needs in waiting.values():
                    needs.discard(cell)
    finally:
        for future in running:  # after an interrupt; what already runs is kept when it is finished
            future.cancel()
    return failed


def _error(
    grid: Grid, missing: Mapping[Cell, set[Cell]], failed: Mapping[Cell, BaseException], folder: Path
) -> GridError:
    """The one error that lists all cells that failed, those with the same message together."""
    failures = {grid.name(cell): error for cell, error in failed.items()}
    alike: dict[str, list[str]] = {}
    for name, error in failures.items():
        alike.setdefault(f"{type(error).__name__}: {error}", []).append(name)
    held_up = sum(bool(needs & failed.keys()) for cell, needs in missing.items() if cell not in failed)
    lines = [f"  {'; '.join(names)}: {message}" for message, names in alike.items()]
    return GridError(
        f"{len(failed)} of {len(missing)} cells failed"
        + (f", and {held_up} that need their vectors were not run" if held_up else "")
        + f"; the others are kept in {folder}, and the same call runs only those that are missing:\n"
        + "\n".join(lines),
        failures,
    )


# On the workers


@dataclass(frozen=True)
class Opened:
    """What the first worker says of a grid: the settings of each design, and whether progress is shown."""

    settings: tuple[Settings, ...]
    progress: bool


@dataclass
class _Worker:
    """What a worker process keeps from cell to cell of one grid: the model, and each design with what it has read."""

    engine: Engine
    progress: bool
    runs: dict[int, Run] = field(default_factory=dict)

    def run(self, grid: Grid, design: int) -> Run:
        """The run of a design; of its folder no task has been read."""
        if design not in self.runs:
            self.runs[design] = prepare(self.engine, grid.tasks, grid.designs[design], grid.folders[design], read=())
        return self.runs[design]


# The worker of the grid that was run last, by its marker. A process has one model at a time, and runs one cell at a
# time, as hooks are on the model meanwhile.
_workers: dict[Path, _Worker] = {}
_one_cell = threading.Lock()


@contextmanager
def _worker(grid: Grid) -> Iterator[_Worker]:
    with _one_cell:
        if not grid.marker.exists():
            raise TvLensError(
                f"{socket.gethostname()} does not see the folder {grid.marker.parent}, or the run has ended; use a "
                "folder that all workers see under this name"
            )
        if grid.marker not in _workers:
            _workers.clear()  # before another model is loaded
            engine = engine_for(grid.boot())
            _workers[grid.marker] = _Worker(engine, engine.progress)
            engine.progress = False  # there is one bar, for the whole grid
        yield _workers[grid.marker]


def open_grid(grid: Grid) -> Opened:
    """Check everything that can be checked before the first cell."""
    with _worker(grid) as worker:
        runs = [worker.run(grid, design) for design in range(len(grid.designs))]
        for run in runs:
            run.check_prompts()
        return Opened(tuple(run.settings for run in runs), worker.progress)


def run_cell(grid: Grid, cell: Cell) -> None:
    """Make what is missing of a cell, and keep it in the folder."""
    with _worker(grid) as worker:
        run = worker.run(grid, cell.design)
        if cell.kind == "vectors":
            run.make_vectors(cell.task)
        else:
            run.make_results(cell.task)
