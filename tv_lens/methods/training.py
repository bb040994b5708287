"""A training: its options, its prompts, and the loop over epochs."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import Positions, Write
from tv_lens.engines import Engine, Prefixes, progress_bar
from tv_lens.errors import TvLensError
from tv_lens.methods.base import as_option
from tv_lens.methods.losses import Examples, Objective, Trainer
from tv_lens.methods.progress import Epoch, Progress
from tv_lens.progress import Bar
from tv_lens.prompts import Prompt, check_prompts


@dataclass(frozen=True)
class Options:
    """The options of a training, checked."""

    objective: Objective
    how: Write
    positions: Positions
    epochs: int
    lr: float | None
    weight_decay: float
    batch_size: int
    patience: int

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise TvLensError(f"objective is {self.objective!r}; use {' or '.join(map(repr, get_args(Objective)))}")
        if not isinstance(self.how, Write) or self.how.op == "rotate":
            raise TvLensError(f"how is {self.how}; a vector is learned with add(strength) or overwrite")
        whole = all(isinstance(number, int) for number in (self.epochs, self.batch_size, self.patience))
        if not whole or self.epochs < 0 or self.batch_size < 1 or self.patience < 1:
            raise TvLensError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, patience={self.patience}: epochs are 0 or more, "
                "the others 1 or more"
            )
        numbers = [each for each in (self.lr, self.weight_decay) if each is not None]
        if not all(isinstance(each, (int, float)) and math.isfinite(each) for each in numbers) or (
            (self.lr is not None and self.lr <= 0) or self.weight_decay < 0
        ):
            raise TvLensError(f"lr={self.lr}, weight_decay={self.weight_decay}: use a number above 0, and 0 or more")

    def as_json(self) -> dict[str, Any]:
        """The options as JSON values, without the number of epochs, which may be raised later."""
        named = {name: as_option(value) for name, value in vars(self).items()}
        if not isinstance(self.positions, str):
            named["positions"] = list(self.positions)
        del named["epochs"]
        return named


@dataclass(frozen=True, eq=False)
class Data:
    """The prompts to train on and those held out, and both as they are run."""

    trained: list[Prompt]
    held_out: list[Prompt]
    examples: Examples
    validated: Examples | None

    @staticmethod
    def of(
        engine: Engine, prompts: Sequence[Prompt], validation: float | Sequence[Prompt], options: Options, seed: int
    ) -> Data:
        """The prompts, checked and split.

        Raises:
            TvLensError: a share out of range, a prompt that cannot be trained on, or a query in both parts.
        """
        if isinstance(validation, (int, float)):
            if not 0 <= validation < 1:
                raise TvLensError(
                    f"validation is {validation}; give prompts, or the share to hold out, from 0 to below 1"
                )
            every = list(prompts)
            count = max(round(validation * len(every)), int(validation > 0)) if len(every) > 1 else 0
            drawn = random.Random(f"validation:{seed}").sample(range(len(every)), len(every))[:count]
        else:
            every = [*prompts, *validation]
            drawn = list(range(len(prompts), len(every)))
            check_prompts(every)
        if options.objective == "few-shot" and not all(prompt.examples for prompt in every):
            raise TvLensError("the few-shot distribution needs demonstrations; sample the prompts with shots=1 or more")
        held = sorted(drawn)
        rest = [i for i in range(len(every)) if i not in set(drawn)]
        shared = {every[i].query for i in held} & {every[i].query for i in rest}
        if shared:
            raise TvLensError(
                f"{len(shared)} queries are in training and in validation prompts ({sorted(shared)[0]!r}, ...), so "
                "validation would reward learning them by heart; use different ones"
            )
        examples = Examples.of(engine, every, options.objective, options.positions)
        return Data(
            [every[i] for i in rest],
            [every[i] for i in held],
            examples.keep(rest),
            examples.keep(held) if held else None,
        )

    def taught(self, engine: Engine) -> Data:
        """The same, with the few-shot distributions if these are the objective."""
        if self.examples.targets is not None:
            return self
        validated = None if self.validated is None else self.validated.taught(engine, self.held_out)
        return replace(self, examples=self.examples.taught(engine, self.trained), validated=validated)

    def as_json(self) -> list[list[Any]]:
        """What a file is compared with."""
        return [[[prompt.text, prompt.answer] for prompt in part] for part in (self.trained, self.held_out)]


@dataclass(frozen=True, eq=False)
class Training:
    """A training: its prompts, its options, and the loop over epochs."""

    engine: Engine
    data: Data
    layers: tuple[int, ...]
    options: Options
    rates: tuple[float, ...]
    seed: int

    def run(self, begun: Float[Tensor, "layer d_model"], file: Path | None, settings: dict[str, Any]) -> Progress:
        """The progress after all epochs, or when every layer has stopped."""
        options, kept = self.options, Prefixes()
        trainer = Trainer(self.engine, self.layers, options.how, kept)
        if file is not None and file.exists():
            progress = Progress.load(file, settings)
            if progress.epochs > options.epochs:
                raise TvLensError(f"{file}: has {progress.epochs} epochs, more than epochs={options.epochs}; raise it")
        else:
            progress = Progress.start(begun)
            self._validate(trainer, progress, list(range(len(self.layers))), None)
            self._save(progress, file, settings)
        batches = self._batches()
        with progress_bar(self.engine, options.epochs * len(batches), "steps") as shown:
            shown.skip(progress.epochs * len(batches))
            while progress.epochs < options.epochs and (active := self._active(progress)):
                progress.epochs += 1
                losses = self._train(trainer, progress, active, batches, shown)
                self._validate(trainer, progress, active, losses)
                self._save(progress, file, settings)
        return progress

    def _batches(self) -> list[list[int]]:
        """The prompts of each step, the same in every epoch, so that what was run before their vectors is kept."""
        order = random.Random(f"batches:{self.seed}").sample(range(len(self.data.examples)), len(self.data.examples))
        size = self.options.batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _active(self, progress: Progress) -> list[int]:
        """The vectors that are still trained."""
        if self.data.validated is None:
            return list(range(len(self.layers)))
        stale = [progress.epochs - best.epoch for best in best_points(progress.curve, self.layers)]
        return [slot for slot, epochs in enumerate(stale) if epochs < self.options.patience]

    def _train(
        self, trainer: Trainer, progress: Progress, active: list[int], batches: Sequence[list[int]], shown: Bar
    ) -> Float[Tensor, " vector"]:
        """One epoch; the mean loss of each active vector while it was trained."""
        options, rows = self.options, list(progress.vectors)  # views, which the optimizer changes in place
        optimizer = torch.optim.AdamW(
            [{"params": [rows[slot]], "lr": self.rates[slot]} for slot in active], weight_decay=options.weight_decay
        )
        for slot in active:
            optimizer.state[rows[slot]] = {
                "step": torch.tensor(float((progress.epochs - 1) * len(batches))),
                "exp_avg": progress.first_moments[slot],
                "exp_avg_sq": progress.second_moments[slot],
            }
        total = torch.zeros(len(active), dtype=torch.float32, device="cpu")
        draw = random.Random(f"epoch:{self.seed}:{progress.epochs}")
        for batch in draw.sample(batches, len(batches)):
            result = trainer.run(self.data.examples, batch, progress.vectors, active, grad=True)
            assert result.gradient is not None
            for slot in active:
                rows[slot].grad = result.gradient[slot] / len(batch)
            optimizer.step()
            total += result.losses.sum(dim=0)
            shown.update()
        return total / len(self.data.examples)

    def _validate(
        self, trainer: Trainer, progress: Progress, active: list[int], losses: Float[Tensor, " vector"] | None
    ) -> None:
        """Measure the active vectors on the held-out prompts, and keep those that are better than before."""
        epoch, layers = progress.epochs, self.layers
        validated = None
        if self.data.validated is not None:
            everything = list(range(len(self.data.validated)))
            validated = trainer.run(self.data.validated, everything, progress.vectors, active, grad=False)
        for column, slot in enumerate(active):
            point = Epoch(
                epoch,
                layers[slot],
                None if losses is None else float(losses[column]),
                None if validated is None else float(validated.losses[:, column].mean()),
                None if validated is None else float(validated.right[:, column].float().mean()),
            )
            earlier = [each for each in progress.curve if each.layer == layers[slot]]
            if all(rank_of(point) > rank_of(each) for each in earlier):
                progress.best[slot] = progress.vectors[slot]
            progress.curve.append(point)

    def _save(self, progress: Progress, file: Path | None, settings: dict[str, Any]) -> None:
        if file is not None:
            progress.save(file, settings)


def rank_of(point: Epoch) -> tuple[float, float]:
    """What is compared between epochs and layers, the higher the better; without validation later epochs win."""
    if point.validation_accuracy is None or point.validation_loss is None:
        return float(point.epoch), 0.0
    return point.validation_accuracy, -point.validation_loss


def best_points(curve: Sequence[Epoch], layers: Sequence[int]) -> list[Epoch]:
    """The best epoch of each layer."""
    return [max((each for each in curve if each.layer == layer), key=rank_of) for layer in layers]


def by_validation(curve: Sequence[Epoch], layers: Sequence[int]) -> tuple[int, ...]:
    if any(point.validation_accuracy is None for point in curve):
        return ()
    points = best_points(curve, layers)
    return tuple(point.layer for point in sorted(points, key=rank_of, reverse=True))
