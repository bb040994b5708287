"""Learned vectors: trained by gradient to make a frozen model answer without demonstrations (Yang et al., arXiv
2509.24169, section 3).

answer      minimize  -log P(answer | query, vector), mean over the answer's tokens
few-shot    minimize  KL(p_few-shot || p_patched) of the next token, which needs no answers
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities.statistics import derive_generator

from tv_lens.display import figure, html_table
from tv_lens.edits import RESID_POST, Positions, Usage, Write, add
from tv_lens.engines import Capability, Engine, Model, Prefixes, engine_for, progress_bar
from tv_lens.errors import TvLensError
from tv_lens.methods.base import Method, as_option
from tv_lens.methods.extraction import Extraction, read_site, vectors_of
from tv_lens.methods.progress import Epoch, Progress
from tv_lens.methods.training import Examples, Objective, Trainer
from tv_lens.patching import check_type
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.provenance import Option
from tv_lens.shuffling import shuffle_answers, without_demonstrations
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors, check_layer

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Start: TypeAlias = Literal["zero", "uniform"] | TaskVectors

ADD = add()

# The default learning rate, as a share of the activations' root mean square.
_RELATIVE_LR = 0.05

# Random vectors begin between minus and plus this (the paper's code).
_UNIFORM = 0.1


@dataclass(frozen=True, repr=False, eq=False)
class Learned:
    """Learned vectors and how they were learned. `vectors` are the best of each layer by validation accuracy, then by
    validation loss; without validation prompts those after the last epoch.
    """

    vectors: TaskVectors
    curve: tuple[Epoch, ...]

    def __repr__(self) -> str:
        layer, accuracy = self.best_layers[0], self.vectors.options.get("validation_accuracy")
        known = f", validation accuracy {max(accuracy):.2f}" if isinstance(accuracy, list) and accuracy else ""
        return f"Learned({self.vectors!r}, best layer {layer}{known})"

    @property
    def best_layers(self) -> tuple[int, ...]:
        """The layers, that with the highest validation accuracy first; equal ones by their validation loss."""
        return _by_validation(self.curve, self.vectors.layers)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each epoch and layer: epoch, layer, loss and validation_loss in nats, validation_accuracy."""
        import pandas as pd

        kinds = dict.fromkeys(("loss", "validation_loss", "validation_accuracy"), "Float64")
        return pd.DataFrame(self.curve, columns=list(Epoch._fields)).astype(kinds)

    def best(self) -> pd.DataFrame:
        """The best epoch of each layer, one row for each, with the columns of `to_pandas`; the best layer first."""
        table, order = self.to_pandas(), self.best_layers
        points = {point.layer: point for point in _best_points(self.curve, order)}
        rows = [int(table.index[(table["layer"] == n) & (table["epoch"] == points[n].epoch)][0]) for n in order]
        return table.loc[rows].reset_index(drop=True)

    def plot(self) -> go.Figure:
        """Losses and validation accuracy by epoch, a line for each layer."""
        return figure(self)

    def _repr_html_(self) -> str:
        return html_table(self.to_pandas(), repr(self))


