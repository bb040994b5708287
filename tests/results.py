"""Small results made by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tv_lens import Comparison, Conditions, Evaluation, Experiment, Score, Settings, Sweep, TaskResult
from tv_lens.evidence.results import Cost


def score_of(right: int, n: int = 10) -> Score:
    """The first `right` of `n` answers are correct."""
    return Score(("x",) * n, ("y",) * n, (True,) * right + (False,) * (n - right))


def make_settings(**changes: Any) -> Settings:
    """The settings of an experiment on one task."""
    tasks = changes.get("tasks", ("t",))
    given: dict[str, Any] = {
        "model": "tiny",
        "engine": "LocalEngine",
        "weights": None,
        "dtype": "float32",
        "n_layers": 4,
        "d_model": 32,
        "prepend_bos": True,
        "bos": "<s>",
        "tasks": tasks,
        "data": dict.fromkeys(tasks, "0123456789abcdef"),
        "rules": dict.fromkeys(tasks, "starts_with"),
        "shots": 2,
        "n_dev": 10,
        "n_test": 10,
        "seed": 0,
        "method": "extract",
        "methods": {"extract": {"substitutes": 2}},
        "substitutes": 2,
        "controls": ("random", "other task", "shuffled"),
        "template": {"kind": "Template", "example": "example:{input}->{output}", "separator": "\n"},
        "max_new_tokens": 8,
        "scoring": "full answer",
        "layers": (0, 1, 2, 3),
        "versions": {"torch": "9.9"},
    }
    return Settings(**{**given, **changes})


def make_comparison(
    tasks: Mapping[str, str],
    methods: Mapping[str, dict[str, Any]],
    *,
    seeds: Sequence[int] = (0, 1),
    n: int = 10,
    controls: Sequence[str] = ("random", "other task", "shuffled"),
    measured: bool = True,
    **changes: Any,
) -> Comparison:
    """A comparison with made-up answers, drawn with fixed chances. `tasks` maps a task's name to its category."""
    conditions = ("shuffled few-shot", "another template")
    settings = make_settings(
        tasks=tuple(tasks),
        methods=dict(methods),
        method=", ".join(methods),
        n_test=n,
        n_train=8,
        strengths=(0.5, 1.0, 2.0),
        controls=tuple(controls),
        conditions=conditions,
        measured=measured,
        controls_choose=True,
        **changes,
    )
    experiments = []
    for seed in seeds:
        draw = random.Random(seed)
        results = []
        for t, (task, category) in enumerate(tasks.items()):
            zero, few = _drawn(draw, 0.15, n, measured), _drawn(draw, 0.85, n, measured)
            plain = {name: _drawn(draw, 0.3, n, measured) for name in conditions}
            for m, method in enumerate(methods):
                patched = _drawn(draw, 0.25 + 0.5 * ((m + t) % 3) / 2, n, measured)
                others = {name: _drawn(draw, 0.1 + 0.1 * i, n, measured) for i, name in enumerate(controls)}
                results.append(
                    TaskResult(
                        task,
                        category,
                        Sweep((1, 2), (score_of(8), score_of(7 + t % 2)), settings.n_layers, strength=2.0),
                        Evaluation(
                            1,
                            zero,
                            few,
                            patched,
                            others,
                            settings.n_layers,
                            strength=2.0,
                            control_layers=dict.fromkeys(controls, 2),
                        ),
                        "another",
                        ("dev",) * 10,
                        tuple(f"prompt {i}" for i in range(n)),
                        tuple(f"query {i}" for i in range(n)),
                        method,
                        other_sweeps=(Sweep((1, 2), (score_of(6), score_of(8)), settings.n_layers),),
                        conditions=Conditions(
                            {name: {"no vector": plain[name], "patched": _drawn(draw, 0.5, n)} for name in conditions}
                        ),
                        cost=Cost(100.0 * (m + 1), 1.5 * (m + 1)),
                    )
                )
        experiments.append(Experiment(replace(settings, seed=seed), tuple(results)))
    return Comparison(tuple(experiments))


def _drawn(draw: random.Random, chance: float, n: int, measured: bool = False) -> Score:
    """Answers that are correct with this chance."""
    correct = tuple(draw.random() < chance for _ in range(n))
    numbers = tuple(-draw.expovariate(1) for _ in range(n)) if measured else None
    return Score(("x",) * n, ("y",) * n, correct, numbers, numbers and tuple(-number for number in numbers))
