"""The results of a comparison, and the statistics of its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tv_lens.display import figure, html_table, write_report
from tv_lens.errors import MissingExtraError, TvLensError
from tv_lens.evidence.results import PLAIN, Evaluation, Experiment, Score, TaskResult
from tv_lens.evidence.settings import Settings
from tv_lens.evidence.statistics import (
    Seeds,
    accuracy_interval,
    better_p_value,
    difference_interval,
    different_p_value,
    holm,
    intersection_union,
    mean_interval,
    non_inferiority,
    share_recovered,
    smallest_detectable,
)
from tv_lens.files import from_typed_json, read_whole, to_json, write_whole
from tv_lens.vectors import layers_text

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Comparison:
    """The results of `compare`.

    Attributes:
        experiments: one for each seed, on the same tasks with the same methods.

    Raises:
        TvLensError: experiments of other tasks, methods or settings, or two of one seed.

    Examples:
        >>> Comparison.load("comparison.json").summary()  # doctest: +SKIP
    """

    experiments: tuple[Experiment, ...]

    def __post_init__(self) -> None:
        if not self.experiments:
            raise TvLensError("a comparison has at least one experiment")
        first = self.experiments[0].settings
        for experiment in self.experiments[1:]:
            differing = [name for name in first if name != "seed" and first[name] != experiment.settings[name]]
            if differing:
                raise TvLensError(f"the experiments of a comparison differ in {differing}; they may differ in the seed")
        if len(set(self.seeds)) < len(self.experiments):
            raise TvLensError(f"the experiments have the seeds {list(self.seeds)}; give each a different one")
        for task in self.tasks:
            for experiment in self.experiments:
                asked = {result.test_prompts for result in experiment.results if result.task == task}
                if len(asked) != 1:
                    raise TvLensError(f"the methods were tested on different prompts of {task!r}, or on none")

    @property
    def settings(self) -> Settings:
        """The settings of the first seed; the others differ in the seed alone."""
        return self.experiments[0].settings

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, one for each experiment."""
        return tuple(experiment.settings.seed for experiment in self.experiments)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names."""
        return self.settings.tasks

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' names; the others are compared with the first."""
        return tuple(self.settings.methods)

    def at(self, task: str, method: str) -> Cell:
        """The results of one task and method, one for each seed.

        Args:
            task: the task's name.
            method: the method's name.

        Returns:
            Their results, one for each seed.

        Raises:
            TvLensError: a task or method that was not run.
        """
        if (task, method) not in self._cells:
            raise TvLensError(f"{task!r} with {method!r} was not run; there are {self.tasks} and {self.methods}")
        return self._cells[task, method]

    @cached_property
    def _cells(self) -> dict[tuple[str, str], Cell]:
        by_key: dict[tuple[str, str], list[TaskResult]] = {}
        for experiment in self.experiments:
            for result in experiment.results:
                by_key.setdefault((result.task, result.method), []).append(result)
        return {key: Cell(tuple(results)) for key, results in by_key.items()}

    def to_pandas(self) -> pd.DataFrame:
        """One tidy table: a row for each task, method, seed and condition, as `Experiment.to_pandas` has them."""
        import pandas as pd

        return pd.concat([experiment.to_pandas() for experiment in self.experiments], ignore_index=True)

    @cached_property
    def _estimates(self) -> pd.DataFrame:
        import pandas as pd

        rows = []
        for task in self.tasks:
            first = self.at(task, self.methods[0])
            rows += [
                self.at(task, method).estimates(None if method == self.methods[0] else first) for method in self.methods
            ]
        table = pd.DataFrame(rows)
        for name in ("p_controls", "p_first"):
            known = table[name].notna()
            table[f"{name}_holm"] = pd.Series(dtype="float64")
            table.loc[known, f"{name}_holm"] = holm(table.loc[known, name].astype(float).tolist())
        texts = ("task", "category", "method", "layers", "strengths", "strongest_control", "as_good")
        return table.astype({name: "float64" for name in table if name not in texts and table[name].dtype == object})

    def estimates(self) -> pd.DataFrame:
        """One row for each task and method, all seeds together; the statistics are in `docs/statistics.md`.

        - n is the number of test prompts of all seeds. zero_shot, few_shot and accuracy are means over seeds, low and
          high the 95% interval of the accuracy. layers and strengths are the chosen ones, one for each seed, `tried` is
          how many of them were tried in a seed, and tied_low and tied_high are the range of the test accuracy over
          those that tied on dev.
        - difference (with its interval) is accuracy minus that of the first method on the same prompts, p_first the
          two-sided exact test of it, p_first_holm the same adjusted for all rows.
        - p_controls is the exact one-sided test that the vector is better than every control, p_controls_holm the same
          adjusted for all rows. strongest_control, and control_accuracy, are those that decide it. p_zero_shot is the
          two-sided test against zero-shot. detectable is the smallest difference that so many different queries could
          have shown at 5%, before the adjustment.
        - share (with its interval) is the share of the few-shot gain that is recovered, missing if few-shot is not
          clearly better than zero-shot. below_few_shot is the one-sided 95% bound of how much less accurate than
          few-shot the vector may be, and as_good whether that is less than 0.1.
        - logprob is the mean log-probability of the right answer, logprob_gain (with its interval) how much it is above
          zero-shot, and divergence (with its interval) that of the next token from few-shot, all in nats.
        - positions and seconds are what making the vectors took, mean over seeds.
        """
        return self._estimates.copy()

    def summary(self) -> pd.DataFrame:
        """One row for each task and method, to read; `estimates` has all the numbers. Both p-values are adjusted by
        Holm's method for all rows: p difference is against the first method, p controls against the strongest control.
        """
        import pandas as pd

        return pd.DataFrame([_to_read(row) for row in self._estimates.to_dict("records")])

    def by_method(self) -> pd.DataFrame:
        """One row for each method: its mean accuracy over tasks, and the difference from the first method with an
        interval over tasks like these; for how many tasks it beats every control, and is better or worse than the first
        method (all after Holm's adjustment); how many it does as well as few-shot; and what its vectors took.
        """
        import pandas as pd

        table = self._estimates
        rows = []
        for method in self.methods:
            own = table[table["method"] == method]
            differences = own["difference"].dropna().tolist()
            over_tasks = mean_interval([differences]) if len(differences) > 1 else None
            significant = own["p_first_holm"] < 0.05
            rows.append(
                {
                    "method": method,
                    "tasks": len(own),
                    "accuracy": own["accuracy"].mean(),
                    "difference": None if not differences else sum(differences) / len(differences),
                    "difference_low": None if over_tasks is None else max(over_tasks.low, -1.0),
                    "difference_high": None if over_tasks is None else min(over_tasks.high, 1.0),
                    "better": int((significant & (own["difference"] > 0)).sum()),
                    "worse": int((significant & (own["difference"] < 0)).sum()),
                    "beats_controls": int((own["p_controls_holm"] < 0.05).sum()),
                    "as_good_as_few_shot": int(own["as_good"].sum()),
                    "logprob_gain": own["logprob_gain"].mean(),
                    "divergence": own["divergence"].mean(),
                    "positions": own["positions"].mean(),
                    "seconds": own["seconds"].mean(),
                }
            )
        floats = ("difference", "difference_low", "difference_high", "positions", "seconds")
        return pd.DataFrame(rows).astype(dict.fromkeys(floats, "Float64"))

    def conditions(self) -> pd.DataFrame:
        """One row for each task, method and condition: the accuracy without and with the vector, and the difference
        with its interval. The layer and the strength are those of the query alone. Empty without conditions.
        """
        import pandas as pd

        rows = [row for cell in self._cells.values() for row in cell.conditions()]
        names = ["task", "method", "condition", "n", "without", "accuracy", "difference", "low", "high", "p_value"]
        return pd.DataFrame(rows, columns=names)

    def plot(self) -> go.Figure:
        """Accuracy with intervals by task and method, a panel for each kind of task."""
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

    def save(self, path: str | Path) -> None:
        """Write everything as `.json`, which `load` reads, or `estimates()` as `.parquet` (extra `parquet`).

        Args:
            path: a path that ends with `.json` or `.parquet`.

        Raises:
            TvLensError: another kind of file.
            MissingExtraError: the extra is not installed.
        """
        path = Path(path)
        if path.suffix == ".json":
            saved = [{"settings": each.settings, "results": each.results} for each in self.experiments]
            write_whole(path, to_json({"experiments": saved}, indent=1))
        elif path.suffix == ".parquet":
            try:
                content = self._estimates.to_parquet(index=False)
            except ImportError as error:
                raise MissingExtraError('a Parquet file needs pyarrow; pip install "tv_lens[parquet]"') from error
            write_whole(path, content)
        else:
            raise TvLensError(f"{path}: a comparison is saved as .json or .parquet, not {path.suffix!r}")

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read what `save` wrote as `.json`; the vectors are separate files in the comparison's folder.

        Args:
            path: a `.json` file.

        Returns:
            The comparison, without its vectors.

        Raises:
            OSError: the file cannot be read.
            TvLensError: not a saved comparison, or a corrupted file.
        """
        try:
            saved = from_typed_json(read_whole(path), _Saved)
            return cls(tuple(Experiment(each.settings, each.results) for each in saved.experiments))
        except TvLensError as error:
            raise TvLensError(f"{path}: not a saved comparison, or the file is corrupted ({error})") from error

    def __repr__(self) -> str:
        return f"Comparison({len(self.tasks)} tasks, {', '.join(self.methods)}, seeds {list(self.seeds)})"

    def __str__(self) -> str:
        return str(self.summary().to_string(index=False))

    def _repr_html_(self) -> str:
        about = ", ".join(f"{name} {self.settings[name]}" for name in ("model", "scoring", "shots"))
        return html_table(self.summary(), f"{about}, seeds {list(self.seeds)}; compared with {self.methods[0]}")


@dataclass(frozen=True)
class Cell:
    """One task and method: a result for each seed."""

    results: tuple[TaskResult, ...]

    @property
    def evaluations(self) -> list[Evaluation]:
        """The evaluations, one for each seed."""
        return [result.evaluation for result in self.results]

    @property
    def queries(self) -> list[tuple[str, ...]]:
        """The test queries of each seed."""
        return [result.queries for result in self.results]

    @property
    def controls(self) -> list[str]:
        """The controls that every seed has."""
        return [
            name for name in self.evaluations[0].controls if all(name in each.controls for each in self.evaluations)
        ]

    def correct(self, condition: str) -> list[tuple[bool, ...]]:
        """Which answers were right under a condition, by seed."""
        return [evaluation.conditions[condition].correct for evaluation in self.evaluations]

    def estimates(self, first: Cell | None) -> dict[str, Any]:
        """A row of `Comparison.estimates`; `first` is the same task with the first method, None for that itself."""
        one = self.results[0]
        patched, zero, few = (self.correct(name) for name in ("patched", "zero-shot", "few-shot"))
        low, high = accuracy_interval(patched, queries=self.queries)
        tied = [result.test_range for result in self.results]
        return {
            "task": one.task,
            "category": one.category,
            "method": one.method,
            "n": sum(map(len, patched)),
            "seeds": len(self.results),
            "zero_shot": _mean(zero),
            "few_shot": _mean(few),
            "accuracy": _mean(patched),
            "low": low,
            "high": high,
            "layers": "; ".join(layers_text(each.layer) for each in self.evaluations),
            "strengths": "; ".join(f"{each.strength:g}" for each in self.evaluations),
            "tried": one.tried,
            "tied_low": sum(each[0] for each in tied) / len(tied),
            "tied_high": sum(each[1] for each in tied) / len(tied),
            **self._against_first(patched, first),
            **self._against_controls(patched, zero),
            **self._against_few_shot(patched, zero, few),
            **self._measured(),
            "positions": self._cost(lambda result: None if result.cost is None else result.cost.positions),
            "seconds": self._cost(lambda result: None if result.cost is None else result.cost.seconds),
        }

    def conditions(self) -> list[dict[str, Any]]:
        """The rows of `Comparison.conditions`."""
        known = [result.conditions for result in self.results if result.conditions is not None]
        rows = []
        for name in known[0].scores if known else ():
            if len(known) < len(self.results) or not all(name in each.scores for each in known):
                continue
            plain, patched = ([each.scores[name][vector].correct for each in known] for vector in (PLAIN, "patched"))
            low, high = difference_interval(patched, plain, queries=self.queries)
            rows.append(
                {
                    "task": self.results[0].task,
                    "method": self.results[0].method,
                    "condition": name,
                    "n": sum(map(len, patched)),
                    "without": _mean(plain),
                    "accuracy": _mean(patched),
                    "difference": _mean(patched) - _mean(plain),
                    "low": low,
                    "high": high,
                    "p_value": different_p_value(patched, plain, self.queries),
                }
            )
        return rows

    def _against_first(self, patched: Seeds, first: Cell | None) -> dict[str, Any]:
        names = ("difference", "difference_low", "difference_high", "p_first")
        if first is None:
            return dict.fromkeys(names)
        theirs = first.correct("patched")
        interval = difference_interval(patched, theirs, queries=self.queries)
        p_value = different_p_value(patched, theirs, self.queries)
        return dict(zip(names, (_mean(patched) - _mean(theirs), *interval, p_value), strict=True))

    def _against_controls(self, patched: Seeds, zero: Seeds) -> dict[str, Any]:
        p_values = {name: better_p_value(patched, self.correct(name), self.queries) for name in self.controls}
        accuracies = {name: _mean(self.correct(name)) for name in self.controls}
        strongest = max(p_values, key=lambda name: (p_values[name], accuracies[name]), default=None)
        return {
            "strongest_control": strongest,
            "control_accuracy": None if strongest is None else accuracies[strongest],
            "p_controls": None if strongest is None else intersection_union(list(p_values.values())),
            "p_zero_shot": different_p_value(patched, zero, self.queries),
            "detectable": smallest_detectable(len({query for queries in self.queries for query in queries})),
        }

    def _against_few_shot(self, patched: Seeds, zero: Seeds, few: Seeds) -> dict[str, Any]:
        share = share_recovered(patched, zero, few, queries=self.queries)
        value, low, high = (None, None, None) if share is None else share
        bound = non_inferiority(patched, few, self.queries)
        return {
            "share": value,
            "share_low": low,
            "share_high": high,
            "below_few_shot": -bound.low,
            "as_good": bound.holds,
        }

    def _measured(self) -> dict[str, Any]:
        names = ("logprob", "logprob_gain", "logprob_gain_low", "logprob_gain_high")
        others = ("divergence", "divergence_low", "divergence_high")
        patched, zero = (
            _logprobs([each.conditions[name] for each in self.evaluations]) for name in ("patched", "zero-shot")
        )
        divergences = _divergences([each.patched for each in self.evaluations])
        row: dict[str, Any] = dict.fromkeys((*names, *others))
        if patched is not None and zero is not None:
            gain = _mean(patched) - _mean(zero)
            row |= dict(
                zip(
                    names,
                    (_mean(patched), gain, *difference_interval(patched, zero, queries=self.queries)),
                    strict=True,
                )
            )
        if divergences is not None:
            row |= dict(
                zip(others, (_mean(divergences), *mean_interval(divergences, queries=self.queries)), strict=True)
            )
        return row

    def _cost(self, of: Callable[[TaskResult], float | None]) -> float | None:
        known = [cost for result in self.results if (cost := of(result)) is not None]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True)
class _SavedExperiment:
    settings: Settings
    results: tuple[TaskResult, ...]


@dataclass(frozen=True)
class _Saved:
    """The content of a saved comparison."""

    experiments: tuple[_SavedExperiment, ...]


def _logprobs(scores: Sequence[Score]) -> Seeds | None:
    known = [score.logprobs for score in scores if score.logprobs is not None]
    return known if len(known) == len(scores) else None


def _divergences(scores: Sequence[Score]) -> Seeds | None:
    known = [score.divergences for score in scores if score.divergences is not None]
    return known if len(known) == len(scores) else None


def _mean(values: Seeds) -> float:
    """The mean of the seeds' means."""
    return sum(sum(own) / len(own) for own in values) / len(values)