def learn(  # noqa: PLR0913 - its options are keywords
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: int | Sequence[int] | None = None,
    how: Write = ADD,
    positions: Positions = "last",
    start: Start = "zero",
    objective: Objective = "answer",
    epochs: int = 10,
    lr: float | None = None,
    weight_decay: float = 0.01,
    batch_size: int = 4,
    validation: float | Sequence[Prompt] = 0.2,
    patience: int = 2,
    seed: int = 0,
    file: str | Path | None = None,
) -> Learned:
    """One vector for each of `layers`, trained with AdamW to make the frozen model answer the prompts' queries without
    demonstrations (Yang et al., arXiv 2509.24169, section 3). They are trained side by side, each as if it were alone.

    Args:
        layers: one layer, several, or None for all.
        how: `add(strength)` or `overwrite`; with `every_step` the vector is also written at the answer's tokens.
        positions: where in the query, as in `patch_generate`.
        start: "zero", "uniform" (between -0.1 and 0.1, as in the paper), or vectors, whose mean is taken.
        objective: "answer" raises the probability of the prompts' answers, each token of which is predicted after the
            right tokens before. "few-shot" imitates the model's next-token distribution after the whole prompt.
        epochs: 0 gives the vectors to start from.
        lr: AdamW's learning rate, such as the paper's 5e-3 for Llama. Activations of models and layers differ by orders
            of magnitude, so None takes 0.05 of the root mean square of the layer's activations at the queries' last
            tokens.
        batch_size: prompts for each step of the optimizer. Batches keep their prompts and change their order.
        validation: prompts for early stopping, or the share of the prompts that is held out for it; 0 for none. A
            layer's accuracy is the share whose answer (or most likely next token after the few-shot prompt) is what
            greedy decoding gives.
        patience: a layer stops after so many epochs without a better accuracy, or a lower loss at the same accuracy.
        file: keeps the training after every epoch. The same call resumes from it, also with more epochs.

    Raises:
        TvLensError: prompts without answers (or, for "few-shot", without demonstrations), no layers or one that does
            not exist, an option out of range, a start of another model, a file of another training, or a model that
            gives no gradients.
        EngineError: a loss that is NaN or infinite.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    options = _Options(
        _layers(engine, layers), how, positions, objective, epochs, lr, weight_decay, batch_size, patience, int(seed)
    )
    for needed in (Capability.PATCH, Capability.GRADIENTS, Capability.LOGITS):
        engine.require(needed)
    trained, held_out = _split(prompts, validation, options.seed)
    if objective == "few-shot" and not all(prompt.examples for prompt in [*trained, *held_out]):
        raise TvLensError("the few-shot distribution needs demonstrations; sample the prompts with shots=1 or more")
    begun = _start(engine, start, options)
    with engine.session():
        examples = Examples.of(engine, trained, objective, positions)
        validated = Examples.of(engine, held_out, objective, positions) if held_out else None
        training = _Training(engine, examples, validated, options, _rates(engine, trained, options))
        settings = {
            "model": engine.name,
            "weights": None if file is None else engine.fingerprint(),
            **options.as_json(),
            "start": start if isinstance(start, str) else begun.tolist(),
            "prompts": [[prompt.text, prompt.answer] for prompt in trained],
            "validation": [[prompt.text, prompt.answer] for prompt in held_out],
        }
        progress = training.run(begun, None if file is None else Path(file), settings)
    notes: dict[str, Option] = {
        **options.as_json(),
        "start": start if isinstance(start, str) else str(start.provenance),
        "epochs": epochs,
        "rates": list(training.rates),
        "n_validation": len(held_out),
        "best_epochs": [int(each) for each in progress.best_epochs],
        "validation_accuracy": _accuracies(progress),
    }
    best = vectors_of(engine, progress.best[None], trained, (), RESID_POST, "learn", notes, layers=options.layers)
    usage = Usage(positions, how.strength, how.every_step, how.keep_norm)
    return Learned(replace(best, op=how.op, usage=usage), tuple(progress.curve))


@dataclass(frozen=True)
class _Options:
    """The options of a training, checked."""

    layers: tuple[int, ...]
    how: Write
    positions: Positions
    objective: Objective
    epochs: int
    lr: float | None
    weight_decay: float
    batch_size: int
    patience: int
    seed: int

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise TvLensError(f"objective is {self.objective!r}; use {' or '.join(map(repr, get_args(Objective)))}")
        if not isinstance(self.how, Write) or self.how.op == "rotate":
            raise TvLensError(f"how is {self.how}; a vector is learned with add(strength) or overwrite")
        if self.epochs < 0 or self.batch_size < 1 or self.patience < 1:
            raise TvLensError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, patience={self.patience}: epochs are 0 or more, "
                "the others 1 or more"
            )
        if not (self.lr is None or 0 < self.lr < math.inf) or not 0 <= self.weight_decay < math.inf:
            raise TvLensError(f"lr={self.lr}, weight_decay={self.weight_decay}: use a number above 0, and 0 or more")

    def as_json(self) -> dict[str, Any]:
        """The options as JSON values, without the number of epochs, which may be raised later."""
        named = {**vars(self), "how": as_option(self.how), "layers": list(self.layers)}
        if not isinstance(self.positions, str):
            named["positions"] = list(self.positions)
        del named["epochs"]
        return named


def _layers(engine: Engine, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(engine.n_layers))
    given = [layers] if isinstance(layers, int) else list(layers)
    if not given or len(set(given)) < len(given):
        raise TvLensError(f"layers are {layers!r}; give one, a list of different ones, or None for all")
    for layer in given:
        check_layer(layer, engine.n_layers, engine.name)
    return tuple(sorted(index(layer) for layer in given))


def _split(
    prompts: Sequence[Prompt], validation: float | Sequence[Prompt], seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to train on and those held out."""
    if not isinstance(validation, (int, float)):
        held_out = list(validation)
        if held_out:
            check_prompts(held_out)
        return list(prompts), held_out
    if not 0 <= validation < 1:
        raise TvLensError(f"validation is {validation}; give prompts, or the share to hold out, from 0 to below 1")
    order = random.Random(f"validation:{seed}").sample(range(len(prompts)), len(prompts))
    held = set(order[: round(validation * len(prompts))])
    return (
        [prompt for i, prompt in enumerate(prompts) if i not in held],
        [prompt for i, prompt in enumerate(prompts) if i in held],
    )


