"""What examples in docstrings use: a tiny model, a task of 24 inputs, four prompts of three shots, their vectors."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest


@functools.cache
def names_of_examples() -> dict[str, Any]:
    import torch
    from models import make_twins  # tests/models.py

    import tv_lens as tv

    model = tv.LocalEngine(make_twins("llama").bridge, progress=False)
    task = tv.Task("upper", tuple(f"{a}{b}" for a in "abcdef" for b in "uvwx"), str.upper)
    prompts = task.sample(4, shots=3, seed=0)
    vectors = tv.extract(model, prompts, task.substitutes(prompts, 1, seed=0))
    return {
        "tv": tv,
        "torch": torch,
        "dataclasses": dataclasses,
        "model": model,
        "task": task,
        "prompts": prompts,
        "vectors": vectors,
        "vector": vectors.mean(),
    }


@functools.cache
def an_experiment() -> Any:
    import tv_lens as tv

    names = names_of_examples()
    return tv.run_experiment(names["model"], [names["task"]], shots=2, n_dev=2, n_test=2, max_new_tokens=1, layers=[2])


@pytest.fixture(autouse=True)
def _names_of_examples(request: pytest.FixtureRequest) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        names = names_of_examples()
        code = "".join(example.source for example in request.node.dtest.examples)
        if "experiment." in code and "experiment =" not in code:
            names = names | {"experiment": an_experiment()}
        request.getfixturevalue("doctest_namespace").update(names)
