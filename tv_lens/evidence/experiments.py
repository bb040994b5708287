"""How an experiment is run, task by task and method by method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tv_lens.answers import first_token
from tv_lens.engines import Capability, Engine, Prefixes, Reads, sharing_reads
from tv_lens.errors import TvLensError
from tv_lens.evidence.checkpoints import Checkpoints
from tv_lens.evidence.conditions import Condition, condition_score
from tv_lens.evidence.controls import (
    CONTROLS,
    Control,
    ShuffledDemonstrations,
    Treatment,
    check_controls,
    control_vectors,
    rows_of,
)
from tv_lens.evidence.evaluation import swept_layers, written_layers
from tv_lens.evidence.other_tasks import least_similar
from tv_lens.evidence.results import PLAIN, Choice, Conditions, Cost, Evaluation, Experiment, Score, TaskResult
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
from tv_lens.evidence.tuning import Tuned, at_strength, tune
from tv_lens.generation import check_new_tokens, encode
from tv_lens.measuring import check_answers_fit
from tv_lens.methods.base import Method, settings_of
from tv_lens.methods.reading import read_together
from tv_lens.patching import Placement
from tv_lens.progress import Bar, stage, whole_bar
from tv_lens.prompts import PAPER, Prompt, PromptFormat
from tv_lens.provenance import versions
from tv_lens.tasks import Task, fingerprint
from tv_lens.tasks.halves import train_dev_test
from tv_lens.vectors import TaskVectors

Value = TypeVar("Value")


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

    @property
    def early_controls(self) -> list[Control]:
        """The controls that run the model, which are made together with the vectors."""
        return [control for control in self.controls if control.runs_model]


def run_designs(
    engine: Engine, tasks: Sequence[Task], designs: Sequence[tuple[Design, Path | None]]
) -> tuple[Experiment, ...]:
    """The experiment of each design, resumed if its folder holds a part of it."""
    check_tasks(tasks)
    total = sum(len(tasks) * len(design.methods) for design, _ in designs)
    experiments = []
    with whole_bar(total, "results", shown=engine.progress) as shown:
        for design, folder in designs:
            label = (f"seed {design.seed}",) if len(designs) > 1 else ()
            run = replace(prepare(engine, tasks, design, folder), shown=shown, label=label)
            run.check_prompts()
            run.make_all_vectors()
            for i in range(len(run.plans)):
                run.make_results(i)
            experiments.append(run.checkpoints.experiment())
    return tuple(experiments)


def prepare(
    engine: Engine,
    tasks: Sequence[Task],
    design: Design,
    folder: str | Path | None,
    read: Sequence[str] | None = None,
) -> Run:
    """The experiment of this design before it is run, with what the folder has of the tasks in `read`, by default all.

    Raises:
        TvLensError: a model or tasks that the design does not fit, or a folder of another run.
    """
    check_new_tokens(engine, design.max_new_tokens)
    engine.require(Capability.PATCH)
    layers = swept_layers(engine, design.layers, range(engine.n_layers))
    plans = _plans(engine, tasks, design)
    settings = _settings(engine, plans, design, layers, folder)
    return Run(engine, plans, design, Checkpoints(None if folder is None else Path(folder), settings, read))


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


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise TvLensError unless `tasks` are tasks with different names."""
    if isinstance(tasks, Task):
        raise TvLensError(f"tasks are one task; give a list, [{tasks!r}]")
    for task in tasks:
        if not isinstance(task, Task):
            raise TvLensError(f"tasks hold a {type(task).__name__}, {task!r:.60}; give Task objects: library()[name]")
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise TvLensError(f"tasks are {names}; give at least one, each with a different name")


