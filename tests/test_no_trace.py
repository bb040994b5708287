"""Every public call leaves the caller's model, tokenizer and random state as they were, also when it raises."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import Twins, make_tokenizer, make_twins, original

import tv_lens as tv

TASK = tv.Task("upper", ("a", "bb", "cold", "dog", "quick brown", "fox", "wet", "x"), str.upper)
PROMPTS = TASK.sample(4, shots=2, seed=0)
SUBSTITUTES = TASK.substitutes(PROMPTS, 2, seed=0)

CALLS: dict[str, Callable[[Any, tv.TaskVectors], Any]] = {
    "read_heads": lambda model, vectors: tv.read_heads(model, PROMPTS),
    "head_effects": lambda model, vectors: tv.head_effects(model, PROMPTS, tv.read_heads(model, PROMPTS)),
    "attribution": lambda model, vectors: tv.head_effects(
        model, PROMPTS, tv.read_heads(model, PROMPTS), how="attribution"
    ),
    "function_vector": lambda model, vectors: tv.function_vector(model, tv.read_heads(model, PROMPTS), [(0, 1)]),
    "extract": lambda model, vectors: tv.extract(model, PROMPTS, SUBSTITUTES),
    "extract_across": lambda model, vectors: tv.extract_across(model, PROMPTS),
    "generate": lambda model, vectors: tv.generate(model, PROMPTS, max_new_tokens=3),
    "sampled": lambda model, vectors: tv.generate(model, PROMPTS, max_new_tokens=3, sampler=tv.sample(seed=1)),
    "patch_generate": lambda model, vectors: tv.patch_generate(model, PROMPTS, vectors, [0, 1, 2, 3]),
    "patched_logits": lambda model, vectors: tv.patched_logits(model, PROMPTS, vectors, 1),
    "evaluate": lambda model, vectors: tv.evaluate(model, TASK, PROMPTS, vectors, 1, max_new_tokens=2),
    "conflict": lambda model, vectors: tv.conflict(model, TASK, TASK, PROMPTS, vectors, 1, max_new_tokens=2),
    "run_experiment": lambda model, vectors: tv.run_experiment(
        model, [TASK], shots=2, n_dev=3, n_test=3, substitutes=1
    ),
    "top_tokens": lambda model, vectors: tv.top_tokens(model, vectors, 1, k=3),
    "first_token": lambda model, vectors: tv.first_token(model)("x", "cold"),
    "sweep_layers": lambda model, vectors: tv.sweep_layers(model, TASK, PROMPTS, vectors, max_new_tokens=2),
}


def state_of(twins: Twins) -> dict[str, Any]:
    """Everything a caller could notice."""
    bridge, tokenizer = twins.bridge, twins.bridge.tokenizer
    modules = {
        f"{part}.{name}": module
        for part, model in (("bridge", bridge), ("model", original(bridge)))
        for name, module in model.named_modules()
    }
    return {
        "training": {name: module.training for name, module in modules.items()},
        "torch hooks": {
            name: (list(module._forward_hooks), list(module._forward_pre_hooks), list(module._backward_hooks))
            for name, module in modules.items()
        },
        "lens hooks": {name: [id(h) for h in point.fwd_hooks] for name, point in bridge.hook_dict.items()},
        "parameters": {
            name: (p.requires_grad, p.dtype, p.grad is None, p.sum().item())
            for name, p in original(bridge).named_parameters()
        },
        "config": original(bridge).config.to_dict(),
        "generation config": original(bridge).generation_config.to_dict(),
        "cfg": dict(vars(bridge.cfg)),
        "tokenizer": {
            name: repr(value)
            for name, value in vars(tokenizer).items()
            if name not in ("_tokenizer", "deprecation_warnings")
        },
        "padding_side": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token),
        "tokenizer inside": tokenizer.backend_tokenizer.to_str(),
        "random": (random.getstate(), repr(np.random.get_state())),
        "torch random": torch.get_rng_state().tolist(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, value in before.items():
        assert after[name] == value, f"{name} changed"


# beartype picks the list items that it checks with Python's `random`.
pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.fixture(scope="module")
def touched() -> Twins:
    """A model that is half in train mode and partly frozen, with the user's hooks and with dropout."""
    twins = make_twins("gpt2", make_tokenizer(pad="</s>"))
    bridge = twins.bridge
    bridge(bridge.to_tokens("a"))  # TransformerLens itself hooks the layer norms at a model's first run
    original(bridge).train()
    original(bridge).transformer.h[1].eval()
    next(original(bridge).parameters()).requires_grad_(False)
    bridge.add_hook("blocks.1.hook_resid_post", lambda residual, hook: residual)
    return twins


@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_changed(touched: Twins, call: str) -> None:
    vectors = tv.TaskVectors(torch.ones(4, 4, 32), "tiny-gpt2", "t")
    before = state_of(touched)
    CALLS[call](touched.bridge, vectors)
    assert_same(before, state_of(touched))


@pytest.mark.parametrize("call", sorted(CALLS.keys() - {"top_tokens", "first_token"}))  # these run no block
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_changed_when_the_model_raises(touched: Twins, call: str, error: type[BaseException]) -> None:
    def fail(module: Any, args: Any) -> None:
        raise error("in the middle")

    handle = original(touched.bridge).transformer.h[2].register_forward_pre_hook(fail)
    try:
        before = state_of(touched)
        with pytest.raises(error, match="in the middle"):
            CALLS[call](touched.bridge, tv.TaskVectors(torch.ones(4, 4, 32), "tiny-gpt2", "t"))
        assert_same(before, state_of(touched))
    finally:
        handle.remove()


def test_nothing_is_left_changed_when_the_sampler_raises(touched: Twins) -> None:
    def fail(logits: torch.Tensor, keys: Any) -> torch.Tensor:
        raise RuntimeError("in the sampler")

    before = state_of(touched)
    with pytest.raises(RuntimeError, match="in the sampler"):
        tv.generate(touched.bridge, PROMPTS, sampler=fail)
    assert_same(before, state_of(touched))


def test_train_mode_does_not_make_answers_random() -> None:
    twins = make_twins("gpt2")
    assert original(twins.bridge).config.resid_pdrop > 0
    quiet = tv.extract(twins.bridge, PROMPTS, SUBSTITUTES).values
    original(twins.bridge).train()
    torch.testing.assert_close(tv.extract(twins.bridge, PROMPTS, SUBSTITUTES).values, quiet)
    assert original(twins.bridge).training


def test_results_hold_no_graph() -> None:
    twins = make_twins("gpt2")
    vectors = tv.extract(twins.bridge, PROMPTS, SUBSTITUTES)
    assert not vectors.values.requires_grad
    assert not tv.patched_logits(twins.bridge, PROMPTS, vectors, 0).requires_grad
