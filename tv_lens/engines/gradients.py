"""Gradients of what an engine computed, with an error that says why a model gives none."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.engines.base import Engine
from tv_lens.errors import UnsupportedError


def gradient(engine: Engine, total: Float[Tensor, ""], value: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """The gradient of a number from `forward(grad=True)` with respect to a value that was written.

    Raises:
        UnsupportedError: a model whose own code changes tensors in place that its gradients need.
    """
    try:
        with torch.enable_grad():
            [result] = torch.autograd.grad(total, [value])
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise UnsupportedError(
            f"{engine.name} gives no gradients, because its own code overwrites what they need; vectors cannot be "
            f"learned on it, but extracted ones work ({str(error).splitlines()[0]})"
        ) from error
    return result
