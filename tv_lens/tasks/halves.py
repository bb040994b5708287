"""How an experiment splits a task and samples its prompts."""

from __future__ import annotations

from typing import NamedTuple

from tv_lens.errors import TvLensError
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


class Parts(NamedTuple):
    """What an experiment uses a task's inputs for. `development` has the inputs of `train` and `dev`, whose
    demonstrations are drawn from all of it; `test` has the others.
    """

    development: Task
    train: list[Prompt]
    dev: list[Prompt]
    test: Task
    test_prompts: list[Prompt]


def train_dev_test(
    task: Task, n_train: int | None, n_dev: int, n_test: int, *, shots: int, seed: int, template: PromptFormat
) -> Parts:
    """Prompts that vectors are made from, that choose the layer, and that are reported. Train and dev prompts have
    different queries; without `n_train` they are the same prompts. A task with too few inputs gives fewer of each.

    Raises:
        TvLensError: too few inputs.
    """
    half, test = dev_and_test(task, (n_train or 0) + n_dev, n_test, shots=shots, seed=seed, template=template)
    if n_train is None:
        return Parts(half.task, half.prompts, half.prompts, test.task, test.prompts)
    n = len(half.prompts)
    if n < 2:
        raise TvLensError(f"task {task.name!r}: one input for training and dev prompts; add inputs, or lower n_test")
    trained = min(max(round(n * n_train / (n_train + n_dev)), 1), n - 1)
    return Parts(half.task, half.prompts[:trained], half.prompts[trained:], test.task, test.prompts)
