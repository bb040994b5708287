"""The paper's main experiment, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tv_lens.answers import first_token
from tv_lens.engines import bar, engine_for, engine_name
from tv_lens.evidence.checkpoints import Kept
from tv_lens.evidence.controls import shuffle_outputs
from tv_lens.evidence.evaluation import chosen_layers, evaluate, sweep_layers
from tv_lens.evidence.results import Experiment, TaskResult
from tv_lens.generation import check_new_tokens, check_patching
from tv_lens.methods.extraction import extract, extract_across
from tv_lens.prompts import PAPER, Template
from tv_lens.tasks import Task, fingerprint, rule_name
from tv_lens.vectors import TaskVectors, versions


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
    chosen, seed = chosen_layers(engine, layers), int(seed)
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
    kept = Kept(None if folder is None else Path(folder), settings)
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
