"""Which task gives the control `other task`: one that has little to do with the task itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import torch
from torch.nn.functional import cosine_similarity

from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors


def least_similar(i: int, tasks: Sequence[Task], vectors: Callable[[int], TaskVectors]) -> int | None:
    """The task whose vectors are the control for task `i`: of another category or, if there is none, of any. Among
    these, the one that is least similar by name and by the cosine of the vectors. None if there is one task.

    Tasks without a category are not known to differ. `vectors(j)` gives the mean vectors of task `j`.
    """
    candidates = dissimilar(i, tasks)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    own = vectors(i)
    return min(candidates, key=lambda j: _name_similarity(tasks[i], tasks[j]) + _cosine(own, vectors(j)))


def dissimilar(i: int, tasks: Sequence[Task]) -> list[int]:
    """The tasks of another category than task `i`; all others if there are none."""
    others = [j for j in range(len(tasks)) if j != i]
    category = tasks[i].category
    return [j for j in others if category and tasks[j].category not in ("", category)] or others


def _name_similarity(one: Task, other: Task) -> float:
    """How alike two names are, 0 to 1."""
    return SequenceMatcher(None, one.name, other.name).ratio()


def _cosine(one: TaskVectors, other: TaskVectors) -> float:
    """The mean cosine over the layers that both have; 0 if there are none."""
    shared = [layer for layer in one.layers if layer in other.layers]
    if not shared:
        return 0.0
    first, second = (torch.stack([each.at(layer).mean(dim=0) for layer in shared]) for each in (one, other))
    return float(cosine_similarity(first, second, dim=-1).mean())
