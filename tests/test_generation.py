from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Twins, ids_of, make_tokenizer, make_twins, original
from oracle import plain_generate, plain_run, refuse, until_end

import tv_lens as tv
from tv_lens import Prompt, TaskVectors, Template
from tv_lens.engines import Capability

NEVER = Template("{input} -> {output}", separator="\n\n\n\n")  # rows run to max_new_tokens
QUERIES = ("big", "a", "the quick brown fox", "tall and wet")
PROMPTS = [Prompt((), query, template=NEVER) for query in QUERIES]


def vectors_for(twins: Twins, n: int, seed: int = 3) -> TaskVectors:
    cfg = twins.bridge.cfg
    values = torch.randn(n, cfg.n_layers, cfg.d_model, generator=torch.Generator().manual_seed(seed)) * 3
    return TaskVectors(values, model=cfg.model_name, task="t")


def test_patched_logits_are_a_plain_hook_that_overwrites(twins: Twins) -> None:
    vectors, layers = vectors_for(twins, 4), [3, 0, 2, 1]
    actual = tv.patched_logits(twins.bridge, PROMPTS, vectors, layers)
    for i, prompt in enumerate(PROMPTS):
        ids = ids_of(twins.bridge, prompt.text)
        write = (layers[i], ids.shape[1] - 1, vectors.values[i, layers[i]])
        torch.testing.assert_close(actual[i], plain_run(twins, ids, write)[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_longer_patched_answers_equal_running_the_whole_text_again(twins: Twins, layer: int) -> None:
    """The oracle has no cache: the whole text each step, the hook at the same absolute position."""
    vectors = vectors_for(twins, 4)
    actual = tv.patch_generate(twins.bridge, PROMPTS, vectors, layer, max_new_tokens=6)
    plain = tv.generate(twins.bridge, PROMPTS, max_new_tokens=6)
    for i, prompt in enumerate(PROMPTS):
        ids = ids_of(twins.bridge, prompt.text)
        write = (layer, ids.shape[1] - 1, vectors.values[i, layer])
        assert until_end(actual.tokens[i]) == until_end(torch.tensor(plain_generate(twins, ids, 6, write)))
        assert until_end(plain.tokens[i]) == until_end(torch.tensor(plain_generate(twins, ids, 6)))
    assert not torch.equal(actual.tokens, plain.tokens)


@pytest.mark.parametrize("make_sampler", [lambda: tv.greedy, lambda: tv.sample(temperature=2.0, seed=5)])
def test_a_batch_gives_what_each_row_gives_alone(twins: Twins, make_sampler) -> None:  # type: ignore[no-untyped-def]
    vectors, sampler = vectors_for(twins, 4), make_sampler()
    together = tv.patch_generate(twins.bridge, PROMPTS, vectors, 1, sampler=sampler)
    for i, prompt in enumerate(PROMPTS):
        own = replace(vectors, values=vectors.values[i : i + 1])
        [alone] = tv.patch_generate(twins.bridge, [prompt], own, 1, sampler=sampler)
        assert alone == together[i]
    order = [2, 0, 3, 1]
    shuffled = replace(vectors, values=vectors.values[order])
    engine = tv.LocalEngine(twins.bridge, batch_size=3, progress=False)
    again = tv.patch_generate(engine, [PROMPTS[i] for i in order], shuffled, 1, sampler=sampler)
    assert [again[order.index(i)] for i in range(4)] == list(together)


def test_patch_generate_drops_the_demonstrations() -> None:
    twins = make_twins("gpt2")
    shown = [Prompt((tv.Example("hot", "cold"),), query, template=NEVER) for query in QUERIES]
    vectors = vectors_for(twins, 4)
    with_them, without = (tv.patch_generate(twins.bridge, prompts, vectors, 2) for prompts in (shown, PROMPTS))
    assert torch.equal(with_them.tokens, without.tokens)


def test_one_vector_is_used_for_every_row() -> None:
    twins = make_twins("llama")
    mean = vectors_for(twins, 4).mean()
    repeated = replace(mean, values=mean.values.expand(4, -1, -1))
    one, four = (tv.patched_logits(twins.bridge, PROMPTS, each, 2) for each in (mean, repeated))
    assert torch.equal(one, four)


def test_rows_stop_at_their_own_end() -> None:
    """Each row's separator is a text that its greedy answer reaches at a different step."""
    twins = make_twins("llama")
    free = tv.generate(twins.bridge, PROMPTS, max_new_tokens=6)
    decode = twins.bridge.tokenizer.decode
    prompts, expected, lengths = [], [], []
    for i, stop in enumerate((1, 2, 4, 6)):
        ids = free.tokens[i, :stop].tolist()
        separator = decode(ids[-1:])
        first = next(n for n in range(1, 7) if separator in decode(free.tokens[i, :n].tolist()))
        prompts.append(Prompt((), QUERIES[i], template=Template("{input} -> {output}", separator)))
        expected.append(decode(free.tokens[i, :first].tolist()).split(separator)[0].strip())
        lengths.append(first)
    actual = tv.generate(twins.bridge, prompts, max_new_tokens=6)
    assert list(actual) == expected
    for i, length in enumerate(lengths):
        assert torch.equal(actual.tokens[i, :length], free.tokens[i, :length])
        assert (actual.tokens[i, length:] == 2).all()  # the padding id
    assert len(set(lengths)) > 2


def test_the_end_of_text_ends_the_answer() -> None:
    twins = make_twins("llama")
    free = tv.generate(twins.bridge, PROMPTS[:1], max_new_tokens=4).tokens[0]
    original(twins.bridge).generation_config.eos_token_id = [int(free[1]), 1]
    stopped = tv.generate(twins.bridge, PROMPTS[:1], max_new_tokens=4)
    length = free.tolist().index(int(free[1])) + 1
    assert stopped.tokens[0].tolist() == free.tolist()[:length]


def test_one_new_token_is_the_first_token_protocol() -> None:
    twins = make_twins("gpt2")
    vectors = vectors_for(twins, 4)
    actual = tv.patch_generate(twins.bridge, PROMPTS, vectors, 2, max_new_tokens=1)
    assert torch.equal(actual.tokens[:, 0], tv.patched_logits(twins.bridge, PROMPTS, vectors, 2).argmax(-1))


def test_sampling_follows_the_seed_and_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1])).repeat(4000, 1)
    keys = [str(i) for i in range(4000)]
    draws = tv.sample(seed=1)(logits, keys)
    assert torch.equal(draws, tv.sample(seed=1)(logits, keys))
    assert not torch.equal(draws, tv.sample(seed=2)(logits, keys))
    shares = torch.bincount(draws, minlength=3) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.03, rtol=0)
    assert set(tv.sample(top_k=2)(logits, keys).tolist()) == {0, 1}
    assert set(tv.sample(top_p=0.5)(logits, keys).tolist()) == {0}
    cold = torch.bincount(tv.sample(temperature=0.5)(logits, keys), minlength=3) / 4000
    torch.testing.assert_close(cold, torch.tensor([0.36, 0.09, 0.01]) / 0.46, atol=0.03, rtol=0)