def _plans(engine: Engine, tasks: Sequence[Task], design: Design) -> list[TaskPlan]:
    check_tasks(tasks)
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
class Run:
    """An experiment while it runs. `shown` counts its results, and shows the label before what is done."""

    engine: Engine
    plans: Sequence[TaskPlan]
    design: Design
    checkpoints: Checkpoints
    shown: Bar = field(default_factory=Bar)
    label: tuple[str, ...] = ()

    @property
    def settings(self) -> Settings:
        """What the experiment is run with."""
        return self.checkpoints.settings

    def check_prompts(self) -> None:
        """Raise TvLensError if a prompt is too long: now, and not after an hour."""
        for plan in self.plans:
            prompts = [*plan.train, *plan.dev, *plan.test_prompts]
            ids = encode(self.engine, prompts, max(self.design.max_new_tokens, plan.task.rule.tokens))
            if self.design.measured:
                check_answers_fit(self.engine, prompts, ids)

    def make_all_vectors(self) -> None:
        """The vectors of every task that has no result yet, with the controls that run the model."""
        for i, plan in enumerate(self.plans):
            if self.checkpoints.without_result(plan.task.name):
                self.shown.describe(*self.label, f"vectors of {plan.task.name}")
                self.make_vectors(i)
        self.shown.restart()

    def make_vectors(self, i: int) -> None:
        """The vectors of one task that are missing, each read once for all methods and their controls."""
        task, early = self.plans[i].task.name, self.design.early_controls
        self.checkpoints.read(task)
        if not self.checkpoints.lacks_vectors(task, [control.name for control in early]):
            return
        everything = list(self.design.methods)
        with sharing_reads(self.engine):
            if len(everything) > 1:
                # For all methods, so that a resumed run reads in the same batches.
                with stage("reading"):
                    self._read_together(i, dict.fromkeys(everything, self.plans[i].train))
                    self._read_together(i, {name: self._shuffled(i, name) for name in everything})
            for name in self.checkpoints.without_result(task):
                vectors = self.vector(i, name)
                for control in early:
                    key = (task, name, control.name)
                    if key not in self.checkpoints.controls:
                        with stage(name, f"control {control.name}"):
                            self.checkpoints.keep_control(*key, control(self._treatment(i, name, vectors)))

    def make_results(self, i: int) -> None:
        """The results of one task, each kept as soon as it is known. All methods share what is run without vectors."""
        task, tests = self.plans[i].task.name, _Tests(self.engine, self.plans[i], self.design)
        for name in self.design.methods:
            self.shown.describe(*self.label, task, name)
            self.checkpoints.read(task)  # what another process has finished in the meantime
            kept = self.checkpoints.results.get((task, name))
            if kept is not None and kept.other_task == self._name_of(self._other(i, name)):
                self.shown.skip()
                continue
            made = self.result(i, name, tests) if kept is None else self.result_among(i, name, kept, tests)
            self.checkpoints.keep_result(made)
            self.shown.update()

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
        if key not in self.checkpoints.vectors:
            self.checkpoints.read_vectors(plan.task.name)  # what another process has made in the meantime
        if key in self.checkpoints.vectors:
            return self.checkpoints.vectors[key]
        with stage(name), sharing_reads(self.engine) as reads, _metered(self.engine, reads) as meter:
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
        vectors = {"patched": vector, **controls}
        tuned = tests.tune(_on_dev(vectors, plan), self.settings.layers)
        evaluation = tests.evaluate(_on_test(vectors, plan), tuned)
        return TaskResult(
            task=plan.task.name,
            category=plan.task.category,
            sweep=tuned["patched"].sweep,
            evaluation=evaluation,
            other_task=self._name_of(other),
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

    def result_among(self, i: int, name: str, kept: TaskResult, tests: _Tests) -> TaskResult:
        """A result that was made when the run had other tasks, with those controls made anew that may have another
        task's vector.
        """
        other, before = self._other(i, name), kept.evaluation
        treatment = self._treatment(i, name, self.vector(i, name), other)
        made = control_vectors([control for control in self.design.controls if not control.runs_model], treatment)
        tuned = tests.tune(_on_dev(made, self.plans[i]), self.settings.layers, preferred=kept.ties[0]) if made else {}
        scores = tests.scores(_on_test(made, self.plans[i]), tuned) if made else {}
        early = {control.name for control in self.design.early_controls} & set(before.controls)
        names = [control.name for control in self.design.controls if control.name in {*early, *made}]
        sweeps = {each: tuned[each].sweep for each in made}
        layers = {each: written_layers(made[each], tuned[each].choice.layer) for each in made}
        strengths = {each: tuned[each].choice.strength for each in made}
        return replace(
            kept,
            other_task=self._name_of(other),
            control_sweeps=_updated(kept.control_sweeps, sweeps, names),
            evaluation=replace(
                before,
                controls=_updated(before.controls, scores, names),
                control_layers=_updated(before.control_layers, layers, names),
                control_strengths=_updated(before.control_strengths, strengths, names),
            ),
        )

    def _name_of(self, i: int | None) -> str | None:
        return None if i is None else self.plans[i].task.name

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


def _updated(before: Mapping[str, Value], new: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """The values of these names in this order, new if there is one."""
    return {name: new[name] if name in new else before[name] for name in names}


def _on_dev(vectors: Mapping[str, TaskVectors], plan: TaskPlan) -> dict[str, TaskVectors]:
    """The vectors for the dev prompts, which come first."""
    return {name: rows_of(each, slice(len(plan.dev))) for name, each in vectors.items()}


def _on_test(vectors: Mapping[str, TaskVectors], plan: TaskPlan) -> dict[str, TaskVectors]:
    """The vectors for the test prompts."""
    return {name: rows_of(each, slice(len(plan.dev), None)) for name, each in vectors.items()}


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
        with stage("few-shot"):
            return few_shot_run(self.engine, self.plan.test, self.plan.test_prompts, self.design.max_new_tokens)

    @cached_property
    def few_shot_score(self) -> Score:
        """The score of the few-shot answers."""
        if self.design.measured:
            return self.few_shot_run.score
        with stage("few-shot"):
            return unpatched_score(self.engine, self.plan.test, self.plan.test_prompts, self.design.max_new_tokens)

    @cached_property
    def zero_shot_score(self) -> Score:
        """The score of the answers to the test queries alone."""
        test, queries = self.plan.test, [prompt.zero_shot() for prompt in self.plan.test_prompts]
        kept, n_tokens = self.kept, self.design.max_new_tokens
        few_shot = self.few_shot_run if self.design.measured else None
        with stage("zero-shot"):
            if few_shot is not None:
                return unpatched_measured(self.engine, test, queries, n_tokens, few_shot=few_shot, kept=kept)
            return unpatched_score(self.engine, test, queries, n_tokens, kept=kept)

    def tune(
        self, candidates: Mapping[str, TaskVectors], layers: Sequence[int], preferred: Choice | None = None
    ) -> dict[str, Tuned]:
        """The layers and strengths of all candidates, chosen on the dev prompts."""
        with stage("sweep"):
            return tune(
                self.engine,
                self.plan.development,
                self.plan.dev,
                candidates,
                layers=layers,
                strengths=self.design.strengths,
                max_new_tokens=self.design.max_new_tokens,
                preferred=preferred,
                kept=self.kept,
            )

    def scores(self, vectors: Mapping[str, TaskVectors], tuned: Mapping[str, Tuned]) -> dict[str, Score]:
        """The answers to the test prompts with each of the vectors, at its own layer and strength."""
        test, prompts, n_tokens = self.plan.test, self.plan.test_prompts, self.design.max_new_tokens
        chosen = {name: tuned[name].choice for name in vectors}
        written = [(at_strength(vectors[name], each.strength), each.layer) for name, each in chosen.items()]
        few_shot = self.few_shot_run if self.design.measured else None
        with stage("test prompts"):
            if few_shot is not None:
                scores = measured_scores(
                    self.engine, test, prompts, written, Placement(), n_tokens, few_shot=few_shot, kept=self.kept
                )
            else:
                scores = patched_scores(self.engine, test, prompts, written, Placement(), n_tokens, kept=self.kept)
        return dict(zip(vectors, scores, strict=True))

    def evaluate(self, vectors: Mapping[str, TaskVectors], tuned: Mapping[str, Tuned]) -> Evaluation:
        """The test prompts under all conditions, each vector at its own layer and strength."""
        chosen = {name: tuned[name].choice for name in vectors}
        controls = self.scores(vectors, tuned)
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
        with stage("layers that tie"):
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
            with stage(condition.name):
                if condition.name not in self._plain:
                    self._plain[condition.name] = condition_score(
                        self.engine, test, asked, condition, None, n_tokens, kept=kept
                    )
                patched = condition_score(self.engine, test, asked, condition, written, n_tokens, kept=kept)
            scores[condition.name] = {PLAIN: self._plain[condition.name], "patched": patched}
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
