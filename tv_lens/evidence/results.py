"""What was found: scores, sweeps, evaluations, experiments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer_lens.utilities.statistics import success_rate_ci

from tv_lens.files import from_json, to_json, write_whole
from tv_lens.vectors import TaskVectors, depth
from tv_lens.views.tables import to_html

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


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
        return to_html(self.to_pandas(), f"accuracy {self}, {len(self.correct)} prompts")


def mcnemar(one: Score, other: Score) -> float:
    """The two-sided p-value of McNemar's exact test that two conditions answer the same prompts equally well: a
    binomial test of the prompts that only one of them gets right. 1 where there are none.

    Raises:
        ValueError: the scores are not of the same prompts.
    """
    from scipy.stats import binomtest

    if one.answers != other.answers:
        raise ValueError(
            f"a paired test needs two scores of the same prompts; these are of {len(one.answers)} and "
            f"{len(other.answers)} prompts with different answers"
        )
    only_one = sum(a and not b for a, b in zip(one.correct, other.correct, strict=True))
    only_other = sum(b and not a for a, b in zip(one.correct, other.correct, strict=True))
    return float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0


@dataclass(frozen=True)
class Sweep:
    """Scores of the same prompts patched at each of several layers of a model with `n_layers` of them."""

    layers: tuple[int, ...]
    scores: tuple[Score, ...]
    n_layers: int | None = None

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
        """A row for each layer: layer, depth (the fraction of the model's blocks that have been run), accuracy with
        its 95% interval (low, high), whether it is the best.
        """
        import pandas as pd

        intervals = [score.interval for score in self.scores]
        n = self.n_layers
        return pd.DataFrame(
            {
                "layer": self.layers,
                **({} if n is None else {"depth": [depth(layer, n) for layer in self.layers]}),
                "accuracy": [score.accuracy for score in self.scores],
                "low": [low for low, _ in intervals],
                "high": [high for _, high in intervals],
                "best": [layer == self.best for layer in self.layers],
            }
        )

    def plot(self, *, zero_shot: Score | None = None, few_shot: Score | None = None) -> go.Figure:
        """Accuracy by layer with its intervals; beside it the lines of `zero_shot` and `few_shot`, where given."""
        from tv_lens.views.plots import plot_sweep

        return plot_sweep(self, zero_shot=zero_shot, few_shot=few_shot)

    def _repr_html_(self) -> str:
        tied = f", tied with {list(self.ties[1:])}" if len(self.ties) > 1 else ""
        return to_html(self.to_pandas(), f"best layer {self.best}: {self.at(self.best)}{tied}")


@dataclass(frozen=True)
class Evaluation:
    """Scores of the same prompts under several conditions, patched at one layer."""

    layer: int
    zero_shot: Score
    few_shot: Score
    patched: Score
    controls: Mapping[str, Score]
    n_layers: int | None = None

    @property
    def conditions(self) -> dict[str, Score]:
        """All scores by name: zero-shot, few-shot, patched and the controls."""
        return {"zero-shot": self.zero_shot, "few-shot": self.few_shot, "patched": self.patched, **self.controls}

    @property
    def p_value(self) -> float:
        """McNemar's exact test, patched against zero-shot."""
        return mcnemar(self.patched, self.zero_shot)

    def to_pandas(self) -> pd.DataFrame:
        """A row for each condition: layer (none where nothing is patched), n, accuracy with its 95% interval (low,
        high), and p_value, McNemar's exact test of patched against it.
        """
        import pandas as pd

        unpatched = ("zero-shot", "few-shot")
        rows = [
            {
                "condition": name,
                "layer": None if name in unpatched else self.layer,
                "n": len(score.correct),
                "accuracy": score.accuracy,
                "low": score.interval[0],
                "high": score.interval[1],
                "p_value": None if name == "patched" else mcnemar(self.patched, score),
            }
            for name, score in self.conditions.items()
        ]
        return pd.DataFrame(rows).astype({"layer": "Int64", "p_value": "Float64"})

    def plot(self) -> go.Figure:
        """Accuracy by condition with its intervals."""
        from tv_lens.views.plots import plot_evaluation

        return plot_evaluation(self)

    def _repr_html_(self) -> str:
        title = f"patched at layer {self.layer}, {len(self.patched.correct)} prompts; p: patched against the condition"
        return to_html(self.to_pandas(), title, {"p_value": "{:.1g}"})


@dataclass(frozen=True)
class Conflict:
    """Answers to the same few-shot prompts, as they are and with a rival task's vector written in; each scored
    as answers to the demonstrated task and as answers to the rival.
    """

    task: str
    rival: str
    layer: int
    plain_task: Score
    plain_rival: Score
    patched_task: Score
    patched_rival: Score
    n_layers: int | None = None

    def to_pandas(self) -> pd.DataFrame:
        """A row for each of plain and patched, and each task scored: accuracy with its 95% interval (low, high)."""
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
        from tv_lens.views.plots import plot_conflict

        return plot_conflict(self)

    def _repr_html_(self) -> str:
        return to_html(self.to_pandas(), f"demonstrations of {self.task}, vector of {self.rival} at layer {self.layer}")


@dataclass(frozen=True)
class TaskResult:
    """What an experiment found for one task: the sweep on dev prompts, the evaluation on test prompts, those
    prompts' texts, and the test prompts' queries.
    """

    task: str
    category: str
    sweep: Sweep
    evaluation: Evaluation
    other_task: str | None
    dev_prompts: tuple[str, ...]
    test_prompts: tuple[str, ...]
    queries: tuple[str, ...] = ()

    def plot(self) -> go.Figure:
        """The sweep on dev prompts, beside the zero-shot and few-shot accuracy on test prompts."""
        from tv_lens.views.plots import plot_sweep

        test, n_dev, n_test = self.evaluation, len(self.dev_prompts), len(self.test_prompts)
        note = f"{self.task}: layers on {n_dev} dev prompts, lines on {n_test} test prompts"
        return plot_sweep(self.sweep, zero_shot=test.zero_shot, few_shot=test.few_shot, note=note)

    def _repr_html_(self) -> str:
        return self.evaluation._repr_html_()


@dataclass(frozen=True)
class Experiment:
    """The results of `run_experiment`, with all that it takes to repeat it in `settings`, and each task's vector."""

    settings: Mapping[str, Any]
    results: tuple[TaskResult, ...]
    vectors: Mapping[str, TaskVectors] = field(default_factory=dict, compare=False)

    def to_pandas(self) -> pd.DataFrame:
        """One tidy table: a row for each task and condition, the columns of `Evaluation.to_pandas` beside the task,
        its category, and the settings that tell runs apart.
        """
        import pandas as pd

        tables = [
            result.evaluation.to_pandas().assign(
                task=result.task, category=result.category, **{name: self.settings[name] for name in _TOLD}
            )
            for result in self.results
        ]
        table = pd.concat(tables, ignore_index=True)
        return table[["task", "category", *(name for name in table if name not in ("task", "category"))]]

    def summary(self) -> pd.DataFrame:
        """A row for each task, to read: accuracies with 95% intervals, the layer (and how many tie with it), the
        controls, and p of patched against zero-shot.
        """
        import pandas as pd

        rows = []
        for result in self.results:
            found, ties = result.evaluation, len(result.sweep.ties) - 1
            rows.append(
                {
                    "task": result.task,
                    "n": len(found.patched.correct),
                    **{name: str(found.conditions[name]) for name in ("zero-shot", "few-shot", "patched")},
                    "layer": f"{found.layer}" + (f" (+{ties})" if ties else ""),
                    **{name: f"{score.accuracy:.2f}" for name, score in found.controls.items()},
                    "p": f"{found.p_value:.1g}",
                }
            )
        return pd.DataFrame(rows).fillna("")

    def save(self, path: str | Path) -> None:
        """Write everything as `.json`, which `load` reads, or the tidy table as `.parquet` (extra `parquet`).

        Raises:
            ValueError: another kind of file.
            ImportError: the extra is missing.
        """
        path = Path(path)
        if path.suffix == ".json":
            whole = {"settings": dict(self.settings), "results": [asdict(result) for result in self.results]}
            write_whole(path, to_json(whole, indent=1))
        elif path.suffix == ".parquet":
            try:
                content = self.to_pandas().to_parquet(index=False)
            except ImportError as error:
                raise ImportError('a Parquet file needs pyarrow; pip install "tv_lens[parquet]"') from error
            write_whole(path, content)
        else:
            raise ValueError(f"{path}: results are saved as .json or .parquet, not {path.suffix!r}")

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read what `save` wrote as `.json`; the vectors are files of their own, in the experiment's folder.

        Raises:
            ValueError: another kind of file, or a damaged one.
        """
        try:
            whole = from_json(Path(path).read_bytes())
            settings, results = whole["settings"], tuple(task_result(each) for each in _list_of(dict, whole["results"]))
            if not (results and all(isinstance(settings[name], (str, int)) for name in _TOLD)):
                raise ValueError(f"no results, or no {', '.join(_TOLD)}")
            return cls(settings, results)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: no saved experiment, or a damaged one ({error!r})") from error

    def plot(self) -> go.Figure:
        """Accuracy by task: zero-shot, few-shot and patched with their intervals, and the controls."""
        from tv_lens.views.plots import plot_experiment

        return plot_experiment(self)

    def report(self, path: str | Path) -> None:
        """Write everything as one HTML page that needs nothing else to be read, whole or not at all.

        Raises:
            ImportError: the extra `plots` is not installed.
            OSError: the folder is missing or cannot be written to.
        """
        from tv_lens.views.report import write_report

        write_report(self, path)

    def _repr_html_(self) -> str:
        about = ", ".join(f"{name} {self.settings[name]}" for name in ("model", "scoring", "shots", "seed"))
        return to_html(self.summary(), about)


# The settings that tell the rows of several experiments apart.
_TOLD = ("model", "scoring", "method", "shots", "seed")


def _list_of(kind: type, values: Any) -> tuple[Any, ...]:
    if not (isinstance(values, list) and all(type(each) is kind for each in values)):
        raise ValueError(f"not a list of {kind.__name__}")
    return tuple(values)


def _score(data: Mapping[str, Any]) -> Score:
    found = Score(
        *(_list_of(*each) for each in ((str, data["texts"]), (str, data["answers"]), (bool, data["correct"])))
    )
    if not len(found.texts) == len(found.answers) == len(found.correct) > 0:
        raise ValueError("a score has a text, an answer and a verdict for each prompt")
    return found


def _n_layers(data: Mapping[str, Any], layers: Sequence[int]) -> int | None:
    """How many layers the model has, which files of before did not say."""
    found = data.get("n_layers")
    if not (found is None or (type(found) is int and max(layers) < found < 2**31)):
        raise ValueError(f"n_layers is {found}, of a model with the layers {layers}")
    return found


def task_result(data: Mapping[str, Any]) -> TaskResult:
    """A result from JSON, each part of its type and as many as there should be."""
    found, swept = data["evaluation"], data["sweep"]
    scores = tuple(map(_score, _list_of(dict, swept["scores"])))
    layers = (found["layer"], *_list_of(int, swept["layers"]))
    if not all(type(layer) is int and 0 <= layer < 2**31 for layer in layers):
        raise ValueError(f"layers are {layers}, and should be whole numbers")
    sweep = Sweep(layers[1:], scores, _n_layers(swept, layers))
    if not len(set(sweep.layers)) == len(sweep.layers) == len(sweep.scores) > 0:
        raise ValueError("a sweep has different layers and a score for each")
    if not isinstance(found["controls"], dict):
        raise ValueError("controls is an object")
    evaluation = Evaluation(
        found["layer"],
        zero_shot=_score(found["zero_shot"]),
        few_shot=_score(found["few_shot"]),
        patched=_score(found["patched"]),
        controls={name: _score(each) for name, each in found["controls"].items()},
        n_layers=_n_layers(found, layers),
    )
    if len({score.answers for score in evaluation.conditions.values()}) > 1:
        raise ValueError("the conditions are not of the same prompts")
    task, category, other = data["task"], data["category"], data["other_task"]
    if not (isinstance(task, str) and isinstance(category, str) and (other is None or isinstance(other, str))):
        raise ValueError("task, category and other_task are texts")
    dev, test = _list_of(str, data["dev_prompts"]), _list_of(str, data["test_prompts"])
    queries = _list_of(str, data.get("queries", []))
    n_dev, n_test = len(sweep.scores[0].correct), len(evaluation.patched.correct)
    if (len(dev), len(test)) != (n_dev, n_test) or len(queries) not in (0, n_test):
        raise ValueError(
            f"{len(dev)} dev and {len(test)} test prompts, {len(queries)} queries, for {n_dev} and {n_test} answers"
        )
    return TaskResult(task, category, sweep, evaluation, other, dev, test, queries)