def test_identical_prompts_are_sampled_independently() -> None:
    twins = make_twins("llama")
    actual = tv.generate(twins.bridge, PROMPTS[:1] * 10, sampler=tv.sample(temperature=3.0), max_new_tokens=4)
    assert len(set(actual)) > 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_k": 5, "top_p": 0.5}, "both given"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_wrong_samplers_are_refused(settings, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        tv.sample(**settings)


def test_wrong_use_says_what_to_do(as_users_run_it: None) -> None:
    twins = make_twins("gpt2")
    vectors, bridge = vectors_for(twins, 4), twins.bridge
    original(bridge).register_forward_pre_hook(refuse)
    other = TaskVectors(torch.zeros(4, 4, 64), "wide-model", "t")
    for layer in (-1, 4, [0, 1, 2, 9]):
        with pytest.raises(ValueError, match=r"layer (-1|4|9) is not one of tiny-gpt2: .* 0 to 3"):
            tv.patch_generate(bridge, PROMPTS, vectors, layer)
    not_layers: list[Any] = [1.5, [0, 1], "last", None, True]
    for wrong in not_layers:
        with pytest.raises(ValueError, match="give one int, or one int for each"):
            tv.patch_generate(bridge, PROMPTS, vectors, wrong)
    with pytest.raises(ValueError, match=r"wide-model \(4 layers, d_model 64\) and tiny-gpt2 has 4 layers, d_model 32"):
        tv.patched_logits(bridge, PROMPTS, other, 0)
    with pytest.raises(ValueError, match="4 vectors for 3 prompts"):
        tv.patch_generate(bridge, PROMPTS[:3], vectors, 0)
    for call in (
        lambda: tv.generate(bridge, []),
        lambda: tv.patch_generate(bridge, [], vectors, 0),
        lambda: tv.patched_logits(bridge, [], vectors, 0),
    ):
        with pytest.raises(ValueError, match="at least one Prompt"):
            call()
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        tv.generate(bridge, PROMPTS, max_new_tokens=0)
    with pytest.raises(ValueError, match="prompt 1 has .* with 99 more to come, and the context of tiny-gpt2 is 128"):
        tv.generate(bridge, [PROMPTS[0], Prompt((), "b " * 20)], max_new_tokens=100)


