"""The paper's main experiment, task by task and method by method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from tv_lens.answers import first_token
from tv_lens.engines import Capability, Engine, Model, Prefixes, Reads, engine_for, progress_bar, sharing_reads
from tv_lens.errors import TvLensError
from tv_lens.evidence.checkpoints import Checkpoints
from tv_lens.evidence.conditions import Condition, condition_score
from tv_lens.evidence.controls import CONTROLS, Control, ShuffledDemonstrations, Treatment, check_controls, rows_of
from tv_lens.evidence.evaluation import swept_layers, written_layers
from tv_lens.evidence.other_tasks import least_similar
from tv_lens.evidence.results import PLAIN, Conditions, Cost, Evaluation, Experiment, Score, TaskResult
from tv_lens.evidence.scoring import (
    FewShotRun,
    decided_scores,
    few_shot_run,
    measured_scores,
    patched_scores,
    unpatched_measured,
    unpatched_score,
)
from tv_lens.evidence.settings import Settings
from tv_lens.evidence.tuning import Tuned, at_strength, check_strengths, tune
from tv_lens.generation import check_new_tokens, encode
from tv_lens.measuring import check_answers_fit
from tv_lens.methods.base import Method, Methods, named_methods, settings_of
from tv_lens.methods.extraction import AcrossPrompts, Extraction
from tv_lens.methods.reading import read_together
from tv_lens.patching import Placement
from tv_lens.prompts import PAPER, Prompt, PromptFormat
from tv_lens.provenance import versions
from tv_lens.tasks import Task, fingerprint
from tv_lens.tasks.halves import train_dev_test
from tv_lens.vectors import TaskVectors


def run_experiment(  # noqa: PLR0913 - its options are keywords
    model: Model,
    tasks: Sequence[Task],
    *,
    shots: int = 5,
    n_dev: int = 50,
    n_test: int = 50,
    seed: int = 0,
    substitutes: int = 2,
    across: bool = False,
    methods: Methods | None = None,
    controls: Sequence[Control] = CONTROLS,
    template: PromptFormat = PAPER,
    max_new_tokens: int = 8,
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
    n_train: int | None = None,
    strengths: Sequence[float | int] = (1.0,),
) -> Experiment:
    """The paper's main experiment (Hendel et al. 2023, section 3), for each task:

    its inputs are split into disjoint dev and test sets; the mean task vector of dev prompts is made by each method and
    written in at every layer for the dev queries; at the best layer it is evaluated, once, on test prompts. Each
    control chooses its own layer on the same dev queries. The control `other task` takes the vector of the least
    similar task, of another category if there is one.

    Nothing is run twice: methods that read the same prompts share the reads, and what comes before a vector is run once
    for all vectors, layers and strengths. The same seed gives the same table.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        tasks: tasks of different names.
        shots: demonstrations of each prompt.
        n_dev: dev prompts. A task with fewer inputs gets as many prompts as it has inputs in either set.
        n_test: test prompts.
        seed: of the split, the prompts and the controls.
        substitutes: of the default method, `Extraction(substitutes)`.
        across: whether the default method is `AcrossPrompts()`.
        methods: a list, or a dictionary with names for them, if two are of one kind; None for the default.
        controls: kinds of control.
        template: how prompts are written.
        max_new_tokens: how many tokens an answer may have. With 1 answers are scored by their first token, or by the
            first one that tells the task's answers apart (`first_token`), else in full by each task's own rule;
            `settings["scoring"]` and `settings["rules"]` say which.
        layers: the layers to try; None for all.
        folder: keeps each finished task; a run with the same settings resumes where it stopped.
        n_train: make the vectors from that many other prompts, whose queries are neither dev nor test queries.
        strengths: multiples of the strength that vectors are meant to have, at each of which those that are added are
            tried.

    Returns:
        The results of all tasks and methods, with tables, tests and settings.

    Raises:
        TvLensError: no tasks or two of one name, too few inputs, fewer than one substitute, or a folder of another run;
            the message says which settings differ.

    Examples:
        >>> experiment = tv.run_experiment(model, [task], shots=2, n_dev=2, n_test=2, max_new_tokens=1, layers=[2])
        >>> experiment.results[0].evaluation.layer
        2
    """
    if methods is None:
        methods = [AcrossPrompts()] if across else [Extraction(substitutes=substitutes)]
    design = Design(
        shots=shots,
        n_train=n_train,
        n_dev=n_dev,
        n_test=n_test,
        seed=int(seed),
        methods=named_methods(methods),
        controls=controls,
        template=template,
        max_new_tokens=max_new_tokens,
        layers=layers,
        strengths=check_strengths(strengths),
        substitutes=substitutes,
    )
    return run_design(engine_for(model), tasks, design, folder)


@dataclass(frozen=True)
class Design:
    """How an experiment is made: everything but the model and the tasks.

    Raises:
        TvLensError: a number of prompts or demonstrations below 1, or two controls or conditions of one name.
    """

    shots: int
    n_dev: int
    n_test: int
    seed: int
    methods: Mapping[str, Method]
    n_train: int | None = None
    controls: Sequence[Control] = CONTROLS
    conditions: Sequence[Condition] = ()
    template: PromptFormat = PAPER
    max_new_tokens: int = 8
    layers: Sequence[int] | None = None
    strengths: tuple[float, ...] = (1.0,)
    measured: bool = False
    substitutes: int = 2

    def __post_init__(self) -> None:
        if min(self.shots, self.n_dev, self.n_test) < 1:
            raise TvLensError(f"n_dev={self.n_dev}, n_test={self.n_test} and shots={self.shots} are each 1 or more")
        if self.n_train is not None and self.n_train < 1:
            raise TvLensError(f"n_train={self.n_train}; use 1 or more, or None to make the vectors from dev prompts")
        check_controls(self.controls)
        names = [condition.name for condition in self.conditions]
        if len(set(names)) < len(names):
            raise TvLensError(f"conditions are named {names}; give each a different name")


def run_design(engine: Engine, tasks: Sequence[Task], design: Design, folder: str | Path | None) -> Experiment:
    """The experiment of this design, resumed if the folder holds a part of it."""
    check_new_tokens(engine, design.max_new_tokens)
    engine.require(Capability.PATCH)
    layers = swept_layers(engine, design.layers, range(engine.n_layers))
    plans = _plans(engine, tasks, design)
    settings = _settings(engine, plans, design, layers, folder)
    checkpoints = Checkpoints(None if folder is None else Path(folder), settings)
    for plan in plans:  # a prompt that is too long shows now, and not after an hour
        prompts = [*plan.train, *plan.dev, *plan.test_prompts]
        ids = encode(engine, prompts, max(design.max_new_tokens, plan.task.rule.tokens))
        if design.measured:
            check_answers_fit(engine, prompts, ids)
    run = _Run(engine, plans, settings, design, checkpoints)
    run.make_all_vectors()
    with progress_bar(engine, len(plans) * len(design.methods), "task") as shown:
        for i, plan in enumerate(plans):
            tests = _Tests(engine, plan, design)
            for name in design.methods:
                if (plan.task.name, name) not in checkpoints.results:
                    checkpoints.keep_result(run.result(i, name, tests))
                shown.update()
    return run.experiment()


def _settings(
    engine: Engine, plans: Sequence[TaskPlan], design: Design, layers: Sequence[int], folder: str | Path | None
) -> Settings:
    return Settings(
        model=engine.name,
        engine=type(engine).__name__,
        weights=_weights(engine, plans, folder),
        dtype=engine.info.dtype,
        n_layers=engine.n_layers,
        d_model=engine.d_model,
        prepend_bos=engine.info.prepend_bos,
        bos=engine.info.bos,
        tasks=tuple(plan.task.name for plan in plans),
        data={plan.task.name: fingerprint(plan.task) for plan in plans},
        rules={plan.task.name: plan.task.rule.name or "unnamed" for plan in plans},
        shots=design.shots,
        n_dev=design.n_dev,
        n_test=design.n_test,
        seed=design.seed,
        method=", ".join(design.methods),
        methods={name: settings_of(name, method) for name, method in design.methods.items()},
        substitutes=design.substitutes,
        controls=tuple(control.name for control in design.controls),
        template=design.template.to_dict(),
        max_new_tokens=design.max_new_tokens,
        scoring="first token" if design.max_new_tokens == 1 else "full answer",
        layers=tuple(layers),
        versions=versions(),
        n_train=design.n_train,
        strengths=design.strengths,
        conditions=tuple(condition.identity for condition in design.conditions),
        measured=design.measured,
        controls_choose=True,
    )


@dataclass(frozen=True)
class TaskPlan:
    """A task with its rule, and the prompts that vectors are made from, chosen on and reported on. `development` has
    the inputs of train and dev prompts, `test` those of the test prompts.
    """

    task: Task
    development: Task
    train: Sequence[Prompt]
    dev: Sequence[Prompt]
    test: Task
    test_prompts: Sequence[Prompt]


def _plans(engine: Engine, tasks: Sequence[Task], design: Design) -> list[TaskPlan]:
    if isinstance(tasks, Task):
        raise TvLensError(f"tasks are one task; give a list, [{tasks!r}]")
    for task in tasks:
        if not isinstance(task, Task):
            raise TvLensError(f"tasks hold a {type(task).__name__}, {task!r:.60}; give Task objects: library()[name]")
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise TvLensError(f"tasks are {names}; give at least one, each with a different name")
    # Before a task is split, so that all parts have the rule.
    if design.max_new_tokens == 1:
        tasks = [replace(task, accepts=first_token(engine, design.template, task)) for task in tasks]
    return [
        TaskPlan(
            task,
            *train_dev_test(
                task,
                design.n_train,
                design.n_dev,
                design.n_test,
                shots=design.shots,
                seed=design.seed,
                template=design.template,
            ),
        )
        for task in tasks
    ]


def _weights(engine: Engine, plans: Sequence[TaskPlan], folder: str | Path | None) -> str | None:
    """The model's fingerprint. If the run is kept in a folder, a model without one is refused."""
    if folder is not None:
        for plan in plans:
            plan.task.rule.check_named(plan.task.name)
        return engine.fingerprint()
    try:
        return engine.fingerprint()
    except TvLensError:  # a hook that has no fingerprint; nothing will be resumed
        return None


