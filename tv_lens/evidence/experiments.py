"""The paper's main experiment, task by task and method by method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tv_lens.answers import first_token
from tv_lens.engines import Capability, Engine, Model, engine_for, progress_bar
from tv_lens.errors import TvLensError
from tv_lens.evidence.checkpoints import Checkpoints
from tv_lens.evidence.controls import CONTROLS, Control, Treatment, check_controls, control_vectors
from tv_lens.evidence.evaluation import check_evaluation, evaluate_with, sweep_layers, swept_layers
from tv_lens.evidence.results import Experiment, TaskResult
from tv_lens.evidence.settings import Settings
from tv_lens.generation import check_new_tokens, encode
from tv_lens.methods.base import Method, check_methods
from tv_lens.methods.extraction import AcrossPrompts, Extraction
from tv_lens.patching import Placement
from tv_lens.prompts import PAPER, Prompt, PromptFormat
from tv_lens.provenance import versions
from tv_lens.tasks import Task, fingerprint
from tv_lens.tasks.halves import dev_and_test
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
    methods: Sequence[Method] | None = None,
    controls: Sequence[Control] = CONTROLS,
    template: PromptFormat = PAPER,
    max_new_tokens: int = 8,
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
) -> Experiment:
    """The paper's main experiment (Hendel et al. 2023, section 3), for each task:

    its inputs are split into disjoint dev and test sets; the mean task vector of `n_dev` dev prompts is made by each of
    `methods` (by default `Extraction(substitutes)`, or `AcrossPrompts()` with `across`) and written in at every layer
    for the dev queries; at the best layer it is evaluated, once, on `n_test` test prompts, with `controls`. A task with
    fewer inputs gets as many prompts as it has inputs in either set. The control `other task` takes the vector of the
    task half the list away.

    With `max_new_tokens=1` answers are scored by their first token, or by the first one that tells the task's answers
    apart (`first_token`), else in full by each task's own rule; `settings["scoring"]` and `settings["rules"]` say
    which. The same seed gives the same table.

    With a `folder`, each finished task is kept there, and a run with the same settings resumes where it stopped.

    Raises:
        TvLensError: no tasks or two of one name, too few inputs, fewer than one substitute, or a folder of another
            run; the message says which settings differ.
    """
    engine = engine_for(model)
    check_new_tokens(engine, max_new_tokens)
    engine.require(Capability.PATCH)
    if methods is None:
        methods = [AcrossPrompts()] if across else [Extraction(substitutes=substitutes)]
    check_methods(methods)
    check_controls(controls)
    swept = swept_layers(engine, layers, range(engine.n_layers))
    sampling = _Sampling(shots, n_dev, n_test, int(seed), template)
    plans = _plans(engine, tasks, sampling, max_new_tokens)
    settings = Settings(
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
        shots=shots,
        n_dev=n_dev,
        n_test=n_test,
        seed=int(seed),
        method=", ".join(method.name for method in methods),
        methods={method.name: method.options for method in methods},
        substitutes=substitutes,
        controls=tuple(control.name for control in controls),
        template=template.to_dict(),
        max_new_tokens=max_new_tokens,
        scoring="first token" if max_new_tokens == 1 else "full answer",
        layers=tuple(swept),
        versions=versions(),
    )
    checkpoints = Checkpoints(None if folder is None else Path(folder), settings)
    for plan in plans:  # a prompt that is too long shows now, and not after an hour
        encode(engine, [*plan.dev_prompts, *plan.test_prompts], max(max_new_tokens, plan.task.rule.tokens))
    run = _Run(engine, plans, settings, checkpoints, tuple(controls))
    with progress_bar(engine, len(plans) * len(methods), "task") as shown:
        for i, plan in enumerate(plans):
            for method in methods:
                if (plan.task.name, method.name) not in checkpoints.results:
                    checkpoints.keep_result(run.result(i, method))
                shown.update()
    return run.experiment()


@dataclass(frozen=True)
class _Sampling:
    """How prompts are drawn from a task."""

    shots: int
    n_dev: int
    n_test: int
    seed: int
    template: PromptFormat

    def __post_init__(self) -> None:
        if min(self.shots, self.n_dev, self.n_test) < 1:
            raise TvLensError(f"n_dev={self.n_dev}, n_test={self.n_test} and shots={self.shots} are each 1 or more")


@dataclass(frozen=True)
class TaskPlan:
    """A task with its rule, split into dev and test, and the prompts from each."""

    task: Task
    dev: Task
    test: Task
    dev_prompts: Sequence[Prompt]
    test_prompts: Sequence[Prompt]

    @staticmethod
    def of(task: Task, sampling: _Sampling) -> TaskPlan:
        """Disjoint halves in the proportion of dev to test prompts.

        Raises:
            TvLensError: too few inputs.
        """
        dev, test = dev_and_test(
            task,
            sampling.n_dev,
            sampling.n_test,
            shots=sampling.shots,
            seed=sampling.seed,
            template=sampling.template,
        )
        return TaskPlan(task, dev.task, test.task, dev.prompts, test.prompts)


def _plans(engine: Engine, tasks: Sequence[Task], sampling: _Sampling, max_new_tokens: int) -> list[TaskPlan]:
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise TvLensError(f"tasks are {names}; give at least one, each with a different name")
    # Before a task is split, so that both halves have the rule.
    if max_new_tokens == 1:
        tasks = [replace(task, accepts=first_token(engine, sampling.template, task)) for task in tasks]
    return [TaskPlan.of(task, sampling) for task in tasks]


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
    checkpoints: Checkpoints
    controls: Sequence[Control]

    def vector(self, i: int, method: Method) -> TaskVectors:
        """The mean vector of task `i`, made once."""
        plan, key = self.plans[i], (self.plans[i].task.name, method.name)
        if key in self.checkpoints.vectors:
            return self.checkpoints.vectors[key]
        vectors = method(self.engine, plan.dev, plan.dev_prompts, self.settings.seed).mean()
        if vectors.task != plan.task.name:
            raise TvLensError(
                f"{method.name} returned vectors of {vectors.task!r} for the task {plan.task.name!r}; a method can "
                "name them with dataclasses.replace(vectors, task=task.name)"
            )
        return self.checkpoints.keep_vectors(*key, vectors)

    def result(self, i: int, method: Method) -> TaskResult:
        """The sweep on dev prompts, and the evaluation at the best layer on test prompts."""
        plan, settings = self.plans[i], self.settings
        vector = self.vector(i, method)
        layers = [layer for layer in settings.layers if layer in vector.tried_layers]
        if not layers:
            raise TvLensError(
                f"{method.name} gave vectors of {plan.task.name!r} to try at the layers {list(vector.tried_layers)}, "
                f"and none of these is among layers={list(settings.layers)}; give both the same layers"
            )
        n_tokens = settings.max_new_tokens
        sweep = sweep_layers(self.engine, plan.dev, plan.dev_prompts, vector, layers, max_new_tokens=n_tokens)
        other = self.other(i)
        treatment = Treatment(
            engine=self.engine,
            task=plan.dev,
            prompts=plan.dev_prompts,
            vectors=vector,
            method=method,
            seed=settings.seed,
            n=len(plan.test_prompts),
            layers=vector.written_with(sweep.best),
            other=None if other is None else self._vector_of(other, method),
        )
        controls = control_vectors(self.controls, treatment)
        compared = {"patched": vector, **controls}
        check_evaluation(self.engine, plan.test, plan.test_prompts, list(compared.values()), sweep.best, n_tokens)
        evaluation = evaluate_with(
            self.engine, plan.test, plan.test_prompts, compared, sweep.best, Placement(), n_tokens
        )
        return TaskResult(
            task=plan.task.name,
            category=plan.task.category,
            sweep=sweep,
            evaluation=evaluation,
            other_task=None if other is None else self.plans[other].task.name,
            dev_prompts=tuple(prompt.text for prompt in plan.dev_prompts),
            test_prompts=tuple(prompt.text for prompt in plan.test_prompts),
            queries=tuple(prompt.query for prompt in plan.test_prompts),
            method=method.name,
        )

    def other(self, i: int) -> int | None:
        """The task half the list away, None if there is one task."""
        other = (i + len(self.plans) // 2) % len(self.plans)
        return None if other == i else other

    def _vector_of(self, i: int, method: Method) -> Callable[[], TaskVectors]:
        return lambda: self.vector(i, method)

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
