"""From task vectors to the edits that write them: which layer, which positions, overwritten or added.

All checks of what a caller passes are made here, before the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from textwrap import shorten
from types import NoneType
from typing import NamedTuple, TypeAlias

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import normalize

from tv_lens.edits import RESID_POST, ByPrompt, Edit, Edits, Layers, Positions, Write
from tv_lens.engines import Capability, Engine
from tv_lens.errors import TvLensError, warn
from tv_lens.prompts import FreeText, PlainText, Prompt
from tv_lens.vectors import TaskVectors, check_layer

# One layer for all prompts, one for each, or several at once.
LayerChoice: TypeAlias = int | Sequence[int] | ByPrompt | Layers


@dataclass(frozen=True)
class Placement:
    """Where and how vectors are written: the keywords that all patching functions share.

    None is the way that the vectors are meant: hidden states overwrite, differences are added (`TaskVectors.usage`).
    """

    how: Write | None = None
    positions: Positions | None = None
    keep_demonstrations: bool | None = None

    def of(self, vectors: TaskVectors) -> Placed:
        """The same, with what is meant for these vectors in place of None.

        Raises:
            TvLensError: `vectors` are something else.
        """
        check_type(vectors)
        usage, keep = vectors.usage, self.keep_demonstrations
        return Placed(
            vectors.write if self.how is None else self.how,
            usage.positions if self.positions is None else self.positions,
            usage.keep_demonstrations if keep is None else keep,
        )


@dataclass(frozen=True)
class Placed:
    """Where and how certain vectors are written."""

    write: Write
    positions: Positions
    keep_demonstrations: bool

    def prompts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts as they are run: the queries alone, unless the demonstrations are kept."""
        return list(prompts) if self.keep_demonstrations else [prompt.zero_shot() for prompt in prompts]


def check_type(vectors: TaskVectors) -> None:
    """Raise TvLensError unless `vectors` are task vectors."""
    if not isinstance(vectors, TaskVectors):
        raise TvLensError(
            f"vectors are a {type(vectors).__name__}; pass the TaskVectors themselves, the layer is chosen by `layer`"
        )


def checked(
    engine: Engine, prompts: Sequence[Prompt], vectors: TaskVectors | Tensor, layer: LayerChoice, placement: Placement
) -> tuple[TaskVectors, Placed]:
    """What a caller wants to write, and where; with warnings about what was probably not meant.

    Raises:
        TvLensError: something that is not a vector, vectors of other sizes than the model's or another number, or an
            engine that cannot write.
    """
    task_vectors = _as_vectors(engine, vectors, layer, len(prompts))
    placed = placement.of(task_vectors)
    check_vectors(engine, task_vectors, len(prompts))
    _warn_of_differences(engine, prompts, task_vectors)
    return task_vectors, placed


def _as_vectors(engine: Engine, vectors: TaskVectors | Tensor, layer: LayerChoice, n: int) -> TaskVectors:
    """Task vectors as they are; a plain tensor as vectors of the residual stream, which overwrite, for the layers that
    are written to. Its shape is (d_model,), or (prompt, d_model) for one vector per prompt.

    Raises:
        TvLensError: something else, a tensor of another shape, or a layer that the model does not have.
    """
    if not isinstance(vectors, Tensor):
        check_type(vectors)
        return vectors
    width = engine.info.width(RESID_POST)
    rows = vectors[None] if vectors.ndim == 1 else vectors
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) not in (1, n):
        raise TvLensError(
            f"a tensor of shape {tuple(vectors.shape)} cannot be written into {n} prompts of {engine.name}; give "
            f"one of shape ({width},), or ({n}, {width}) for one vector per prompt"
        )
    chosen = list(layer) if isinstance(layer, Layers) else _numbers(layer, n)
    written = sorted({chosen} if isinstance(chosen, int) else set(chosen))
    for number in written:
        check_layer(number, engine.n_layers, engine.name)
    values = repeat(rows.detach().float(), "prompt width -> prompt layer width", layer=len(written))
    return TaskVectors(values, engine.name, "tensor", method="tensor", layers=tuple(written), n_layers=engine.n_layers)


def _warn_of_differences(engine: Engine, prompts: Sequence[Prompt], vectors: TaskVectors) -> None:
    """Warn if vectors are written into prompts of another template, with another BOS, or into the queries at which
    they were read.
    """
    others = {prompt.template for prompt in prompts if not isinstance(prompt.template, (PlainText, FreeText))}
    others.discard(vectors.template)
    if others and not isinstance(vectors.template, (PlainText, FreeText, NoneType)):
        own, other = (shorten(repr(each), 120, placeholder=" ...") for each in (vectors.template, next(iter(others))))
        warn(
            f"these vectors are from prompts of {own} and are written into {other}; a vector may do less in "
            "another template"
        )
    if None not in (vectors.prepend_bos, engine.info.prepend_bos) and vectors.prepend_bos != engine.info.prepend_bos:
        prepended = {True: "with", False: "without"}
        warn(
            f"these vectors are from prompts {prepended[bool(vectors.prepend_bos)]} a BOS token in front and are "
            f"written into prompts {prepended[bool(engine.info.prepend_bos)]} one; use LocalEngine(model, prepend_bos="
            f"{vectors.prepend_bos})"
        )
    # Vectors of single prompts hold other queries: substitutes, or those of the other prompts.
    read = set(vectors.prompts) if len(vectors) == 1 and not vectors.substitutes else set()
    repeated = [i for i, prompt in enumerate(prompts) if prompt.examples and prompt.text in read]
    if repeated:
        warn(
            f"prompt {repeated[0]} (and {len(repeated) - 1} more) is one of those that the vectors are from, read at "
            "its own query: they may hold its answer, not only the task; use other prompts, or substitute queries"
        )