@dataclass(frozen=True)
class _Run:
    """An experiment while it runs."""

    engine: Engine
    plans: Sequence[TaskPlan]
    settings: Settings
    design: Design
    checkpoints: Checkpoints

    def make_all_vectors(self) -> None:
        """The vectors of every task that has no result yet, with the controls that run the model."""
        unfinished = [i for i in range(len(self.plans)) if self._methods_without_result(i)]
        with progress_bar(self.engine, len(unfinished), "task") as shown:
            for i in unfinished:
                shown.set_description("vectors")
                self._make_vectors(i)
                shown.update()

    def _methods_without_result(self, i: int) -> list[str]:
        results, task = self.checkpoints.results, self.plans[i].task.name
        return [name for name in self.design.methods if (task, name) not in results]

    def _make_vectors(self, i: int) -> None:
        """The vectors of one task, each read once for all methods and their controls."""
        plan, names = self.plans[i], self._methods_without_result(i)
        early = [control for control in self.design.controls if control.runs_model]
        missing = [key for key in ((plan.task.name, name) for name in names) if key not in self.checkpoints.vectors]
        controls = [(plan.task.name, name, control.name) for name in names for control in early]
        if not missing and self.checkpoints.controls.keys() >= set(controls):
            return
        everything = list(self.design.methods)
        with sharing_reads(self.engine):
            if len(everything) > 1:
                # For all methods, so that a resumed run reads in the same batches.
                self._read_together(i, dict.fromkeys(everything, plan.train))
                self._read_together(i, {name: self._shuffled(i, name) for name in everything})
            for name in names:
                vectors = self.vector(i, name)
                for control in early:
                    key = (plan.task.name, name, control.name)
                    if key not in self.checkpoints.controls:
                        self.checkpoints.keep_control(*key, control(self._treatment(i, name, vectors)))

    def _read_together(self, i: int, prompts: Mapping[str, Sequence[Prompt]]) -> None:
        """Read what each method needs of its prompts, once for all methods."""
        task, seed = self.plans[i].development, self.design.seed
        methods = self.design.methods
        reads = [read for name, own in prompts.items() if own for read in methods[name].reads(task, own, seed)]
        read_together(self.engine, reads)

    def _shuffled(self, i: int, name: str) -> Sequence[Prompt]:
        """What the shuffled control reads; nothing if there is no such control."""
        if not any(isinstance(control, ShuffledDemonstrations) for control in self.design.controls):
            return ()
        return self.design.methods[name].shuffled(self.plans[i].train, self.design.seed) or ()

    def vector(self, i: int, name: str) -> TaskVectors:
        """The mean vector of task `i`, made once."""
        plan, key, method = self.plans[i], (self.plans[i].task.name, name), self.design.methods[name]
        if key in self.checkpoints.vectors:
            return self.checkpoints.vectors[key]
        with sharing_reads(self.engine) as reads, _metered(self.engine, reads) as meter:
            vectors = method(self.engine, plan.development, plan.train, self.design.seed).mean()
        if vectors.task != plan.task.name:
            raise TvLensError(
                f"{method.name} returned vectors of {vectors.task!r} for the task {plan.task.name!r}; a method can "
                "name them with dataclasses.replace(vectors, task=task.name)"
            )
        return self.checkpoints.keep_vectors(*key, vectors, meter.cost)

    def result(self, i: int, name: str, tests: _Tests) -> TaskResult:
        """The sweep on dev prompts, and the evaluation at the best layer and strength on test prompts."""
        plan, design = self.plans[i], self.design
        vector = self.vector(i, name)
        # What is written at all its layers at once has nothing to choose.
        if vector.usage.span != "together" and not set(self.settings.layers) & set(vector.tried_layers):
            raise TvLensError(
                f"{name} gave vectors of {plan.task.name!r} to try at the layers {list(vector.tried_layers)}, "
                f"and none of these is among layers={list(self.settings.layers)}; give both the same layers"
            )
        other = self._other(i, name)
        controls = self._controls(i, name, self._treatment(i, name, vector, other))
        n_dev, vectors = len(plan.dev), {"patched": vector, **controls}
        on_dev, on_test = (
            {key: rows_of(each, rows) for key, each in vectors.items()} for rows in (slice(n_dev), slice(n_dev, None))
        )
        tuned = tests.tune(on_dev, self.settings.layers)
        evaluation = tests.evaluate(on_test, tuned)
        return TaskResult(
            task=plan.task.name,
            category=plan.task.category,
            sweep=tuned["patched"].sweep,
            evaluation=evaluation,
            other_task=None if other is None else self.plans[other].task.name,
            dev_prompts=tuple(prompt.text for prompt in plan.dev),
            test_prompts=tuple(prompt.text for prompt in plan.test_prompts),
            queries=tuple(prompt.query for prompt in plan.test_prompts),
            method=name,
            other_sweeps=tuple(each for each in tuned["patched"].sweeps if each != tuned["patched"].sweep),
            control_sweeps={control: tuned[control].sweep for control in controls},
            tied_accuracies=tests.tied_accuracies(vector, tuned["patched"], evaluation.patched),
            conditions=tests.conditions(vector, tuned["patched"]) if design.conditions else None,
            train_prompts=() if design.n_train is None else tuple(prompt.text for prompt in plan.train),
            cost=self.checkpoints.costs.get((plan.task.name, name)),
        )

    def _other(self, i: int, name: str) -> int | None:
        return least_similar(i, [plan.task for plan in self.plans], lambda j: self.vector(j, name))

    def _treatment(self, i: int, name: str, vectors: TaskVectors, other: int | None = None) -> Treatment:
        plan = self.plans[i]
        return Treatment(
            engine=self.engine,
            task=plan.development,
            prompts=plan.train,
            vectors=vectors,
            method=self.design.methods[name],
            seed=self.design.seed,
            n=len(plan.dev) + len(plan.test_prompts),
            other=None if other is None else self._vector_of(other, name),
        )

    def _vector_of(self, i: int, name: str) -> Callable[[], TaskVectors]:
        return lambda: self.vector(i, name)

    def _controls(self, i: int, name: str, treatment: Treatment) -> dict[str, TaskVectors]:
        """The vectors of each control that there can be, for the dev prompts and then for the test prompts."""
        made = {}
        for control in self.design.controls:
            key = (self.plans[i].task.name, name, control.name)
            early = self.checkpoints.controls
            vectors = early[key] if key in early else control(treatment)
            if vectors is not None:
                made[control.name] = vectors
        return made

    def experiment(self) -> Experiment:
        """All results and vectors."""
        kept, settings = self.checkpoints, self.settings
        keys = [(task, method) for task in settings.tasks for method in settings.methods]
        one_method = len(settings.methods) == 1
        vectors = {
            task if one_method else f"{task}, {method}": kept.vectors[task, method]
            for task, method in keys
            if (task, method) in kept.vectors
        }
        return Experiment(settings, tuple(kept.results[key] for key in keys), vectors)


