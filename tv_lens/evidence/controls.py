"""What a vector is held against: random directions, shuffled demonstrations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformer_lens.utilities.statistics import derive_generator

from tv_lens.prompts import Example, Prompt
from tv_lens.vectors import TaskVectors


def random_like(vectors: TaskVectors, n: int, seed: int) -> TaskVectors:
    """`n` random vectors, at each layer as long as the given ones: a direction of its own for each prompt."""
    shape = (n, vectors.n_layers, vectors.d_model)
    noise = torch.randn(shape, generator=derive_generator(seed, "random control"))
    length = vectors.values.norm(dim=-1, keepdim=True)
    return replace(
        vectors,
        values=noise / noise.norm(dim=-1, keepdim=True) * length,
        task="random",
        prompts=(),
        substitutes=(),
        method=f"random, as long as {vectors.method} of {vectors.task!r}",
    )


def shuffle_outputs(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The prompts with the outputs of their demonstrations exchanged, so that none keeps its own place and as few as
    can be are right all the same: where most demonstrations of a prompt have one output, some must be.

    Raises:
        ValueError: a prompt with fewer than two demonstrations.
    """
    draw = random.Random(f"shuffle outputs:{seed}")
    mixed = []
    for i, prompt in enumerate(prompts):
        if prompt.shots < 2:
            raise ValueError(f"prompt {i} has {prompt.shots} demonstrations; outputs are exchanged among 2 or more")
        order = draw.sample(range(prompt.shots), prompt.shots)
        outputs = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle through all
        if any(prompt.examples[j].output == prompt.examples[k].output for j, k in outputs.items()):
            outputs = _most_wrong([example.output for example in prompt.examples], order)
        examples = [Example(each.input, prompt.examples[outputs[j]].output) for j, each in enumerate(prompt.examples)]
        mixed.append(replace(prompt, examples=tuple(examples)))
    return mixed


def _most_wrong(outputs: Sequence[str], order: Sequence[int]) -> dict[int, int]:
    """Whose output each takes, so that the fewest are equal to their own and, of these, none is its own; which of
    the many such exchanges it is goes by `order`.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    n = len(outputs)
    cost = np.array([[(outputs[j] == outputs[k]) + (j == k) / (n + 1) for k in order] for j in order])
    rows, columns = linear_sum_assignment(cost)
    return {order[row]: order[column] for row, column in zip(rows.tolist(), columns.tolist(), strict=True)}