def test_a_sweep_of_a_tensor_is_refused(as_users_run_it: None) -> None:
    """It has no layers. `patch_generate` takes a tensor, which test_objects.py tests."""
    twins = make_twins("gpt2")
    words = tv.Task("upper", ("a", "b"), str.upper)
    with pytest.raises(ValueError, match="vectors are a Tensor; pass the TaskVectors themselves"):
        tv.sweep_layers(twins.bridge, words, PROMPTS, vectors_for(twins, 4).at(1))  # type: ignore[arg-type]


def test_each_step_draws_again() -> None:
    flat = tv.sample(temperature=1e6, seed=0)
    actual = tv.generate(make_twins("llama").bridge, PROMPTS[:1], max_new_tokens=12, sampler=flat)
    assert len(set(actual.tokens[0].tolist())) > 6


def test_an_engine_that_cannot_continue_gives_one_token_and_refuses_more() -> None:
    twins = make_twins("gpt2")
    engine = tv.LocalEngine(twins.bridge)
    engine.capabilities -= {Capability.CONTINUE}
    assert tv.generate(engine, PROMPTS, max_new_tokens=1).tokens.shape == (4, 1)
    calls: tuple[Callable[[], object], ...] = (
        lambda: tv.generate(engine, PROMPTS),
        lambda: tv.patch_generate(engine, PROMPTS, vectors_for(twins, 4), 1, max_new_tokens=2),
    )
    for call in calls:
        with pytest.raises(ValueError, match="tiny-gpt2 cannot generate more than one token; this engine has PATCH, "):
            call()


def test_texts_without_bos_of_one_token_beside_long_ones() -> None:
    """Rows that are all pads before their last token must not change other rows, or be wrong themselves."""
    twins = make_twins("llama", make_tokenizer(bos=False))
    engine = tv.LocalEngine(twins.bridge, prepend_bos=False)
    prompts = [Prompt((), query, template=Template("{input}{output}")) for query in ("a", "the quick brown fox", "b")]
    actual = tv.generate(engine, prompts, max_new_tokens=3)
    for i, prompt in enumerate(prompts):
        ids = ids_of(twins.bridge, prompt.text, False)
        assert until_end(actual.tokens[i]) == until_end(torch.tensor(plain_generate(twins, ids, 3)))
