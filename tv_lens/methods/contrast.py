"""Directions from contrasts: the mean difference of two lists of texts, and in-context vectors.

mean difference      mean h(positive) - mean h(negative)                                 (Rimsky et al. 2024, section 3)
in-context vector    mean of h(y) - h(x), plus its first principal component             (Liu et al. 2024, section 3)

h is the residual stream after a block, at the last token of a text. Each text is a prompt by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import RESID_POST, Op, Usage, add
from tv_lens.engines import Engine, Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.methods.base import Method, Read
from tv_lens.methods.extraction import read_site, vectors_of
from tv_lens.prompts import Example, Prompt, as_prompts, check_prompts
from tv_lens.provenance import Option
from tv_lens.shuffling import pair_within_sides, swap_demonstrations
from tv_lens.tasks import Task
from tv_lens.tasks.contrast import ContrastivePairs
from tv_lens.vectors import TaskVectors

Direction: TypeAlias = Literal["mean", "pca"]

# Differences that vary by less than this part of their length, which is rounding, have no principal component.
_ROUNDING = 1e-4


def mean_difference(
    model: Model,
    positive: Sequence[Prompt | str] | ContrastivePairs,
    negative: Sequence[Prompt | str] | None = None,
    *,
    direction: Direction = "mean",
    strength: float = 1.0,
) -> TaskVectors:
    """The direction from `negative` to `positive` texts, one vector per layer, to be added at every token of a prompt
    and at every generated token (contrastive activation addition, Rimsky et al. 2024, arXiv 2312.06681, section 3).

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        positive: texts or prompts, or `ContrastivePairs`.
        negative: texts or prompts; None with `ContrastivePairs`.
        direction: "mean", the difference of the two means, for which the lists may differ in length; or "pca", the
            first principal component of the texts' states, each pair centered at its own mean (`pca_center` in repeng),
            of length 1, with the positive texts on its positive side on average. The i-th texts of the lists are then a
            pair.
        strength: what the vectors are multiplied by when they are written (`TaskVectors.usage`).

    Returns:
        One vector for each layer.

    Raises:
        TvLensError: no texts, lists of different lengths for "pca", texts that the model does not distinguish, or
            another direction.

    Examples:
        >>> polite = tv.mean_difference(model, ["Thank you.", "Please."], ["Go."], strength=4.0)
        >>> str(polite.write)
        'add(4, every_step=True)'
    """
    engine = engine_for(model)
    _check_options(direction, strength)
    first, second, name = _two_lists(positive, negative)
    if direction == "pca" and len(first) != len(second):
        raise TvLensError(
            f"{len(first)} positive and {len(second)} negative texts; direction='pca' compares the texts pair by pair, "
            "so give as many of either, or use direction='mean'"
        )
    if direction == "pca":
        _check_pairs(first, second)
    states = _states(engine, [*first, *second])
    positives, negatives = states[: len(first)], states[len(first) :]
    if direction == "mean":
        values = differences = positives.mean(dim=0) - negatives.mean(dim=0)
    else:
        differences = positives - negatives
        values = _principal(differences, differences.mean(dim=0))
    _check_distinguished(differences, states)
    options: dict[str, Option] = {
        "strength": float(strength),
        "direction": direction,
        "positive": len(first),
        "negative": len(second),
    }
    usage = Usage(positions="all", strength=float(strength), every_step=True)
    made = vectors_of(engine, values[None].float(), [*first, *second], (), RESID_POST, MeanDifference.name, options)
    return _as_used(made, name, "add", usage)


def in_context_vector(
    model: Model, demonstrations: Sequence[Prompt] | ContrastivePairs, *, strength: float = 0.1
) -> TaskVectors:
    """The in-context vector of demonstrations (Liu et al. 2024, arXiv 2311.06668, section 3): one direction per layer,
    toward which every activation is turned, at all layers, all tokens of a prompt and all generated tokens.

    For each demonstration h(x) and h(y) are the states of input and output, read as two separate texts. The direction
    is the mean of h(y) - h(x) plus the first principal component of these differences, of length 1 and not against the
    mean. With one demonstration, or equal differences, it is the mean alone. The paper's code takes one component of
    all layers joined, and turns the output of the MLPs; here each layer has its own component, and the residual stream
    after each block is turned.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        demonstrations: prompts, each of whose different demonstrations counts once, or `ContrastivePairs`, from
            negative to positive.
        strength: the paper's lambda, the length of what is added to an activation's direction (`rotate`).

    Returns:
        One vector for each layer, to be written at all layers at once.

    Raises:
        TvLensError: no demonstrations, or outputs that the model does not distinguish from their inputs.

    Examples:
        >>> tv.in_context_vector(model, prompts).values.shape
        torch.Size([1, 4, 32])
    """
    engine = engine_for(model)
    _check_options("mean", strength)
    if isinstance(demonstrations, ContrastivePairs):
        pairs = [Example(*pair) for pair in zip(demonstrations.negative, demonstrations.positive, strict=True)]
        name = demonstrations.name
    else:
        pairs = _demonstrations(demonstrations)
        name = " + ".join(sorted({prompt.task for prompt in demonstrations if prompt.task}))
    inputs, outputs = _sides(pairs)
    _check_pairs(inputs, outputs)
    states = _states(engine, [*inputs, *outputs])
    differences = states[len(inputs) :] - states[: len(inputs)]
    _check_distinguished(differences, states)
    values = _in_context(differences)
    options: dict[str, Option] = {"strength": float(strength), "demonstrations": len(pairs)}
    made = vectors_of(engine, values[None].float(), [*inputs, *outputs], (), RESID_POST, InContextVector.name, options)
    usage = Usage(positions="all", strength=float(strength), every_step=True, span="together")
    return _as_used(made, name, "rotate", usage)


@dataclass(frozen=True)
class MeanDifference(Method):
    """`mean_difference` as a method: from the inputs of the prompts' demonstrations to their outputs, each read as a
    text by itself. Each different demonstration counts once.

    Attributes:
        strength: as in `mean_difference`.
        direction: "mean" or "pca".

    Raises:
        TvLensError: a strength that is not finite, or another direction.

    Examples:
        >>> str(MeanDifference(strength=4.0))
        "mean_difference(strength=4.0, direction='mean')"
    """

    name: ClassVar[str] = "mean_difference"
    strength: float = 1.0
    direction: Direction = "mean"

    def __post_init__(self) -> None:
        _check_options(self.direction, self.strength)

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector for all prompts."""
        inputs, outputs = _sides(_demonstrations(prompts))
        made = mean_difference(engine, outputs, inputs, direction=self.direction, strength=self.strength)
        return replace(made, task=task.name, terms=())

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """Inputs and outputs of the demonstrations, each by itself."""
        return _texts(prompts)

    def shuffled(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
        """The prompts with input and output swapped in half of the demonstrations: a mean difference does not depend on
        which output belongs to which input. A principal component does not depend on the order of a pair either, so for
        "pca" inputs are paired with inputs and outputs with outputs. None if there are too few demonstrations.
        """
        return _paired_within(prompts, seed) if self.direction == "pca" else _swapped(prompts, seed)


@dataclass(frozen=True)
class InContextVector(Method):
    """`in_context_vector` as a method, of all different demonstrations of the prompts.

    Attributes:
        strength: as in `in_context_vector`.

    Raises:
        TvLensError: a strength that is not finite.

    Examples:
        >>> str(InContextVector())
        'in_context_vector(strength=0.1)'
    """

    name: ClassVar[str] = "in_context_vector"
    strength: float = 0.1

    def __post_init__(self) -> None:
        _check_options("mean", self.strength)

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector for all prompts."""
        made = in_context_vector(engine, prompts, strength=self.strength)
        return replace(made, task=task.name, terms=())

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """Inputs and outputs of the demonstrations, each by itself."""
        return _texts(prompts)

    def shuffled(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
        """The prompts with inputs paired with inputs, and outputs with outputs; None if there are too few of them."""
        return _paired_within(prompts, seed)


def _swapped(prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
    """The prompts of the control, None if they show fewer than two demonstrations and their inverses."""
    different = {frozenset(each) for each in _demonstrations(prompts)}
    return swap_demonstrations(prompts, seed) if len(different) > 1 else None


def _paired_within(prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
    return pair_within_sides(prompts, seed) if len(_demonstrations(prompts)) > 3 else None


def _check_options(direction: str, strength: float) -> None:
    add(strength)  # refuses what is not finite
    if direction not in get_args(Direction):
        raise TvLensError(f"direction is {direction!r}; use 'mean' or 'pca'")


def _two_lists(
    positive: Sequence[Prompt | str] | ContrastivePairs, negative: Sequence[Prompt | str] | None
) -> tuple[list[Prompt], list[Prompt], str]:
    """The positive and the negative texts, and their name."""
    if isinstance(positive, ContrastivePairs):
        if negative is not None:
            raise TvLensError(f"{positive!r} holds both lists; leave the second out, or pass two lists of texts")
        return as_prompts(positive.positive), as_prompts(positive.negative), positive.name
    if negative is None:
        raise TvLensError("negative texts are missing; pass two lists of texts, or ContrastivePairs")
    return as_prompts(positive), as_prompts(negative), ""


def _demonstrations(prompts: Sequence[Prompt]) -> list[Example]:
    """Every demonstration of the prompts, once."""
    check_prompts(prompts)
    distinct = list(dict.fromkeys(example for prompt in prompts for example in prompt.examples))
    if not distinct:
        raise TvLensError("the prompts have no demonstrations to compare; sample them with shots=1 or more")
    return distinct


def _sides(pairs: Sequence[Example]) -> tuple[list[Prompt], list[Prompt]]:
    """Inputs and outputs, each a prompt by itself."""
    return as_prompts([pair.input for pair in pairs]), as_prompts([pair.output for pair in pairs])


def _texts(prompts: Sequence[Prompt]) -> list[Read]:
    inputs, outputs = _sides(_demonstrations(prompts))
    return [Read(text) for text in [*inputs, *outputs]]


def _states(engine: Engine, texts: Sequence[Prompt]) -> Float[Tensor, "text layer d_model"]:
    return read_site(engine, [[text] for text in texts], RESID_POST, "last").double()


def _check_pairs(first: Sequence[Prompt], second: Sequence[Prompt]) -> None:
    """Raise TvLensError if there is no difference to take a direction from."""
    if all(one.text == other.text for one, other in zip(first, second, strict=True)):
        raise TvLensError("both texts of every pair are equal, so there is no direction between them; give other texts")


def _check_distinguished(
    differences: Float[Tensor, "*pair layer d_model"], states: Float[Tensor, "text layer d_model"]
) -> None:
    """Raise TvLensError if the states do not differ at all, so that the direction would be rounding."""
    if float(differences.norm()) <= _ROUNDING * float(states.norm()):
        raise TvLensError("the model does not distinguish the two sides, so there is no direction; give other texts")


def _in_context(differences: Float[Tensor, "pair layer d_model"]) -> Float[Tensor, "layer d_model"]:
    """The mean, plus the first principal component of each layer in which the differences vary."""
    mean = differences.mean(dim=0)
    centered = differences - mean
    varies: Tensor = centered.norm(dim=(0, 2)) > _ROUNDING * differences.norm(dim=(0, 2))
    return mean + torch.where(varies[:, None], _principal(centered, mean), 0.0)


def _principal(
    rows: Float[Tensor, "pair layer d_model"], toward: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    """For each layer the direction of unit length along which the rows have the largest sum of squares, and not against
    `toward`.
    """
    by_layer = rearrange(rows, "pair layer d_model -> layer pair d_model")
    directions = torch.stack([torch.linalg.svd(layer, full_matrices=False).Vh[0] for layer in by_layer])
    against = (directions * toward).sum(dim=-1) < 0
    oriented: Tensor = torch.where(against[:, None], -directions, directions)
    return oriented


def _as_used(vectors: TaskVectors, task: str, op: Op, usage: Usage) -> TaskVectors:
    return replace(vectors, task=task, op=op, usage=usage, terms=())
