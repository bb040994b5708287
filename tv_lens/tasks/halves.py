"""How an experiment splits a task and samples its prompts."""

from __future__ import annotations

from typing import NamedTuple

from tv_lens.prompts import Prompt, PromptFormat
from tv_lens.tasks.task import Task


class Half(NamedTuple):
    """One of two parts of a task that share no input, and the prompts from it."""

    task: Task
    prompts: list[Prompt]


def dev_and_test(
    task: Task, n_dev: int, n_test: int, *, shots: int, seed: int, template: PromptFormat
) -> tuple[Half, Half]:
    """Disjoint halves in the proportion of dev to test prompts, each with that many prompts, or as many as it has
    inputs.

    Raises:
        TvLensError: too few inputs.
    """
    dev, test = (
        Half(part, part.sample(min(n, len(part)), shots=shots, seed=seed, template=template))
        for part, n in zip(task.split(n_dev / (n_dev + n_test), seed=seed), (n_dev, n_test), strict=True)
    )
    return dev, test
