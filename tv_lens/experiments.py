"""Find the layer a task lives at, and the evidence for it: accuracies with intervals, beside controls.

patched (vector of the task)  against  zero-shot, a random vector, another task's, one of shuffled demonstrations
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformer_lens.utilities.statistics import derive_generator, success_rate_ci

from tv_lens.engines import Engine, bar, engine_for, engine_name
from tv_lens.extraction import extract, extract_across
from tv_lens.files import from_json, to_json, write_whole
from tv_lens.generation import answer_all, answer_side_by_side, check_new_tokens, check_patching, patch_for
from tv_lens.prompts import PAPER, Example, Prompt, Template, check_prompts
from tv_lens.tables import to_html
from tv_lens.tasks import Task, fingerprint, first_token, rule_name
from tv_lens.vectors import TaskVectors, check_layer, depth, versions

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
        from tv_lens.plots import plot_sweep

        return plot_sweep(self, zero_shot=zero_shot, few_shot=few_shot)

    def _repr_html_(self) -> str:
        tied = f", tied with {list(self.ties[1:])}" if len(self.ties) > 1 else ""
        return to_html(self.to_pandas(), f"best layer {self.best}: {self.at(self.best)}{tied}")


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
    correct = tuple(task.right(text, answer) for text, answer in zip(texts, answers, strict=True))
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
    chosen = _chosen(engine, layers)
    patches = [patch_for(engine, len(prompts), vectors, layer) for layer in chosen]
    answers = answer_side_by_side(engine, prompts, patches, max_new_tokens)
    return Sweep(tuple(chosen), tuple(score(task, prompts, texts) for texts in answers), engine.n_layers)


def _chosen(engine: Engine, layers: Sequence[int] | None) -> Sequence[int]:
    chosen = range(engine.n_layers) if layers is None else layers
    if not isinstance(chosen, Sequence) or not len(chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers are {chosen!r}; give a list of different ones, at least one, or None for all")
    for layer in chosen:
        check_layer(layer, engine.n_layers, engine_name(engine))
    return [int(layer) for layer in chosen]  # NumPy's own are not JSON's


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
        from tv_lens.plots import plot_evaluation

        return plot_evaluation(self)

    def _repr_html_(self) -> str:
        title = f"patched at layer {self.layer}, {len(self.patched.correct)} prompts; p: patched against the condition"
        return to_html(self.to_pandas(), title, {"p_value": "{:.1g}"})


def evaluate(
    model: Any,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layer: int,
    *,
    max_new_tokens: int = 8,
    controls: Mapping[str, TaskVectors] | None = None,
    seed: int = 0,
) -> Evaluation:
    """How well the queries of few-shot `prompts` are answered zero-shot, few-shot, and zero-shot with `vectors`
    written in at `layer`. Use prompts that had no part in extracting the vectors or in choosing the layer.

    Controls at the same layer: `random`, for each row another random direction of the vector's own length;
    `shuffled`, the vector of these prompts' demonstrations with their outputs exchanged (where they have two or
    more); and what `controls` names, such as the vectors of another task.

    Raises:
        ValueError: as `patch_generate`, prompts without demonstrations, or a control named like a condition.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    check_layer(layer, engine.n_layers, engine_name(engine))
    if not all(prompt.examples for prompt in prompts):
        raise ValueError("few-shot accuracy needs demonstrations; sample the prompts with shots=1 or more")
    taken = {"zero-shot", "few-shot", "patched"} & set(controls or ())
    if taken:
        raise ValueError(f"controls are named {sorted(taken)}, which are conditions already; name them otherwise")
    patch_for(engine, len(prompts), vectors, layer)
    tried = {"random": random_like(vectors, len(prompts), seed), **(controls or {})}
    for each in tried.values():  # refuses what cannot be patched before anything is run
        patch_for(engine, len(prompts), each, layer)

    # The longest texts go first, so that one too long is refused before the model runs.
    few_shot = answer_all(engine, prompts, None, max_new_tokens)
    zero_shot = answer_all(engine, [prompt.zero_shot() for prompt in prompts], None, max_new_tokens)
    if "shuffled" not in tried and min(prompt.shots for prompt in prompts) > 1:
        mixed = extract(engine, shuffle_outputs(prompts, seed), task.substitutes(prompts, 1, seed=seed))
        tried["shuffled"] = mixed.mean() if len(vectors) == 1 else mixed
    patches = [patch_for(engine, len(prompts), each, layer) for each in (vectors, *tried.values())]
    patched, *controlled = answer_side_by_side(engine, prompts, patches, max_new_tokens)
    return Evaluation(
        layer,
        zero_shot=score(task, prompts, zero_shot),
        few_shot=score(task, prompts, few_shot),
        patched=score(task, prompts, patched),
        controls={name: score(task, prompts, texts) for name, texts in zip(tried, controlled, strict=True)},
        n_layers=engine.n_layers,
    )


