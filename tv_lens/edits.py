"""Where a vector is written into a model, and how.

    set       activation[row, position] = value
    add       activation[row, position] = activation[row, position] + value
    rotate    activation[row, position] is turned toward value and keeps its length

A `Site` is an activation that every block has. An `Edit` is one write into one site of one layer, for some rows of a
batch; `Edits` are all the writes of a batch. Engines apply them, and methods and evaluations only ever build them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor

from tv_lens.errors import TvLensError

Op = Literal["set", "add", "rotate"]

# Which tokens of a prompt are written to or read from; see `TextCodec.positions`.
Role = Literal["last", "separators", "outputs", "query", "all"]
Positions: TypeAlias = Role | Sequence[int]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Site:
    """An activation in every block. Vectors are read from it and written into it.

    Attributes:
        name: its name in files and messages.
        local_hook: its hook in a `TransformerBridge`.
        remote_hook: its hook in a `RemoteBridge`; None if it cannot be reached there.
        per_head: whether it holds the heads' outputs one after the other, so that its width is n_heads * d_head.

    Examples:
        >>> tv.RESID_POST.local_hook
        'blocks.{layer}.hook_resid_post'
    """

    name: str
    local_hook: str
    remote_hook: str | None = None
    per_head: bool = False

    def __str__(self) -> str:
        return self.name


RESID_POST = Site("resid_post", "blocks.{layer}.hook_resid_post", "blocks.{layer}.hook_out")
"""The residual stream after each block, the default."""
ATTN_OUT = Site("attn_out", "blocks.{layer}.attn.hook_out", "blocks.{layer}.attn.hook_out")
"""The attention's own output, before any norm that follows it (Gemma 2 and 3, OLMo 2 and 3, GLM 4)."""
MLP_OUT = Site("mlp_out", "blocks.{layer}.mlp.hook_out", "blocks.{layer}.mlp.hook_out")
"""The MLP's own output, before any norm that follows it."""
HEADS = Site("heads", "blocks.{layer}.attn.hook_z", per_head=True)
"""The outputs of all attention heads, before the output projection."""
SITES = {site.name: site for site in (RESID_POST, ATTN_OUT, MLP_OUT, HEADS)}