def check_vectors(engine: Engine, vectors: TaskVectors, n: int) -> None:
    """Check that vectors can be written into `n` prompts of the engine's model.

    Raises:
        TvLensError: vectors of other sizes than the model's or another number, or an engine that cannot write.
    """
    engine.require(Capability.PATCH)
    check_type(vectors)
    engine.require_site(vectors.site)
    vectors.check_fits(engine.name, engine.n_layers, engine.info.width(vectors.site))
    if len(vectors) not in (1, n) and not vectors.usage.per_position:
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
    placed: Placed,
) -> Edits:
    """What is written into each of `prompts`, which are given as they are run, with their token ids.

    `check_vectors` comes first.

    Raises:
        TvLensError: a layer out of range or without a vector, a position that a prompt does not have, or an engine that
            cannot write so.
    """
    n, write, named = len(prompts), placed.write, placed.positions
    _check_write(engine, write, named, vectors)
    cells: dict[_Cell, list[int]] = {}
    for i, (prompt, own) in enumerate(zip(prompts, ids, strict=True)):
        positions = engine.text.positions(prompt, own, named, i)
        if vectors.usage.per_position and len(positions) != len(vectors):
            raise TvLensError(
                f"{vectors!r} are for {len(vectors)} positions and prompt {i} has {len(positions)} for {named!r}; use "
                "prompts with as many demonstrations as those that the vectors are from"
            )
        for j, position in enumerate(positions):
            # Generated tokens continue the last of the positions.
            every_step = write.every_step and position == positions[-1]
            cell = _Cell(position, every_step, j if vectors.usage.per_position else None)
            cells.setdefault(cell, []).append(i)
    edits = []
    for number, members in _rows_by_layer(layer, n, vectors, engine).items():
        for cell, rows in cells.items():
            chosen = rows if members is None else [row for row in rows if row in members]
            if chosen:
                edit = _edit(vectors, number, chosen, cell, write)
                edits += _by_head(edit, vectors) if vectors.heads else [edit]
    return Edits(edits)


class _Cell(NamedTuple):
    """Where several prompts are written to: a position, whether its write is repeated at generated tokens, and which
    vector is written, if that depends on the position.
    """

    position: int
    every_step: bool
    vector: int | None


def _by_head(edit: Edit, vectors: TaskVectors) -> list[Edit]:
    """The same write, into the heads of its layer that the vectors name and no others."""
    by_head = rearrange(edit.value, "row (head d_head) -> head row d_head", head=vectors.n_heads)
    return [replace(edit, value=by_head[head], head=head) for layer, head in vectors.heads if layer == edit.layer]


def _edit(vectors: TaskVectors, layer: int, rows: Sequence[int], cell: _Cell, write: Write) -> Edit:
    index_of_rows, slot = torch.tensor(list(rows), dtype=torch.long, device="cpu"), vectors.layers.index(layer)
    values = vectors.values[:, slot]
    if cell.vector is not None:
        values = values[[cell.vector]]
    chosen = values.expand(len(rows), -1) if len(values) == 1 else values[index_of_rows]
    if write.op == "rotate":
        chosen = normalize(chosen, dim=-1)
    linear = None if vectors.maps is None else vectors.maps.at(slot)
    if linear is not None and write.strength != 1:
        linear = replace(linear, outward=linear.outward * write.strength)
    return Edit(
        value=chosen if write.strength == 1 else chosen * write.strength,
        rows=index_of_rows,
        layer=layer,
        site=vectors.site,
        position=cell.position,
        op=write.op,
        every_step=cell.every_step,
        keep_norm=write.keep_norm,
        linear=linear,
    )


def _check_write(engine: Engine, write: Write, positions: Positions, vectors: TaskVectors) -> None:
    if write.op == "add":
        engine.require(Capability.ADD)
    if write.op == "rotate":
        engine.require(Capability.ROTATE)
    if vectors.maps is not None:
        engine.require(Capability.LINEAR)
        if write.op != "add":
            raise TvLensError(f"{vectors!r} is a linear function that is added; use how=add(strength)")
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
        _ask_about(layer, chosen)
        if vectors.usage.span != "one":
            if not isinstance(chosen, int):
                raise TvLensError(f"{vectors!r} are written at several layers at once; give one layer for all prompts")
            check_layer(chosen, engine.n_layers, engine.name)
            by_layer = dict.fromkeys(vectors.written_with(chosen) or (chosen,))
        elif isinstance(chosen, int):
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


def _ask_about(layer: int | Sequence[int] | ByPrompt, chosen: int | list[int]) -> None:
    """Warn of a list that could mean either of two things."""
    if not isinstance(chosen, int) and not isinstance(layer, ByPrompt) and len(set(chosen)) > 1:
        text = ", ".join(map(str, chosen[:4])) + (", ..." if len(chosen) > 4 else "")
        warn(
            f"layer=[{text}] is read as one layer for each of {len(chosen)} prompts; write by_prompt({text}) if you "
            f"mean that, or layers({text}) for every prompt at all of them"
        )


def _numbers(layer: int | Sequence[int] | ByPrompt, n: int) -> int | list[int]:
    """One number, or one for each prompt; NumPy's and torch's count as numbers."""
    shown = layer.numbers if isinstance(layer, ByPrompt) else layer
    problem = TvLensError(
        f"layer is {shown!r}; give one int, or one int for each of the {n} prompts by by_prompt(3, 7), or layers(3, 7) "
        "for several at once"
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