def _start(engine: Engine, start: Start, options: _Options) -> Float[Tensor, "layer d_model"]:
    shape = (len(options.layers), engine.d_model)
    if isinstance(start, str):
        if start not in ("zero", "uniform"):
            raise TvLensError(f"start is {start!r}; use 'zero', 'uniform', or task vectors")
        if start == "zero":
            return torch.zeros(shape, dtype=torch.float32, device="cpu")
        # A separate draw for each layer, so that it does not depend on the others.
        drawn = [
            torch.rand(engine.d_model, generator=derive_generator(options.seed, f"start:{layer}"), device="cpu")
            for layer in options.layers
        ]
        return (2 * torch.stack(drawn) - 1) * _UNIFORM
    check_type(start)
    start.check_fits(engine.name, engine.n_layers, engine.d_model)
    if start.site != RESID_POST or start.maps is not None or start.usage.per_position:
        raise TvLensError(f"{start!r} are not vectors of the residual stream, one for all positions; start from others")
    return torch.stack([start.at(layer).mean(dim=0) for layer in options.layers])


def _rates(engine: Engine, prompts: Sequence[Prompt], options: _Options) -> tuple[float, ...]:
    """The learning rate of each layer."""
    if options.lr is not None:
        return (options.lr,) * len(options.layers)
    read = read_site(engine, [[prompt.zero_shot()] for prompt in prompts], RESID_POST, "last")
    sizes = read.pow(2).mean(dim=(0, 2)).sqrt()
    return tuple(_RELATIVE_LR * float(sizes[layer]) for layer in options.layers)


