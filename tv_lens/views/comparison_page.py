"""The HTML page of a comparison; `tv_lens.views.report` registers it."""

from __future__ import annotations

from pathlib import Path

from tv_lens.evidence.comparisons import Comparison
from tv_lens.evidence.settings import Settings
from tv_lens.vectors import layers_text
from tv_lens.views.comparison_tables import by_method_table, conditions_table, estimates_table
from tv_lens.views.layers import LayerAccuracies
from tv_lens.views.pages import describe_controls, describe_format, filled, write_page
from tv_lens.views.plots import plot
from tv_lens.views.repeating import own_method, repeat_code


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write the page, whole or not at all: what was compared, the table of methods, the figure, the table of tasks and
    methods, the conditions, how to read them, and how to repeat the run. All text is shown as text.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    layers = LayerAccuracies(comparison.experiments)
    table = layers.table()
    write_page(
        path,
        "comparison.html",
        {"overview": plot(comparison), **({"layers": layers.plot()} if table.rows else {})},
        parts={"layers": filled("layers_table.html", layers=table)},
        layers=table,
        settings=comparison.settings,
        seeds=comparison.seeds,
        first=comparison.methods[0],
        facts=_facts(comparison),
        by_method=by_method_table(comparison),
        estimates=estimates_table(comparison),
        conditions=conditions_table(comparison),
        template=describe_format(comparison.settings.template),
        repeat=repeat_code(comparison),
    )


def _facts(comparison: Comparison) -> dict[str, str]:
    """What was compared, by name."""
    settings = comparison.settings
    conditions = {"other conditions": ", ".join(settings.conditions)} if settings.conditions else {}
    return {
        "model": f"{settings.model}, {settings.n_layers} layers, {settings.dtype}",
        "tasks": f"{len(settings.tasks)}",
        "methods": "; ".join(_method_text(name, settings) for name in settings.methods),
        "prompts": f"{settings.shots} shots; for each task and seed {_train_text(settings)}, {settings.n_dev} to "
        f"choose a layer and a strength, {settings.n_test} to report (fewer if a task has fewer inputs)",
        "seeds": ", ".join(map(str, comparison.seeds)),
        "template": describe_format(settings.template),
        "layers tried": layers_text(settings.layers),
        "strengths tried": ", ".join(f"{strength:g}" for strength in settings.strengths)
        + " (of vectors that are not written over an activation)",
        "scoring": f"{settings.scoring} by {', '.join(dict.fromkeys(settings.rules.values()))}, at most "
        f"{settings.max_new_tokens} tokens",
        "controls": describe_controls(list(settings.controls)),
        **conditions,
    }


def _method_text(name: str, settings: Settings) -> str:
    """A method's name, and the options that differ from the defaults."""
    options = settings.methods[name]
    method = own_method(name, options)
    if method is not None:
        defaults = type(method)().options
        options = {key: value for key, value in options.items() if key not in defaults or value != defaults[key]}
    shown = ", ".join(f"{key}={value!r}" for key, value in options.items())
    return f"{name} ({shown})" if shown else name


def _train_text(settings: Settings) -> str:
    if settings.n_train is None:
        return "vectors from the dev prompts"
    return f"{settings.n_train} prompts to make vectors from"
