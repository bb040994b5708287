"""What was measured: scores, sweeps, evaluations, conflicts and experiments.

The classes check their own invariants, so a result that was read from a file is as good as one that was computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tv_lens.display import figure, html_table, write_report
from tv_lens.errors import MissingExtraError, TvLensError
from tv_lens.evidence.settings import IDENTIFYING, Settings
from tv_lens.evidence.statistics import exact_interval, paired_p_value
from tv_lens.files import from_typed_json, read_whole, to_json, write_whole
from tv_lens.vectors import TaskVectors, depth, layers_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

# Tables hold layers as machine integers.
_MAX_LAYER = 2**31
_UNPATCHED = ("zero-shot", "few-shot")


@dataclass(frozen=True)
class Score:
    """Predictions beside the expected answers, and which of them the task accepts.

    If they were measured, `logprobs` are the log-probabilities of the expected answers, and `divergences` those of the
    next token from few-shot, both in nats.
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
    """The two-sided p-value of McNemar's exact test that two conditions answer the same prompts equally well: a
    binomial test of the prompts that only one of them gets right. 1 if there are none.

    Raises:
        TvLensError: the scores are not of the same prompts.
    """
    if one.answers != other.answers:
        raise TvLensError(
            f"a paired test needs two scores of the same prompts; these are of {len(one.answers)} and "
            f"{len(other.answers)} prompts with different answers"
        )
    return paired_p_value(one.correct, other.correct)


@dataclass(frozen=True)
class Sweep:
    """Scores of the same prompts patched at each of several layers of a model with `n_layers` of them."""

    layers: tuple[int, ...]
    scores: tuple[Score, ...]
    n_layers: int | None = None

    def __post_init__(self) -> None:
        if not len(set(self.layers)) == len(self.layers) == len(self.scores) > 0:
            raise TvLensError(
                f"a sweep has different layers and a score for each, not {len(self.scores)} for {self.layers[:12]}"
            )
        for layer in self.layers:
            _check_layer(layer, self.n_layers)
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
        """Accuracy by layer with its intervals, and lines for `zero_shot` and `few_shot` if they are given."""
        return figure(self, zero_shot=zero_shot, few_shot=few_shot)

    def _repr_html_(self) -> str:
        tied = f", tied with {list(self.ties[1:])}" if len(self.ties) > 1 else ""
        return html_table(self.to_pandas(), f"best layer {self.best}: {self.at(self.best)}{tied}")


@dataclass(frozen=True)
class Evaluation:
    """Scores of the same prompts under several conditions, patched at one layer (or at several at once)."""

    layer: int | tuple[int, ...]
    zero_shot: Score
    few_shot: Score
    patched: Score
    controls: Mapping[str, Score]
    n_layers: int | None = None

    def __post_init__(self) -> None:
        for layer in (self.layer,) if isinstance(self.layer, int) else self.layer:
            _check_layer(layer, self.n_layers)
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
        """McNemar's exact test, patched against zero-shot."""
        return mcnemar(self.patched, self.zero_shot)

    def to_pandas(self) -> pd.DataFrame:
        """One row per condition: layer (none if nothing is patched), n, accuracy with its 95% interval (low, high), and
        p_value, McNemar's exact test of patched against it.
        """
        import pandas as pd

        rows = []
        for name, score in self.conditions.items():
            low, high = score.interval
            rows.append(
                {
                    "condition": name,
                    "layer": None if name in _UNPATCHED else self.layer,
                    "n": len(score.correct),
                    "accuracy": score.accuracy,
                    "low": low,
                    "high": high,
                    "p_value": None if name == "patched" else mcnemar(self.patched, score),
                }
            )
        kinds = {"p_value": "Float64", **({"layer": "Int64"} if isinstance(self.layer, int) else {})}
        return pd.DataFrame(rows).astype(kinds)

    def plot(self) -> go.Figure:
        """Accuracy by condition with its intervals."""
        return figure(self)

    def _repr_html_(self) -> str:
        title = f"patched at layer {self.layer}, {len(self.patched.correct)} prompts; p: patched against the condition"
        return html_table(self.to_pandas(), title, {"p_value": "{:.1g}"})


@dataclass(frozen=True)
class Conflict:
    """Answers to the same few-shot prompts, as they are and with a rival task's vector written in; each scored
    as answers to the demonstrated task and as answers to the rival.
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

    def _repr_html_(self) -> str:
        title = f"demonstrations of {self.task}, vector of {self.rival} at layer {self.layer}"
        return html_table(self.to_pandas(), title)


@dataclass(frozen=True)
class TaskResult:
    """What an experiment measured for one task and method: the sweep on dev prompts, the evaluation on test prompts,
    those prompts' texts, and the test prompts' queries. `other_task` is the task whose vector was the control.
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

    def __post_init__(self) -> None:
        n_dev, n_test = len(self.sweep.scores[0].correct), len(self.evaluation.patched.correct)
        if not (len(self.dev_prompts) == n_dev and len(self.test_prompts) == len(self.queries) == n_test):
            raise TvLensError(
                f"{len(self.dev_prompts)} dev and {len(self.test_prompts)} test prompts, {len(self.queries)} queries, "
                f"for {n_dev} and {n_test} answers"
            )

    def plot(self) -> go.Figure:
        """The sweep on dev prompts, with the zero-shot and few-shot accuracy on test prompts."""
        return figure(self)

    def _repr_html_(self) -> str:
        return self.evaluation._repr_html_()


@dataclass(frozen=True)
class Experiment:
    """The results of `run_experiment`, with everything it takes to repeat it in `settings`, and each task's vector (by
    the task's name, or "task, method" if there are several methods).
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

    def summary(self) -> pd.DataFrame:
        """One row per task and method, to read: accuracies with 95% intervals, the layer (and how many tie with it),
        the controls, and p of patched against zero-shot.
        """
        import pandas as pd

        rows = []
        for result in self.results:
            scores, ties = result.evaluation, len(result.sweep.ties) - 1
            rows.append(
                {
                    "task": result.task,
                    **({"method": result.method} if len(self.settings.methods) > 1 else {}),
                    "n": len(scores.patched.correct),
                    **{name: str(scores.conditions[name]) for name in ("zero-shot", "few-shot", "patched")},
                    "layer": layers_text(scores.layer) + (f" (+{ties})" if ties else ""),
                    **{name: f"{score.accuracy:.2f}" for name, score in scores.controls.items()},
                    "p": f"{scores.p_value:.1g}",
                }
            )
        return pd.DataFrame(rows).fillna("")

    def save(self, path: str | Path) -> None:
        """Write everything as `.json`, which `load` reads, or the tidy table as `.parquet` (extra `parquet`).

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

        Raises:
            MissingExtraError: the extra `plots` is not installed.
            OSError: the folder is missing or cannot be written to.
        """
        write_report(self, path)

    def _repr_html_(self) -> str:
        about = ", ".join(f"{name} {self.settings[name]}" for name in ("model", "scoring", "shots", "seed"))
        return html_table(self.summary(), about)


@dataclass(frozen=True)
class _Saved:
    """The content of a saved experiment."""

    settings: Settings
    results: tuple[TaskResult, ...]


def _check_layer(layer: int, n_layers: int | None) -> None:
    if not 0 <= layer < _MAX_LAYER or (n_layers is not None and layer >= n_layers):
        raise TvLensError(f"layer {layer} is not one of a model with {n_layers} layers")


def _check_same_prompts(*scores: Score) -> None:
    if len({score.answers for score in scores}) > 1:
        raise TvLensError("the scores are not of the same prompts")
