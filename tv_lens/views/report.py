"""Results as one HTML page that can be read without a network and without other files (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from tv_lens.errors import UnsupportedError
from tv_lens.evidence.comparisons import Comparison
from tv_lens.evidence.results import Evaluation, Experiment, Sweep, TaskResult
from tv_lens.vectors import depth, layers_text
from tv_lens.views.comparison_page import write_comparison
from tv_lens.views.layers import LayerAccuracies
from tv_lens.views.pages import describe_controls, describe_format, filled, write_page
from tv_lens.views.plots import plot
from tv_lens.views.repeating import repeat_code

# Example answers of each kind, for each task.
_MAX_ANSWERS = 10


@singledispatch
def write_report(results: Any, path: str | Path) -> None:
    """Write the page of an experiment or a comparison.

    Raises:
        UnsupportedError: there is no page for this class.
        OSError: the folder is missing or cannot be written to.
    """
    raise UnsupportedError(f"there is no page for a {type(results).__name__}; register one with write_report.register")


write_report.register(Comparison, write_comparison)


@write_report.register
def write_experiment(experiment: Experiment, path: str | Path) -> None:
    """Write the page, whole or not at all: settings, a table that sorts, figures, each task's answers, and how to
    repeat the run. All text from tasks and models is shown as text.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    controls = list(dict.fromkeys(name for result in experiment.results for name in result.evaluation.controls))
    tests = experiment.tests().to_dict("records")
    figures = {f"figure-{i}": plot(result) for i, result in enumerate(experiment.results, start=1)}
    tasks = [_task(experiment, result, test) for result, test in zip(experiment.results, tests, strict=True)]
    several = len(experiment.settings.methods) > 1
    layers = LayerAccuracies((experiment,))
    table = layers.table() if several else layers.table()._replace(rows=[])
    if table.rows:
        figures["layers"] = layers.plot()
    write_page(
        path,
        "report.html",
        {"overview": plot(experiment), **figures},
        parts={
            "layers": filled("layers_table.html", layers=table),
            **{f"task-{i}": filled("task.html", task=task) for i, task in enumerate(tasks, start=1)},
        },
        layers=table,
        several=several,
        settings=experiment.settings,
        controls=controls,
        descriptions=describe_controls(controls),
        template=describe_format(experiment.settings.template),
        tasks=tasks,
        has_ties=any(task["ties"] for task in tasks),
        n_over_zero_shot=sum(task["beats_zero_shot"] for task in tasks),
        n_over_all=sum(task["beats_controls"] for task in tasks),
        repeat=repeat_code(experiment),
    )


def _task(experiment: Experiment, result: TaskResult, test: dict[Any, Any]) -> dict[str, Any]:
    scores, n_layers = result.evaluation, experiment.settings.n_layers
    answers = _answers(result)
    right = [each for each in answers if each["right"]]
    wrong = [each for each in answers if not each["right"]]
    last = scores.layer if isinstance(scores.layer, int) else max(scores.layer)
    several = len(experiment.settings.methods) > 1
    return {
        "name": f"{result.task}, {result.method}" if several else result.task,
        "category": result.category,
        "n": len(scores.patched.correct),
        "evaluation": scores,
        "p": scores.p_value,
        "test": test,
        "layer": _written_to(scores, "patched"),
        "last_layer": last,
        "depth": depth(last, n_layers),
        "ties": list(map(str, result.ties[1:])),
        "test_range": result.test_range,
        "other_task": result.other_task,
        "table": _conditions(scores),
        "beats_zero_shot": scores.patched.accuracy > scores.zero_shot.accuracy and scores.p_value < 0.05,
        "beats_controls": bool(scores.controls) and test["p_controls_holm"] < 0.05,
        "swept": [_swept(sweep) for sweep in (result.sweep, *result.other_sweeps)],
        "prompt": result.test_prompts[0],
        "answers": {"right": _shown(right), "wrong": _shown(wrong)},
    }


def _swept(sweep: Sweep) -> dict[str, Any]:
    """What the figure of a task shows, as a table."""
    return {"strength": sweep.strength, "rows": sweep.to_pandas().to_dict("records")}


def _conditions(scores: Evaluation) -> list[dict[Any, Any]]:
    """The rows of the table of an evaluation: where each condition's vectors were written to is in words."""
    rows = scores.to_pandas().to_dict("records")
    return [{**row, "layer": _written_to(scores, row["condition"])} for row in rows]


def _written_to(scores: Evaluation, condition: str) -> str:
    """The layer or layers of a condition's vectors, and their strength if it is not 1; nothing without vectors."""
    layers = scores.layer_of(condition)
    if layers is None:
        return ""
    strength = scores.control_strengths.get(condition, scores.strength)
    return layers_text(layers) + ("" if strength == 1 else f" x {strength:g}")


def _answers(result: TaskResult) -> list[dict[str, Any]]:
    """Each test query with its expected answer and the answers under three conditions."""
    scores = result.evaluation
    answers = []
    for i, query in enumerate(result.queries):
        answers.append(
            {
                "asked": query,
                "expected": scores.patched.answers[i],
                "right": scores.patched.correct[i],
                "texts": [(s.texts[i], s.correct[i]) for s in (scores.zero_shot, scores.few_shot, scores.patched)],
            }
        )
    return answers


def _shown(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {"count": len(answers), "shown": answers[:_MAX_ANSWERS]}
