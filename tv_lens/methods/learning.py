"""Learned vectors: trained by gradient to make a frozen model answer without demonstrations (Yang et al., arXiv
2509.24169, section 3).

answer      minimize  -log P(answer | query, vector), mean over the answer's tokens
few-shot    minimize  KL(p_few-shot || p_patched) of the next token, which needs no answers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.utilities.statistics import derive_generator

from tv_lens.display import figure, html_table
from tv_lens.edits import RESID_POST, Positions, Usage, Write, add
from tv_lens.engines import Capability, Engine, Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.methods.base import Method
from tv_lens.methods.extraction import Extraction, read_site, vectors_of
from tv_lens.methods.losses import Objective
from tv_lens.methods.progress import Epoch
from tv_lens.methods.training import Data, Options, Training, best_points, by_validation
from tv_lens.patching import check_type, check_vectors
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.provenance import Option
from tv_lens.shuffling import shuffle_answers, shuffle_outputs, without_demonstrations
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors, check_layers

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
    """Learned vectors and how they were learned. What `learn` returns.

    Attributes:
        vectors: the best of each layer by validation accuracy, then by validation loss; without validation prompts
            those after the last epoch.
        curve: losses and validation accuracy by epoch and layer.

    Examples:
        >>> learned = tv.learn(model, prompts, layers=[2], epochs=0)
        >>> learned.vectors.layers
        (2,)
    """

    vectors: TaskVectors
    curve: tuple[Epoch, ...]

    def __repr__(self) -> str:
        known = ", without validation"
        if self.best_layers:
            [best] = best_points(self.curve, self.best_layers[:1])
            known = f", best layer {best.layer}, validation accuracy {best.validation_accuracy:.2f}"
        return f"Learned({self.vectors!r}{known})"

    @property
    def best_layers(self) -> tuple[int, ...]:
        """The layers, that with the highest validation accuracy first; equal ones by their validation loss. Empty
        without validation prompts, which alone can compare layers.
        """
        return by_validation(self.curve, self.vectors.layers)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each epoch and layer: epoch, layer, loss and validation_loss in nats, validation_accuracy."""
        import pandas as pd

        kinds = dict.fromkeys(("loss", "validation_loss", "validation_accuracy"), "Float64")
        return pd.DataFrame(self.curve, columns=list(Epoch._fields)).astype(kinds)

    def best(self) -> pd.DataFrame:
        """The best epoch of each layer, one row for each, with the columns of `to_pandas`; the best layer first. The
        last epoch without validation prompts.
        """
        table, order = self.to_pandas(), self.best_layers or self.vectors.layers
        points = {point.layer: point for point in best_points(self.curve, order)}
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
        model: a bridge, or an engine to control batch size and BOS.
        prompts: prompts with answers (or, for "few-shot", with demonstrations).
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
        weight_decay: AdamW's.
        batch_size: prompts for each step of the optimizer. Batches keep their prompts and change their order.
        validation: prompts for early stopping, or the share of the prompts that is held out for it (at least one
            prompt); 0 for none. A layer's accuracy is the share whose answer (or most likely next token after the
            few-shot prompt) is what greedy decoding gives.
        patience: a layer stops after so many epochs without a better accuracy, or a lower loss at the same accuracy.
        seed: of the order of prompts, of a uniform start, and of what is held out.
        file: keeps the training after every epoch. The same call resumes from it, also with more epochs.

    Returns:
        The vectors, the layers in the order of their validation accuracy, and the losses by epoch.

    Raises:
        TvLensError: prompts without answers (or, for "few-shot", without demonstrations), no layers or one that does
            not exist, an option out of range, a start of another model, a file of another training, or a model that
            gives no gradients.
        EngineError: a loss that is NaN or infinite.

    Examples:
        >>> learned = tv.learn(model, prompts, layers=[1, 2], epochs=1)
        >>> learned.vectors.layers, len(learned.curve)
        ((1, 2), 4)
    """
    engine = engine_for(model)
    check_prompts(prompts)
    for needed in (Capability.PATCH, Capability.GRADIENTS, Capability.LOGITS):
        engine.require(needed)
    options = Options(objective, how, positions, epochs, lr, weight_decay, batch_size, patience)
    chosen = _layers(engine, layers)
    data = Data.of(engine, prompts, validation, options, int(seed))
    with torch.inference_mode(False):  # in which nothing has gradients
        begun = _start(engine, start, chosen, how, int(seed))
    settings = {
        "model": engine.name,
        "bos": [engine.info.prepend_bos, engine.info.bos],
        "dtype": engine.info.dtype,
        **options.as_json(),
        "layers": list(chosen),
        "seed": int(seed),
        "start": start if isinstance(start, str) else begun.tolist(),
        "prompts": data.as_json(),
    }
    with engine.session(), torch.inference_mode(False):
        if file is not None:
            settings["weights"] = engine.fingerprint()
        rates = _rates(engine, data.trained, chosen, lr)
        training = Training(engine, data.taught(engine), chosen, options, rates, int(seed))
        progress = training.run(begun, None if file is None else Path(file), settings)
    bests = best_points(progress.curve, chosen)
    notes: dict[str, Option] = {
        **options.as_json(),
        "epochs": epochs,
        "start": start if isinstance(start, str) else str(start.provenance),
        "rates": list(rates),
        "n_validation": len(data.held_out),
        "best_epochs": [best.epoch for best in bests],
        "validation_accuracy": [best.validation_accuracy for best in bests] if data.held_out else [],
    }
    best = vectors_of(engine, progress.best[None], data.trained, (), RESID_POST, "learn", notes, layers=chosen)
    usage = Usage(positions, how.strength, how.every_step, how.keep_norm)
    return Learned(replace(best, op=how.op, usage=usage), tuple(progress.curve))


def _layers(engine: Engine, layers: int | Sequence[int] | None) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(engine.n_layers))
    return tuple(sorted(check_layers([layers] if isinstance(layers, int) else layers, engine.n_layers, engine.name)))


def _start(
    engine: Engine, start: Start, layers: Sequence[int], how: Write, seed: int
) -> Float[Tensor, "layer d_model"]:
    if isinstance(start, str):
        if start not in ("zero", "uniform"):
            raise TvLensError(f"start is {start!r}; use 'zero', 'uniform', or task vectors")
        if start == "zero":
            return torch.zeros(len(layers), engine.d_model, dtype=torch.float32, device="cpu")
        # A separate draw for each layer, so that it does not depend on the others.
        drawn = [
            torch.rand(engine.d_model, generator=derive_generator(seed, f"start:{layer}"), device="cpu")
            for layer in layers
        ]
        return (2 * torch.stack(drawn) - 1) * _UNIFORM
    check_type(start)
    start.check_constant()
    if start.site != RESID_POST or start.usage.per_position:
        raise TvLensError(f"{start!r} are not vectors of the residual stream, one for all positions; start from others")
    check_vectors(engine, start.mean(), 1)
    scale = start.usage.strength / how.strength if start.op == how.op == "add" and how.strength else 1.0
    return torch.stack([start.at(layer).mean(dim=0) for layer in layers]) * scale


def _rates(engine: Engine, prompts: Sequence[Prompt], layers: Sequence[int], lr: float | None) -> tuple[float, ...]:
    """The learning rate of each layer."""
    if lr is not None:
        return (lr,) * len(layers)
    read = read_site(engine, [[prompt.zero_shot()] for prompt in prompts], RESID_POST, "last")
    sizes = read.pow(2).mean(dim=(0, 2)).sqrt()
    return tuple(_RELATIVE_LR * float(sizes[layer]) for layer in layers)


@dataclass(frozen=True)
class LearnedVector(Method):
    """`learn` as a method. Fields that are not below are those of `learn`.

    Attributes:
        start: as in `learn`, or "extract", the vector that `Extraction` reads, or "shift", the mean difference between
            the residual streams after few-shot and zero-shot prompts, which Yang et al. add as the extracted vector.
        keep: how many layers an experiment tries, those with the highest validation accuracy, because the prompts that
            the vector was trained on would choose the layer that memorizes best. None tries all, and so does a training
            without validation.

    Examples:
        >>> LearnedVector(layers=[1, 2], epochs=2).uses_answers
        True
    """

    name: ClassVar[str] = "learn"
    objective: Objective = "answer"
    layers: int | Sequence[int] | None = None
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
            given = (self.layers,) if isinstance(self.layers, int) else tuple(self.layers)
            object.__setattr__(self, "layers", given)
        Options(
            self.objective,
            self.how,
            self.positions,
            self.epochs,
            self.lr,
            self.weight_decay,
            self.batch_size,
            self.patience,
        )
        if self.keep is not None and self.keep < 1:
            raise TvLensError(f"keep is {self.keep}; use 1 or more, or None to try all layers")
        if self.start not in ("zero", "uniform", "extract", "shift"):
            raise TvLensError(f"start is {self.start!r}; use 'zero', 'uniform', 'extract' or 'shift'")

    @property
    def uses_answers(self) -> bool:
        """Whether the objective is the prompts' answers."""
        return self.objective == "answer"

    def shuffled(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
        """The prompts with their answers permuted among them; for the few-shot objective, or a start that is read from
        demonstrations, with the outputs of their demonstrations permuted as well or instead.
        """
        if self.objective == "few-shot":
            return super().shuffled(prompts, seed)
        if len(prompts) < 2:
            return None
        mixed = shuffle_answers(prompts, seed)
        if self.start in ("zero", "uniform"):
            return mixed
        # Otherwise the control would begin at the task's own vector.
        return shuffle_outputs(mixed, seed) if min(prompt.shots for prompt in prompts) > 1 else None

    def for_control(self, layers: tuple[int, ...]) -> Method:
        """The same training of only the layers that are written to."""
        return replace(self, layers=layers, keep=None) if layers else self

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector for all prompts."""
        given: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "keep"}
        learned = learn(engine, prompts, **{**given, "start": self._start(engine, task, prompts, seed)}, seed=seed)
        vectors = learned.vectors
        if self.keep is not None:
            tried = tuple(sorted(learned.best_layers[: self.keep]))
            vectors = replace(vectors, usage=replace(vectors.usage, tried=tried))
        options = {**vectors.options, **self.options}
        return replace(vectors, task=task.name, method=self.name, options=options, terms=())

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
    """`LearnedVector` with the objective "few-shot" under another name, so that an experiment can have both.

    Examples:
        >>> DistilledVector(layers=[2]).objective
        'few-shot'
    """

    name: ClassVar[str] = "learn_few_shot"
    objective: Objective = "few-shot"
