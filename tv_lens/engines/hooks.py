"""Edits and reads as functions on an activation of shape (batch, pos, ...). Pure torch, differentiable.

The axes after the position are one axis here: a per-head site is n_heads * d_head wide, and a head is a slice of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tv_lens.edits import Edit, LinearMap, Op
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
    linear: LinearMap | None

    def apply(self, activation: Float[Tensor, "batch pos width"], d_head: int) -> None:
        target = activation
        cells = [self.rows.to(activation.device), self.columns.to(activation.device)]
        if self.heads is not None:
            target = rearrange(activation, "batch pos (head d_head) -> batch pos head d_head", d_head=d_head)
            cells.append(self.heads.to(activation.device))
        values = self.values.to(activation)
        if self.op == "set":
            target[tuple(cells)] = values
        elif self.depends_on_activation:
            before = target[tuple(cells)]
            target[tuple(cells)] = self.changed(before, values)
        else:
            target.index_put_(tuple(cells), values, accumulate=True)

    @property
    def depends_on_activation(self) -> bool:
        """Whether what is written depends on what was there, so that it cannot be joined with another write."""
        return self.op == "rotate" or self.keep_norm or self.linear is not None

    def joins(self, other: _Step) -> bool:
        """Whether the two can be written at once."""
        alike = (self.op, self.heads is None) == (other.op, other.heads is None)
        return alike and not self.depends_on_activation and not other.depends_on_activation

    def changed(
        self, before: Float[Tensor, "cell width"], values: Float[Tensor, "cell width"]
    ) -> Float[Tensor, "cell width"]:
        """What is written over `before`."""
        if self.op == "rotate":
            # In half precision the small turns of many layers would be lost in rounding.
            dtype = torch.promote_types(before.dtype, torch.float32)
            x, toward = before.to(dtype), self.values.to(before.device, dtype)
            opposed = -cosine_similarity(x, toward, dim=-1)
            turned = normalize(x, dim=-1) + (1 + opposed.clamp_min(0))[:, None] * toward
            rotated: Tensor = normalize(turned, dim=-1) * x.norm(dim=-1, keepdim=True)
            return rotated.to(before)
        after = before + (values if self.linear is None else self.added(before, self.linear))
        if not self.keep_norm:
            return after
        scale = before.norm(dim=-1, keepdim=True) / after.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        scaled: Tensor = after * scale
        return scaled

    def added(self, before: Float[Tensor, "cell width"], linear: LinearMap) -> Float[Tensor, "cell width"]:
        """The values and the linear function of `before`, summed in float32 or better because they nearly cancel."""
        dtype = torch.promote_types(before.dtype, torch.float32)
        values, inward, outward = (
            each.to(before.device, dtype) for each in (self.values, linear.inward, linear.outward)
        )
        return (values + before.to(dtype) @ inward.T @ outward).to(before)


def writer(edits: Sequence[Edit], width: int, d_head: int) -> Callable[[Tensor], Tensor]:
    """A function that returns the activation with the edits of one site and layer made, in order.

    `width` is the number of positions that are run.
    """
    return partial(_written, _steps(edits, width), d_head)


def _written(steps: Sequence[_Step], d_head: int, activation: Tensor) -> Tensor:
    # The model's own tensor may be read elsewhere.
    written = activation.reshape(*activation.shape[:2], -1).clone()
    for step in steps:
        _check_width(step, written, d_head)
        step.apply(written, d_head)
    return written.reshape(activation.shape)


def reader(
    weights: Float[Tensor, "batch *sum window"] | None, grad: bool
) -> Callable[[Tensor], Float[Tensor, "batch *sum width"]]:
    """A function that returns the last position of an activation, or weighted sums of the last ones, as float32."""
    return partial(_read, weights, grad)


def _read(
    weights: Float[Tensor, "batch *sum window"] | None, grad: bool, activation: Tensor
) -> Float[Tensor, "batch *sum width"]:
    flat = activation.reshape(*activation.shape[:2], -1)
    if weights is None:
        last = flat[:, -1].float()
        # Without a copy the whole activation would stay in memory.
        return last if grad else last.clone()
    window = flat[:, -weights.shape[-1] :].float()
    counted = weights.to(window)
    is_read = reduce(counted != 0, "batch ... window -> batch window", "any")
    window = window.masked_fill(~is_read[..., None], 0)  # what a pad holds may be NaN
    return einsum(counted, window, "batch ... window, batch window width -> batch ... width")


def weighted(
    row: Float[Tensor, "layer pos width"], weights: Float[Tensor, "*sum window"] | None
) -> Float[Tensor, "layer *sum width"]:
    """The last position of one whole row, or weighted sums of its last ones."""
    if weights is None:
        return row[:, -1]
    window = min(weights.shape[-1], row.shape[1])
    return einsum(weights[..., -window:], row[:, -window:], "... pos, layer pos width -> layer ... width")


def _steps(edits: Sequence[Edit], width: int) -> list[_Step]:
    """The edits in order, neighbors of one kind joined."""
    joined: list[list[_Step]] = []
    for edit in edits:
        step = _Step(
            rows=edit.rows,
            columns=torch.full_like(edit.rows, width + edit.position),
            values=edit.value,
            op=edit.op,
            heads=None if edit.head is None else torch.full_like(edit.rows, edit.head),
            keep_norm=edit.keep_norm,
            linear=edit.linear,
        )
        if joined and step.joins(joined[-1][-1]):
            joined[-1].append(step)
        else:
            joined.append([step])
    return [_as_one(some) for some in joined]


def _as_one(steps: Sequence[_Step]) -> _Step:
    """Steps that can be joined, as one."""
    heads = [step.heads for step in steps if step.heads is not None]
    return replace(
        steps[0],
        rows=torch.cat([step.rows for step in steps]),
        columns=torch.cat([step.columns for step in steps]),
        values=torch.cat([step.values for step in steps]),
        heads=torch.cat(heads) if heads else None,
    )


def _check_width(step: _Step, activation: Tensor, d_head: int) -> None:
    wide = activation.shape[-1] if step.heads is None else d_head
    if step.values.shape[1] != wide:
        raise EngineError(
            f"a vector of width {step.values.shape[1]} cannot be written into an activation of width {wide}"
        )
    n_heads = activation.shape[-1] // max(1, d_head)
    if step.heads is not None and not bool(((step.heads >= 0) & (step.heads < n_heads)).all()):
        raise EngineError(f"heads {sorted(set(step.heads.tolist()))[:20]} of an activation of {n_heads} heads")
