"""Edits and reads as functions on an activation of shape (batch, pos, ...). Pure torch, differentiable.

The axes after the position are one axis here: a per-head site is n_heads * d_head wide, and a head is a slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tv_lens.edits import Edit, Op
from tv_lens.errors import EngineError


@dataclass(frozen=True)
class _Step:
    """Writes of one kind that are made at once."""

    rows: Int[Tensor, " cell"]
    columns: Int[Tensor, " cell"]
    values: Float[Tensor, "cell width"]
    op: Op
    heads: Int[Tensor, " cell"] | None
    keep_norm: bool

    def apply(self, activation: Float[Tensor, "batch pos width"], d_head: int) -> None:
        target = activation
        cells = [self.rows.to(activation.device), self.columns.to(activation.device)]
        if self.heads is not None:
            target = rearrange(activation, "batch pos (head d_head) -> batch pos head d_head", d_head=d_head)
            cells.append(self.heads.to(activation.device))
        values = self.values.to(activation)
        if self.op == "set":
            target[tuple(cells)] = values
        elif self.keep_norm:
            before = target[tuple(cells)]
            after = before + values
            scale = before.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            target[tuple(cells)] = after * scale
        else:
            target.index_put_(tuple(cells), values, accumulate=True)


def writer(edits: Sequence[Edit], width: int, d_head: int) -> Callable[[Tensor], Tensor]:
    """A function that returns the activation with the edits of one site and layer made, in order.

    `width` is the number of positions that are run.
    """
    steps = _steps(edits, width)

    def write(activation: Tensor) -> Tensor:
        # The model's own tensor may be read elsewhere.
        written = activation.reshape(*activation.shape[:2], -1).clone()
        for step in steps:
            _check_width(step, written, d_head)
            step.apply(written, d_head)
        return written.reshape(activation.shape)

    return write


def reader(
    weights: Float[Tensor, "batch window"] | None, grad: bool
) -> Callable[[Tensor], Float[Tensor, "batch width"]]:
    """A function that returns the last position of an activation, or a weighted sum of the last ones, as float32."""

    def read(activation: Tensor) -> Float[Tensor, "batch width"]:
        flat = activation.reshape(*activation.shape[:2], -1)
        if weights is None:
            last = flat[:, -1].float()
            # Without a copy the whole activation would stay in memory.
            return last if grad else last.clone()
        window = flat[:, -weights.shape[1] :].float()
        counted = weights.to(window)
        window = window.masked_fill(counted[..., None] == 0, 0)  # what a pad holds may be NaN
        return einsum(counted, window, "batch window, batch window width -> batch width")

    return read


def _steps(edits: Sequence[Edit], width: int) -> list[_Step]:
    """The edits in order, neighbors of one kind joined."""
    joined: list[list[Edit]] = []
    for edit in edits:
        last = joined[-1][-1] if joined else None
        same = last is not None and (last.op, last.head is None) == (edit.op, edit.head is None)
        if same and not edit.keep_norm and last is not None and not last.keep_norm:
            joined[-1].append(edit)
        else:
            joined.append([edit])
    return [
        _Step(
            rows=torch.cat([edit.rows for edit in some]),
            columns=torch.cat([torch.full_like(edit.rows, width + edit.position) for edit in some]),
            values=torch.cat([edit.value for edit in some]),
            op=some[0].op,
            heads=None if some[0].head is None else torch.cat([_heads(edit) for edit in some]),
            keep_norm=some[0].keep_norm,
        )
        for some in joined
    ]


def _heads(edit: Edit) -> Int[Tensor, " row"]:
    return torch.full_like(edit.rows, -1 if edit.head is None else edit.head)


def _check_width(step: _Step, activation: Tensor, d_head: int) -> None:
    wide = activation.shape[-1] if step.heads is None else d_head
    if step.values.shape[1] != wide:
        raise EngineError(
            f"a vector of width {step.values.shape[1]} cannot be written into an activation of width {wide}"
        )
    n_heads = activation.shape[-1] // max(1, d_head)
    if step.heads is not None and not bool(((step.heads >= 0) & (step.heads < n_heads)).all()):
        raise EngineError(f"heads {sorted(set(step.heads.tolist()))[:20]} of an activation of {n_heads} heads")
