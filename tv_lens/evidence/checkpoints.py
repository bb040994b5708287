"""A run kept in a folder: its settings, and one file for each vector and each result, written when it is ready."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tv_lens.errors import TvLensError
from tv_lens.evidence.results import Cost, TaskResult
from tv_lens.evidence.settings import Settings
from tv_lens.files import from_typed_json, to_json, write_whole
from tv_lens.vectors import TaskVectors


class Checkpoints:
    """What a run has so far, in memory and in its folder, if it has one.

    Raises:
        TvLensError: the folder holds a run with other settings, something else, or a damaged file.
    """

    def __init__(self, folder: Path | None, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self.results: dict[tuple[str, str], TaskResult] = {}
        self.vectors: dict[tuple[str, str], TaskVectors] = {}
        self.controls: dict[tuple[str, str, str], TaskVectors | None] = {}
        self.costs: dict[tuple[str, str], Cost] = {}
        if folder is None or not folder.exists():
            return
        self._check_folder(folder)
        for task in settings.tasks:
            for method in settings.methods:
                if self._path(task, method, "json").exists():
                    self.results[task, method] = self._read_result(task, method)
                if self._path(task, method, "safetensors").exists():
                    self.vectors[task, method] = self._read_vectors(task, method)
                if (task, method) not in self.results:
                    self._read_controls(task, method)

    def keep_vectors(self, task: str, method: str, vectors: TaskVectors, cost: Cost) -> TaskVectors:
        """Keep a task's vectors, and in memory what they cost; the vectors are returned."""
        self.vectors[task, method], self.costs[task, method] = vectors, cost
        if self.folder is not None:
            path = self.folder / "settings.json"
            if not path.exists():  # only once there is something to keep
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, to_json(self.settings, indent=1))
            vectors.save(self._path(task, method, "safetensors"))
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

    def _check_folder(self, folder: Path) -> None:
        path = folder / "settings.json"
        if not path.exists():
            if any(each.suffix != ".partial" for each in folder.iterdir()):  # a killed run can leave one
                raise TvLensError(f"{folder} is not empty and holds no experiment; use another folder")
            return
        try:
            before = from_typed_json(path.read_bytes(), Settings)
        except TvLensError as error:
            raise TvLensError(f"{path}: no settings of an experiment ({error}); use another folder") from error
        differences = before.differences(self.settings)
        if differences:
            raise TvLensError(
                f"{folder} holds a run with other settings ({'; '.join(differences)}); use another folder for this one"
            )

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

    def _read_controls(self, task: str, method: str) -> None:
        for control in self.settings.controls:
            if self._path(task, method, "safetensors", control).exists():
                self.controls[task, method, control] = self._read_vectors(task, method, control)

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

    def _path(self, task: str, method: str, kind: str, control: str = "") -> Path:
        assert self.folder is not None
        name = task if len(self.settings.methods) == 1 else f"{task}, {method}"
        if control:
            name += f", control {control}"
        # A task's name may hold what a file's may not; the digest keeps two such names apart.
        plain = "".join(char if char.isalnum() or char in "-_" else "_" for char in name)
        plain = plain.encode()[:80].decode(errors="ignore")  # file systems count bytes
        mark = "" if plain == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.folder / f"task-{plain}{mark}.{kind}"
