"""What was measured: scores, sweeps, evaluations, conflicts and experiments.

The classes check their own invariants, so a result that was read from a file is as good as one that was computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tv_lens.display import figure, html_table, write_report
from tv_lens.errors import MissingExtraError, TvLensError
from tv_lens.evidence.settings import IDENTIFYING, Settings
from tv_lens.evidence.statistics import (
    better_p_value,
    exact_interval,
    holm,
    intersection_union,
    paired_p_value,
    smallest_detectable,
)
from tv_lens.files import from_typed_json, read_whole, to_json, write_whole
from tv_lens.tasks.describe import some
from tv_lens.vectors import TaskVectors, depth, layers_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# Tables hold layers as machine integers.
_MAX_LAYER = 2**31
# The name of a run without a vector.
PLAIN = "no vector"
_UNPATCHED = ("zero-shot", "few-shot")


@dataclass(frozen=True, repr=False)
class Score:
    """Predictions beside the expected answers, and which of them the task accepts. What `score` returns.

    Attributes:
        texts: the predictions.
        answers: the expected answers.
        correct: which predictions are accepted.
        logprobs: the log-probabilities of the expected answers in nats, if they were measured.
        divergences: the divergences of the next token from few-shot in nats, if they were measured.

    Examples:
        >>> score = Score(texts=("cold", "big"), answers=("cold", "small"), correct=(True, False))
        >>> score.accuracy, [round(end, 2) for end in score.interval]
        (0.5, [0.01, 0.99])
    """

    texts: tuple[str, ...]
    answers: tuple[str, ...]
    correct: tuple[bool, ...]
    logprobs: tuple[float, ...] | None = None
    divergences: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for measured in (self.logprobs, self.divergences):
            if measured is not None and len(measured) != len(self.texts):
                raise TvLensError(f"{len(measured)} measurements for {len(self.texts)} texts; there is one for each")
        if not len(self.texts) == len(self.answers) == len(self.correct) > 0:
            raise TvLensError(
                f"a score has a text, an answer and a verdict for each prompt, not {len(self.texts)}, "
                f"{len(self.answers)} and {len(self.correct)}"
            )

    @property
    def accuracy(self) -> float:
        """The fraction accepted, 0 to 1."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """The exact (Clopper-Pearson) 95% interval of the accuracy, for queries drawn independently."""
        return exact_interval(self.correct)

    def __repr__(self) -> str:
        return f"Score({self}, {len(self.correct)} prompts)"

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.2f} [{low:.2f}, {high:.2f}]"

    def to_pandas(self) -> pd.DataFrame:
        """One row per prompt: text, answer, correct."""
        import pandas as pd

        return pd.DataFrame({"text": self.texts, "answer": self.answers, "correct": self.correct})

    def _repr_html_(self) -> str:
        return html_table(self.to_pandas(), f"accuracy {self}, {len(self.correct)} prompts")


def mcnemar(one: Score, other: Score) -> float:
    """The p-value of McNemar's exact test that two conditions answer the same prompts equally well: a binomial test of
    the prompts that only one of them gets right.

    Args:
        one: the score of one condition.
        other: the score of another one on the same prompts.

    Returns:
        The two-sided p-value; 1 if no prompt is answered right by one condition only.

    Raises:
        TvLensError: the scores are not of the same prompts.

    Examples:
        >>> one = Score(("x",) * 6, ("x",) * 6, (True,) * 6)
        >>> mcnemar(one, Score(("y",) * 6, ("x",) * 6, (False,) * 6))
        0.03125
    """
    if one.answers != other.answers:
        raise TvLensError(
            f"a paired test needs two scores of the same prompts; these are of {len(one.answers)} and "
            f"{len(other.answers)} prompts with different answers"
        )
    return paired_p_value(one.correct, other.correct)


class Choice(NamedTuple):
    """Where and how strongly vectors are written.

    Attributes:
        layer: the layer.
        strength: multiplies the strength that the vectors are meant to be written with.

    Examples:
        >>> Choice(20).strength
        1.0
    """

    layer: int
    strength: float = 1.0

    def __str__(self) -> str:
        return str(self.layer) if self.strength == 1 else f"{self.layer} (x {self.strength:g})"


@dataclass(frozen=True, repr=False)
class Sweep:
    """Scores of the same prompts patched at each of several layers. What `sweep_layers` returns.

    Attributes:
        layers: the layers that were tried.
        scores: one for each layer. Their texts are the beginnings of answers: a sweep stops each answer once its rule
            has decided.
        n_layers: the number of the model's blocks.
        strength: multiplies the strength that the vectors are meant to be written with.

    Examples:
        >>> right, wrong = Score(("a",), ("a",), (True,)), Score(("b",), ("a",), (False,))
        >>> sweep = Sweep(layers=(1, 2, 3), scores=(wrong, right, right), n_layers=4)
        >>> sweep.best, sweep.ties
        (2, (2, 3))
    """

    layers: tuple[int, ...]
    scores: tuple[Score, ...]
    n_layers: int | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not len(set(self.layers)) == len(self.layers) == len(self.scores) > 0:
            raise TvLensError(
                f"a sweep has different layers and a score for each, not {len(self.scores)} for {self.layers[:12]}"
            )
        for layer in self.layers:
            _check_layer(layer, self.n_layers)
        if not 0 < self.strength < math.inf:
            raise TvLensError(f"the strength of a sweep is {self.strength}; it is a positive number")
        _check_same_prompts(*self.scores)

    @property
    def best(self) -> int:
        """The layer of the highest accuracy; the lowest such layer if several tie (see `ties`)."""
        return self.ties[0]

    @property
    def ties(self) -> tuple[int, ...]:
        """All layers that reach the highest accuracy. If there are several, the data do not tell them apart."""
        highest = max(score.accuracy for score in self.scores)
        pairs = sorted(zip(self.layers, self.scores, strict=True), key=lambda pair: pair[0])
        return tuple(layer for layer, score in pairs if score.accuracy == highest)

    def at(self, layer: int) -> Score:
        """The score at `layer`, by the layer's number.

        Args:
            layer: the layer's number.

        Returns:
            The score at that layer.

        Raises:
            TvLensError: that layer was not swept.
        """
        if layer not in self.layers:
            raise TvLensError(f"layer {layer} was not swept; the sweep has {list(self.layers)}")
        return self.scores[self.layers.index(layer)]

    def to_pandas(self) -> pd.DataFrame:
        """One row per layer: layer, depth (the fraction of the model's blocks that have been run), accuracy with its
        95% interval (low, high), whether it is the best.
        """
        import pandas as pd

        intervals, best, n_layers = [score.interval for score in self.scores], self.best, self.n_layers
        depths = {} if n_layers is None else {"depth": [depth(layer, n_layers) for layer in self.layers]}
        return pd.DataFrame(
            {
                "layer": self.layers,
                **depths,
                "accuracy": [score.accuracy for score in self.scores],
                "low": [low for low, _ in intervals],
                "high": [high for _, high in intervals],
                "best": [layer == best for layer in self.layers],
            }
        )

    def plot(self, *, zero_shot: Score | None = None, few_shot: Score | None = None) -> go.Figure:
        """Accuracy by layer with its intervals.

        Args:
            zero_shot: drawn as a line, if it is given.
            few_shot: drawn as a line, if it is given.

        Returns:
            A Plotly figure.
        """
        return figure(self, zero_shot=zero_shot, few_shot=few_shot)

    def __repr__(self) -> str:
        strength = "" if self.strength == 1 else f", strength {self.strength:g}"
        return (
            f"Sweep({len(self.layers)} layers, {len(self.scores[0].correct)} prompts; "
            f"best {self.best}: {self.at(self.best)}{strength})"
        )

    def __str__(self) -> str:
        lines = [
            f"{layer:5d}  {score.accuracy:.2f}  {'#' * round(40 * score.accuracy)}{' <- best' * (layer == self.best)}"
            for layer, score in zip(self.layers, self.scores, strict=True)
        ]
        return "\n".join(["layer  accuracy", *(line.rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        tied = f", tied with {list(self.ties[1:])}" if len(self.ties) > 1 else ""
        return html_table(self.to_pandas(), f"best layer {self.best}: {self.at(self.best)}{tied}")


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Scores of the same prompts under several conditions. What `evaluate` returns.

    Attributes:
        layer: where the vectors were written, one layer or several at once.
        zero_shot: the queries alone.
        few_shot: after demonstrations.
        patched: with the vectors.
        controls: with the vectors of each control.
        n_layers: the number of the model's blocks.
        strength: multiplies the strength that the vectors are meant to be written with.
        control_layers: where each control was written.
        control_strengths: the controls' strengths; a control without one has the vector's.

    Examples:
        >>> right, wrong = Score(("a",) * 6, ("a",) * 6, (True,) * 6), Score(("b",) * 6, ("a",) * 6, (False,) * 6)
        >>> result = Evaluation(3, zero_shot=wrong, few_shot=right, patched=right, controls={"random": wrong})
        >>> result.p_value, result.strongest_control
        (0.03125, 'random')
    """

    layer: int | tuple[int, ...]
    zero_shot: Score
    few_shot: Score
    patched: Score
    controls: Mapping[str, Score]
    n_layers: int | None = None
    strength: float = 1.0
    control_layers: Mapping[str, int | tuple[int, ...]] = field(default_factory=dict)
    control_strengths: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for layers in (self.layer, *self.control_layers.values()):
            for layer in (layers,) if isinstance(layers, int) else layers:
                _check_layer(layer, self.n_layers)
        unknown = {*self.control_layers, *self.control_strengths} - set(self.controls)
        if unknown:
            raise TvLensError(f"layers or strengths of {sorted(unknown)}, which are not among the controls")
        taken = set(self.controls) & {*_UNPATCHED, "patched"}
        if taken:
            raise TvLensError(f"controls are named {sorted(taken)}, which are conditions already; name them otherwise")
        _check_same_prompts(*self.conditions.values())

    @property
    def conditions(self) -> dict[str, Score]:
        """All scores by name: zero-shot, few-shot, patched and the controls."""
        return {"zero-shot": self.zero_shot, "few-shot": self.few_shot, "patched": self.patched, **self.controls}

    @property
    def p_value(self) -> float:
        """McNemar's exact test, patched against zero-shot, two-sided. A vector that only gives answers their form can
        pass it; `p_controls` is the test of whether the vector holds the task.
        """
        return mcnemar(self.patched, self.zero_shot)

    @property
    def strongest_control(self) -> str | None:
        """The control that is hardest to tell from the vector: that with the largest p-value, then the highest
        accuracy. None without controls.
        """
        if not self.controls:
            return None
        p_values = {name: self._p_better(score) for name, score in self.controls.items()}
        return max(p_values, key=lambda name: (p_values[name], self.controls[name].accuracy))

    @property
    def p_controls(self) -> float | None:
        """The exact one-sided test that patched is better than every control: the largest of the p-values against
        each of them (an intersection-union test). None without controls.
        """
        if not self.controls:
            return None
        return intersection_union([self._p_better(score) for score in self.controls.values()])

    def _p_better(self, score: Score) -> float:
        return better_p_value([self.patched.correct], [score.correct], [[str(i) for i in range(len(score.correct))]])

    def layer_of(self, condition: str) -> int | tuple[int, ...] | None:
        """The layer that a condition's vectors were written to; None if nothing was written.

        Args:
            condition: its name, one of `conditions`.

        Returns:
            The layer that the condition's vectors were written to; None if nothing was written.
        """
        return None if condition in _UNPATCHED else self.control_layers.get(condition, self.layer)

    def to_pandas(self) -> pd.DataFrame:
        """One row per condition: layer (none if nothing is patched), n, accuracy with its 95% interval (low, high), and
        p_value, McNemar's exact test of patched against it, two-sided. If they were measured, also the means of logprob
        and divergence; if any strength is not 1, the strength.
        """
        import pandas as pd

        rows = []
        for name, score in self.conditions.items():
            low, high = score.interval
            rows.append(
                {
                    "condition": name,
                    "layer": self.layer_of(name),
                    "n": len(score.correct),
                    "accuracy": score.accuracy,
                    "low": low,
                    "high": high,
                    "p_value": None if name == "patched" else mcnemar(self.patched, score),
                    **self._measured(name),
                }
            )
        one_layer = all(isinstance(layer, int) for layer in (self.layer, *self.control_layers.values()))
        kinds = {"p_value": "Float64", **({"layer": "Int64"} if one_layer else {})}
        return pd.DataFrame(rows).astype(kinds)

    def _measured(self, name: str) -> dict[str, float | None]:
        score, row = self.conditions[name], dict[str, float | None]()
        if self.patched.logprobs is not None:
            row["logprob"] = None if score.logprobs is None else _mean(score.logprobs)
            row["divergence"] = None if score.divergences is None else _mean(score.divergences)
        if {self.strength, *self.control_strengths.values()} != {1.0}:
            strength = self.control_strengths.get(name, self.strength)
            row["strength"] = None if name in _UNPATCHED else strength
        return row

    def plot(self) -> go.Figure:
        """Accuracy by condition with its intervals."""
        return figure(self)

    def __repr__(self) -> str:
        accuracies = ", ".join(f"{name} {score.accuracy:.2f}" for name, score in self.conditions.items())
        return f"Evaluation(at layer {layers_text(self.layer)}, {len(self.patched.correct)} prompts; {accuracies})"

    def __str__(self) -> str:
        return _as_text(self.to_pandas())

    def _repr_html_(self) -> str:
        title = f"patched at layer {self.layer}, {len(self.patched.correct)} prompts; p: patched against the condition"
        return html_table(self.to_pandas(), title, {"p_value": "{:.1g}"})


@dataclass(frozen=True, repr=False)
class Conflict:
    """Answers to the same few-shot prompts, as they are and with a rival task's vector written in. What `conflict`
    returns.

    Attributes:
        task: the demonstrated task.
        rival: the task of the vector.
        layer: where the vector was written.
        plain_task: without the vector, scored as answers to the demonstrated task.
        plain_rival: without the vector, scored as answers to the rival.
        patched_task: with the vector, scored as answers to the demonstrated task.
        patched_rival: with the vector, scored as answers to the rival.
        n_layers: the number of the model's blocks.

    Examples:
        >>> right, wrong = Score(("a",), ("a",), (True,)), Score(("a",), ("b",), (False,))
        >>> Conflict("copy", "double", 3, right, wrong, right, wrong).patched_task.accuracy
        1.0
    """

    task: str
    rival: str
    layer: int | tuple[int, ...]
    plain_task: Score
    plain_rival: Score
    patched_task: Score
    patched_rival: Score
    n_layers: int | None = None

    def __post_init__(self) -> None:
        for layer in (self.layer,) if isinstance(self.layer, int) else self.layer:
            _check_layer(layer, self.n_layers)
        _check_same_prompts(self.plain_task, self.patched_task)
        _check_same_prompts(self.plain_rival, self.patched_rival)

    def to_pandas(self) -> pd.DataFrame:
        """One row for each of plain and patched, and each task scored: accuracy with its 95% interval (low, high)."""
        import pandas as pd

        rows = [
            (run, name, role, len(score.correct), score.accuracy, *score.interval)
            for run, name, role, score in (
                ("plain", self.task, "demonstrated", self.plain_task),
                ("plain", self.rival, "vector's", self.plain_rival),
                ("patched", self.task, "demonstrated", self.patched_task),
                ("patched", self.rival, "vector's", self.patched_rival),
            )
        ]
        return pd.DataFrame(rows, columns=["run", "scored as", "task is the", "n", "accuracy", "low", "high"])

    def plot(self) -> go.Figure:
        """Accuracy as either task, without and with the vector."""
        return figure(self)

    def __repr__(self) -> str:
        return (
            f"Conflict(demonstrations of {self.task!r}, vector of {self.rival!r} at layer {layers_text(self.layer)}; "
            f"{self.task} {self.plain_task.accuracy:.2f} -> {self.patched_task.accuracy:.2f}, "
            f"{self.rival} {self.plain_rival.accuracy:.2f} -> {self.patched_rival.accuracy:.2f})"
        )

    def __str__(self) -> str:
        return _as_text(self.to_pandas())

    def _repr_html_(self) -> str:
        title = f"demonstrations of {self.task}, vector of {self.rival} at layer {self.layer}"
        return html_table(self.to_pandas(), title)


@dataclass(frozen=True, repr=False)
class Conditions:
    """Scores by condition, and in each by the vector that was written. What `across_conditions` returns.

    Attributes:
        scores: "no vector" first in each condition.

    Examples:
        >>> right = Score(("a",), ("a",), (True,))
        >>> Conditions({"zero-shot": {"no vector": right, "vector": right}}).vectors
        ('no vector', 'vector')
    """

    scores: Mapping[str, Mapping[str, Score]]

    def __post_init__(self) -> None:
        named = [list(scores) for scores in self.scores.values()]
        if not named or any(names != named[0] or names[0] != PLAIN for names in named):
            raise TvLensError(f"conditions {list(self.scores)} need the same vectors each, {PLAIN!r} first")

    @property
    def vectors(self) -> tuple[str, ...]:
        """The names of the vectors, "no vector" first."""
        return tuple(next(iter(self.scores.values())))

    def to_pandas(self) -> pd.DataFrame:
        """One row for each condition and vector: n, accuracy with its 95% interval (low, high), and p_value, McNemar's
        exact test against the same condition without a vector.
        """
        import pandas as pd

        rows = [
            {
                "condition": condition,
                "vector": name,
                "n": len(score.correct),
                "accuracy": score.accuracy,
                "low": score.interval[0],
                "high": score.interval[1],
                "p_value": None if name == PLAIN else mcnemar(score, scores[PLAIN]),
            }
            for condition, scores in self.scores.items()
            for name, score in scores.items()
        ]
        return pd.DataFrame(rows).astype({"p_value": "Float64"})

    def plot(self) -> go.Figure:
        """Accuracy by condition and vector, with intervals."""
        return figure(self)

    def __repr__(self) -> str:
        return f"Conditions({', '.join(self.scores)}; {', '.join(self.vectors)})"

    def __str__(self) -> str:
        return _as_text(self.to_pandas())

    def _repr_html_(self) -> str:
        return html_table(self.to_pandas(), f"p: against {PLAIN!r}, McNemar's exact test", {"p_value": "{:.1g}"})


@dataclass(frozen=True)
class Cost:
    """What making vectors took. A read that several methods share is charged to each of them.

    Attributes:
        positions: positions that the model ran, pads included.
        seconds: how long it took.

    Examples:
        >>> Cost(positions=918.0, seconds=2.8).positions
        918.0
    """

    positions: float
    seconds: float


@dataclass(frozen=True, repr=False)
class TaskResult:
    """What an experiment measured for one task and method.

    Attributes:
        task: the task's name.
        category: the task's category.
        sweep: on dev prompts, at the chosen strength.
        evaluation: on test prompts, at the chosen layer.
        other_task: the task whose vector was a control.
        dev_prompts: the texts of the dev prompts.
        test_prompts: the texts of the test prompts.
        queries: the queries of the test prompts.
        method: the method's name.
        other_sweeps: on dev prompts, at the other strengths.
        control_sweeps: of the controls, at their chosen strengths.
        tied_accuracies: the accuracies on the test prompts at each of `ties`.
        conditions: the scores of the test queries asked in other ways.
        train_prompts: what the vectors are from, if these are not the dev prompts.
        cost: of the vectors; None if it is not known.

    Examples:
        >>> experiment.results[0].sweep.layers, experiment.results[0].tried
        ((2,), 1)
    """

    task: str
    category: str
    sweep: Sweep
    evaluation: Evaluation
    other_task: str | None
    dev_prompts: tuple[str, ...]
    test_prompts: tuple[str, ...]
    queries: tuple[str, ...]
    method: str = "extract"
    other_sweeps: tuple[Sweep, ...] = ()
    control_sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    tied_accuracies: tuple[float, ...] = ()
    conditions: Conditions | None = None
    train_prompts: tuple[str, ...] = ()
    cost: Cost | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.tied_accuracies and len(self.tied_accuracies) != len(self.ties):
            raise TvLensError(
                f"{len(self.tied_accuracies)} test accuracies for {len(self.ties)} layers that tie on dev"
            )
        n_dev, n_test = len(self.sweep.scores[0].correct), len(self.evaluation.patched.correct)
        if not (len(self.dev_prompts) == n_dev and len(self.test_prompts) == len(self.queries) == n_test):
            raise TvLensError(
                f"{len(self.dev_prompts)} dev and {len(self.test_prompts)} test prompts, {len(self.queries)} queries, "
                f"for {n_dev} and {n_test} answers"
            )

    @property
    def ties(self) -> tuple[Choice, ...]:
        """All layers and strengths that reach the highest accuracy on dev prompts, the chosen one first."""
        return tied_choices((self.sweep, *self.other_sweeps))

    @property
    def tried(self) -> int:
        """How many layers and strengths were tried on dev prompts."""
        return sum(len(sweep.layers) for sweep in (self.sweep, *self.other_sweeps))

    @property
    def test_range(self) -> tuple[float, float]:
        """The lowest and the highest accuracy on test prompts over the layers and strengths that tie on dev."""
        accuracies = self.tied_accuracies or (self.evaluation.patched.accuracy,)
        return min(accuracies), max(accuracies)

    def plot(self) -> go.Figure:
        """The sweep on dev prompts, with the zero-shot and few-shot accuracy on test prompts."""
        return figure(self)

    def __repr__(self) -> str:
        return f"TaskResult({self.task!r}, {self.method!r}, {self.evaluation!r})"

    def __str__(self) -> str:
        return str(self.evaluation)

    def _repr_html_(self) -> str:
        return self.evaluation._repr_html_()


def tied_choices(sweeps: Sequence[Sweep], preferred: Choice | None = None) -> tuple[Choice, ...]:
    """The layers and strengths of the highest accuracy, the one to choose first: `preferred` if it is among them, then
    the strength that is nearest to 1, then the lowest layer.
    """
    highest = max(score.accuracy for sweep in sweeps for score in sweep.scores)
    tied = [
        Choice(layer, sweep.strength)
        for sweep in sweeps
        for layer, score in zip(sweep.layers, sweep.scores, strict=True)
        if score.accuracy == highest
    ]
    return tuple(
        sorted(tied, key=lambda each: (each != preferred, abs(math.log(each.strength)), each.layer, each.strength))
    )


@dataclass(frozen=True, repr=False)
class Experiment:
    """The results of `run_experiment`.

    Attributes:
        settings: everything it takes to repeat it.
        results: one for each task and method.
        vectors: each task's vector, by the task's name, or "task, method" if there are several methods.

    Examples:
        >>> [result.task for result in experiment.results], list(experiment.vectors)
        (['upper'], ['upper'])
    """

    settings: Settings
    results: tuple[TaskResult, ...]
    vectors: Mapping[str, TaskVectors] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.results:
            raise TvLensError("an experiment has at least one result")

    def to_pandas(self) -> pd.DataFrame:
        """One tidy table: a row for each task, method and condition, with the columns of `Evaluation.to_pandas`, the
        task, its category, and the settings that tell runs apart.
        """
        import pandas as pd

        tables = [
            result.evaluation.to_pandas().assign(
                task=result.task,
                category=result.category,
                **{name: self.settings[name] for name in IDENTIFYING} | {"method": result.method},
            )
            for result in self.results
        ]
        table = pd.concat(tables, ignore_index=True)
        return table[["task", "category", *(name for name in table if name not in ("task", "category"))]]

    def tests(self) -> pd.DataFrame:
        """One row per task and method: the strongest control and its accuracy, p_controls (patched is better than every
        control, one-sided) and p_controls_holm (the same, adjusted for all rows by Holm's method), p_zero_shot
        (McNemar's test, two-sided), and detectable, the smallest difference in accuracy that so many prompts could have
        shown at 5%, before the adjustment.
        """
        import pandas as pd

        p_values = [result.evaluation.p_controls for result in self.results]
        adjusted = iter(holm([p for p in p_values if p is not None]))
        rows = []
        for result, p in zip(self.results, p_values, strict=True):
            scores, strongest = result.evaluation, result.evaluation.strongest_control
            rows.append(
                {
                    "task": result.task,
                    "method": result.method,
                    "n": len(scores.patched.correct),
                    "strongest_control": strongest,
                    "control_accuracy": None if strongest is None else scores.controls[strongest].accuracy,
                    "p_controls": p,
                    "p_controls_holm": None if p is None else next(adjusted),
                    "p_zero_shot": scores.p_value,
                    "detectable": smallest_detectable(len(scores.patched.correct)),
                }
            )
        kinds = dict.fromkeys(("control_accuracy", "p_controls", "p_controls_holm", "detectable"), "Float64")
        return pd.DataFrame(rows).astype(kinds)

    def summary(self) -> pd.DataFrame:
        """One row per task and method, to read: accuracies with 95% intervals; the layer, and how many tie with it on
        dev prompts; the range of the accuracy over these, if there are any; the controls; and `tests`: p against the
        strongest control, as it is and adjusted by Holm's method for all rows, and p against zero-shot.
        """
        import pandas as pd

        rows = []
        tests = self.tests().to_dict("records")
        for result, test in zip(self.results, tests, strict=True):
            scores, ties = result.evaluation, len(result.ties) - 1
            low, high = result.test_range
            rows.append(
                {
                    "task": result.task,
                    **({"method": result.method} if len(self.settings.methods) > 1 else {}),
                    "n": len(scores.patched.correct),
                    **{name: str(scores.conditions[name]) for name in ("zero-shot", "few-shot", "patched")},
                    "layer": _layer_text(scores) + (f" (+{ties})" if ties else ""),
                    **({"over ties": f"{low:.2f}-{high:.2f}"} if ties else {}),
                    **{name: f"{score.accuracy:.2f}" for name, score in scores.controls.items()},
                    **({"p controls": f"{test['p_controls']:.1g}"} if scores.controls else {}),
                    **({"Holm": f"{test['p_controls_holm']:.1g}"} if scores.controls else {}),
                    "p zero-shot": f"{scores.p_value:.1g}",
                }
            )
        table = pd.DataFrame(rows).fillna("")
        last = [name for name in ("p controls", "Holm", "p zero-shot") if name in table]
        return table[[name for name in table if name not in last] + last]

    def save(self, path: str | Path) -> None:
        """Write everything as `.json`, which `load` reads, or the tidy table as `.parquet` (extra `parquet`).

        Args:
            path: a path that ends with `.json` or `.parquet`.

        Raises:
            TvLensError: another kind of file.
            MissingExtraError: the extra is not installed.
        """
        path = Path(path)
        if path.suffix == ".json":
            write_whole(path, to_json({"settings": self.settings, "results": self.results}, indent=1))
        elif path.suffix == ".parquet":
            try:
                content = self.to_pandas().to_parquet(index=False)
            except ImportError as error:
                raise MissingExtraError('a Parquet file needs pyarrow; pip install "tv_lens[parquet]"') from error
            write_whole(path, content)
        else:
            raise TvLensError(f"{path}: results are saved as .json or .parquet, not {path.suffix!r}")

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read what `save` wrote as `.json`; the vectors are separate files in the experiment's folder.

        Args:
            path: a `.json` file.

        Returns:
            The experiment, without its vectors.

        Raises:
            OSError: the file cannot be read.
            TvLensError: not a saved experiment, or a corrupted file.
        """
        try:
            saved = from_typed_json(read_whole(path), _Saved)
            return cls(saved.settings, saved.results)
        except TvLensError as error:
            raise TvLensError(f"{path}: not a saved experiment, or the file is corrupted ({error})") from error

    def plot(self) -> go.Figure:
        """Accuracy by task: zero-shot, few-shot and patched with their intervals, and the controls."""
        return figure(self)

    def report(self, path: str | Path) -> None:
        """Write everything as one HTML page that can be read without a network, whole or not at all.

        Args:
            path: where to write the page.

        Raises:
            MissingExtraError: the extra `plots` is not installed.
            OSError: the folder is missing or cannot be written to.
        """
        write_report(self, path)

    def __repr__(self) -> str:
        tasks = list(dict.fromkeys(result.task for result in self.results))
        methods = ", ".join(dict.fromkeys(result.method for result in self.results))
        return f"Experiment({self.settings['model']}, {len(tasks)} tasks: {some(tasks)}; {methods})"

    def __str__(self) -> str:
        return str(self.summary().to_string(index=False))

    def _repr_html_(self) -> str:
        about = ", ".join(f"{name} {self.settings[name]}" for name in ("model", "scoring", "shots", "seed"))
        return html_table(self.summary(), about)


@dataclass(frozen=True)
class _Saved:
    """The content of a saved experiment."""

    settings: Settings
    results: tuple[TaskResult, ...]


def _layer_text(evaluation: Evaluation) -> str:
    return layers_text(evaluation.layer) + ("" if evaluation.strength == 1 else f" x {evaluation.strength:g}")


def _as_text(table: pd.DataFrame) -> str:
    """A table as it is printed: accuracies with two digits, p-values with one."""
    p_values = {"p_value": lambda p: f"{p:.1g}"} if "p_value" in table else {}
    return str(table.to_string(index=False, float_format="{:.2f}".format, formatters=p_values, na_rep=""))


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _check_layer(layer: int, n_layers: int | None) -> None:
    if not 0 <= layer < _MAX_LAYER or (n_layers is not None and layer >= n_layers):
        raise TvLensError(f"layer {layer} is not one of a model with {n_layers} layers")


def _check_same_prompts(*scores: Score) -> None:
    if len({score.answers for score in scores}) > 1:
        raise TvLensError("the scores are not of the same prompts")
