"""The laws of head outputs, head effects and function vectors, on every architecture with attention, against plain
Hugging Face.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from models import CONFIGS, Twins, ids_of, make_twins, original
from oracle import count_positions
from oracle_edits import PlainEdit, hooked_run, output_projection
from oracle_heads import attention_added, head_added, head_logprob, head_states, next_logprobs
from torch import Tensor

import tv_lens as tv
from tv_lens.edits import HEADS

WITHOUT_HEADS = ("mamba", "mamba2", "rwkv")
BROKEN = ("falcon alibi", "falcon 40b")  # TransformerLens does not run them as Hugging Face does
NAMES = [name for name in CONFIGS if name not in (*WITHOUT_HEADS, *BROKEN)]
POST_NORM = ("gemma2", "gemma3", "olmo2", "olmo3", "glm4")
WORDS = {"hot": "cold", "big": "small", "wet": "dry", "a": "the quick", "tall": "short", "fox": "brown"}
TASK = tv.Task.from_mapping("pairs", WORDS)
PROMPTS = TASK.sample(3, shots=3, seed=1, template=tv.Template())


@cache
def twins_of(name: str) -> Twins:
    return make_twins(name)


def engine_of(name: str, batch_size: int | None = None) -> tv.LocalEngine:
    return tv.LocalEngine(twins_of(name).bridge, batch_size=batch_size, progress=False)


def noisy_means(engine: tv.Engine, seed: int = 0) -> tv.TaskVectors:
    """Means that are far from every prompt's own heads."""
    read = tv.read_heads(engine, PROMPTS)
    noise = torch.randn(read.values.shape, generator=torch.Generator().manual_seed(seed))
    return tv.TaskVectors(
        read.values + noise, engine.name, "pairs", site=HEADS, layers=read.layers, n_layers=read.n_layers,
        n_heads=read.n_heads, prompts=read.prompts, options=read.options,
    )  # fmt: skip


def first_tokens(twins: Twins, prompts: list[tv.Prompt]) -> list[int]:
    """The first token of each answer, which the test tokenizer keeps apart from the prompt."""
    tokens = []
    for prompt in prompts:
        whole = twins.bridge.to_tokens(f"{prompt.text} {prompt.answer}")[0].tolist()
        assert whole[: ids_of(twins.bridge, prompt.text).shape[1]] == ids_of(twins.bridge, prompt.text)[0].tolist()
        tokens.append(whole[ids_of(twins.bridge, prompt.text).shape[1]])
    return tokens


def unchanged(prompts: Sequence[tv.Prompt], seed: int) -> list[tv.Prompt]:
    return list(prompts)


# Reads and what heads add to the residual stream