@dataclass(frozen=True, eq=False)
class _Training:
    """A training: its prompts, its options, and the loop over epochs."""

    engine: Engine
    examples: Examples
    validated: Examples | None
    options: _Options
    rates: tuple[float, ...]

    def run(self, begun: Float[Tensor, "layer d_model"], file: Path | None, settings: dict[str, Any]) -> Progress:
        """The progress after all epochs, or when every layer has stopped."""
        options, kept = self.options, Prefixes()
        trainer = Trainer(self.engine, options.layers, options.how, kept)
        if file is not None and file.exists():
            progress = Progress.load(file, settings)
        else:
            progress = Progress.start(begun)
            self._validate(trainer, progress, list(range(len(options.layers))), None)
            self._save(progress, file, settings)
        batches = self._batches()
        with progress_bar(self.engine, options.epochs * len(batches), "step") as shown:
            shown.update(progress.epochs * len(batches))
            while progress.epochs < options.epochs and (active := self._active(progress)):
                progress.epochs += 1
                losses = self._train(trainer, progress, active, batches, shown)
                self._validate(trainer, progress, active, losses)
                self._save(progress, file, settings)
        return progress

    def _batches(self) -> list[list[int]]:
        """The prompts of each step, the same in every epoch, so that what was run before their vectors is kept."""
        order = random.Random(f"batches:{self.options.seed}").sample(range(len(self.examples)), len(self.examples))
        size = self.options.batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _active(self, progress: Progress) -> list[int]:
        """The vectors that are still trained."""
        if self.validated is None:
            return list(range(len(self.options.layers)))
        stale = [progress.epochs - best for best in progress.best_epochs]
        return [slot for slot, epochs in enumerate(stale) if epochs < self.options.patience]

    def _train(
        self, trainer: Trainer, progress: Progress, active: list[int], batches: Sequence[list[int]], shown: Any
    ) -> Float[Tensor, " vector"]:
        """One epoch; the mean loss of each active vector while it was trained."""
        options, rows = self.options, list(progress.vectors)  # views, which the optimizer changes in place
        optimizer = torch.optim.AdamW(
            [{"params": [rows[slot]], "lr": self.rates[slot]} for slot in active], weight_decay=options.weight_decay
        )
        for slot in active:
            optimizer.state[rows[slot]] = {
                "step": torch.tensor(float(progress.steps)),
                "exp_avg": progress.first_moments[slot],
                "exp_avg_sq": progress.second_moments[slot],
            }
        total = torch.zeros(len(active), dtype=torch.float32, device="cpu")
        draw = random.Random(f"epoch:{options.seed}:{progress.epochs}")
        for batch in draw.sample(batches, len(batches)):
            result = trainer.run(self.examples, batch, progress.vectors, active, grad=True)
            assert result.gradient is not None
            for slot in active:
                rows[slot].grad = result.gradient[slot] / len(batch)
            optimizer.step()
            progress.steps += 1
            total += result.losses.sum(dim=0)
            shown.update()
        return total / len(self.examples)

    def _validate(
        self, trainer: Trainer, progress: Progress, active: list[int], losses: Float[Tensor, " vector"] | None
    ) -> None:
        """Measure the active vectors on the held-out prompts, and keep those that are better than before."""
        epoch, layers = progress.epochs, self.options.layers
        validated = None
        if self.validated is not None:
            everything = list(range(len(self.validated)))
            validated = trainer.run(self.validated, everything, progress.vectors, active, grad=False)
        for column, slot in enumerate(active):
            point = Epoch(
                epoch,
                layers[slot],
                None if losses is None else float(losses[column]),
                None if validated is None else float(validated.losses[:, column].mean()),
                None if validated is None else float(validated.right[:, column].float().mean()),
            )
            earlier = [each for each in progress.curve if each.layer == layers[slot]]
            if all(_rank(point) > _rank(each) for each in earlier):
                progress.best[slot] = progress.vectors[slot]
                progress.best_epochs[slot] = epoch
            progress.curve.append(point)

    def _save(self, progress: Progress, file: Path | None, settings: dict[str, Any]) -> None:
        if file is not None:
            progress.save(file, settings)


def _rank(point: Epoch) -> tuple[float, float]:
    """What is compared between epochs and layers, the higher the better; without validation later epochs win."""
    if point.validation_accuracy is None or point.validation_loss is None:
        return float(point.epoch), 0.0
    return point.validation_accuracy, -point.validation_loss


