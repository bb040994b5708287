"""A run kept in a folder: its settings, and one file for each vector and each result, written when it is ready.

A run with more tasks or methods, and all other settings the same, may continue in the folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tv_lens.errors import TvLensError
from tv_lens.evidence.results import Cost, Experiment, TaskResult
from tv_lens.evidence.settings import Settings
from tv_lens.files import from_typed_json, to_json, typed, write_whole
from tv_lens.vector_files import read_notes
from tv_lens.vectors import TaskVectors


class Checkpoints:
    """What a run has so far, in memory and in its folder, if it has one. Only the files of `tasks` are read, by default
    those of all tasks. Several runs with the same settings may share a folder: each file is written whole, and two of
    one name hold the same.

    Raises:
        TvLensError: the folder holds a run with other settings, or with tasks or methods that this one does not have,
            or something else, or a damaged file.
    """

    def __init__(self, folder: Path | None, settings: Settings, tasks: Sequence[str] | None = None) -> None:
        self.folder, self.settings = folder, settings
        self.results: dict[tuple[str, str], TaskResult] = {}
        self.vectors: dict[tuple[str, str], TaskVectors] = {}
        self.controls: dict[tuple[str, str, str], TaskVectors | None] = {}
        self.costs: dict[tuple[str, str], Cost] = {}
        # The files of a run with one method are named after the task alone.
        self._first_method = next(iter(settings.methods))
        if folder is None or not folder.exists():
            return
        before = kept_settings(folder)
        if before is not None:
            self._check_settings(folder, before)
            self._first_method = next(iter(before.methods))
        for task in settings.tasks if tasks is None else tasks:
            self.read(task)

    def read(self, task: str) -> None:
        """Read what the folder has of a task by now."""
        for method in self.settings.methods:
            key = (task, method)
            if key not in self.results and self._has(task, method, "json"):
                self.results[key] = self._read_result(task, method)
            for control in () if key in self.results else self.settings.controls:
                if (*key, control) not in self.controls and self._has(task, method, "safetensors", control):
                    self.controls[(*key, control)] = self._read_vectors(task, method, control)
        self.read_vectors(task)

    def read_vectors(self, task: str) -> None:
        """Read what the folder has of a task's vectors by now."""
        for method in self.settings.methods:
            if (task, method) not in self.vectors and self._has(task, method, "safetensors"):
                self.vectors[task, method] = self._read_vectors(task, method)
                notes = read_notes(self._path(task, method, "safetensors"))
                if notes:
                    self.costs[task, method] = typed(notes, Cost)

    def without_result(self, task: str) -> list[str]:
        """The methods that have no result of this task."""
        return [method for method in self.settings.methods if (task, method) not in self.results]

    def lacks_vectors(self, task: str, controls: Sequence[str]) -> bool:
        """Whether vectors of the task, or of one of these controls, are missing for a method without a result."""
        methods = self.without_result(task)
        return not (
            self.vectors.keys() >= {(task, method) for method in methods}
            and self.controls.keys() >= {(task, method, control) for method in methods for control in controls}
        )

    def keep_vectors(self, task: str, method: str, vectors: TaskVectors, cost: Cost) -> TaskVectors:
        """Keep a task's vectors, and what they cost; the vectors are returned."""
        self.vectors[task, method], self.costs[task, method] = vectors, cost
        if self.folder is not None:
            self._keep_settings(self.folder)
            vectors.save(self._path(task, method, "safetensors"), notes=asdict(cost))
        return vectors

    def keep_control(self, task: str, method: str, control: str, vectors: TaskVectors | None) -> None:
        """Keep the vectors of a control; None if there can be none."""
        self.controls[task, method, control] = vectors
        if self.folder is not None and vectors is not None:
            vectors.save(self._path(task, method, "safetensors", control))

    def keep_result(self, result: TaskResult) -> None:
        """Keep a task's result."""
        self.results[result.task, result.method] = result
        if self.folder is not None:
            write_whole(self._path(result.task, result.method, "json"), to_json(result, indent=1))

    def experiment(self) -> Experiment:
        """All results and vectors.

        Raises:
            KeyError: a result is missing.
        """
        keys = [(task, method) for task in self.settings.tasks for method in self.settings.methods]
        one_method = len(self.settings.methods) == 1
        vectors = {
            task if one_method else f"{task}, {method}": self.vectors[task, method]
            for task, method in keys
            if (task, method) in self.vectors
        }
        return Experiment(self.settings, tuple(self.results[key] for key in keys), vectors)

    def _check_settings(self, folder: Path, before: Settings, *, lacking: bool = False) -> None:
        """Raise TvLensError unless this run continues the one in the folder. With `lacking`, it may have fewer tasks
        and methods than the folder.
        """
        differences = _differences(before, self.settings)
        may_lack = {"tasks", "method"} if lacking else set()
        refused = [text for name, text in differences.items() if name not in may_lack]
        if refused:
            advice = "; to add tasks or methods, name the existing ones as well"
            raise TvLensError(
                f"{folder} holds a run with other settings ({'; '.join(refused)}); use another folder for this one"
                + (advice if {"tasks", "method"} & differences.keys() else "")
            )

    def _keep_settings(self, folder: Path) -> None:
        """Write the settings, once there is something to keep, with the tasks and methods that the folder has now."""
        folder.mkdir(parents=True, exist_ok=True)
        before, settings = kept_settings(folder), self.settings
        if before is not None:  # another run may have begun there in the meantime
            self._check_settings(folder, before, lacking=True)
            settings = _joined(before, self.settings)
            self._first_method = next(iter(before.methods))
        if settings != before:
            write_whole(folder / "settings.json", to_json(settings, indent=1))

    def _read_result(self, task: str, method: str) -> TaskResult:
        path = self._path(task, method, "json")
        try:
            result = from_typed_json(path.read_bytes(), TaskResult)
            if result.task != task:
                raise TvLensError(f"it is of the task {result.task!r}, not {task!r}")
            if result.method != method:
                raise TvLensError(f"it is of the method {result.method!r}, not {method!r}")
            return result
        except TvLensError as error:
            raise TvLensError(f"{path}: a damaged result ({error}); delete it to have the task run again") from error

    def _read_vectors(self, task: str, method: str, control: str = "") -> TaskVectors:
        path, settings = self._path(task, method, "safetensors", control), self.settings
        vectors = TaskVectors.load(path)
        # A control's vectors may be named after something else.
        if vectors.model != settings.model or (vectors.task != task and not control):
            raise TvLensError(
                f"{path}: vectors of {vectors.task!r} and {vectors.model}, not of {task!r} and {settings.model}; "
                "delete it to have them made again"
            )
        if vectors.n_layers != settings.n_layers:
            raise TvLensError(f"{path}: vectors for {vectors.n_layers} layers, not {settings.n_layers}; delete it")
        return vectors

    def _has(self, task: str, method: str, kind: str, control: str = "") -> bool:
        return self.folder is not None and self._path(task, method, kind, control).exists()

    def _path(self, task: str, method: str, kind: str, control: str = "") -> Path:
        assert self.folder is not None
        suffix = f", control {control}" if control else ""
        alone = self.folder / f"{_file_name(task + suffix)}.{kind}"
        # Methods may have been added since the file was written.
        if method == self._first_method and (len(self.settings.methods) == 1 or alone.exists()):
            return alone
        return self.folder / f"{_file_name(f'{task}, {method}{suffix}')}.{kind}"


