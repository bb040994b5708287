"""The paper's main experiment, for any tasks, methods and controls."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

from tv_lens.engines import Model, engine_for
from tv_lens.evidence.controls import CONTROLS, Control
from tv_lens.evidence.experiments import Design, run_designs
from tv_lens.evidence.grids import Boot, run_grid
from tv_lens.evidence.results import Experiment
from tv_lens.evidence.tuning import check_strengths
from tv_lens.methods.base import Methods, named_methods
from tv_lens.methods.extraction import AcrossPrompts, Extraction
from tv_lens.prompts import PAPER, PromptFormat
from tv_lens.tasks import Task


def run_experiment(  # noqa: PLR0913 - its options are keywords
    model: Model | Boot,
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
    executor: Executor | None = None,
) -> Experiment:
    """The paper's main experiment (Hendel et al. 2023, section 3), for each task:

    its inputs are split into disjoint dev and test sets; the mean task vector of dev prompts is made by each method and
    written in at every layer for the dev queries; at the best layer it is evaluated, once, on test prompts. Each
    control chooses its own layer on the same dev queries. The control `other task` takes the vector of the least
    similar task, of another category if there is one.

    Nothing is run twice: methods that read the same prompts share the reads, and what comes before a vector is run once
    for all vectors, layers and strengths. The same seed gives the same table.

    Args:
        model: a bridge, or an engine to control batch size and BOS; with an executor a function that boots one, which
            each worker calls once.
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
        folder: keeps each finished task. A run with the same settings resumes where it stopped, and one with more tasks
            or methods runs those alone; the control `other task` of the others is run again if one of the new tasks
            is less similar.
        n_train: make the vectors from that many other prompts, whose queries are neither dev nor test queries.
        strengths: multiples of the strength that vectors are meant to have, at each of which those that are added are
            tried.
        executor: any `concurrent.futures.Executor`, whose workers share the run; all of them must see `folder`. See
            `docs/clusters.md`.

    Returns:
        The results of all tasks and methods, with tables, tests and settings.

    Raises:
        TvLensError: no tasks or two of one name, too few inputs, fewer than one substitute, or a folder of another run;
            the message says which settings differ. With an executor also a model instead of a function, or no folder.
        GridError: some parts failed on their workers; a second call runs only these.

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
    if executor is not None:
        [experiment] = run_grid(model, tasks, {"": design}, folder, executor)
        return experiment
    [experiment] = run_designs(engine_for(model), tasks, [(design, None if folder is None else Path(folder))])
    return experiment