def _known(value: object) -> bool:
    return value is not None and value == value  # NaN is how a table holds None


def _to_read(row: Mapping[Any, Any]) -> dict[str, str]:
    """A row of `Comparison.summary`."""
    return {
        "task": row["task"],
        "method": row["method"],
        "few-shot": f"{row['few_shot']:.2f}",
        "accuracy": _with_interval(row, "accuracy", "low", "high"),
        "difference": _with_interval(row, "difference", "difference_low", "difference_high", sign="+"),
        "p difference": _p(row["p_first_holm"]),
        "strongest control": _control(row),
        "p controls": _p(row["p_controls_holm"]),
        "share": _with_interval(row, "share", "share_low", "share_high"),
        "log P": f"{row['logprob']:.2f}" if _known(row["logprob"]) else "",
        "layers": row["layers"],
    }


def _with_interval(row: Mapping[Any, Any], value: str, low: str, high: str, sign: str = "") -> str:
    if not _known(row[value]):
        return ""
    return f"{row[value]:{sign}.2f} [{row[low]:{sign}.2f}, {row[high]:{sign}.2f}]"


def _p(value: float | None) -> str:
    return f"{value:.1g}" if _known(value) else ""


def _control(row: Mapping[Any, Any]) -> str:
    return f"{row['strongest_control']} {row['control_accuracy']:.2f}" if _known(row["strongest_control"]) else ""
