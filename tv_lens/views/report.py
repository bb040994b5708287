"""An experiment as one HTML page that needs no network and nothing beside it (extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tv_lens.demo import NAME as DEMO
from tv_lens.evidence.results import mcnemar
from tv_lens.files import write_whole
from tv_lens.tasks import exact_match, fingerprint, library, starts_with
from tv_lens.vectors import depth
from tv_lens.views.plots import plot_experiment

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tv_lens.evidence.results import Evaluation, Experiment, Score, TaskResult

# Example answers of each kind, in each task.
_MOST = 10

# What the page tells of the run.
_NEEDED = (
    *("model", "engine", "dtype", "n_layers", "d_model", "prepend_bos", "tasks", "data", "rules", "shots", "n_dev"),
    *("n_test", "seed", "method", "substitutes", "template", "max_new_tokens", "scoring", "layers", "versions"),
)

_RULES = {rule.__name__ for rule in (exact_match, starts_with)}

_CONTROLS = {
    "random": "a random vector as long as the task's",
    "other task": "the vector of another task",
    "shuffled": "the vector of demonstrations whose outputs were exchanged",
}


def write_report(experiment: Experiment, path: str | Path) -> None:
    """Write the page, whole or not at all: settings, a table that sorts, figures, each task's answers, and how to
    repeat the run. All text from tasks and models is shown as text.

    Raises:
        ValueError: results that do not say what they are of.
        OSError: the folder is missing or cannot be written to.
    """
    from plotly.offline import get_plotlyjs

    missing = [name for name in _NEEDED if name not in experiment.settings]
    if missing:
        raise ValueError(
            f"these results lack the settings {', '.join(missing)}, so no page can say what they are of; they were not "
            "written by run_experiment, or by an older one: run it again"
        )
    # Everything is escaped unless it says that it is markup already; a name that is missing is an error.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("tv_lens.views") / "report.html").read_text(encoding="utf-8"))
    controls = list(dict.fromkeys(name for result in experiment.results for name in result.evaluation.controls))
    tasks = [_task(experiment, result) for result in experiment.results]
    page = template.render(
        settings=experiment.settings,
        controls=controls,
        controls_told=", ".join(_CONTROLS.get(name, f"{name}, of the run's own") for name in controls),
        template=repr(experiment.settings["template"]["example"]),
        separator=repr(experiment.settings["template"]["separator"]),
        tasks=tasks,
        overview=_for_script(plot_experiment(experiment)),
        counts=_counts(experiment, tasks),
        repeat=_repeat(experiment.settings),
        plotly=Markup(get_plotlyjs()),
    )
    write_whole(path, page.encode("utf-8", "replace"))  # a lone surrogate cannot be written, and reads as "?"


def _task(experiment: Experiment, result: TaskResult) -> dict[str, Any]:
    found, n_layers = result.evaluation, experiment.settings["n_layers"]
    # Runs of before kept no queries: there the whole prompt stands.
    asked = result.queries or result.test_prompts
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
        "other_task": result.other_task,
        "table": found.to_pandas().to_dict("records"),
        "beats_all": _beats(found, found.zero_shot, *found.controls.values()),
        "figure": _for_script(result.plot()),
        "prompt": result.test_prompts[0],
        "answers": {
            kind: {"count": len(chosen), "shown": chosen[:_MOST]}
            for kind in ("right", "wrong")
            for chosen in [[each for each in answers if each["right"] == (kind == "right")]]
        },
    }


def _beats(found: Evaluation, *others: Score) -> bool:
    """Whether patched is right more often than each of the others, by more than chance would have it."""
    return all(found.patched.accuracy > other.accuracy and mcnemar(found.patched, other) < 0.05 for other in others)


def _counts(experiment: Experiment, tasks: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    found = [result.evaluation for result in experiment.results]
    return {
        "tasks": len(found),
        "over_zero_shot": sum(_beats(each, each.zero_shot) for each in found),
        "over_all": sum(task["beats_all"] for task in tasks),
    }


def _for_script(figure: go.Figure) -> Markup:
    """A figure as JSON that can stand in a script element: nothing in it can end the element."""
    return Markup(figure.to_json().replace("<", "\\u003c"))


def _repeat(settings: Mapping[str, Any]) -> str:
    """The call that gives these results again. What the results cannot tell is left to fill in, and says so: tasks and
    rules of one's own, and how a model that is not on the hub was booted.
    """
    known, demo = library(), settings["model"] == DEMO
    first_token = settings["max_new_tokens"] == 1
    tasks = []
    for name in settings["tasks"]:
        rule = "starts_with" if first_token else settings["rules"][name]
        if name not in known or fingerprint(known[name]) != settings["data"][name] or rule not in _RULES:
            tasks.append(f"own[{name!r}]")
        elif rule == known[name].accepts.__name__:
            tasks.append(f"tv.library()[{name!r}]")
        else:
            tasks.append(f"replace(tv.library()[{name!r}], accepts=tv.{rule})")
    boot = f"boot_transformers({settings['model']!r}, dtype=torch.{settings['dtype']})"
    models = {
        "LocalEngine": "tv.demo_model()" if demo else f"transformer_lens.TransformerBridge.{boot}  # or its folder",
        "RemoteEngine": f"...  # the remote bridge of {settings['model']}, booted as it was for this run",
    }
    every = list(range(settings["n_layers"]))
    keywords = {
        **{name: settings[name] for name in ("shots", "n_dev", "n_test", "seed", "substitutes")},
        "across": settings["method"] == "extract_across",
        "max_new_tokens": settings["max_new_tokens"],
        **({} if settings["layers"] == every else {"layers": settings["layers"]}),
    }
    template = settings["template"]
    return "\n".join(
        [
            "from dataclasses import replace",
            "",
            "import torch",
            "import transformer_lens",
            "",
            "import tv_lens as tv",
            "",
            *(
                ["own = {}  # name: Task; the tasks and rules that are not tv_lens's own"]
                if "own[" in str(tasks)
                else []
            ),
            f"model = {models[settings['engine']]}" if settings["engine"] in models else "model = ...",
            f"engine = tv.{settings['engine']}(model, prepend_bos={settings['prepend_bos']!r})"
            if settings["engine"] in models
            else f"engine = ...  # an engine of one's own, {settings['engine']}",
            "experiment = tv.run_experiment(",
            "    engine,",
            "    [",
            *(f"        {task}," for task in tasks),
            "    ],",
            f"    template=tv.Template({template['example']!r}, {template['separator']!r}),",
            *(f"    {name}={value!r}," for name, value in keywords.items()),
            ")",
        ]
    )
