"""A run kept in a folder, a file a task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tv_lens.evidence.results import TaskResult, task_result
from tv_lens.files import from_json, to_json, write_whole
from tv_lens.vectors import TaskVectors


class Kept:
    """What a run has found so far: in memory, and in a folder where there is one, a file a task."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.results, self.vectors = folder, dict[str, TaskResult](), dict[str, TaskVectors]()
        self._settings = settings
        if folder is None or not folder.exists():
            return
        whole = folder / "settings.json"
        if whole.exists():
            try:
                before = from_json(whole.read_bytes())
                differ = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{whole}: no settings of an experiment ({error}); use another folder") from error
            if differ:
                told = "; ".join(f"{name} was {before.get(name)}, is {settings.get(name)}" for name in differ)
                raise ValueError(f"{folder} holds a run with other settings ({told}); use another folder for this one")
        elif any(path.suffix != ".partial" for path in folder.iterdir()):  # a killed run can leave one
            raise ValueError(f"{folder} is not empty and holds no experiment; use another folder")
        for name in settings["tasks"]:
            if self._path(name, "json").exists():
                self.results[name] = _read_result(self._path(name, "json"), name)
            if self._path(name, "safetensors").exists():
                self.vectors[name] = TaskVectors.load(self._path(name, "safetensors"))

    def keep_result(self, result: TaskResult) -> None:
        self.results[result.task] = result
        if self.folder is not None:
            write_whole(self._path(result.task, "json"), to_json(asdict(result), indent=1))

    def keep_vector(self, name: str, vectors: TaskVectors) -> None:
        self.vectors[name] = vectors
        if self.folder is not None:
            if not (self.folder / "settings.json").exists():  # not before there is something that they made
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self.folder / "settings.json", to_json(self._settings, indent=1))
            vectors.save(self._path(name, "safetensors"))

    def _path(self, name: str, kind: str) -> Path:
        assert self.folder is not None
        # A task's name may hold what a file's may not; the digest keeps two such names apart.
        plain = "".join(char if char.isalnum() or char in "-_" else "_" for char in name)
        plain = plain.encode()[:80].decode(errors="ignore")  # file systems count bytes
        mark = "" if plain == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.folder / f"task-{plain}{mark}.{kind}"


def _read_result(path: Path, task: str) -> TaskResult:
    try:
        result = task_result(from_json(path.read_bytes()))
        if result.task != task:
            raise ValueError(f"it is of the task {result.task!r}, not {task!r}")
        return result
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: a damaged result ({error!r}); delete it to have the task run again") from error
