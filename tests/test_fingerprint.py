"""Two models that give other logits never have one fingerprint; the same model always has the same."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import LENGTH_DEPENDENT, make_twins, original
from torch import Tensor

import tv_lens as tv
from tv_lens.engines.fingerprint import describe

TASK = tv.Task("upper", tuple("abcdefgh"), str.upper)
SMALL: dict[str, Any] = {"shots": 1, "n_dev": 2, "n_test": 2, "max_new_tokens": 2, "layers": [1]}


def fingerprint(bridge: Any) -> str:
    return tv.LocalEngine(bridge).fingerprint()


def zero_three_of_four_heads(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[:, 8:] = 0


def zero_all_neurons_but_one(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, 1:] = 0


def change_one_number(model: Any) -> None:
    model.lm_head.weight[17, 3] += 1e-3


def change_the_last_number(model: Any) -> None:
    model.model.norm.weight[-1] += 1e-3


def change_the_rotary_frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 1.5


CHANGES: list[Callable[[Any], None]] = [
    zero_three_of_four_heads,
    zero_all_neurons_but_one,
    change_one_number,
    change_the_last_number,
    change_the_rotary_frequencies,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_ablated_model_is_another_model(change: Callable[[Any], None]) -> None:
    bridge = make_twins("llama").bridge
    before, logits = fingerprint(bridge), tv.patched_logits(bridge, ["a b"], ones("tiny-llama"), 0)
    with torch.no_grad():
        change(original(bridge))
    assert not torch.equal(tv.patched_logits(bridge, ["a b"], ones("tiny-llama"), 0), logits)
    assert fingerprint(bridge) != before


def ones(model: str) -> tv.TaskVectors:
    return tv.TaskVectors(torch.ones(1, 4, 32), model, "t")


def test_another_rope_base_is_another_model() -> None:
    """The weights are the same, only the configuration differs."""
    made = [
        make_twins("llama", rope_parameters={"rope_type": "default", "rope_theta": base}).bridge
        for base in (10000.0, 500000.0)
    ]
    assert fingerprint(made[0]) != fingerprint(made[1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "longrope"])
def test_running_a_model_does_not_change_it(name: str) -> None:
    """A model with longrope changes a buffer as it runs."""
    assert name in LENGTH_DEPENDENT or name
    bridge, same = make_twins(name).bridge, make_twins(name).bridge
    before = fingerprint(bridge)
    tv.generate(bridge, ["a b " * 20, "a"], max_new_tokens=2)
    assert fingerprint(bridge) == before == fingerprint(same)


# Hooks


def scale(residual: Tensor, hook: Any, factor: float = 2.0) -> Tensor:
    return residual * factor


FACTOR = 3.0


def scale_by_a_global(residual: Tensor, hook: Any) -> Tensor:
    return residual * FACTOR


def factory(vector: Tensor) -> Callable[..., Tensor]:
    def add(residual: Tensor, hook: Any) -> Tensor:
        return residual + vector

    return add


def test_hooks_count_with_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook counts with its name, its code, its closure, its arguments and the globals that it reads."""
    bridge = make_twins("llama").bridge
    seen = {fingerprint(bridge)}

    def with_hook(function: Any, name: str = "blocks.1.hook_resid_post") -> str:
        with bridge.hooks(fwd_hooks=[(name, function)]):
            return fingerprint(bridge)

    hooks: list[tuple[Any, str]] = [
        (scale, "blocks.1.hook_resid_post"),
        (scale, "blocks.2.hook_resid_post"),
        (functools.partial(scale, factor=4.0), "blocks.1.hook_resid_post"),
        (functools.partial(scale, factor=5.0), "blocks.1.hook_resid_post"),
        (factory(torch.ones(32)), "blocks.1.hook_resid_post"),
        (factory(torch.arange(32.0)), "blocks.1.hook_resid_post"),
        (scale_by_a_global, "blocks.1.hook_resid_post"),
        (lambda residual, hook: residual * 2.5, "blocks.1.hook_resid_post"),
    ]
    for function, name in hooks:
        actual = with_hook(function, name)
        assert actual == with_hook(function, name)
        assert actual not in seen
        seen.add(actual)
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 4.0)
    assert with_hook(scale_by_a_global) not in seen
    assert with_hook(factory(torch.ones(32))) in seen
    assert fingerprint(bridge) in seen  # gone again


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_torch_hooks_count_too(kind: str) -> None:
    bridge = make_twins("llama").bridge
    bridge(bridge.to_tokens("a"))
    before = fingerprint(bridge)
    handle = getattr(original(bridge).model.layers[1], kind)(lambda module, *args: None)
    assert fingerprint(bridge) != before
    handle.remove()
    assert fingerprint(bridge) == before


