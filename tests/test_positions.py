"""What is run, counted in token positions: no shared prefix twice, nothing unneeded, whole prompts if a
cache cannot be forked. Counts are laws; times are for `benchmark.py`.
"""

from __future__ import annotations

import pytest
import torch
from models import ids_of, make_tokenizer, make_twins, original
from oracle import count_positions, plain_run
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv

# One-letter inputs: in this tokenizer all prompts with the same number of shots have equal length.
LETTERS = tv.Task.from_mapping("letters", {letter: letter for letter in "bcdfjkmpvy"})


@pytest.mark.parametrize("shots", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_extraction_runs_demonstrations_once(shots: int, k: int) -> None:
    """P prompts with a prefix of n tokens and k substitutes of t tokens: P * (n + k * t) positions."""
    bridge = make_twins("llama").bridge
    prompts = LETTERS.sample(4, shots=shots, seed=0, template=tv.Template())
    substitutes = LETTERS.substitutes(prompts, k, seed=0)
    whole = {
        ids_of(bridge, p.asking(query).text).shape[1] for p, s in zip(prompts, substitutes, strict=True) for query in s
    }
    assert len(whole) == 1
    tail = ids_of(bridge, "b ->", prepend_bos=False).shape[1]
    prefix = whole.pop() - tail
    run = count_positions(bridge, lambda: tv.extract(bridge, prompts, substitutes))
    assert run == (4 * (prefix + k * tail) if k > 1 else 4 * (prefix + tail))


@pytest.mark.parametrize("layers", [[2], [0, 3], [0, 1, 2, 3]])
def test_a_sweep_runs_queries_once_and_then_a_token_a_layer(layers: list[int]) -> None:
    bridge = make_twins("llama").bridge
    prompts = LETTERS.sample(5, shots=2, seed=0, template=tv.Template())
    vectors = tv.extract(bridge, prompts, LETTERS.substitutes(prompts, 1, seed=0))
    query = ids_of(bridge, "b ->").shape[1]
    run = count_positions(bridge, lambda: tv.sweep_layers(bridge, LETTERS, prompts, vectors, layers, max_new_tokens=1))
    assert run == 5 * (query - 1 + len(layers) if len(layers) > 1 else query)


def test_a_whole_task_extracts_and_sweeps_once() -> None:
    """run_experiment against the sum of its parts: P prompts of 1 shot, one new token throughout."""
    bridge = make_twins("llama").bridge
    made: list[tv.Experiment] = []
    run = count_positions(
        bridge,
        lambda: made.append(tv.run_experiment(bridge, [LETTERS], shots=1, n_dev=4, n_test=4, max_new_tokens=1)),
    )
    query = ids_of(bridge, "example:b->").shape[1]
    whole = ids_of(bridge, "example:b->b\nexample:c->").shape[1]
    tail = shared_tail(bridge, "example:b->b\nexample:c->", "example:b->b\nexample:d->")
    extraction = 4 * (whole - tail + 2 * tail)
    # The vector and the random control (one shot leaves nothing to shuffle) at four layers.
    sweep = 4 * (query - 1 + 2 * 4)
    # The queries up to their last token once, then that token alone, and with the vector and the control.
    tested = 4 * (query - 1 + 1 + 2)
    ties = 4 * (len(made[0].results[0].ties) - 1)  # the other layers that are as good on dev, each tested once
    assert run == extraction + sweep + 4 * whole + tested + ties


def shared_tail(bridge: TransformerBridge, one: str, other: str) -> int:
    a, b = ids_of(bridge, one)[0].tolist(), ids_of(bridge, other)[0].tolist()
    same = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return len(a) - same


@pytest.mark.parametrize("name", ["mistral", "mamba", "qwen3_next", "lfm2"])
def test_if_a_cache_cannot_be_forked_whole_prompts_are_run(name: str) -> None:
    """A sliding window shorter than the prompts, and recurrent state: still equal to plain hooks."""
    twins = make_twins(name)
    words = ("hot", "a quick", "x", "tall fox", "wet", "brown", "b")
    task = tv.Task.from_mapping("words", {word: word for word in words})
    prompts = task.sample(4, shots=3, seed=0)
    substitutes = task.substitutes(prompts, 2, seed=0)
    actual = tv.extract(twins.bridge, prompts, substitutes)
    for i, (prompt, queries) in enumerate(zip(prompts, substitutes, strict=True)):
        texts = [prompt.asking(query).text for query in queries]
        plain = torch.stack([plain_run(twins, ids_of(twins.bridge, text))[0] for text in texts]).mean(0)
        torch.testing.assert_close(actual.values[i], plain, atol=1e-4, rtol=0)
    texts = [
        prompt.asking(query).text for prompt, queries in zip(prompts, substitutes, strict=True) for query in queries
    ]
    run = count_positions(twins.bridge, lambda: tv.extract(twins.bridge, prompts, substitutes))
    assert run >= sum(ids_of(twins.bridge, text).shape[1] for text in texts)  # nothing was shared

    swept = tv.sweep_layers(twins.bridge, task, prompts, actual, max_new_tokens=1)
    for layer, score in zip(swept.layers, swept.scores, strict=True):
        for i, prompt in enumerate(prompts):
            ids = ids_of(twins.bridge, prompt.zero_shot().text)
            logits = plain_run(twins, ids, (layer, ids.shape[1] - 1, actual.values[i, layer]))[1]
            text = twins.bridge.tokenizer.decode([int(logits.argmax())], skip_special_tokens=True)
            assert score.texts[i] == prompt.template.cut(text)


def test_rows_that_have_ended_leave_a_sweep_of_many_tokens() -> None:
    """A vector that makes the model give its separator at once costs no second token."""
    twins = make_twins("gpt2", make_tokenizer())
    prompts = LETTERS.sample(3, shots=1, seed=0, template=tv.Template())
    line_end = ids_of(twins.bridge, "\n", prepend_bos=False)[0, -1]
    unembed = original(twins.bridge).lm_head.weight.detach()
    pointed = unembed[line_end] - unembed.mean(0)
    values = pointed.expand(1, 4, -1) * 1000
    vectors = tv.TaskVectors(values, model="tiny-gpt2", task="line end")
    engine = tv.LocalEngine(twins.bridge)
    first = tv.sweep_layers(engine, LETTERS, prompts, vectors, [3], max_new_tokens=1)
    assert set(first.scores[0].texts) == {""}  # the separator, cut
    one = count_positions(
        twins.bridge, lambda: tv.sweep_layers(engine, LETTERS, prompts, vectors, [3], max_new_tokens=1)
    )
    eight = count_positions(
        twins.bridge, lambda: tv.sweep_layers(engine, LETTERS, prompts, vectors, [3], max_new_tokens=8)
    )
    assert one == eight
