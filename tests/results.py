"""Small results made by hand."""

from __future__ import annotations

from typing import Any

from tv_lens import Score, Settings


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