def test_a_hook_without_a_stable_description_is_refused_with_a_folder(tmp_path: Path) -> None:
    bridge = make_twins("gpt2").bridge
    counter = iter(range(10**6))

    def count(residual: Tensor, hook: Any) -> Tensor:
        return residual * (1 + 1e-9 * next(counter))

    with bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", count)]):
        actual = tv.run_experiment(bridge, [TASK], **SMALL)
        assert actual.settings["weights"] is None
        with pytest.raises(tv.TvLensError, match="a hook on the model uses <range_iterator .* run without a folder"):
            tv.run_experiment(bridge, [TASK], folder=tmp_path / "run", **SMALL)
    assert not (tmp_path / "run").exists()


def test_a_resumed_folder_never_reports_another_models_table(tmp_path: Path) -> None:
    bridge = make_twins("llama").bridge
    tv.run_experiment(bridge, [TASK], folder=tmp_path, **SMALL)
    tv.run_experiment(bridge, [TASK], folder=tmp_path, **SMALL)
    with (
        bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_post", scale)]),
        pytest.raises(tv.TvLensError, match="other settings .weights was"),
    ):
        tv.run_experiment(bridge, [TASK], folder=tmp_path, **SMALL)
    with torch.no_grad():
        zero_three_of_four_heads(original(bridge))
    with pytest.raises(tv.TvLensError, match="other settings .weights was"):
        tv.run_experiment(bridge, [TASK], folder=tmp_path, **SMALL)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2),
        (1, True),
        ([1, 2], [2, 1]),
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (np.arange(3), np.arange(3) + 1),
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (slice(1, 2), slice(1, 3)),
        (functools.partial(max, 1), functools.partial(max, 2)),
        (max, min),
        ([].append, [1].append),
    ],
)
def test_descriptions_tell_values_apart(one: Any, other: Any) -> None:
    assert describe(one) == describe(one)
    assert describe(one) != describe(other)


@pytest.mark.slow
def test_a_description_is_the_same_in_every_process() -> None:
    code = "import test_fingerprint as t; print(t.describe([{'a', 'b', 'c'}, t.scale, t.factory(t.torch.ones(3))]))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_a_function_that_calls_itself_has_a_description() -> None:
    assert describe(countdown) == describe(countdown)


def countdown(n: int) -> int:
    return countdown(n - 1) if n else 0


def test_the_demo_model_is_hashed_whole_in_a_moment(demo: Any) -> None:
    """540 MB; a bound far above what it takes, so that nobody hashes it number by number."""
    begun = time.monotonic()
    first = fingerprint(demo)
    assert time.monotonic() - begun < 20
    assert fingerprint(demo) == first


def test_the_first_pass_changes_no_fingerprint(demo: Any) -> None:
    """transformers leaves hooks on some models, so a run in a folder must not take them for the user's."""
    engine = tv.LocalEngine(tv.demo_model())  # a fresh one
    before = engine.fingerprint()
    tv.generate(engine, ["a b"], max_new_tokens=1)
    assert engine.fingerprint() == before
