"""Linear task vectors: what demonstrations change in the residual stream, predicted from the query's own state (arXiv
2605.20730).

W, b = argmin sum over prompts |W h_zero + b - (h_few - h_zero)|^2 + penalty |W|^2
patched activation = x + W x + b
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import RESID_POST
from tv_lens.engines import Engine, Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.methods.base import Method, Read
from tv_lens.methods.extraction import read_site, vectors_of
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.tasks import Task
from tv_lens.vectors import LinearMaps, TaskVectors, check_layers


def linear_vector(
    model: Model, prompts: Sequence[Prompt], *, penalty: float = 5.0, layers: Sequence[int] | None = None
) -> TaskVectors:
    """A vector that depends on the query: at every layer the ridge regression, with an intercept, of the effect of the
    demonstrations on the state of the query alone (arXiv 2605.20730, which uses 256 prompts of 30 shots and a penalty
    of about 5).

    h_few is the residual stream after a block at the last token of a few-shot prompt, h_zero the same of the query
    alone. W and b minimize the sum over the prompts of |W h_zero + b - (h_few - h_zero)|^2, plus `penalty` |W|^2.
    Patching adds W x + b to the activation x of the prompt that is patched.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: two prompts or more, with demonstrations.
        penalty: of the ridge regression, above 0.
        layers: the layers to make vectors for, all by default.

    Returns:
        b as the values, one vector for all prompts, and W as `maps`, two factors whose rank is the number of prompts or
        d_model, whichever is less. `maps.lengths` are the mean lengths of W h_zero + b over the prompts. All are
        float32.

    Raises:
        TvLensError: fewer than two prompts, a prompt without demonstrations, a penalty that is not a positive number,
            or no such layer.

    Examples:
        >>> linear = tv.linear_vector(model, prompts, penalty=5.0)
        >>> linear.values.shape, linear.maps.inward.shape
        (torch.Size([1, 4, 32]), torch.Size([4, 4, 32]))
    """
    engine = engine_for(model)
    check_prompts(prompts)
    _check_penalty(penalty)
    if len(prompts) < 2:
        raise TvLensError("one prompt is too few for a regression; give two or more, the paper uses 256")
    for i, prompt in enumerate(prompts):
        if not prompt.examples:
            raise TvLensError(
                f"prompt {i} has no demonstrations, so there is no effect of them to predict; sample the prompts with "
                "shots=1 or more"
            )
    every = range(engine.n_layers)
    chosen = sorted(check_layers(every if layers is None else layers, engine.n_layers, engine.name))
    few = read_site(engine, [[prompt] for prompt in prompts], RESID_POST, "last")[:, chosen]
    zero = read_site(engine, [[prompt.zero_shot()] for prompt in prompts], RESID_POST, "last")[:, chosen]
    intercept, maps = _ridge(zero, few.double() - zero.double(), penalty)
    vectors = vectors_of(
        engine,
        values=rearrange(intercept, "layer d_model -> 1 layer d_model"),
        prompts=prompts,
        substitutes=(),
        site=RESID_POST,
        method=LinearVector.name,
        options={"penalty": float(penalty), "n": len(prompts)},
        layers=chosen,
    )
    return replace(vectors, op="add", maps=maps)


def _ridge(
    states: Float[Tensor, "prompt layer d_model"], effects: Float[Tensor, "prompt layer d_model"], penalty: float
) -> tuple[Float[Tensor, "layer d_model"], LinearMaps]:
    """The intercept and the factors of W at every layer, computed in float64.

    With X and Y the centered states and effects, W^T = (X^T X + penalty)^-1 X^T Y = X^T (X X^T + penalty)^-1 Y. The
    second form is used if there are fewer prompts than dimensions; no matrix of d_model x d_model is made then. Its
    middle is split in two by the Cholesky factor L of X X^T + penalty: inward = L^-1 X, outward = L^-1 Y. Neither
    factor is large then, so that little is lost when they are rounded to float32.
    """
    x, y = states.double(), effects.double()
    x_mean, y_mean = (reduce(each, "prompt layer d_model -> layer 1 d_model", "mean") for each in (x, y))
    x = rearrange(x, "prompt layer d_model -> layer prompt d_model") - x_mean
    y = rearrange(y, "prompt layer d_model -> layer prompt d_model") - y_mean
    n_layers, n, width = x.shape
    if n < width:
        factor = torch.linalg.cholesky(x @ x.mT + penalty * _identity(n))
        inward, outward = (torch.linalg.solve_triangular(factor, each, upper=False) for each in (x, y))
    else:
        inward = _identity(width).expand(n_layers, -1, -1)
        outward = torch.linalg.solve(x.mT @ x + penalty * _identity(width), x.mT @ y)
    intercept = y_mean - x_mean @ inward.mT @ outward
    added = x @ inward.mT @ outward + y_mean
    lengths = reduce(added.norm(dim=-1), "layer prompt -> layer", "mean")
    maps = LinearMaps(inward.float().contiguous(), outward.float().contiguous(), lengths.float())
    return rearrange(intercept, "layer 1 d_model -> layer d_model").float(), maps


def _identity(n: int) -> Float[Tensor, "n n"]:
    return torch.eye(n, dtype=torch.float64, device="cpu")


def _check_penalty(penalty: float) -> None:
    if not (math.isfinite(penalty) and penalty > 0):
        raise TvLensError(f"penalty is {penalty}; use a number above 0, the paper uses about 5")


@dataclass(frozen=True)
class LinearVector(Method):
    """`linear_vector` as a method.

    Attributes:
        penalty: as in `linear_vector`.

    Raises:
        TvLensError: a penalty that is not a positive number.

    Examples:
        >>> str(LinearVector())
        'linear_vector(penalty=5.0)'
    """

    name: ClassVar[str] = "linear_vector"
    penalty: float = 5.0

    def __post_init__(self) -> None:
        _check_penalty(self.penalty)

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector and one linear map per layer, for all prompts."""
        return replace(linear_vector(engine, prompts, penalty=self.penalty), task=task.name)

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """The prompts, and their queries alone."""
        return [Read(each) for prompt in prompts for each in (prompt, prompt.zero_shot())]

    def shuffled(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
        """The prompts with permuted outputs; None if there are too few of them for a regression."""
        return None if len(prompts) < 2 else super().shuffled(prompts, seed)
