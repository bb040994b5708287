"""Which method's vectors carry a task best: all methods on the same items, with paired statistics."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from tv_lens.engines import Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.evidence.comparisons import Comparison
from tv_lens.evidence.conditions import Condition, other_template, shuffled_few_shot
from tv_lens.evidence.controls import CONTROLS, Control
from tv_lens.evidence.experiments import Design, run_designs
from tv_lens.evidence.grids import Boot, run_grid
from tv_lens.evidence.tuning import check_strengths
from tv_lens.methods.base import Methods, named_methods
from tv_lens.prompts import PAPER, PromptFormat, Template
from tv_lens.tasks import Task

# The template of the condition "another template", and the one that replaces it if that is the comparison's own.
QUESTION = Template("Q: {input}\nA: {output}", separator="\n\n")


def compare(  # noqa: PLR0913 - its options are keywords
    model: Model | Boot,
    tasks: Sequence[Task],
    methods: Methods,
    *,
    shots: int = 5,
    n_train: int = 25,
    n_dev: int = 25,
    n_test: int = 50,
    seeds: Sequence[int] = (0, 1, 2),
    strengths: Sequence[float | int] = (0.5, 1.0, 2.0),
    controls: Sequence[Control] = CONTROLS,
    conditions: Sequence[Condition] | None = None,
    template: PromptFormat = PAPER,
    max_new_tokens: int = 8,
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
    executor: Executor | None = None,
) -> Comparison:
    """Compare how well the vectors of several methods carry tasks. The first method is the one that the others are
    compared with.

    For each task and seed, all methods get the same prompts, with different queries: some to make vectors from, some to
    choose a layer and a strength on, and some that are used once. Demonstrations of train and dev prompts come from the
    same part of the task, so methods that are made from demonstrations may have seen dev queries; those of test prompts
    come from the other part. Every control of every method chooses its layer and strength in the same way.

    Each test query is asked alone (zero-shot), after demonstrations (few-shot), and with the vectors and their controls
    written in; then in other `conditions`. Answers, the log-probability of the right answer, and the divergence of the
    next token from few-shot are measured.

    Args:
        model: a bridge, or an engine to control batch size and BOS; with an executor a function that boots one.
        tasks: tasks of different names.
        methods: a list, or a dictionary with names for them, if two are of one kind.
        shots: demonstrations of each prompt.
        n_train: prompts to make vectors from. A task with fewer inputs gives fewer prompts of each kind.
        n_dev: prompts to choose on.
        n_test: prompts that are reported.
        seeds: each draws prompts anew.
        strengths: multiples of the strength that vectors are meant to have, of those that are added or turned toward;
            those that overwrite have none.
        controls: kinds of control.
        conditions: other ways to ask; None for demonstrations with permuted outputs, and another template.
        template: how prompts are written.
        max_new_tokens: how many tokens an answer may have.
        layers: the layers to try; None for all.
        folder: keeps finished parts, in a folder for each seed; the same call resumes, and one with more tasks, methods
            or seeds runs those alone.
        executor: any `concurrent.futures.Executor`, whose workers share the tasks and seeds, as in `run_experiment`.

    Returns:
        The results of all seeds, with tables and tests.

    Raises:
        TvLensError: no seeds or one twice, or as `run_experiment`.
        GridError: as `run_experiment`.

    Examples:
        >>> comparison = tv.compare(
        ...     model, [task], [tv.Extraction(), tv.MeanState()], shots=2, n_train=3, n_dev=2, n_test=2, seeds=(0,),
        ...     max_new_tokens=1, layers=[2], controls=[], conditions=[],
        ... )
        >>> comparison.methods
        ('extract', 'mean_state')
    """
    named = named_methods(methods)
    if not seeds or len({int(seed) for seed in seeds}) < len(seeds):
        raise TvLensError(f"seeds are {seeds!r}; give at least one, each of them once")
    if conditions is None:
        conditions = default_conditions(template, shots)
    designs = [
        Design(
            shots=shots,
            n_train=n_train,
            n_dev=n_dev,
            n_test=n_test,
            seed=int(seed),
            methods=named,
            controls=controls,
            conditions=conditions,
            template=template,
            max_new_tokens=max_new_tokens,
            layers=layers,
            strengths=check_strengths(strengths),
            measured=True,
        )
        for seed in seeds
    ]
    if executor is not None:
        by_name = {f"seed-{design.seed}": design for design in designs}
        return Comparison(tuple(run_grid(model, tasks, by_name, folder, executor)))
    folders = [None if folder is None else Path(folder) / f"seed-{design.seed}" for design in designs]
    return Comparison(run_designs(engine_for(model), tasks, list(zip(designs, folders, strict=True))))


def default_conditions(template: PromptFormat, shots: int) -> tuple[Condition, ...]:
    """The conditions of a comparison that names none: after demonstrations with permuted outputs, if there are two or
    more, and in another template.
    """
    in_another = other_template(QUESTION if template != QUESTION else PAPER)
    return (shuffled_few_shot, in_another) if shots > 1 else (in_another,)
