"""One run gives the answers, the log-probability of the right ones, and the divergence from few-shot."""

from __future__ import annotations

import pytest
import torch
from models import Twins, make_twins
from oracle import count_positions, plain_run

import tv_lens as tv
from tv_lens.edits import Edits
from tv_lens.engines import Prefixes
from tv_lens.generation import encode
from tv_lens.measuring import measure
from tv_lens.patching import Placement, edits_for

# Answers of one token and of several, rows of unequal length.
TASK = tv.Task("upper", ("a", "bb", "cold", "dog", "quick brown", "fox", "wet", "x"), str.upper)


def conditions_of(engine: tv.LocalEngine, queries: list[tv.Prompt], vectors: tv.TaskVectors) -> list[Edits]:
    ids = encode(engine, queries, 4)
    patched = [
        edits_for(engine, queries, ids, vectors, layer, Placement(how).of(vectors))
        for layer, how in ((0, None), (2, None), (1, tv.add(0.5, every_step=True)))
    ]
    return [Edits(), *patched]


def test_one_run_gives_what_the_public_functions_give(twins: Twins) -> None:
    engine = tv.LocalEngine(twins.bridge)
    prompts = TASK.sample(5, shots=2, seed=0)
    queries = [prompt.zero_shot() for prompt in prompts]
    noise = 3 * torch.randn(1, 4, engine.d_model, generator=torch.Generator().manual_seed(0))
    vectors = tv.TaskVectors(noise, engine.name, "t")
    [few_shot] = measure(engine, prompts, encode(engine, prompts, 4), [Edits()], 4, keep_next=True)
    assert [each.answer for each in few_shot.answers] == list(tv.generate(engine, prompts, max_new_tokens=4))
    assert torch.allclose(few_shot.logprobs, tv.answer_logprobs(engine, prompts), atol=1e-3)
    assert few_shot.divergences is None
    assert few_shot.next_logprobs is not None

    kept = Prefixes()
    measured = measure(
        engine,
        queries,
        encode(engine, queries, 4),
        conditions_of(engine, queries, vectors),
        4,
        teacher=few_shot.next_logprobs,
        kept=kept,
    )
    ways: list[tuple[int, tv.Write | None]] = [(0, None), (2, None), (1, tv.add(0.5, every_step=True))]
    assert [each.answer for each in measured[0].answers] == list(tv.generate(engine, queries, max_new_tokens=4))
    for actual, (layer, how) in zip(measured[1:], ways, strict=True):
        texts = tv.patch_generate(engine, prompts, vectors, layer, how=how, max_new_tokens=4)
        assert [each.answer for each in actual.answers] == list(texts)
        logprobs = tv.answer_logprobs(engine, prompts, vectors=vectors, layer=layer, how=how)
        assert torch.allclose(actual.logprobs, logprobs, atol=1e-3)
        assert actual.divergences is not None
        divergences = tv.divergence(engine, prompts, vectors, layer, how=how)
        assert torch.allclose(actual.divergences, divergences, atol=1e-4)


def test_log_probabilities_equal_plain_hugging_face(twins: Twins) -> None:
    """Token by token, with the right tokens before, the write at its own position."""
    engine = tv.LocalEngine(twins.bridge)
    [prompt, *_] = TASK.sample(1, shots=0, seed=0)
    [ids] = encode(engine, [prompt], 4)
    vector = torch.linspace(-2, 2, engine.d_model)
    vectors = tv.TaskVectors(vector.expand(1, 4, -1).clone(), engine.name, "t")
    edits = edits_for(engine, [prompt], [ids], vectors, 1, Placement().of(vectors))
    [actual] = measure(engine, [prompt], [ids], [edits], 4)
    whole = engine.text.to_ids(prompt.text + prompt.template.continuation(prompt.query, str(prompt.answer)))
    assert whole[: len(ids)] == ids
    expected = 0.0
    for end in range(len(ids), len(whole)):
        logits = plain_run(twins, torch.tensor([whole[:end]]), (1, len(ids) - 1, vector))[1]
        expected += float(logits.log_softmax(dim=-1)[whole[end]])
    assert float(actual.logprobs[0]) == pytest.approx(expected, abs=1e-3)


def test_the_prompt_is_run_once_for_both_continuations() -> None:
    """By hand: the prompt, and then one position for each token but the last of either continuation."""
    twins = make_twins("llama")
    engine = tv.LocalEngine(twins.bridge, batch_size=1)
    [prompt] = [each for each in TASK.sample(8, shots=1, seed=0) if each.query == "cold"]
    [ids] = encode(engine, [prompt], 4)
    n_answer = len(engine.text.to_ids(prompt.text + prompt.template.continuation("cold", "COLD"))) - len(ids)
    assert n_answer > 1
    [result] = measure(engine, [prompt], [ids], [Edits()], 4)
    n_generated = len(result.answers[0].ids)
    count = count_positions(twins.bridge, lambda: measure(engine, [prompt], [ids], [Edits()], 4))
    assert count == len(ids) + (n_generated - 1) + (n_answer - 1)


def test_an_answer_is_needed(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge)
    prompt = tv.Prompt((), "a")
    with pytest.raises(tv.TvLensError, match="prompt 0 has no answer"):
        measure(engine, [prompt], encode(engine, [prompt], 1), [Edits()], 1)
