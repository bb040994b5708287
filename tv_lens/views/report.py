"""An experiment as one HTML page that can be read without a network and without other files (extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tv_lens.demo import NAME as DEMO
from tv_lens.evidence.controls import CONTROLS
from tv_lens.evidence.results import Evaluation, Experiment, Score, TaskResult, mcnemar
from tv_lens.evidence.settings import Settings
from tv_lens.files import write_whole
from tv_lens.prompts import Template
from tv_lens.tasks import Task, exact_match, fingerprint, library, starts_with
from tv_lens.vectors import depth
from tv_lens.views.plots import plot

if TYPE_CHECKING:
    import plotly.graph_objects as go

# Example answers of each kind, for each task.
_MAX_ANSWERS = 10

_RULES = {rule.__name__ for rule in (exact_match, starts_with)}
_METHODS = ("extract", "extract_across")


def write_report(experiment: Experiment, path: str | Path) -> None:
    """Write the page, whole or not at all: settings, a table that sorts, figures, each task's answers, and how to
    repeat the run. All text from tasks and models is shown as text.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    from plotly.offline import get_plotlyjs

    # Everything is escaped unless it is marked as HTML already; a missing name is an error.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("tv_lens.views") / "report.html").read_text(encoding="utf-8"))
    described = {control.name: control.description for control in CONTROLS}
    controls = list(dict.fromkeys(name for result in experiment.results for name in result.evaluation.controls))
    tasks = [_task(experiment, result) for result in experiment.results]
    page = template.render(
        settings=experiment.settings,
        controls=controls,
        descriptions=", ".join(described.get(name, f"{name}, a custom control") for name in controls),
        template=_format_text(experiment.settings.template),
        tasks=tasks,
        overview=_for_script(plot(experiment)),
        n_over_zero_shot=sum(_beats(result.evaluation, result.evaluation.zero_shot) for result in experiment.results),
        n_over_all=sum(task["beats_all"] for task in tasks),
        repeat=repeat_code(experiment.settings),
        plotly=Markup(get_plotlyjs()),
    )
    write_whole(path, page.encode("utf-8", "replace"))  # a lone surrogate cannot be written, and reads as "?"


def _format_text(template: Mapping[str, Any]) -> str:
    if template["kind"] == Template.__name__:
        return f"{template['example']!r}, between demonstrations {template['separator']!r}"
    return ", ".join(f"{name} {value!r}" for name, value in template.items())


def _task(experiment: Experiment, result: TaskResult) -> dict[str, Any]:
    scores, n_layers = result.evaluation, experiment.settings.n_layers
    answers = _answers(result)
    right = [each for each in answers if each["right"]]
    wrong = [each for each in answers if not each["right"]]
    layer = scores.layer if isinstance(scores.layer, int) else max(scores.layer)
    several = len(experiment.settings.methods) > 1
    return {
        "name": f"{result.task}, {result.method}" if several else result.task,
        "category": result.category,
        "n": len(scores.patched.correct),
        "evaluation": scores,
        "p": scores.p_value,
        "layer": layer,
        "depth": depth(layer, n_layers),
        "ties": [each for each in result.sweep.ties if each != result.sweep.best],
        "other_task": result.other_task,
        "table": scores.to_pandas().to_dict("records"),
        "beats_all": _beats(scores, scores.zero_shot, *scores.controls.values()),
        "figure": _for_script(plot(result)),
        "prompt": result.test_prompts[0],
        "answers": {"right": _shown(right), "wrong": _shown(wrong)},
    }


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


def _beats(scores: Evaluation, *others: Score) -> bool:
    """Whether patched is right significantly more often than each of the others."""
    return all(scores.patched.accuracy > other.accuracy and mcnemar(scores.patched, other) < 0.05 for other in others)


def _for_script(figure: go.Figure) -> Markup:
    """A figure as JSON for a script element: nothing in it can end the element."""
    return Markup(figure.to_json().replace("<", "\\u003c"))


def repeat_code(settings: Settings) -> str:
    """The call that gives these results again. What the settings cannot tell is left to fill in, and marked: custom
    tasks, rules, formats, methods, controls and engines, and how a model that is not on the hub was booted.
    """
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("tv_lens.views") / "repeat.py.jinja").read_text(encoding="utf-8"))
    known = library()
    tasks = [_task_code(settings, name, known.get(name)) for name in settings.tasks]
    standard = tuple(control.name for control in CONTROLS)
    return template.render(
        settings=settings,
        has_custom_tasks=None in tasks,
        tasks=[f"own[{name!r}]" if code is None else code for name, code in zip(settings.tasks, tasks, strict=True)],
        is_demo=settings.model == DEMO,
        has_standard_methods=set(settings.methods) <= set(_METHODS) and len(settings.methods) == 1,
        has_standard_controls=settings.controls == standard,
        is_template=settings.template.get("kind") == Template.__name__,
        all_layers=settings.layers == tuple(range(len(settings.layers))) and len(settings.layers) == settings.n_layers,
    )


def _task_code(settings: Settings, name: str, task: Task | None) -> str | None:
    """The code for a task of the library, None if it is not one."""
    rule = "starts_with" if settings.max_new_tokens == 1 else settings.rules[name]
    if task is None or fingerprint(task) != settings.data[name] or rule not in _RULES:
        return None
    if rule == task.rule.name:
        return f"tv.library()[{name!r}]"
    return f"replace(tv.library()[{name!r}], accepts=tv.{rule})"
