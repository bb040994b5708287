"""What a task's vector is compared with: vectors of the same site, layer and norm that do not hold the task.

A custom control is a class that derives from `Control`, names itself and defines `__call__`.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from transformer_lens.utilities.statistics import derive_generator

from tv_lens.engines import Engine
from tv_lens.errors import TvLensError
from tv_lens.methods import Method
from tv_lens.methods.function_vectors import chosen_heads
from tv_lens.methods.heads import all_heads, read_heads
from tv_lens.prompts import Prompt
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors


@dataclass(frozen=True)
class Treatment:
    """What a control is compared with: `vectors`, made by `method` from `prompts` of `task`.

    `n` is the number of prompts that will be patched, `layers` are those that will be written to (empty if each control
    chooses). `other` gives another task's vector, None if there is no other.
    """

    engine: Engine
    task: Task
    prompts: Sequence[Prompt]
    vectors: TaskVectors
    method: Method
    seed: int
    n: int
    other: Callable[[], TaskVectors] | None = None
    layers: tuple[int, ...] = ()


class Control(ABC):
    """A kind of control. A custom one derives from this class and defines `__call__`, which gets a `Treatment` and
    returns vectors, or None if it does not apply (see `docs/extending.md`).

    An experiment calls those with `runs_model` together with the methods, so that they share reads; they get no other
    task's vector.

    Attributes:
        name: its name in tables.
        description: what it is, on report pages.
        runs_model: whether it runs the model.

    Examples:
        >>> [control.name for control in (RandomDirection(), OtherTask(), ShuffledDemonstrations())]
        ['random', 'other task', 'shuffled']
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    runs_model: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, treatment: Treatment) -> TaskVectors | None:
        """The control's vectors, one for each patched prompt or one for all; None if there can be none."""


@dataclass(frozen=True)
class RandomDirection(Control):
    """For each patched prompt another random direction, as long as the task's vector.

    Examples:
        >>> RandomDirection().description
        "a random vector as long as the task's"
    """

    name: ClassVar[str] = "random"
    description: ClassVar[str] = "a random vector as long as the task's"

    def __call__(self, treatment: Treatment) -> TaskVectors:
        """One vector per patched prompt."""
        return random_like(treatment.vectors, treatment.n, treatment.seed)


@dataclass(frozen=True)
class OtherTask(Control):
    """The vector of another task.

    Examples:
        >>> OtherTask().description
        'the vector of another task'
    """

    name: ClassVar[str] = "other task"
    description: ClassVar[str] = "the vector of another task"

    def __call__(self, treatment: Treatment) -> TaskVectors | None:
        """The other task's vector, if there is another task; to be tried at all its layers."""
        if treatment.other is None:
            return None
        vectors = treatment.other()
        return replace(vectors, usage=replace(vectors.usage, tried=()))


@dataclass(frozen=True)
class ShuffledDemonstrations(Control):
    """The vector that the same method makes of the same prompts, with the outputs of each prompt's demonstrations
    permuted; for a method that learns from answers, with the answers permuted among the prompts (`Method.shuffled`).

    Examples:
        >>> ShuffledDemonstrations().runs_model
        True
    """

    name: ClassVar[str] = "shuffled"
    description: ClassVar[str] = "the vector of demonstrations with permuted outputs, or of permuted answers"
    runs_model: ClassVar[bool] = True

    def __call__(self, treatment: Treatment) -> TaskVectors | None:
        """The mean vector if the task's is one, else one per prompt; None if there is nothing to permute."""
        mixed = treatment.method.shuffled(treatment.prompts, treatment.seed)
        if mixed is None:
            return None
        method = treatment.method.for_control(treatment.layers)
        vectors = method(treatment.engine, treatment.task, mixed, treatment.seed)
        return vectors.mean() if len(treatment.vectors) == 1 else vectors


@dataclass(frozen=True)
class RandomHeads(Control):
    """The function vector of as many other heads, drawn at random for each patched prompt, as long as the task's.

    Examples:
        >>> RandomHeads().name
        'random heads'
    """

    name: ClassVar[str] = "random heads"
    description: ClassVar[str] = "the function vector of as many random other heads, as long as the task's"
    runs_model: ClassVar[bool] = True

    def __call__(self, treatment: Treatment) -> TaskVectors | None:
        """One vector per patched prompt; None if the task's vector is not a summed function vector."""
        chosen = chosen_heads(treatment.vectors)
        if not chosen or treatment.vectors.heads:
            return None
        engine = treatment.engine
        read = read_heads(engine, treatment.prompts)
        outputs = torch.stack([engine.head_outputs(read.at(layer), layer) for layer in read.layers])
        others = [head for head in all_heads(read) if head not in chosen]
        draw = random.Random(f"random heads:{treatment.seed}")
        sets = [draw.sample(others, min(len(chosen), len(others))) for _ in range(treatment.n)]
        slots = [[(read.layers.index(layer), head) for layer, head in each] for each in sets]
        summed = torch.stack([torch.stack([outputs[slot] for slot in each]).sum(dim=0) for each in slots])
        length = treatment.vectors.values.norm(dim=-1, keepdim=True)
        direction = summed / summed.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        return replace(
            treatment.vectors,
            values=direction[:, None] * length,
            usage=replace(treatment.vectors.usage, tried=()),
            prompts=(),
            substitutes=(),
            method=f"random heads, as long as {treatment.vectors.method} of {treatment.vectors.task!r}",
            options={"heads": [[list(head) for head in each] for each in sets]},
            terms=(),
        )


CONTROLS: tuple[Control, ...] = (RandomDirection(), OtherTask(), ShuffledDemonstrations())


def rows_of(vectors: TaskVectors, rows: slice) -> TaskVectors:
    """The vectors of some of the patched prompts; vectors for all prompts, or for positions, as they are."""
    if len(vectors) == 1 or vectors.usage.per_position:
        return vectors
    return replace(vectors, values=vectors.values[rows], prompts=(), substitutes=())


def control_vectors(controls: Sequence[Control], treatment: Treatment) -> dict[str, TaskVectors]:
    """The vectors of each control that there can be, by name."""
    by_name = {control.name: control(treatment) for control in controls}
    return {name: vectors for name, vectors in by_name.items() if vectors is not None}


def check_controls(controls: Sequence[Control]) -> None:
    """Raise TvLensError unless `controls` are controls with different names."""
    names = [control.name for control in controls if isinstance(control, Control)]
    if isinstance(controls, Control) or len(set(names)) < len(controls):
        raise TvLensError(f"controls are {controls!r}; give a list of controls with different names")


def random_like(vectors: TaskVectors, n: int, seed: int) -> TaskVectors:
    """`n` random vectors, at each layer as long as the given ones: another direction for each prompt.

    Vectors of positions get another direction for each position. Linear ones get directions as long as what they add
    on average.
    """
    if vectors.usage.per_position:
        n = len(vectors)
    shape = (n, *vectors.values.shape[1:])
    generator = derive_generator(seed, "random control")
    noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if vectors.heads:  # in these heads alone
        noise = noise * vectors.written
    length = vectors.values.norm(dim=-1, keepdim=True)
    if vectors.maps is not None:
        length = vectors.maps.lengths[None, :, None]
    return replace(
        vectors,
        values=noise / noise.norm(dim=-1, keepdim=True) * length,
        maps=None,
        usage=replace(vectors.usage, tried=()),
        task="random",
        prompts=(),
        substitutes=(),
        method=f"random, as long as {vectors.method} of {vectors.task!r}",
        options={},
        terms=(),
    )
