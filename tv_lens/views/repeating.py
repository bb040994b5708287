"""Results as the code that gives them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tv_lens.demo import NAME as DEMO
from tv_lens.edits import Site, Write, overwrite
from tv_lens.errors import TvLensError
from tv_lens.evidence.comparing import QUESTION, default_conditions
from tv_lens.evidence.comparisons import Comparison
from tv_lens.evidence.controls import CONTROLS
from tv_lens.evidence.results import Experiment
from tv_lens.evidence.settings import Settings
from tv_lens.files import to_json
from tv_lens.methods import AcrossPrompts, Extraction
from tv_lens.methods.base import METHODS, Method, option_value, settings_of
from tv_lens.prompts import PAPER, Template
from tv_lens.provenance import Option
from tv_lens.tasks import Task, exact_match, fingerprint, library, starts_with
from tv_lens.views.pages import environment

_RULES = {rule.__name__ for rule in (exact_match, starts_with)}


def repeat_code(results: Experiment | Comparison) -> str:
    """The call that gives these results again. What the settings cannot tell is left to fill in, and marked: custom
    tasks, rules, formats, methods, controls, conditions and engines, and how a model that is not on the hub was booted.
    """
    settings, known = results.settings, library()
    tasks = [_task_code(settings, name, known.get(name)) for name in settings.tasks]
    methods = {name: own_method(name, options) for name, options in settings.methods.items()}
    return (
        environment(autoescape=False)
        .get_template("repeat.py.jinja")
        .render(
            settings=settings,
            seeds=results.seeds if isinstance(results, Comparison) else None,
            needs_own=None in tasks or None in methods.values(),
            tasks=[
                f"own[{name!r}]" if code is None else code for name, code in zip(settings.tasks, tasks, strict=True)
            ],
            is_demo=settings.model == DEMO,
            across=None if isinstance(results, Comparison) else _across(settings, methods),
            methods=_methods_code(settings, methods),
            are_named=any(method is not None and method.name != name for name, method in methods.items()),
            has_standard_controls=settings.controls == tuple(control.name for control in CONTROLS),
            has_standard_conditions=settings.conditions == _standard_conditions(settings),
            is_template=settings.template.get("kind") == Template.__name__,
            all_layers=settings.layers == tuple(range(len(settings.layers)))
            and len(settings.layers) == settings.n_layers,
        )
    )


def own_method(name: str, options: Mapping[str, Option]) -> Method | None:
    """The method that an experiment's settings describe, if it is one of the package's; None if it is not, or if it
    cannot be made from what the settings hold.
    """
    kind: Any = METHODS.get(str(options.get("method", name)))
    if kind is None or not kind.__module__.startswith("tv_lens."):
        return None
    given = {key: option_value(key, option) for key, option in options.items() if key != "method"}
    try:
        method: Method = kind(**given)
    except (TvLensError, TypeError):  # options of another version
        return None
    made = settings_of(name, method)
    kept = {key: made.get(key) for key in options}
    return method if to_json(kept) == to_json(dict(options)) else None


def method_code(method: Method) -> str:
    """The call that makes one of the package's methods."""
    options = ", ".join(f"{name}={_value_code(getattr(method, name))}" for name in method.options)
    return f"tv.{type(method).__name__}({options})"


def _methods_code(settings: Settings, methods: Mapping[str, Method | None]) -> dict[str, str]:
    """The code of each method, with a comment after that of a custom one."""
    return {
        name: f"own[{name!r}],  # a custom method, {settings.methods[name]}"
        if method is None
        else f"{method_code(method)},"
        for name, method in methods.items()
    }


def _across(settings: Settings, methods: Mapping[str, Method | None]) -> bool | None:
    """The value of `across` that gives the methods; None if they were given."""
    for across, method in ((False, Extraction(substitutes=settings.substitutes)), (True, AcrossPrompts())):
        if dict(methods) == {method.name: method}:
            return across
    return None


def _value_code(value: Any) -> str:
    """The code of a method's option."""
    if isinstance(value, Site):
        return f"tv.{value.name.upper()}"
    if isinstance(value, Write):
        return _write_code(value)
    return repr(value)


def _write_code(how: Write) -> str:
    if how == overwrite:
        return "tv.overwrite"
    keep_norm = ", keep_norm=True" if how.keep_norm else ""
    return f"tv.{how.op}({how.strength!r}, every_step={how.every_step}{keep_norm})"


def _standard_conditions(settings: Settings) -> tuple[str, ...]:
    """The conditions of `compare`, if none are given."""
    template = QUESTION if settings.template == QUESTION.to_dict() else PAPER
    return tuple(condition.identity for condition in default_conditions(template, settings.shots))


def _task_code(settings: Settings, name: str, task: Task | None) -> str | None:
    """The code for a task of the library, None if it is not one."""
    rule = "starts_with" if settings.max_new_tokens == 1 else settings.rules[name]
    if task is None or fingerprint(task) != settings.data[name] or rule not in _RULES:
        return None
    if rule == task.rule.name:
        return f"tv.library()[{name!r}]"
    return f"replace(tv.library()[{name!r}], accepts=tv.{rule})"
