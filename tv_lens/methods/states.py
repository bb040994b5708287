"""State vectors: what all heads give at the query's separator, written at many layers together (arXiv 2404.11225).

state = (z[0], ..., z[m]),    z[l] = outputs of all heads of block l at the separator, before the output projection
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import HEADS, Usage
from tv_lens.engines import Engine, Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.methods.base import Method, Read
from tv_lens.methods.extraction import read_site, vectors_of
from tv_lens.methods.separators import read_separators
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.provenance import Option
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors


def state_vectors(
    model: Model, prompts: Sequence[Prompt], *, last: int = 1, momentum: float | None = None
) -> TaskVectors:
    """One state per prompt: the outputs of all heads, of every layer that has heads, at the query's separator, which is
    the last token (arXiv 2404.11225). It is written over the heads' outputs of the layers 0 to m together, where m is
    the layer that is named in `patch_generate`, `sweep_layers` or `evaluate`.

    s_1, ..., s_k are the states at the last k separators, in the order of the text.

    - Without `momentum` the vector is their mean (inner optimization; the paper uses 7).
    - With `momentum` it is s_k plus the weighted mean of the differences s_2 - s_1, ..., s_k - s_(k-1). The last of
      them has the weight 1, and each one before it `momentum` times that of the next: (sum over i of momentum^(k - i)
      (s_i - s_(i-1))) / (sum over i of momentum^(k - i)), i from 2 to k. With 1 this is the ordinary mean, with 0 the
      last difference alone.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: few-shot prompts.
        last: the number k of separators that are read: the query's, and those of the last demonstrations before it.
        momentum: 0 to 1, or None.

    Returns:
        Vectors of shape (prompt, layer, n_heads * d_head); `by_head` has the heads on a separate axis.

    Raises:
        TvLensError: a model without attention heads, `last` below 1, a prompt with fewer separators, or a momentum that
            is not from 0 to 1, or is given with fewer than two separators.

    Examples:
        >>> tv.state_vectors(model, prompts, last=2).by_head.shape
        torch.Size([4, 4, 4, 8])
    """
    engine = engine_for(model)
    check_prompts(prompts)
    _check(last, momentum)
    if last == 1:
        values = read_site(engine, [[prompt] for prompt in prompts], HEADS, "last")
    else:
        read = read_separators(engine, prompts, HEADS, last)
        values = einsum(read, _weights(last, momentum), "prompt separator layer width, separator -> prompt layer width")
    options: dict[str, Option] = {"last": last, "momentum": momentum}
    vectors = vectors_of(engine, values, prompts, (), HEADS, StateVectors.name, options)
    return replace(vectors, usage=Usage(span="up to"))


def _weights(last: int, momentum: float | None) -> Float[Tensor, " separator"]:
    """How much the state at each separator counts in the vector."""
    if momentum is None:
        return torch.full((last,), 1 / last, dtype=torch.float32, device="cpu")
    before_last = torch.arange(last - 2, -1, -1, dtype=torch.float32, device="cpu")
    differences = momentum**before_last
    differences = differences / differences.sum()
    weights = torch.zeros(last, dtype=torch.float32, device="cpu")
    weights[-1] = 1
    weights[1:] += differences
    weights[:-1] -= differences
    return weights


def _check(last: int, momentum: float | None) -> None:
    if last < 1:
        raise TvLensError(f"last is {last}; use 1 for the query's separator alone, or more for a mean")
    if momentum is None:
        return
    if not 0 <= momentum <= 1:
        raise TvLensError(f"momentum is {momentum}; use a number from 0 to 1, or None for the mean of the states")
    if last < 2:
        raise TvLensError("momentum needs the difference of two states or more; use last=2 or more")


@dataclass(frozen=True)
class StateVectors(Method):
    """`state_vectors` as a method.

    Attributes:
        last: as in `state_vectors`.
        momentum: as in `state_vectors`.

    Raises:
        TvLensError: `last` or `momentum` out of range.

    Examples:
        >>> str(StateVectors(last=7))
        'state_vectors(last=7, momentum=None)'
    """

    name: ClassVar[str] = "state_vectors"
    last: int = 1
    momentum: float | None = None

    def __post_init__(self) -> None:
        _check(self.last, self.momentum)

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector per prompt and layer."""
        return replace(state_vectors(engine, prompts, last=self.last, momentum=self.momentum), task=task.name)

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """The heads after the prompts, if no other separators are read."""
        return [Read(prompt, HEADS) for prompt in prompts] if self.last == 1 else []

    def shuffled(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
        """The prompts with permuted outputs; None if they have fewer separators than are read."""
        too_few = min(prompt.shots for prompt in prompts) + 1 < self.last
        return None if too_few else super().shuffled(prompts, seed)
