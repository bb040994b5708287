"""Choose layers and strengths on dev prompts: for the vectors, and in the same way for each of their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tv_lens.engines import Engine, Prefixes
from tv_lens.errors import TvLensError
from tv_lens.evidence.results import Choice, Sweep, tied_choices
from tv_lens.evidence.scoring import decided_scores
from tv_lens.patching import Placement
from tv_lens.prompts import Prompt
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors


@dataclass(frozen=True)
class Tuned:
    """The sweeps at every strength that was tried, and all choices of the highest accuracy, the one to use first."""

    sweeps: tuple[Sweep, ...]
    ties: tuple[Choice, ...]

    @property
    def choice(self) -> Choice:
        """The layer and strength to use."""
        return self.ties[0]

    @property
    def sweep(self) -> Sweep:
        """The sweep at the chosen strength."""
        [sweep] = [each for each in self.sweeps if each.strength == self.choice.strength]
        return sweep


def tune(  # noqa: PLR0913 - its options are keywords
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    candidates: Mapping[str, TaskVectors],
    *,
    layers: Sequence[int] | None,
    strengths: Sequence[float],
    max_new_tokens: int,
    placement: Placement | None = None,
    preferred: Choice | None = None,
    kept: Prefixes | None = None,
) -> dict[str, Tuned]:
    """The best layer and strength of each of several vectors for the dev `prompts`, all of them swept side by side.

    Each tries the layers in `layers` (None: all) that it is meant to be tried at, and vectors that are added or turned
    toward all strengths. The first candidate is the vector itself, and the others are its controls: if several layers
    are best for a control, it gets the vector's own, if that is among them (`preferred` if no vector is given).
    """
    grid = {name: _cells(vectors, layers, strengths) for name, vectors in candidates.items()}
    conditions = [
        (at_strength(candidates[name], choice.strength), choice.layer)
        for name, choices in grid.items()
        for choice in choices
    ]
    scores = iter(
        decided_scores(engine, task, prompts, conditions, placement or Placement(), max_new_tokens, kept=kept)
    )
    tuned: dict[str, Tuned] = {}
    for name, choices in grid.items():
        scored = dict(zip(choices, scores, strict=False))
        sweeps = tuple(
            Sweep(
                tuple(choice.layer for choice in scored if choice.strength == strength),
                tuple(score for choice, score in scored.items() if choice.strength == strength),
                engine.n_layers,
                strength,
            )
            for strength in dict.fromkeys(choice.strength for choice in choices)
        )
        tuned[name] = Tuned(sweeps, tied_choices(sweeps, preferred))
        if preferred is None:
            preferred = tuned[name].choice
    return tuned


def at_strength(vectors: TaskVectors, strength: float) -> TaskVectors:
    """The vectors, meant to be written so many times as strongly."""
    if strength == 1:
        return vectors
    return replace(vectors, usage=replace(vectors.usage, strength=vectors.usage.strength * strength))


def check_strengths(strengths: Sequence[float | int]) -> tuple[float, ...]:
    """The strengths, each a positive number, given once.

    Raises:
        TvLensError: none, one of them twice, or one that is not a positive number.
    """
    given = tuple(float(each) for each in strengths)
    if not given or len(set(given)) < len(given) or not all(0 < each < float("inf") for each in given):
        raise TvLensError(f"strengths are {strengths!r}; give positive numbers, each once, such as (0.5, 1, 2)")
    return given


def _cells(vectors: TaskVectors, layers: Sequence[int] | None, strengths: Sequence[float]) -> list[Choice]:
    # What overwrites an activation has no strength.
    scaled = (1.0,) if vectors.op == "set" else strengths
    return [Choice(layer, strength) for strength in scaled for layer in _tried(vectors, layers)]


def _tried(vectors: TaskVectors, layers: Sequence[int] | None) -> Sequence[int]:
    """The layers to try: those in `layers` that the vectors are meant to be tried at, or at least have. What is written
    at all its layers at once has nothing to choose.
    """
    if layers is None or vectors.usage.span == "together":
        return vectors.tried_layers
    meant = [layer for layer in vectors.tried_layers if layer in layers]
    return meant or [layer for layer in vectors.layers if layer in layers] or vectors.tried_layers