def _best_points(curve: Sequence[Epoch], layers: Sequence[int]) -> list[Epoch]:
    """The best epoch of each layer."""
    return [max((each for each in curve if each.layer == layer), key=_rank) for layer in layers]


def _by_validation(curve: Sequence[Epoch], layers: Sequence[int]) -> tuple[int, ...]:
    points = _best_points(curve, layers)
    return tuple(point.layer for point in sorted(points, key=_rank, reverse=True))


def _accuracies(progress: Progress) -> list[float]:
    """The validation accuracy of each layer's best vector; empty without validation prompts."""
    layers = sorted({point.layer for point in progress.curve})
    accuracies = [point.validation_accuracy for point in _best_points(progress.curve, layers)]
    return [accuracy for accuracy in accuracies if accuracy is not None]


@dataclass(frozen=True)
class LearnedVector(Method):
    """`learn` as a method. An experiment tries the `keep` layers with the highest validation accuracy, because the
    prompts it was trained on would choose the layer that memorizes best; None tries all.

    `start` may also be "extract", the vector that `Extraction` reads, or "shift", the mean difference between the
    residual streams after few-shot and zero-shot prompts, which Yang et al. add as the extracted vector.
    """

    name: ClassVar[str] = "learn"
    objective: Objective = "answer"
    layers: tuple[int, ...] | None = None
    how: Write = ADD
    positions: Positions = "last"
    start: Literal["zero", "uniform", "extract", "shift"] = "zero"
    epochs: int = 10
    lr: float | None = None
    weight_decay: float = 0.01
    batch_size: int = 4
    validation: float = 0.2
    patience: int = 2
    keep: int | None = 1

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        if self.keep is not None and self.keep < 1:
            raise TvLensError(f"keep is {self.keep}; use 1 or more, or None to try all layers")
        if self.start not in ("zero", "uniform", "extract", "shift"):
            raise TvLensError(f"start is {self.start!r}; use 'zero', 'uniform', 'extract' or 'shift'")

    @property
    def uses_answers(self) -> bool:
        """Whether the objective is the prompts' answers."""
        return self.objective == "answer"

    def shuffled(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
        """The prompts with their answers permuted among them; or, for the few-shot objective, with the outputs of their
        demonstrations permuted.
        """
        if self.objective == "few-shot":
            return super().shuffled(prompts, seed)
        return shuffle_answers(prompts, seed) if len(prompts) > 1 else None

    def for_control(self, vectors: TaskVectors) -> Method:
        """The same training of only the layers that are tried."""
        return replace(self, layers=vectors.tried_layers, keep=None)

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector for all prompts."""
        options: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "keep"}
        learned = learn(engine, prompts, **{**options, "start": self._start(engine, task, prompts, seed)}, seed=seed)
        vectors = learned.vectors
        if self.keep is not None and self.keep < len(vectors.layers):
            tried = tuple(sorted(learned.best_layers[: self.keep]))
            vectors = replace(vectors, usage=replace(vectors.usage, tried=tried))
        return replace(vectors, task=task.name, options={**vectors.options, **self.options})

    def _start(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> Start:
        if self.start == "extract":
            return Extraction()(engine, task, prompts, seed)
        if self.start != "shift":
            return self.start
        few_shot = read_site(engine, [[prompt] for prompt in prompts], RESID_POST, "last")
        alone = [[prompt] for prompt in without_demonstrations(prompts, seed)]
        zero_shot = read_site(engine, alone, RESID_POST, "last")
        return vectors_of(engine, few_shot - zero_shot, prompts, (), RESID_POST, "shift", {})


@dataclass(frozen=True)
class DistilledVector(LearnedVector):
    """`LearnedVector` with the objective "few-shot" under another name, so that an experiment can have both."""

    name: ClassVar[str] = "learn_few_shot"
    objective: Objective = "few-shot"