@dataclass(frozen=True)
class _Tests:
    """What is run on the dev and test prompts of one task. All methods share the runs without vectors, and what comes
    before a vector.
    """

    engine: Engine
    plan: TaskPlan
    design: Design
    kept: Prefixes = field(default_factory=Prefixes)
    _plain: dict[str, Score] = field(default_factory=dict)

    @cached_property
    def few_shot_run(self) -> FewShotRun:
        """The few-shot answers to the test prompts, measured."""
        return few_shot_run(self.engine, self.plan.test, self.plan.test_prompts, self.design.max_new_tokens)

    @cached_property
    def few_shot_score(self) -> Score:
        """The score of the few-shot answers."""
        if self.design.measured:
            return self.few_shot_run.score
        return unpatched_score(self.engine, self.plan.test, self.plan.test_prompts, self.design.max_new_tokens)

    @cached_property
    def zero_shot_score(self) -> Score:
        """The score of the answers to the test queries alone."""
        test, queries = self.plan.test, [prompt.zero_shot() for prompt in self.plan.test_prompts]
        kept, n_tokens = self.kept, self.design.max_new_tokens
        if self.design.measured:
            return unpatched_measured(self.engine, test, queries, n_tokens, few_shot=self.few_shot_run, kept=kept)
        return unpatched_score(self.engine, test, queries, n_tokens, kept=kept)

    def tune(self, candidates: Mapping[str, TaskVectors], layers: Sequence[int]) -> dict[str, Tuned]:
        """The layers and strengths of all candidates, chosen on the dev prompts."""
        return tune(
            self.engine,
            self.plan.development,
            self.plan.dev,
            candidates,
            layers=layers,
            strengths=self.design.strengths,
            max_new_tokens=self.design.max_new_tokens,
            kept=self.kept,
        )

    def evaluate(self, vectors: Mapping[str, TaskVectors], tuned: Mapping[str, Tuned]) -> Evaluation:
        """The test prompts under all conditions, each vector at its own layer and strength."""
        test, prompts, n_tokens = self.plan.test, self.plan.test_prompts, self.design.max_new_tokens
        chosen = {name: tuned[name].choice for name in vectors}
        written = [(at_strength(vectors[name], each.strength), each.layer) for name, each in chosen.items()]
        if self.design.measured:
            scores = measured_scores(
                self.engine, test, prompts, written, Placement(), n_tokens, few_shot=self.few_shot_run, kept=self.kept
            )
        else:
            scores = patched_scores(self.engine, test, prompts, written, Placement(), n_tokens, kept=self.kept)
        controls = dict(zip(vectors, scores, strict=True))
        patched = controls.pop("patched")
        return Evaluation(
            written_layers(vectors["patched"], chosen["patched"].layer),
            zero_shot=self.zero_shot_score,
            few_shot=self.few_shot_score,
            patched=patched,
            controls=controls,
            n_layers=self.engine.n_layers,
            strength=chosen["patched"].strength,
            control_layers={name: written_layers(vectors[name], chosen[name].layer) for name in controls},
            control_strengths={name: chosen[name].strength for name in controls},
        )

    def tied_accuracies(self, vector: TaskVectors, tuned: Tuned, chosen: Score) -> tuple[float, ...]:
        """The accuracy on the test prompts at every layer and strength that ties on dev, that of the chosen one first;
        empty if none ties.
        """
        if len(tuned.ties) < 2:
            return ()
        scores = decided_scores(
            self.engine,
            self.plan.test,
            self.plan.test_prompts,
            [(at_strength(vector, each.strength), each.layer) for each in tuned.ties[1:]],
            Placement(),
            self.design.max_new_tokens,
            kept=self.kept,
        )
        return (chosen.accuracy, *(score.accuracy for score in scores))

    def conditions(self, vector: TaskVectors, tuned: Tuned) -> Conditions | None:
        """The test queries asked in other ways, without and with the vector; None if there is no such way."""
        written = (at_strength(vector, tuned.choice.strength), tuned.choice.layer)
        scores: dict[str, dict[str, Score]] = {}
        for condition in self.design.conditions:
            asked = condition.prompts(self.plan.test_prompts, self.design.seed)
            if vector.usage.per_position and len({prompt.shots for prompt in (*asked, *self.plan.test_prompts)}) > 1:
                continue  # vectors for the separators of few-shot prompts
            test, kept, n_tokens = self._test_for(asked), self.kept, self.design.max_new_tokens
            if condition.name not in self._plain:
                self._plain[condition.name] = condition_score(
                    self.engine, test, asked, condition, None, n_tokens, kept=kept
                )
            scores[condition.name] = {
                PLAIN: self._plain[condition.name],
                "patched": condition_score(self.engine, test, asked, condition, written, n_tokens, kept=kept),
            }
        return Conditions(scores) if scores else None

    def _test_for(self, asked: Sequence[Prompt]) -> Task:
        """The test part of the task, by whose rule the answers to these prompts are judged: that of the first token
        depends on the template.
        """
        if self.design.max_new_tokens > 1:
            return self.plan.test
        return replace(self.plan.test, accepts=first_token(self.engine, asked[0].template, self.plan.task))


@dataclass
class _Meter:
    """What was used since the beginning."""

    cost: Cost = field(default_factory=lambda: Cost(0.0, 0.0))


@contextmanager
def _metered(engine: Engine, reads: Reads) -> Iterator[_Meter]:
    """Measure what is run inside, with what was read before for several methods, and without what others will use."""
    meter = _Meter()
    reads.charged.clear()
    positions, seconds = engine.positions_run + reads.charge.positions, time.perf_counter() + reads.charge.seconds
    yield meter
    meter.cost = Cost(
        engine.positions_run + reads.charge.positions - positions,
        time.perf_counter() + reads.charge.seconds - seconds,
    )
