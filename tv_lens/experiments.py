"""Find the layer a task lives at, and say how well the answers score, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from einops import rearrange
from transformer_lens.utilities.statistics import success_rate_ci

from tv_lens.engines import Patch, engine_for, shared
from tv_lens.generation import check_new_tokens, complete, greedy, patch_for, row_keys
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Score:
    """Predictions beside the expected answers, and which of them the task accepts."""

    texts: tuple[str, ...]
    answers: tuple[str, ...]
    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """The fraction accepted, 0 to 1."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """The exact (Clopper-Pearson) 95% interval of the accuracy, for queries drawn independently."""
        found = success_rate_ci(self.correct, confidence=0.95)
        return found.ci_low, found.ci_high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.2f} [{low:.2f}, {high:.2f}]"

    def to_pandas(self) -> pd.DataFrame:
        """A row for each prompt: text, answer, correct."""
        import pandas as pd

        return pd.DataFrame({"text": self.texts, "answer": self.answers, "correct": self.correct})

    def _repr_html_(self) -> str:
        return f"<p>accuracy {self}</p>{self.to_pandas().to_html()}"


@dataclass(frozen=True)
class Sweep:
    """Scores of the same prompts patched at each of several layers."""

    layers: tuple[int, ...]
    scores: tuple[Score, ...]

    @property
    def best(self) -> int:
        """The layer of the highest accuracy, the lowest such layer where several tie (see `ties`)."""
        return self.ties[0]

    @property
    def ties(self) -> tuple[int, ...]:
        """All layers that reach the highest accuracy; more than one means that the data do not tell them
        apart.
        """
        highest = max(score.accuracy for score in self.scores)
        return tuple(
            layer
            for layer, score in sorted(zip(self.layers, self.scores, strict=True), key=lambda pair: pair[0])
            if score.accuracy == highest
        )

    def at(self, layer: int) -> Score:
        """The score at `layer`, by the layer's number.

        Raises:
            ValueError: that layer was not swept.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not swept; the sweep has {list(self.layers)}")
        return self.scores[self.layers.index(layer)]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each layer: layer, accuracy with its 95% interval (low, high), whether it is the best."""
        import pandas as pd

        intervals = [score.interval for score in self.scores]
        return pd.DataFrame(
            {
                "layer": self.layers,
                "accuracy": [score.accuracy for score in self.scores],
                "low": [low for low, _ in intervals],
                "high": [high for _, high in intervals],
                "best": [layer == self.best for layer in self.layers],
            }
        )

    def _repr_html_(self) -> str:
        tied = f", tied with {list(self.ties[1:])}" if len(self.ties) > 1 else ""
        return f"<p>best layer {self.best}: {self.at(self.best)}{tied}</p>{self.to_pandas().to_html(index=False)}"


def score(task: Task, prompts: Sequence[Prompt], texts: Sequence[str]) -> Score:
    """How the answers `texts` to `prompts` score by the task's own rule, against each prompt's answer, or the
    task's where a prompt holds none.

    Raises:
        ValueError: no prompts, or another number of texts.
    """
    check_prompts(prompts)
    if len(texts) != len(prompts):
        raise ValueError(f"{len(texts)} texts for {len(prompts)} prompts; give one for each")
    answers = tuple(task.answer(p.query) if p.answer is None else p.answer for p in prompts)
    correct = tuple(bool(task.accepts(text, answer)) for text, answer in zip(texts, answers, strict=True))
    return Score(tuple(texts), answers, correct)


def sweep_layers(
    model: Any,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layers: Sequence[int] | None = None,
    *,
    max_new_tokens: int = 8,
) -> Sweep:
    """Score the patched answers to each prompt's query at every layer, or at those given (Hendel et al. 2023,
    section 3.2 and figure 4). Choose a layer so on prompts that you do not report on.

    The queries are run once, up to their last token; from there all layers go on side by side.

    Raises:
        ValueError: as `patch_generate`, or no layers, or one of them twice.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    check_new_tokens(engine, max_new_tokens)
    chosen = range(engine.n_layers) if layers is None else [int(layer) for layer in layers]
    if not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers are {list(chosen)}; give different ones, at least one, or None for all")
    patches = [patch_for(engine, len(prompts), vectors, layer) for layer in chosen]
    patch = Patch(
        rearrange([patch.vectors for patch in patches], "layer prompt d_model -> (prompt layer) d_model"),
        rearrange([patch.layers for patch in patches], "layer prompt -> (prompt layer)"),
    )
    asked = [prompt.zero_shot() for prompt in prompts for _ in chosen]
    groups = [[prompt.zero_shot().text] * len(chosen) for prompt in prompts]
    keys = row_keys([prompt.text for prompt in asked])
    answers = [""] * len(asked)
    for rows, tokens, past in shared(engine, groups, room=max_new_tokens - 1):
        found, _ = complete(
            engine,
            tokens,
            patch.keep(rows),
            past,
            [asked[row] for row in rows],
            [keys[row] for row in rows],
            max_new_tokens,
            greedy,
        )
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
    return Sweep(
        tuple(chosen),
        tuple(score(task, prompts, answers[i :: len(chosen)]) for i in range(len(chosen))),
    )