def kept_settings(folder: Path) -> Settings | None:
    """The settings of the run that a folder holds; None if it is empty.

    Raises:
        TvLensError: the folder holds something else.
    """
    path = folder / "settings.json"
    others = [each for each in folder.iterdir() if each.suffix != ".partial"]  # a killed run can leave one
    if not path.exists():  # looked for last, as another process may be writing it
        if others:
            raise TvLensError(f"{folder} is not empty and holds no experiment; use another folder")
        return None
    try:
        return from_typed_json(path.read_bytes(), Settings)
    except TvLensError as error:
        raise TvLensError(f"{path}: no settings of an experiment ({error}); use another folder") from error


def finished_part(kept: Checkpoints, tasks: Sequence[str], methods: Sequence[str]) -> Experiment:
    """The experiment of some tasks and methods that are finished."""
    part = Checkpoints(None, _part(kept.settings, tasks, methods))
    part.results, part.vectors = kept.results, kept.vectors
    return part.experiment()


def _part(settings: Settings, tasks: Sequence[str], methods: Sequence[str]) -> Settings:
    """The settings of a run with only these tasks and methods."""
    data = {task: settings.data[task] for task in tasks}
    rules = {task: settings.rules[task] for task in tasks}
    return _with(settings, data, rules, {name: settings.methods[name] for name in methods})


def _joined(before: Settings, now: Settings) -> Settings:
    """The settings of a run with the tasks and methods of both, those of `before` first."""
    tasks = dict.fromkeys((*before.tasks, *now.tasks))
    data, rules = {**before.data, **now.data}, {**before.rules, **now.rules}
    return _with(
        now,
        {task: data[task] for task in tasks},
        {task: rules[task] for task in tasks},
        {**before.methods, **now.methods},
    )


def _with(settings: Settings, data: dict[str, str], rules: dict[str, str], methods: dict[str, Any]) -> Settings:
    """The settings with other tasks, those of `data`, and other methods."""
    return replace(settings, tasks=tuple(data), data=data, rules=rules, method=", ".join(methods), methods=methods)


def _differences(before: Settings, now: Settings) -> dict[str, str]:
    """What differs, by setting, but for the tasks and methods that `now` adds."""
    shared: dict[str, Any] = {
        name: {key: now[name].get(key, value) for key, value in before[name].items()}
        for name in ("data", "rules", "methods")
    }
    if set(before.tasks) <= set(now.tasks):
        shared["tasks"] = before.tasks
    if set(before.methods) <= set(now.methods):
        shared["method"] = before.method
    values = {name: (before[name], shared.get(name, now[name])) for name in before}
    return {name: f"{name} was {one}, is {other}" for name, (one, other) in values.items() if one != other}


def _file_name(name: str) -> str:
    # A task's name may hold what a file's may not; the digest keeps two such names apart.
    plain = "".join(char if char.isalnum() or char in "-_" else "_" for char in name)
    plain = plain.encode()[:80].decode(errors="ignore")  # file systems count bytes
    mark = "" if plain == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"task-{plain}{mark}"