class Head(NamedTuple):
    """An attention head.

    Attributes:
        layer: its block.
        head: its number in the block.

    Examples:
        >>> Head(15, 2).layer
        15
    """

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}.H{self.head}"


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A linear map from an activation to what is added to it, as two factors: x -> (x inward^T) outward."""

    inward: Float[Tensor, "rank width"]
    outward: Float[Tensor, "rank width"]


@dataclass(frozen=True, eq=False)
class Edit:
    """One vector per row, written into one site of one layer at one position. For authors of engines.

    "rotate" turns the activation x toward `value`, which has the length of the strength, and keeps its length (Liu et
    al. 2024, section 3): |x| unit(unit(x) + (1 + max(0, -cos(x, value))) value).

    Attributes:
        value: `value[i]` is written into row `rows[i]` of the batch.
        rows: different rows of the batch.
        layer: the block.
        site: what is written to.
        position: counts from the end of the prompt; -1 is its last token.
        op: "set", "add" or "rotate".
        head: one head of a per-head site.
        every_step: whether the vector is written again at each generated token.
        keep_norm: whether the result of an addition is rescaled to the length that the activation had.
        linear: a function of the activation that an addition also adds, so that it depends on the prompt.

    Raises:
        TvLensError: the parts do not fit together.

    Examples:
        >>> edit = Edit(torch.ones(2, 4), torch.tensor([0, 1]), layer=3, op="add")
        >>> edit.site.name, edit.position
        ('resid_post', -1)
    """

    value: Float[Tensor, "row width"]
    rows: Int[Tensor, " row"]
    layer: int
    site: Site = RESID_POST
    position: int = -1
    op: Op = "set"
    head: int | None = None
    every_step: bool = False
    keep_norm: bool = False
    linear: LinearMap | None = None

    def __post_init__(self) -> None:
        if self.value.ndim != 2 or self.rows.ndim != 1 or len(self.value) != len(self.rows) or not len(self.rows):
            raise TvLensError(
                f"an edit needs one vector for each of its rows, not {tuple(self.value.shape)} for "
                f"{tuple(self.rows.shape)} rows"
            )
        if len(set(self.rows.tolist())) < len(self.rows):
            raise TvLensError(f"an edit names a row twice: {self.rows.tolist()[:20]}; use one edit for each write")
        if self.position >= 0:
            raise TvLensError(
                f"position is {self.position}; positions count from the end of the prompt, -1 is the last"
            )
        if self.layer < 0 or self.op not in get_args(Op):
            raise TvLensError(
                f"layer {self.layer}, op {self.op!r}: a layer is 0 or more, an op is 'set', 'add' or 'rotate'"
            )
        if self.head is not None and not self.site.per_head:
            raise TvLensError(f"{self.site} has no heads; leave head out, or use site=HEADS")
        if self.keep_norm and self.op != "add":
            raise TvLensError("keep_norm rescales the result of an addition; use op='add'")
        if self.linear is not None and (self.op != "add" or self.head is not None):
            raise TvLensError("a linear function of an activation is added to all of it; use op='add' and no head")

    def keep(self, index_of: Int[Tensor, " all"]) -> Edit | None:
        """The edit for a smaller batch: row `r` becomes `index_of[r]`, or is dropped if that is negative.

        Args:
            index_of: for each row of the batch its number in the smaller one, negative if it is dropped.

        Returns:
            The edit for a smaller batch; None if no row is left.
        """
        inside = self.rows < len(index_of)
        rows = torch.full_like(self.rows, -1)
        rows[inside] = index_of[self.rows[inside]]
        kept = rows >= 0
        return replace(self, value=self.value[kept], rows=rows[kept]) if bool(kept.any()) else None


class Edits(tuple[Edit, ...]):
    """The edits of a batch, applied in order. For authors of engines.

    Raises:
        TvLensError: two of them set one cell, so that only the order would decide.

    Examples:
        >>> edits = Edits.per_row(torch.ones(2, 4), torch.tensor([1, 3]))
        >>> [(edit.layer, edit.rows.tolist()) for edit in edits]
        [(1, [0]), (3, [1])]
    """

    def __new__(cls, edits: Iterable[Edit] = ()) -> Edits:
        checked = super().__new__(cls, edits)
        _check_sets(checked)
        return checked

    @staticmethod
    def per_row(  # noqa: PLR0913 - the fields of an Edit
        vectors: Float[Tensor, "row width"],
        layers: Int[Tensor, " row"],
        *,
        site: Site = RESID_POST,
        position: int = -1,
        op: Op = "set",
        head: int | None = None,
        every_step: bool = False,
        keep_norm: bool = False,
    ) -> Edits:
        """One vector and one layer for each row.

        Args:
            vectors: one for each row.
            layers: one for each row.
            site: as in `Edit`.
            position: as in `Edit`.
            op: as in `Edit`.
            head: as in `Edit`.
            every_step: as in `Edit`.
            keep_norm: as in `Edit`.

        Returns:
            One edit for each layer that occurs.
        """
        edits = []
        for layer in sorted(set(layers.tolist())):
            rows = (layers == layer).nonzero().squeeze(1)
            edits.append(
                Edit(
                    vectors[rows],
                    rows,
                    layer,
                    site=site,
                    position=position,
                    op=op,
                    head=head,
                    every_step=every_step,
                    keep_norm=keep_norm,
                )
            )
        return Edits(edits)

    @staticmethod
    def interleave(parts: Sequence[Edits]) -> Edits:
        """The edits of `k` parts for rows in alternation: row `i` of part `j` becomes row `i * k + j`.

        Args:
            parts: the edits of each part.

        Returns:
            The edits of all rows.
        """
        k = len(parts)
        return Edits(replace(edit, rows=edit.rows * k + j) for j, part in enumerate(parts) for edit in part)

    def keep(self, rows: Sequence[int]) -> Edits:
        """The edits for a batch of only these rows, in this order.

        Args:
            rows: the rows that stay, in their new order.

        Returns:
            The edits of these rows.
        """
        if not self:
            return self
        most = max(int(edit.rows.max()) for edit in self)
        index_of = torch.full((max(most, *rows) + 1,), -1, dtype=torch.long, device="cpu")
        index_of[torch.tensor(list(rows), dtype=torch.long, device="cpu")] = torch.arange(len(rows), device="cpu")
        return self._of(edit.keep(index_of) for edit in self)

    def repeat(self, n: int) -> Edits:
        """The edits for a batch in which each row appears `n` times in succession.

        Args:
            n: how many times.

        Returns:
            The edits of the larger batch.
        """

        def repeated(edit: Edit) -> Edit:
            copies = torch.arange(n, device="cpu")
            rows = (edit.rows[:, None] * n + copies).flatten()
            return replace(edit, value=repeat(edit.value, "row width -> (row n) width", n=n), rows=rows)

        return self._of(repeated(edit) for edit in self)

    def before(self, n_tokens: int) -> Edits:
        """The same writes, seen from `n_tokens` later.

        Args:
            n_tokens: how many tokens have been added after the prompt.

        Returns:
            Edits whose positions count from the new end.
        """
        return self._of(replace(edit, position=edit.position - n_tokens) for edit in self)

    def next_step(self) -> Edits:
        """What is written at the next generated token: the edits with `every_step`."""
        return self._of(replace(edit, position=-1) for edit in self if edit.every_step)

    @property
    def reach(self) -> int:
        """How many tokens before the end of the prompt the edits begin; a shared prefix must leave that many."""
        return max((-edit.position for edit in self), default=1)

    @classmethod
    def _of(cls, edits: Iterable[Edit | None]) -> Edits:
        """Edits made from checked ones, which need no second check."""
        return super().__new__(cls, (edit for edit in edits if edit is not None))


def Patch(vectors: Float[Tensor, "row width"], layers: Int[Tensor, " row"]) -> Edits:
    """The name that version 0.1 gave to `Edits.per_row(vectors, layers)`.

    Args:
        vectors: one for each row.
        layers: one for each row.

    Returns:
        One edit for each layer that occurs, at the last token.

    Examples:
        >>> len(Patch(torch.ones(2, 4), torch.tensor([1, 3])))
        2
    """
    return Edits.per_row(vectors, layers)


def _check_sets(edits: Iterable[Edit]) -> None:
    seen: dict[tuple[Site, int, int], list[Edit]] = {}
    for edit in edits:
        if edit.op != "set":
            continue
        others = seen.setdefault((edit.site, edit.layer, edit.position), [])
        for other in others:
            same_head = edit.head == other.head or None in (edit.head, other.head)
            if same_head and bool(torch.isin(edit.rows, other.rows).any()):
                row = edit.rows[torch.isin(edit.rows, other.rows)][0]
                raise TvLensError(
                    f"two edits set {edit.site} of layer {edit.layer} at position {edit.position} in row {row}, and "
                    "only one of them can win; leave one out, or add the second"
                )
        others.append(edit)


@dataclass(frozen=True)
class Write:
    """How vectors are written: `overwrite`, or what `add` and `rotate` return.

    Attributes:
        op: "set", "add" or "rotate".
        strength: what the vector is multiplied by; a rotation's is the length of the vector that is added to the
            activation's direction.
        every_step: as in `add` and `rotate`.
        keep_norm: as in `add`.

    Raises:
        TvLensError: a strength that is not finite.

    Examples:
        >>> tv.add(2.0) == Write("add", strength=2.0)
        True
    """

    op: Op
    strength: float = 1.0
    every_step: bool = False
    keep_norm: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise TvLensError(f"strength is {self.strength}; use a finite number")

    def __str__(self) -> str:
        if self == overwrite:
            return "overwrite"
        every_step = ", every_step=True" if self.every_step else ""
        keep_norm = ", keep_norm=True" if self.keep_norm else ""
        return f"{self.op}({self.strength:g}{every_step}{keep_norm})"


overwrite = Write("set")
"""A value for `how=`: replace the activation by the vector (Hendel et al. 2023)."""


def add(strength: float = 1.0, *, every_step: bool = False, keep_norm: bool = False) -> Write:
    """Add the vector to the activation.

    Args:
        strength: what the vector is multiplied by.
        every_step: whether it is added again at each generated token.
        keep_norm: whether the sum is rescaled to the length that the activation had.

    Returns:
        A value for `how=`.

    Examples:
        >>> str(add(4.0, every_step=True))
        'add(4, every_step=True)'
    """
    return Write("add", float(strength), every_step, keep_norm)


def rotate(strength: float = 0.1, *, every_step: bool = True) -> Write:
    """Turn the activation toward the vector and keep its length; the vector's own length does not matter (Liu et al.
    2024, in-context vectors).

    Args:
        strength: the length of what is added to the activation's direction.
        every_step: whether generated tokens are turned, too.

    Returns:
        A value for `how=`.

    Examples:
        >>> str(rotate(0.1))
        'rotate(0.1, every_step=True)'
    """
    return Write("rotate", float(strength), every_step)


@dataclass(frozen=True)
class Usage:
    """How vectors are meant to be written, if the caller does not say otherwise.

    Attributes:
        positions: as in `patch_generate`.
        strength: as in `add` and `rotate`.
        every_step: as in `add` and `rotate`.
        keep_norm: as in `add`.
        keep_demonstrations: as in `patch_generate`.
        per_position: whether the vectors belong to the positions, one to each in order, instead of to the prompts.
        span: which layers are written to if a layer is named: "one" that layer; "up to" all layers with vectors up to
            it; "together" all layers with vectors, whichever is named, so that a sweep tries only the last.
        tried: the layers that a sweep tries, if these are not all of them.

    Raises:
        TvLensError: another span, or a strength that is not finite.

    Examples:
        >>> Usage(strength=4.0, every_step=True).span
        'one'
    """

    positions: Positions = "last"
    strength: float = 1.0
    every_step: bool = False
    keep_norm: bool = False
    keep_demonstrations: bool = False
    per_position: bool = False
    span: Literal["one", "up to", "together"] = "one"
    tried: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.positions, str):
            object.__setattr__(self, "positions", tuple(self.positions))
        object.__setattr__(self, "tried", tuple(self.tried))
        if self.span not in ("one", "up to", "together") or not math.isfinite(self.strength):
            raise TvLensError(
                f"span is {self.span!r}, strength {self.strength}; a span is 'one', 'up to' or 'together', a strength "
                "is a finite number"
            )


@dataclass(frozen=True)
class Layers:
    """Several layers that are written to in the same pass; made by `layers(3, 7, 12)`.

    Examples:
        >>> Layers((1, 2)) == layers(1, 2)
        True
    """

    numbers: tuple[int, ...]

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


@dataclass(frozen=True)
class ByPrompt:
    """A layer for each prompt; made by `by_prompt(3, 7, 12)`.

    Examples:
        >>> tv.by_prompt(3, 7).numbers
        (3, 7)
    """

    numbers: tuple[int, ...]

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


def by_prompt(*numbers: int) -> ByPrompt:
    """A layer for each prompt: the first is where the first prompt's vector is written, and so on.

    Args:
        *numbers: the layers, one for each prompt.

    Returns:
        A value for `layer=`.

    Raises:
        TvLensError: no layer.

    Examples:
        >>> answers = tv.patch_generate(model, prompts, vector, tv.by_prompt(1, 1, 2, 3), max_new_tokens=1)
    """
    if not numbers:
        raise TvLensError("by_prompt() without a layer; give one for each prompt")
    return ByPrompt(numbers)


def layers(*numbers: int) -> Layers:
    """Several layers at once: each row gets its vector of every one of them, in one pass.

    Args:
        *numbers: the layers.

    Returns:
        A value for `layer=`.

    Raises:
        TvLensError: no layer, or a layer twice.

    Examples:
        >>> layers(3, 7, 12).numbers
        (3, 7, 12)
    """
    if not numbers or len(set(numbers)) < len(numbers):
        raise TvLensError(f"layers{numbers}: give at least one layer, each of them once")
    return Layers(tuple(numbers))