@pytest.mark.parametrize("name", NAMES)
def test_heads_are_read_where_plain_hooks_read_them(name: str) -> None:
    engine, twins = engine_of(name), twins_of(name)
    read = tv.read_heads(engine, PROMPTS)
    assert read.by_head.shape == (3, len(engine.layers_of(HEADS)), engine.info.n_heads, engine.info.d_head)
    for i, prompt in enumerate(PROMPTS):
        for slot, layer in enumerate(read.layers):
            wanted = head_states(twins, prompt.text, layer)
            torch.testing.assert_close(read.values[i, slot], wanted, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(read.by_head[i, slot, 1], wanted.reshape(engine.info.n_heads, -1)[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_heads_and_the_bias_sum_to_what_the_attention_adds(name: str) -> None:
    engine, twins = engine_of(name), twins_of(name)
    for layer in engine.layers_of(HEADS):
        for prompt in PROMPTS[:2]:
            z = head_states(twins, prompt.text, layer)
            actual = engine.head_outputs(z[None], layer)
            projection = output_projection(twins.blocks[layer])
            assert projection is not None
            wanted = attention_added(twins, prompt.text, layer)
            if name not in POST_NORM:  # those have no bias
                wanted = wanted - projection(torch.zeros_like(z)[None, None])[0, 0]
            torch.testing.assert_close(actual.sum(dim=0), wanted, atol=1e-5, rtol=1e-5)
            for head in (0, engine.info.n_heads - 1):
                own = head_added(twins, prompt.text, layer, head, engine.info.n_heads)
                torch.testing.assert_close(actual[head], own, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", [*POST_NORM, "gpt2", "deepseek_v3", "lfm2"])
def test_what_heads_add_is_averaged_over_rows(name: str) -> None:
    """Behind a norm each row has another scale, so this is not what the mean output adds."""
    engine, twins = engine_of(name), twins_of(name)
    layer = engine.layers_of(HEADS)[-1]
    z = torch.stack([head_states(twins, prompt.text, layer) for prompt in PROMPTS])
    actual = engine.head_outputs(z, layer)
    for head in range(engine.info.n_heads):
        each = [head_added(twins, prompt.text, layer, head, engine.info.n_heads) for prompt in PROMPTS]
        torch.testing.assert_close(actual[head], torch.stack(each).mean(dim=0), atol=1e-5, rtol=1e-4)


def test_a_residual_multiplier_scales_what_heads_add() -> None:
    twins = make_twins("granite", residual_multiplier=0.3)
    engine = tv.LocalEngine(twins.bridge, progress=False)
    block, seen = twins.blocks[1], dict[str, Tensor]()
    block.register_forward_pre_hook(lambda module, args: seen.update(before=args[0][0, -1]))
    block.post_attention_layernorm.register_forward_pre_hook(lambda module, args: seen.update(after=args[0][0, -1]))
    z = head_states(twins, PROMPTS[0].text, 1)
    torch.testing.assert_close(
        engine.head_outputs(z[None], 1).sum(dim=0), seen["after"] - seen["before"], atol=1e-5, rtol=1e-4
    )


def test_a_norm_that_is_not_a_scale_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = make_twins("gemma2")
    engine = tv.LocalEngine(twins.bridge, progress=False)
    norm = twins.bridge.blocks[0].ln1_post.original_component
    monkeypatch.setattr(type(norm), "forward", lambda self, hidden: torch.tanh(hidden) + 1)
    with pytest.raises(tv.UnsupportedError, match="follows the attention and does more than scale"):
        engine.head_outputs(torch.randn(1, engine.info.width(HEADS)), 0)


# Effects


@pytest.mark.parametrize("name", NAMES)
def test_effects_are_those_of_a_plain_hook_on_each_head(name: str) -> None:
    """All heads, prompts of unequal length, with shared prefixes where the model allows them."""
    engine, twins = engine_of(name), twins_of(name)
    means = noisy_means(engine)
    prompts = tv.shuffle_outputs(PROMPTS[:2], 5)
    assert len({ids_of(twins.bridge, prompt.text).shape[1] for prompt in prompts}) == 2
    effects = tv.head_effects(engine, PROMPTS[:2], means, seeds=[5])
    logs = tv.head_effects(engine, PROMPTS[:2], means, seeds=[5], measure="log-probability")
    assert effects.prompts == tuple(prompt.text for prompt in prompts)
    mean, n_heads = means.by_head.mean(dim=0), engine.info.n_heads
    for i, (prompt, target) in enumerate(zip(prompts, first_tokens(twins, prompts), strict=True)):
        base = float(next_logprobs(twins, prompt.text, [], n_heads)[target])
        assert float(effects.baseline[i]) == pytest.approx(base, abs=1e-4)
        for slot, layer in enumerate(means.layers):
            for head in range(n_heads):
                with_mean = head_logprob(twins, prompt.text, target, layer, head, mean[slot, head], n_heads)
                assert float(logs.values[i, slot, head]) == pytest.approx(with_mean - base, abs=1e-4)
                difference = torch.tensor([with_mean, base]).exp().diff().item() * -1
                assert float(effects.values[i, slot, head]) == pytest.approx(difference, abs=1e-4)
    assert logs.values.abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_head_patched_with_its_own_value_has_no_effect(name: str) -> None:
    engine = engine_of(name)
    own = tv.read_heads(engine, PROMPTS[:1])
    effects = tv.head_effects(engine, PROMPTS[:1], own, corrupt=unchanged, measure="log-probability")
    assert effects.values.abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_attribution_is_the_derivative_along_the_replacement(name: str) -> None:
    """A central difference of log P, one step to either side of the head's own output."""
    engine, twins = engine_of(name), twins_of(name)
    means, n_heads = noisy_means(engine), engine.info.n_heads
    [prompt] = tv.shuffle_outputs(PROMPTS[:1], 0)
    [target] = first_tokens(twins, [prompt])
    effects = tv.head_effects(engine, PROMPTS[:1], means, how="attribution", measure="log-probability")
    for slot, layer in enumerate(means.layers):
        for head in (0, n_heads - 1):
            z = head_states(twins, prompt.text, layer).reshape(n_heads, -1)[head]
            step = (means.by_head.mean(dim=0)[slot, head] - z) * 1e-3
            up, down = (
                head_logprob(twins, prompt.text, target, layer, head, z + sign * step, n_heads) for sign in (1, -1)
            )
            assert float(effects.values[0, slot, head]) == pytest.approx((up - down) / 2e-3, abs=3e-3, rel=3e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "qwen3_next", "mpt"])
def test_attribution_of_probability_is_that_of_its_logarithm_times_it(name: str) -> None:
    engine = engine_of(name)
    means = noisy_means(engine)
    one, other = (
        tv.head_effects(engine, PROMPTS, means, how="attribution", measure=measure)
        for measure in ("probability", "log-probability")
    )
    torch.testing.assert_close(one.values, other.values * other.baseline.exp()[:, None, None], atol=1e-6, rtol=1e-4)
    exact = tv.head_effects(engine, PROMPTS, means)
    torch.testing.assert_close(one.baseline, exact.baseline, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["exact", "attribution"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3", "bloom", "lfm2"])
def test_effects_do_not_depend_on_the_batch(name: str, how: str) -> None:
    engine = engine_of(name)
    means = noisy_means(engine)
    together = tv.head_effects(engine, PROMPTS, means, how=how, seeds=[0, 1])  # type: ignore[arg-type]
    for batch_size in (1, 5):
        small = engine_of(name, batch_size)
        actual = tv.head_effects(small, PROMPTS, means, how=how, seeds=[0, 1])  # type: ignore[arg-type]
        torch.testing.assert_close(actual.values, together.values, atol=1e-5, rtol=1e-4)
    mixed = tv.shuffle_outputs(PROMPTS, 0)
    for i, prompt in enumerate(mixed):
        alone = tv.head_effects(engine, [prompt], means, how=how, corrupt=unchanged)  # type: ignore[arg-type]
        torch.testing.assert_close(alone.values[0], together.values[i], atol=1e-5, rtol=1e-4)


def test_a_prompt_is_run_once_and_each_head_is_one_token() -> None:
    engine, twins = engine_of("llama"), twins_of("llama")
    means = noisy_means(engine)
    prompt = PROMPTS[0]
    length = ids_of(twins.bridge, prompt.text).shape[1]
    n_heads = 4 * 4
    run = count_positions(twins.bridge, lambda: tv.head_effects(engine, [prompt], means))
    assert run == length - 1 + n_heads + 1
    quick = count_positions(twins.bridge, lambda: tv.head_effects(engine, [prompt], means, how="attribution"))
    assert quick == length
    some = count_positions(twins.bridge, lambda: tv.head_effects(engine, [prompt], means, heads=[(0, 1), (2, 3)]))
    assert some == length - 1 + 3


def test_only_some_heads_are_scored() -> None:
    engine = engine_of("llama")
    means = noisy_means(engine)
    every = tv.head_effects(engine, PROMPTS, means)
    some = tv.head_effects(engine, PROMPTS, means, heads=[(2, 3), (0, 1)])
    assert some.heads == (tv.Head(0, 1), tv.Head(2, 3))
    assert set(some.top(2)) == {(0, 1), (2, 3)}
    for head in some.heads:
        torch.testing.assert_close(some.values[:, head.layer, head.head], every.values[:, head.layer, head.head])
    assert int(some.values.isnan().sum()) == 3 * 14
    with pytest.raises(tv.TvLensError, match=r"top\(3\): there are 2 heads"):
        some.top(3)


def test_memory_that_runs_out_gives_the_same_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = make_twins("llama").bridge
    engine = tv.LocalEngine(bridge, progress=False)
    means = noisy_means(engine)
    wanted = tv.head_effects(engine, PROMPTS, means)
    run, sizes = bridge.run_with_hooks, []

    def small_memory(ids: Tensor, **options: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 7:
            raise torch.cuda.OutOfMemoryError("as if the GPU were full")
        return run(ids, **options)

    monkeypatch.setattr(bridge, "run_with_hooks", small_memory)
    with pytest.warns(tv.TvLensWarning, match="no memory for"):
        actual = tv.head_effects(engine, PROMPTS, means)
    assert max(sizes) > 7 >= sizes[-1]
    torch.testing.assert_close(actual.values, wanted.values, atol=1e-5, rtol=1e-4)


def test_effects_leave_no_trace() -> None:
    twins = make_twins("llama")
    model = original(twins.bridge)
    model.train()
    means = noisy_means(engine := tv.LocalEngine(twins.bridge, progress=False))
    state = torch.get_rng_state()
    for how in ("exact", "attribution"):
        tv.head_effects(engine, PROMPTS, means, how=how)
    tv.function_vector(engine, means, [(0, 1)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(point.fwd_hooks for point in twins.bridge.hook_dict.values())


def test_seeds_are_rows_and_intervals_are_about_prompts() -> None:
    engine = engine_of("llama")
    means = noisy_means(engine)
    both = tv.head_effects(engine, PROMPTS, means, seeds=[3, 4])
    one, other = (tv.head_effects(engine, PROMPTS, means, seeds=[seed]) for seed in (3, 4))
    assert (len(both), both.values.shape[0]) == (3, 6)
    torch.testing.assert_close(both.values, torch.cat([one.values, other.values]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.by_prompt, (one.values + other.values) / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both.mean(), (one.mean() + other.mean()) / 2, atol=1e-5, rtol=1e-4)


# Function vectors


@pytest.mark.parametrize("name", NAMES)
def test_a_function_vector_is_the_sum_of_what_its_heads_add(name: str) -> None:
    engine, twins = engine_of(name), twins_of(name)
    read, n_heads = tv.read_heads(engine, PROMPTS), engine.info.n_heads
    first, last = read.layers[0], read.layers[-1]
    heads = [(last, 0), (first, n_heads - 1), (last, 1)]
    vector = tv.function_vector(engine, read, heads)
    assert (vector.op, vector.site, vector.values.shape) == ("add", tv.RESID_POST, (1, engine.n_layers, 32))
    each = [head_added(twins, prompt.text, *head, n_heads) for prompt in PROMPTS for head in heads]
    wanted = torch.stack(each).sum(dim=0) / len(PROMPTS)
    for layer in range(engine.n_layers):
        torch.testing.assert_close(vector.values[0, layer], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma", "gemma2"])
def test_the_function_vector_of_all_heads_is_the_attention_without_its_bias(name: str) -> None:
    engine, twins = engine_of(name), twins_of(name)
    read = tv.read_heads(engine, PROMPTS)
    everything = [(layer, head) for layer in read.layers for head in range(read.n_heads)]
    wanted = torch.zeros(32)
    for layer in read.layers:
        wanted += torch.stack([attention_added(twins, prompt.text, layer) for prompt in PROMPTS]).mean(dim=0)
        projection = output_projection(twins.blocks[layer])
        assert projection is not None
        if name not in POST_NORM:
            wanted -= projection(torch.zeros(1, 1, read.width))[0, 0]
    vector = tv.function_vector(engine, read, everything)
    torch.testing.assert_close(vector.values[0, 0], wanted.detach(), atol=1e-4, rtol=1e-4)
    if name == "gpt2":
        assert projection is not None
        assert projection(torch.zeros(1, 1, 32)).abs().max() > 0.1  # a bias that would show


@pytest.mark.parametrize("how", [None, tv.add(0.5)])
@pytest.mark.parametrize("name", NAMES)
def test_the_distributed_form_writes_each_head_at_its_own_layer(name: str, how: tv.Write | None) -> None:
    engine, twins = engine_of(name), twins_of(name)
    means, n_heads = noisy_means(engine), engine.info.n_heads
    first, last = means.layers[0], means.layers[-1]
    heads = list(dict.fromkeys([(last, 0), (first, n_heads - 1), (last, 1)]))
    vector = tv.function_vector(engine, means, heads, distributed=True)
    assert vector.layers == tuple(sorted({first, last}))
    queries = [prompt.zero_shot() for prompt in PROMPTS]
    actual = tv.patched_logits(engine, queries, vector, tv.layers(*vector.layers), how=how)
    mean = means.by_head.mean(dim=0)
    for i, query in enumerate(queries):
        ids = ids_of(twins.bridge, query.text)
        factor, op = (1, "set") if how is None else (0.5, "add")
        edits = [
            PlainEdit("heads", layer, ids.shape[1] - 1, factor * mean[means.layers.index(layer), head], op, head)
            for layer, head in heads
        ]
        wanted = hooked_run(twins, ids, edits, n_heads)[1][-1]
        torch.testing.assert_close(actual[i], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_all_heads_of_a_layer_are_the_attention_output(name: str) -> None:
    engine, twins = engine_of(name), twins_of(name)
    means = noisy_means(engine)
    layer = means.layers[-1]
    vector = tv.function_vector(engine, means, [(layer, head) for head in range(means.n_heads)], distributed=True)
    projection = output_projection(twins.blocks[layer])
    assert projection is not None
    with torch.no_grad():
        output = projection(means.values[:, -1].mean(dim=0)[None, None])[0, 0]
    actual = tv.patched_logits(engine, [prompt.zero_shot() for prompt in PROMPTS], vector, layer)
    for i, prompt in enumerate(PROMPTS):
        ids = ids_of(twins.bridge, prompt.zero_shot().text)
        wanted = hooked_run(twins, ids, [PlainEdit("attn_out", layer, ids.shape[1] - 1, output)])[1][-1]
        torch.testing.assert_close(actual[i], wanted, atol=1e-4, rtol=1e-4)


# What is refused


@pytest.mark.parametrize("name", ["mamba", "rwkv"])
def test_a_model_without_heads_is_refused(name: str) -> None:
    with pytest.raises(tv.UnsupportedError, match="gives no access to heads"):
        tv.read_heads(engine_of(name), PROMPTS)


def test_what_does_not_fit_is_refused(as_users_run_it: None) -> None:
    engine = engine_of("llama")
    means = noisy_means(engine)
    residual = tv.extract(engine, PROMPTS, TASK.substitutes(PROMPTS, 1, seed=0))
    gemma = tv.read_heads(engine_of("gemma"), PROMPTS)
    for call, message in (
        (lambda: tv.head_effects(engine, PROMPTS, residual), "are not outputs of all heads; read_heads"),
        (lambda: tv.head_effects(engine, PROMPTS, gemma), "these vectors were read from tiny-gemma"),
        (lambda: tv.head_effects(engine, PROMPTS, means, heads=[(4, 0)]), "head 0 of layer 4 is not one of"),
        (lambda: tv.head_effects(engine, PROMPTS, means, heads=[(1, 4)]), "it has 4 heads, 0 to 3"),
        (lambda: tv.head_effects(engine, PROMPTS, means, heads=[(1, 2), (1, 2)]), "listed twice: L1.H2, L1.H2"),
        (lambda: tv.head_effects(engine, PROMPTS, means, heads=[]), "heads are empty"),
        (lambda: tv.head_effects(engine, PROMPTS, means, seeds=[]), "give at least one"),
        (lambda: tv.head_effects(engine, PROMPTS, means, seeds=[1, 1]), "each of them once"),
        (lambda: tv.head_effects(engine, PROMPTS, means, measure="logit"), "measure 'logit'"),  # type: ignore[arg-type]
        (lambda: tv.head_effects(engine, PROMPTS, means, how="guess"), "how 'guess'"),  # type: ignore[arg-type]
        (lambda: tv.head_effects(engine, [p.asking("x") for p in PROMPTS], means), "prompt 0 has no answer"),
        (lambda: tv.head_effects(engine, [p.zero_shot() for p in PROMPTS], means), "prompt 0 has 0 demonstrations"),
        (lambda: tv.function_vector(engine, means, []), "needs a head or more"),
        (lambda: tv.function_vector(engine, residual, [(0, 0)]), "are not outputs of all heads"),
    ):  # fmt: skip
        with pytest.raises(tv.TvLensError, match=message):
            call()