def random_like(vectors: TaskVectors, n: int, seed: int) -> TaskVectors:
    """`n` random vectors, at each layer as long as the given ones: a direction of its own for each prompt."""
    shape = (n, vectors.n_layers, vectors.d_model)
    noise = torch.randn(shape, generator=derive_generator(seed, "random control"))
    length = vectors.values.norm(dim=-1, keepdim=True)
    return replace(
        vectors,
        values=noise / noise.norm(dim=-1, keepdim=True) * length,
        task="random",
        prompts=(),
        substitutes=(),
        method=f"random, as long as {vectors.method} of {vectors.task!r}",
    )


def shuffle_outputs(prompts: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The prompts with the outputs of their demonstrations exchanged, so that none keeps its own place and as few as
    can be are right all the same: where most demonstrations of a prompt have one output, some must be.

    Raises:
        ValueError: a prompt with fewer than two demonstrations.
    """
    draw = random.Random(f"shuffle outputs:{seed}")
    mixed = []
    for i, prompt in enumerate(prompts):
        if prompt.shots < 2:
            raise ValueError(f"prompt {i} has {prompt.shots} demonstrations; outputs are exchanged among 2 or more")
        order = draw.sample(range(prompt.shots), prompt.shots)
        outputs = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle through all
        if any(prompt.examples[j].output == prompt.examples[k].output for j, k in outputs.items()):
            outputs = _most_wrong([example.output for example in prompt.examples], order)
        examples = [Example(each.input, prompt.examples[outputs[j]].output) for j, each in enumerate(prompt.examples)]
        mixed.append(replace(prompt, examples=tuple(examples)))
    return mixed


def _most_wrong(outputs: Sequence[str], order: Sequence[int]) -> dict[int, int]:
    """Whose output each takes, so that the fewest are equal to their own and, of these, none is its own; which of
    the many such exchanges it is goes by `order`.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    n = len(outputs)
    cost = np.array([[(outputs[j] == outputs[k]) + (j == k) / (n + 1) for k in order] for j in order])
    rows, columns = linear_sum_assignment(cost)
    return {order[row]: order[column] for row, column in zip(rows.tolist(), columns.tolist(), strict=True)}


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
        from tv_lens.plots import plot_conflict

        return plot_conflict(self)

    def _repr_html_(self) -> str:
        return to_html(self.to_pandas(), f"demonstrations of {self.task}, vector of {self.rival} at layer {self.layer}")


def conflict(
    model: Any,
    task: Task,
    rival: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layer: int,
    *,
    max_new_tokens: int = 8,
) -> Conflict:
    """Which wins, demonstrations of `task` or the vector of `rival`? The few-shot `prompts` keep their
    demonstrations, and `vectors` of the rival are written at their last position (Hendel et al. 2023,
    section 5, conflicting tasks).

    Raises:
        ValueError: as `patch_generate`, prompts without demonstrations, or a query the rival has no answer to.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    check_layer(layer, engine.n_layers, engine_name(engine))
    patch = patch_for(engine, len(prompts), vectors, layer)
    if not all(prompt.examples for prompt in prompts):
        raise ValueError("conflicting demonstrations are needed; sample the prompts with shots=1 or more")
    unanswered = [prompt.query for prompt in prompts if prompt.query not in rival.inputs]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} queries are no inputs of the rival {rival.name!r} ({unanswered[0]!r}, ...); "
            "conflicting tasks share their inputs, as present_to_past and present_to_gerund do"
        )
    as_rival = [replace(prompt, answer=rival.answer(prompt.query)) for prompt in prompts]
    plain = answer_all(engine, prompts, None, max_new_tokens)
    patched = answer_all(engine, prompts, patch, max_new_tokens)
    return Conflict(
        task.name,
        rival.name,
        layer,
        plain_task=score(task, prompts, plain),
        plain_rival=score(rival, as_rival, plain),
        patched_task=score(task, prompts, patched),
        patched_rival=score(rival, as_rival, patched),
        n_layers=engine.n_layers,
    )


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
        from tv_lens.plots import plot_sweep

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
            settings, results = whole["settings"], tuple(_result(each) for each in _list_of(dict, whole["results"]))
            if not (results and all(isinstance(settings[name], (str, int)) for name in _TOLD)):
                raise ValueError(f"no results, or no {', '.join(_TOLD)}")
            return cls(settings, results)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: no saved experiment, or a damaged one ({error!r})") from error

    def plot(self) -> go.Figure:
        """Accuracy by task: zero-shot, few-shot and patched with their intervals, and the controls."""
        from tv_lens.plots import plot_experiment

        return plot_experiment(self)

    def report(self, path: str | Path) -> None:
        """Write everything as one HTML page that needs nothing else to be read, whole or not at all.

        Raises:
            ImportError: the extra `plots` is not installed.
            OSError: the folder is missing or cannot be written to.
        """
        from tv_lens.report import write_report

        write_report(self, path)

    def _repr_html_(self) -> str:
        about = ", ".join(f"{name} {self.settings[name]}" for name in ("model", "scoring", "shots", "seed"))
        return to_html(self.summary(), about)


def run_experiment(
    model: Any,
    tasks: Sequence[Task],
    *,
    shots: int = 5,
    n_dev: int = 50,
    n_test: int = 50,
    seed: int = 0,
    substitutes: int = 2,
    across: bool = False,
    template: Template = PAPER,
    max_new_tokens: int = 8,
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
) -> Experiment:
    """The paper's main experiment (Hendel et al. 2023, section 3), for each task:

    its inputs are parted into dev and test with none in common; the mean task vector of `n_dev` dev prompts is
    extracted (with `substitutes`, or `across` prompts) and written in at every layer for the dev queries; at the
    best layer it is evaluated, once, on `n_test` test prompts, beside controls. A task with fewer inputs gets as
    many prompts as it has inputs on either side. The control `other task` takes the vector of the task half the
    list away.

    With `max_new_tokens=1` answers are scored by their first token (`first_token`), else in full by each task's
    own rule; `settings["scoring"]` says which. Same seed, same table.

    With a `folder`, each finished task is kept there, and a run with the same settings goes on where it was
    interrupted.

    Raises:
        ValueError: no tasks or two of one name, too few inputs, fewer than one substitute, or a folder of another
            run; the message says which settings differ.
    """
    engine = engine_for(model)
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"tasks are {names}; give at least one, each with a name of its own")
    check_new_tokens(engine, max_new_tokens)
    check_patching(engine)
    chosen, seed = _chosen(engine, layers), int(seed)
    halves = [_Halves(task, shots, n_dev, n_test, seed, template) for task in tasks]  # too few inputs show here
    settings = {
        "model": engine_name(engine),
        "engine": type(engine).__name__,
        "weights": getattr(engine, "weights", None),
        "dtype": getattr(engine, "dtype", None),
        "n_layers": engine.n_layers,
        "d_model": engine.d_model,
        "prepend_bos": getattr(engine, "prepend_bos", None),
        "tasks": names,
        "data": {task.name: fingerprint(task) for task in tasks},
        "rules": {task.name: "first_token" if max_new_tokens == 1 else rule_name(task.accepts) for task in tasks},
        "shots": shots,
        "n_dev": n_dev,
        "n_test": n_test,
        "seed": seed,
        "method": "extract_across" if across else "extract",
        "substitutes": substitutes,  # across prompts too, as the shuffled control is read with them
        "template": asdict(template),
        "max_new_tokens": max_new_tokens,
        "scoring": "first token" if max_new_tokens == 1 else "full answer",
        "layers": chosen,
        "versions": versions(),
    }
    kept = _Kept(None if folder is None else Path(folder), settings)
    if max_new_tokens == 1:
        rule = first_token(engine, template)
        for half in halves:
            half.dev, half.test = replace(half.dev, accepts=rule), replace(half.test, accepts=rule)

    def vector_of(i: int) -> TaskVectors:
        if names[i] not in kept.vectors:
            dev, prompts = halves[i].dev, halves[i].dev_prompts
            found = (
                extract_across(engine, prompts)
                if across
                else extract(engine, prompts, dev.substitutes(prompts, substitutes, seed=seed))
            )
            kept.keep_vector(names[i], found.mean())
        return kept.vectors[names[i]]

    with bar(engine, len(tasks), "task") as shown:
        for i, (task, half) in enumerate(zip(tasks, halves, strict=True)):
            if task.name not in kept.results:
                vector = vector_of(i)
                sweep = sweep_layers(engine, half.dev, half.dev_prompts, vector, chosen, max_new_tokens=max_new_tokens)
                other = (i + len(tasks) // 2) % len(tasks)
                controls = {"other task": vector_of(other)} if other != i else {}
                if shots > 1:
                    mixed = shuffle_outputs(half.dev_prompts, seed)
                    asked = half.dev.substitutes(mixed, substitutes, seed=seed)
                    controls["shuffled"] = extract(engine, mixed, asked).mean()
                evaluation = evaluate(
                    engine,
                    half.test,
                    half.test_prompts,
                    vector,
                    sweep.best,
                    max_new_tokens=max_new_tokens,
                    controls=controls,
                    seed=seed,
                )
                kept.keep_result(
                    TaskResult(
                        task.name,
                        task.category,
                        sweep,
                        evaluation,
                        names[other] if other != i else None,
                        tuple(prompt.text for prompt in half.dev_prompts),
                        tuple(prompt.text for prompt in half.test_prompts),
                        tuple(prompt.query for prompt in half.test_prompts),
                    )
                )
            shown.update()
    return Experiment(settings, tuple(kept.results[name] for name in names), dict(kept.vectors))


class _Halves:
    """A task's dev and test halves, and the prompts from each."""

    def __init__(self, task: Task, shots: int, n_dev: int, n_test: int, seed: int, template: Template) -> None:
        if n_dev < 1 or n_test < 1 or shots < 1:
            raise ValueError(f"n_dev={n_dev}, n_test={n_test} and shots={shots} are each 1 or more")
        self.dev, self.test = task.split(n_dev / (n_dev + n_test), seed=seed)
        self.dev_prompts = self.dev.sample(min(n_dev, len(self.dev)), shots=shots, seed=seed, template=template)
        self.test_prompts = self.test.sample(min(n_test, len(self.test)), shots=shots, seed=seed, template=template)


# The settings that tell the rows of several experiments apart.
_TOLD = ("model", "scoring", "method", "shots", "seed")


class _Kept:
    """What a run has found so far: in memory, and in a folder where there is one, a file a task."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.results, self.vectors = folder, dict[str, TaskResult](), dict[str, TaskVectors]()
        self._settings = settings
        if folder is None or not folder.exists():
            return
        whole = folder / "settings.json"
        if whole.exists():
            try:
                before = from_json(whole.read_bytes())
                differ = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            except (ValueError, TypeError) as error:
                raise ValueError(f"{whole}: no settings of an experiment ({error}); use another folder") from error
            if differ:
                told = "; ".join(f"{name} was {before.get(name)}, is {settings.get(name)}" for name in differ)
                raise ValueError(f"{folder} holds a run with other settings ({told}); use another folder for this one")
        elif any(path.suffix != ".partial" for path in folder.iterdir()):  # a killed run can leave one
            raise ValueError(f"{folder} is not empty and holds no experiment; use another folder")
        for name in settings["tasks"]:
            if self._path(name, "json").exists():
                self.results[name] = _read_result(self._path(name, "json"), name)
            if self._path(name, "safetensors").exists():
                self.vectors[name] = TaskVectors.load(self._path(name, "safetensors"))

    def keep_result(self, result: TaskResult) -> None:
        self.results[result.task] = result
        if self.folder is not None:
            write_whole(self._path(result.task, "json"), to_json(asdict(result), indent=1))

    def keep_vector(self, name: str, vectors: TaskVectors) -> None:
        self.vectors[name] = vectors
        if self.folder is not None:
            if not (self.folder / "settings.json").exists():  # not before there is something that they made
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self.folder / "settings.json", to_json(self._settings, indent=1))
            vectors.save(self._path(name, "safetensors"))

    def _path(self, name: str, kind: str) -> Path:
        assert self.folder is not None
        # A task's name may hold what a file's may not; the digest keeps two such names apart.
        plain = "".join(char if char.isalnum() or char in "-_" else "_" for char in name)
        plain = plain.encode()[:80].decode(errors="ignore")  # file systems count bytes
        mark = "" if plain == name else "-" + hashlib.sha256(name.encode()).hexdigest()[:8]
        return self.folder / f"task-{plain}{mark}.{kind}"


def _read_result(path: Path, task: str) -> TaskResult:
    try:
        result = _result(from_json(path.read_bytes()))
        if result.task != task:
            raise ValueError(f"it is of the task {result.task!r}, not {task!r}")
        return result
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: a damaged result ({error!r}); delete it to have the task run again") from error


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


def _result(data: Mapping[str, Any]) -> TaskResult:
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
