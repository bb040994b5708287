"""From task vectors to the edits that write them: which layer, which positions, overwritten or added.

All checks of what a caller passes are made here, before the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import TypeAlias

import torch
from einops import rearrange

from tv_lens.edits import Edit, Edits, Layers, Positions, Write
from tv_lens.engines import Capability, Engine
from tv_lens.errors import TvLensError, warn
from tv_lens.prompts import Prompt
from tv_lens.vectors import TaskVectors, check_layer

# One layer for all prompts, one for each, or several at once.
LayerChoice: TypeAlias = int | Sequence[int] | Layers


@dataclass(frozen=True)
class Placement:
    """Where and how vectors are written: the keywords that all patching functions share.

    `how=None` writes them the way they are meant: hidden states overwrite, differences are added.
    """

    how: Write | None = None
    positions: Positions = "last"
    keep_demonstrations: bool = False

    def prompts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts as they are run: the queries alone, unless the demonstrations are kept."""
        return list(prompts) if self.keep_demonstrations else [prompt.zero_shot() for prompt in prompts]

    def write(self, vectors: TaskVectors) -> Write:
        """How these vectors are written."""
        return Write(vectors.op) if self.how is None else self.how


def check_vectors(engine: Engine, vectors: TaskVectors, n: int) -> None:
    """Check that vectors can be written into `n` prompts of the engine's model.

    Raises:
        TvLensError: vectors of other sizes than the model's or another number, or an engine that cannot write.
    """
    engine.require(Capability.PATCH)
    if not isinstance(vectors, TaskVectors):
        raise TvLensError(
            f"vectors are a {type(vectors).__name__}; pass the TaskVectors themselves, the layer is chosen by `layer`"
        )
    engine.require_site(vectors.site)
    vectors.check_fits(engine.name, engine.n_layers, engine.info.width(vectors.site))
    if len(vectors) not in (1, n):
        raise TvLensError(
            f"{len(vectors)} vectors for {n} prompts; give one for each prompt, or one for all with vectors.mean()"
        )
    if vectors.model != engine.name:
        warn(
            f"these vectors were read from {vectors.model} and are written into {engine.name}; a task vector means "
            "something only in the model that it was read from"
        )


def edits_for(
    engine: Engine,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    vectors: TaskVectors,
    layer: LayerChoice,
    placement: Placement,
) -> Edits:
    """What is written into each of `prompts`, which are given as they are run, with their token ids.

    `check_vectors` comes first.

    Raises:
        TvLensError: a layer out of range or without a vector, a position that a prompt does not have, or an engine that
            cannot write so.
    """
    n, write = len(prompts), placement.write(vectors)
    _check_write(engine, write, placement.positions)
    rows_at: dict[tuple[int, bool], list[int]] = {}
    for i, (prompt, own) in enumerate(zip(prompts, ids, strict=True)):
        positions = engine.text.positions(prompt, own, placement.positions, i)
        for position in positions:
            # Generated tokens continue the last of the positions.
            every_step = write.every_step and position == positions[-1]
            rows_at.setdefault((position, every_step), []).append(i)
    edits = []
    for number, members in _rows_by_layer(layer, n, vectors, engine).items():
        for (position, every_step), rows in rows_at.items():
            chosen = rows if members is None else [row for row in rows if row in members]
            if chosen:
                edit = _edit(vectors, number, chosen, position, every_step, write)
                edits += _by_head(edit, vectors) if vectors.heads else [edit]
    return Edits(edits)


def _by_head(edit: Edit, vectors: TaskVectors) -> list[Edit]:
    """The same write, into the heads of its layer that the vectors name and no others."""
    by_head = rearrange(edit.value, "row (head d_head) -> head row d_head", head=vectors.n_heads)
    return [replace(edit, value=by_head[head], head=head) for layer, head in vectors.heads if layer == edit.layer]


def _edit(vectors: TaskVectors, layer: int, rows: Sequence[int], position: int, every_step: bool, write: Write) -> Edit:
    index_of_rows = torch.tensor(list(rows), dtype=torch.long, device="cpu")
    values = vectors.values[:, vectors.layers.index(layer)]
    chosen = values.expand(len(rows), -1) if len(values) == 1 else values[index_of_rows]
    return Edit(
        value=chosen if write.strength == 1 else chosen * write.strength,
        rows=index_of_rows,
        layer=layer,
        site=vectors.site,
        position=position,
        op=write.op,
        every_step=every_step,
        keep_norm=write.keep_norm,
    )


def _check_write(engine: Engine, write: Write, positions: Positions) -> None:
    if write.op == "add":
        engine.require(Capability.ADD)
    if write.keep_norm:
        engine.require(Capability.KEEP_NORM)
    if positions != "last":
        engine.require(Capability.POSITIONS)


def _rows_by_layer(
    layer: LayerChoice, n: int, vectors: TaskVectors, engine: Engine
) -> dict[int, frozenset[int] | None]:
    """The layers to write to, and the rows of each; None for all rows."""
    if isinstance(layer, Layers):
        by_layer: dict[int, frozenset[int] | None] = dict.fromkeys(layer)
    else:
        chosen = _numbers(layer, n)
        if isinstance(chosen, int):
            by_layer = {chosen: None}
        else:
            by_layer = {
                number: frozenset(i for i, each in enumerate(chosen) if each == number)
                for number in dict.fromkeys(chosen)
            }
    for number in by_layer:
        check_layer(number, engine.n_layers, engine.name)
        if number not in vectors.layers:
            raise TvLensError(f"{vectors!r} has no vector for layer {number}, only for {list(vectors.layers)}")
    return by_layer


def _numbers(layer: int | Sequence[int], n: int) -> int | list[int]:
    """One number, or one for each prompt; NumPy's and torch's count as numbers."""
    problem = TvLensError(
        f"layer is {layer!r}; give one int, or one int for each of the {n} prompts, or layers(3, 7) for several at once"
    )
    if isinstance(layer, bool):
        raise problem
    try:
        return index(layer)  # type: ignore[arg-type]
    except TypeError:
        pass  # not a single number
    try:
        numbers = [index(each) for each in layer if not isinstance(each, bool)]  # type: ignore[union-attr]
    except TypeError as error:
        raise problem from error
    if isinstance(layer, str) or len(numbers) != n:
        raise problem
    return numbers
