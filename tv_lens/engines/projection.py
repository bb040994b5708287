"""What attention heads add to the residual stream.

A head's output `z[h]` goes through its slice of the output projection, `W_O[h] z[h]`, without the bias. Two kinds of
blocks change the attention's output `a` before they add it: a norm follows in Gemma 2 and 3, OLMo 2 and 3 and GLM 4,
and Granite multiplies by a constant. A norm `gamma * a / rms(a)` is linear once its scale `1 / rms(a)` is known, and
`a` is known, because all heads are. So

    head_output[h] = multiplier * gamma * W_O[h] mean over rows of z[h] / rms(a)

and the heads and the bias still sum to what the block adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from tv_lens.errors import UnsupportedError

# How far the parts may be from the whole, as a share of its length.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Projection:
    """From the heads' outputs of one layer to the residual stream.

    `linear` is the output projection, `norm` the norm that follows the attention, if any; both are the model's own
    modules, so that quantized weights, adapters and offloaded weights need no special treatment.
    """

    linear: nn.Module
    norm: nn.Module | None
    multiplier: float
    n_heads: int
    dtype: torch.dtype
    device: torch.device

    def __call__(self, heads: Float[Tensor, "row width"]) -> Float[Tensor, "head d_model"]:
        """What each head adds to the residual stream, mean over rows; float32.

        Raises:
            UnsupportedError: the heads' parts do not sum to the attention's output.
        """
        scale, direction = self._norm_of(heads)
        weighted = einsum(heads, scale, "row width, row -> width") / len(heads)
        nothing = self._run(self.linear, torch.zeros_like(weighted)[None])
        outputs = direction(self._run(self.linear, self._apart(weighted)) - nothing)
        self._check(heads[:1], nothing)
        return outputs * self.multiplier

    def _apart(self, heads: Float[Tensor, " width"]) -> Float[Tensor, "head width"]:
        """A row for each head, with the others' outputs 0."""
        parts = repeat(torch.zeros_like(heads), "width -> head width", head=self.n_heads).clone()
        by_head = rearrange(heads, "(head d_head) -> head d_head", head=self.n_heads)
        for head, part in enumerate(rearrange(parts, "part (head d_head) -> part head d_head", head=self.n_heads)):
            part[head] = by_head[head]
        return parts

    def _norm_of(
        self, heads: Float[Tensor, "row width"]
    ) -> tuple[Float[Tensor, " row"], Callable[[Float[Tensor, "some d_model"]], Float[Tensor, "some d_model"]]]:
        """The norm's scale for each row, and the rest of the norm: its gain."""
        norm = self.norm
        if norm is None:
            return torch.ones(len(heads), dtype=torch.float32, device="cpu"), lambda output: output

        def gain(output: Float[Tensor, "some d_model"]) -> Float[Tensor, "some d_model"]:
            """gamma * output: the norm of a vector of length one, times the length."""
            length = _rms(output)
            return self._run(norm, output / length) * length

        attention = self._run(self.linear, heads)
        # Not 1 / rms: what the norm adds to the length before it divides counts as well.
        scale = self._run(norm, attention).norm(dim=-1) / gain(attention).norm(dim=-1).clamp_min(1e-12)
        return scale, gain

    def _check(self, heads: Float[Tensor, "row width"], nothing: Float[Tensor, "row d_model"]) -> None:
        """The heads' parts of one row, and the bias, sum to what a norm makes of the whole."""
        if self.norm is None:
            return
        scale, gain = self._norm_of(heads)
        whole = self._run(self.norm, self._run(self.linear, heads))
        by_head = gain(self._run(self.linear, self._apart(heads[0])) - nothing)
        parts = (by_head.sum(dim=0, keepdim=True) + gain(nothing)) * scale
        if float((parts - whole).norm()) > _TOLERANCE * float(whole.norm()):
            raise UnsupportedError(
                f"a {type(self.norm).__name__} follows the attention and does more than scale its output, so no head "
                "can be given a part of it; use function_vector(..., distributed=True)"
            )

    def _run(self, module: nn.Module, values: Float[Tensor, "row width"]) -> Float[Tensor, "row d_model"]:
        output: Tensor = module(values.to(self.device, self.dtype)[None])
        return output[0].float().cpu()


def _rms(vectors: Float[Tensor, "some d_model"]) -> Float[Tensor, "some 1"]:
    return vectors.pow(2).mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-30)
