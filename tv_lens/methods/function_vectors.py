"""Function vectors: what the heads that carry a task add to the residual stream (Todd et al. 2024, section 2.3).

FV = sum over the top heads of W_O[l, h] mean[l, h]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import repeat

from tv_lens.edits import HEADS, RESID_POST, Head, Usage
from tv_lens.engines import Capability, Engine, Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.heads import HeadEffects, How, Measure
from tv_lens.methods.base import Method, Read
from tv_lens.methods.extraction import read_site, vectors_of
from tv_lens.methods.heads import NoneKnownError, check_head_vectors, head_effects, read_heads
from tv_lens.prompts import Prompt
from tv_lens.provenance import Option
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors, check_heads


def function_vector(
    model: Model, vectors: TaskVectors, heads: Sequence[tuple[int, int]], *, distributed: bool = False
) -> TaskVectors:
    """The function vector of `heads`: the sum of what they add to the residual stream, mean over prompts (Todd et al.
    2024, section 2.3).

    The bias of the output projection belongs to no head and is left out. In models with a norm after the attention
    (Gemma 2 and 3, OLMo 2 and 3, GLM 4) each head's part has the scale of that norm on the same prompt, and in Granite
    its multiplier, so the vector always has the units of the residual stream.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        vectors: what `read_heads` gives.
        heads: (layer, head) pairs, such as `effects.top(10)`.
        distributed: whether each head's mean output is written at its own layer instead, over the head's own output.
            Write all of them at once with `layers(*vectors.layers)`, or add them to it with `how=add()`.

    Returns:
        The same vector at every layer, meant to be added; or, distributed, one for each layer of the heads.

    Raises:
        TvLensError: vectors that `read_heads` did not make, no heads, one of them twice, or one that does not exist.

    Examples:
        >>> means = tv.read_heads(model, prompts)
        >>> vector = tv.function_vector(model, means, [(1, 0), (2, 3)])
        >>> vector.op, vector.values.shape
        ('add', torch.Size([1, 4, 32]))
    """
    engine = engine_for(model)
    check_head_vectors(engine, vectors)
    chosen = tuple(Head(*pair) for pair in heads)
    if not chosen:
        raise TvLensError("a function vector needs a head or more; effects.top(10) gives some")
    check_heads(chosen, vectors.layers, vectors.n_heads, engine.name)
    options: dict[str, Option] = {"heads": [list(head) for head in chosen], "distributed": distributed}
    options |= {name: vectors.options[name] for name in ("n", "right", "kept") if name in vectors.options}
    if distributed:
        return _distributed(vectors, chosen, options)
    engine.require(Capability.PROJECT)
    total = torch.zeros(engine.d_model, dtype=torch.float32, device="cpu")
    with engine.session():
        for layer in dict.fromkeys(head.layer for head in chosen):
            outputs = engine.head_outputs(vectors.at(layer), layer)
            total += outputs[[head.head for head in chosen if head.layer == layer]].sum(dim=0)
    return replace(
        vectors,
        values=repeat(total, "d_model -> 1 layer d_model", layer=engine.n_layers),
        method=FunctionVector.name,
        site=RESID_POST,
        op="add",
        layers=tuple(range(engine.n_layers)),
        options=options,
        n_heads=0,
        terms=(),
    )


def chosen_heads(vectors: TaskVectors) -> tuple[Head, ...]:
    """The heads whose function vector this is; none if it is something else."""
    listed = vectors.options.get("chosen", vectors.options.get("heads"))
    if vectors.method.removeprefix("mean of ") != FunctionVector.name or not isinstance(listed, list):
        return ()
    return tuple(Head(*pair) for pair in listed)


def _distributed(vectors: TaskVectors, heads: tuple[Head, ...], options: dict[str, Option]) -> TaskVectors:
    layers = tuple(sorted({head.layer for head in heads}))
    values = vectors.values[:, [vectors.layers.index(layer) for layer in layers]].mean(dim=0, keepdim=True)
    at_heads = replace(
        vectors,
        values=values,
        method=FunctionVector.name,
        layers=layers,
        heads=heads,
        options=options,
        terms=(),
        usage=Usage(span="together"),
    )
    return replace(at_heads, values=at_heads.values * at_heads.written)


@dataclass(frozen=True)
class FunctionVector(Method):
    """`function_vector` as a method. The vectors' options hold the chosen heads, the share of known prompts and the
    diagnosis.

    Attributes:
        heads: how many heads, those of the highest average effect; or given heads, such as a published list.
        measure: as in `head_effects`.
        how: as in `head_effects`.
        preselect: the number of heads, chosen by attribution, whose exact effect is measured; 0 for all heads.
        n_corrupted: on how many of the prompts effects are measured.
        corruptions: how many times each of them is corrupted.
        known_only: whether only prompts whose answer's first token the model gets right are used, as in the paper; all
            of them if there is none.
        distributed: as in `function_vector`.

    Raises:
        TvLensError: no heads, or a count out of range.

    Examples:
        >>> method = FunctionVector(heads=((1, 0), (2, 3)), known_only=False)
        >>> method(model, task, prompts, 0).values.shape
        torch.Size([1, 4, 32])
    """

    name: ClassVar[str] = "function_vector"
    heads: int | tuple[tuple[int, int], ...] = 10
    measure: Measure = "probability"
    how: How = "exact"
    preselect: int = 0
    n_corrupted: int = 25
    corruptions: int = 1
    known_only: bool = True
    distributed: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.heads, int):
            object.__setattr__(self, "heads", tuple((int(layer), int(head)) for layer, head in self.heads))
        n_heads = self.heads if isinstance(self.heads, int) else len(self.heads)
        if isinstance(self.heads, bool) or min(n_heads, self.n_corrupted, self.corruptions) < 1 or self.preselect < 0:
            raise TvLensError(f"{self}: heads, n_corrupted and corruptions are 1 or more, preselect is 0 or more")
        if isinstance(self.heads, int) and 0 < self.preselect < self.heads:
            raise TvLensError(f"{self}: {self.preselect} preselected heads are fewer than the {self.heads} wanted")

    @property
    def options(self) -> dict[str, Option]:
        """The method's fields as JSON values."""
        options = super().options
        return options if isinstance(self.heads, int) else {**options, "heads": [list(pair) for pair in self.heads]}

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector for all prompts."""
        vectors, known = self._read(engine, prompts)
        notes: dict[str, Option] = {}
        if isinstance(self.heads, int):
            effects = self.effects(engine, known, vectors, seed)
            chosen = effects.top(min(self.heads, len(effects.heads)))
            notes = {"diagnosis": list(effects.diagnosis)}
        else:
            chosen = tuple(Head(*pair) for pair in self.heads)
        vector = function_vector(engine, vectors, chosen, distributed=self.distributed)
        options = {**vector.options, **self.options, "chosen": [list(head) for head in chosen], **notes}
        return replace(vector, task=task.name, options=options)

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """The heads after the prompts, and how likely the answers are."""
        judged = all(prompt.answer is not None for prompt in prompts)
        return [Read(prompt, HEADS, judged) for prompt in prompts]

    def effects(self, engine: Engine, prompts: Sequence[Prompt], vectors: TaskVectors, seed: int) -> HeadEffects:
        """The effects that choose the heads, from what `read_heads` gives for the prompts.

        Args:
            engine: what runs the model.
            prompts: few-shot prompts.
            vectors: what `read_heads` gives for the prompts.
            seed: of the corruption.

        Returns:
            The effects that choose the heads.
        """
        asked, seeds = prompts[: self.n_corrupted], range(seed, seed + self.corruptions)
        if not self.preselect:
            return head_effects(engine, asked, vectors, measure=self.measure, how=self.how, seeds=seeds)
        quick = head_effects(engine, asked, vectors, measure=self.measure, how="attribution", seeds=seeds)
        heads = quick.top(min(self.preselect, len(quick.heads)))
        return head_effects(engine, asked, vectors, measure=self.measure, seeds=seeds, heads=heads)

    def _read(self, engine: Engine, prompts: Sequence[Prompt]) -> tuple[TaskVectors, Sequence[Prompt]]:
        """The heads' outputs, and the prompts they are from."""
        if not self.known_only:
            return read_heads(engine, prompts), prompts
        try:
            vectors = read_heads(engine, prompts, known_only=True)
        except NoneKnownError:
            vectors = read_heads(engine, prompts)
            return replace(vectors, options={**vectors.options, "kept": 0.0}), prompts
        kept = set(vectors.prompts)
        return vectors, [prompt for prompt in prompts if prompt.text in kept]


@dataclass(frozen=True)
class MeanState(Method):
    """The mean residual stream at the last token of the prompts, added instead of written over: the layer averages that
    Todd et al. 2024 compare function vectors with.

    Examples:
        >>> MeanState()(model, task, prompts, 0).op
        'add'
    """

    name: ClassVar[str] = "mean_state"

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector per prompt and layer."""
        values = read_site(engine, [[prompt] for prompt in prompts], RESID_POST, "last")
        vectors = vectors_of(engine, values, prompts, (), RESID_POST, self.name, {})
        return replace(vectors, op="add", task=task.name)

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """The prompts."""
        return [Read(prompt) for prompt in prompts]
