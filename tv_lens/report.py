"""An experiment as one HTML page that needs no network and nothing beside it (extra `plots`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tv_lens.files import write_whole
from tv_lens.plots import plot_experiment
from tv_lens.vectors import depth

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tv_lens.experiments import Evaluation, Experiment, TaskResult

# Example answers of each kind, in each task.
_MOST = 10


def write_report(experiment: Experiment, path: str | Path) -> None:
    """Write the page, whole or not at all: settings, a table that sorts, figures, each task's answers, and how to
    repeat the run. All text from tasks and models is shown as text.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    from plotly.offline import get_plotlyjs

    # Everything is escaped unless it says that it is markup already; a name that is missing is an error.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("tv_lens") / "report.html").read_text(encoding="utf-8"))
    controls = list(dict.fromkeys(name for result in experiment.results for name in result.evaluation.controls))
    page = template.render(
        settings=experiment.settings,
        controls=controls,
        tasks=[_task(experiment, result) for result in experiment.results],
        overview=_for_script(plot_experiment(experiment)),
        counts=_counts(experiment),
        repeat=_repeat(experiment.settings),
        plotly=Markup(get_plotlyjs()),
    )
    write_whole(path, page.encode("utf-8", "replace"))  # a lone surrogate cannot be written, and reads as "?"


def _task(experiment: Experiment, result: TaskResult) -> dict[str, Any]:
    found, n_layers = result.evaluation, experiment.settings["n_layers"]
    asked = _asked(experiment.settings, result.test_prompts)
    answers = [
        {"asked": text, "expected": expected, "right": right, "texts": texts}
        for text, expected, right, texts in zip(
            asked,
            found.patched.answers,
            found.patched.correct,
            [
                [(score.texts[i], score.correct[i]) for score in (found.zero_shot, found.few_shot, found.patched)]
                for i in range(len(asked))
            ],
            strict=True,
        )
    ]
    return {
        "name": result.task,
        "category": result.category,
        "n": len(found.patched.correct),
        "evaluation": found,
        "p": found.p_value,
        "layer": found.layer,
        "depth": depth(found.layer, n_layers),
        "ties": [layer for layer in result.sweep.ties if layer != result.sweep.best],
        "n_dev": len(result.dev_prompts),
        "other_task": result.other_task,
        "table": found.to_pandas().to_dict("records"),
        "beaten": _beaten(found),
        "figure": _for_script(result.plot()),
        "prompt": result.test_prompts[0],
        "answers": {
            kind: {"count": len(chosen), "shown": chosen[:_MOST]}
            for kind in ("right", "wrong")
            for chosen in [[each for each in answers if each["right"] == (kind == "right")]]
        },
    }


def _beaten(found: Evaluation) -> bool:
    """Whether patched is right more often than each control, by more than chance would have it."""
    from tv_lens.experiments import mcnemar

    return all(
        found.patched.accuracy > score.accuracy and mcnemar(found.patched, score) < 0.05
        for score in (found.zero_shot, *found.controls.values())
    )


def _counts(experiment: Experiment) -> dict[str, int]:
    found = [result.evaluation for result in experiment.results]
    return {
        "tasks": len(found),
        "over_zero_shot": sum(
            each.patched.accuracy > each.zero_shot.accuracy and each.p_value < 0.05 for each in found
        ),
        "over_all": sum(map(_beaten, found)),
    }


def _asked(settings: Mapping[str, Any], prompts: Sequence[str]) -> list[str]:
    """What stands after the demonstrations: the prompts are kept as texts."""
    return [prompt.rsplit(settings["template"]["separator"], 1)[-1] for prompt in prompts]


def _for_script(figure: go.Figure) -> Markup:
    """A figure as JSON that can stand in a script element: nothing in it can end the element."""
    return Markup(figure.to_json().replace("<", "\\u003c"))


def _repeat(settings: Mapping[str, Any]) -> str:
    """The call that gives these results again, for library tasks as it stands."""
    template = settings["template"]
    keywords = {
        **{name: settings[name] for name in ("shots", "n_dev", "n_test", "seed")},
        **({"across": True} if settings["method"] == "extract_across" else {"substitutes": settings["substitutes"]}),
        "max_new_tokens": settings["max_new_tokens"],
    }
    layers = settings["layers"]
    if layers != list(range(settings["n_layers"])):
        keywords["layers"] = layers
    lines = [
        "import transformer_lens",
        "import tv_lens as tv",
        "",
        f"model = transformer_lens.TransformerBridge.boot_transformers({settings['model']!r})"
        if settings["model"] != "SmolLM2-135M-Instruct"
        else "model = tv.demo_model()",
        f"engine = tv.LocalEngine(model, prepend_bos={settings['prepend_bos']!r})",
        f"names = {json.dumps(list(settings['tasks']), ensure_ascii=False)}",
        "experiment = tv.run_experiment(",
        "    engine,",
        "    [tv.library()[name] for name in names],  # tasks of your own: Task.from_file, Task.from_mapping",
        f"    template=tv.Template({template['example']!r}, {template['separator']!r}),",
        *(f"    {name}={value!r}," for name, value in keywords.items()),
        ")",
    ]
    return "\n".join(lines)
