"""What the folder of a run or of a comparison has so far, whether it is finished or not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tv_lens.errors import TvLensError
from tv_lens.evidence.checkpoints import Checkpoints, finished_part, kept_settings
from tv_lens.evidence.comparisons import Comparison
from tv_lens.evidence.results import Experiment


class FinishedPart(NamedTuple):
    """What is finished, and in words what is not, except for seeds that have not begun: they leave nothing behind."""

    results: Experiment | Comparison
    unfinished: tuple[str, ...]


def read_folder(folder: Path) -> FinishedPart:
    """What is finished in a folder that `run_experiment` or `compare` keeps: as many results as there are for the same
    methods, and in a comparison the same seeds, of each task.

    Raises:
        OSError: there is no such folder.
        TvLensError: the folder holds something else, a damaged file, or nothing that is finished.
    """
    seeds = [
        each
        for each in folder.iterdir()
        if re.fullmatch(r"seed--?\d+", each.name) and (each / "settings.json").is_file()
    ]
    all_runs = [_opened(each) for each in seeds or [folder]]
    used, methods, tasks = _largest_block(all_runs)
    if not tasks:
        raise TvLensError(f"{folder}: nothing is finished yet of {', '.join(all_runs[0].settings.tasks)}")
    lacking = [
        *(task for task in _unique(each.settings.tasks for each in all_runs) if task not in tasks),
        *(name for name in _unique(each.settings.methods for each in all_runs) if name not in methods),
        *(f"seed {each.settings.seed}" for each in all_runs if each not in used),
    ]
    in_order = sorted(used, key=lambda each: each.settings.seed)
    parts = tuple(finished_part(each, tasks, methods) for each in in_order)
    return FinishedPart(Comparison(parts) if seeds else parts[0], tuple(lacking))


def _largest_block(all_runs: Sequence[Checkpoints]) -> tuple[Sequence[Checkpoints], list[str], list[str]]:
    """Runs, methods and tasks of which every result is there, as many results as possible."""
    by_size = sorted(all_runs, key=lambda each: -len(each.results))
    known = _unique(each.settings.methods for each in all_runs)
    ranked = sorted(known, key=lambda name: -sum(method == name for each in all_runs for _, method in each.results))
    blocks = [
        (by_size[:n_runs], [name for name in known if name in ranked[:n_methods]])
        for n_runs in range(len(all_runs), 0, -1)
        for n_methods in range(len(known), 0, -1)
    ]
    filled = [
        (runs, methods, [task for task in runs[0].settings.tasks if _has_all(runs, task, methods)])
        for runs, methods in blocks
    ]
    return max(filled, key=lambda each: len(each[0]) * len(each[1]) * len(each[2]))


def _has_all(runs: Sequence[Checkpoints], task: str, methods: Sequence[str]) -> bool:
    return all((task, method) in each.results for each in runs for method in methods)


def _unique(groups: Iterable[Iterable[str]]) -> list[str]:
    """All names, each once."""
    return list(dict.fromkeys(name for group in groups for name in group))


def _opened(folder: Path) -> Checkpoints:
    settings = kept_settings(folder)
    if settings is None:
        raise TvLensError(f"{folder} is empty; give the folder of a run")
    return Checkpoints(folder, settings)
