"""The tokens of an answer: the first-token rule, log-probabilities, and the distance from few-shot, against plain
Hugging Face and hand calculation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Twins, ids_of, make_tokenizer, make_twins, original
from oracle import plain_run, refuse
from oracle_edits import PlainEdit, hooked_run
from tokenizers import pre_tokenizers
from torch import Tensor

import tv_lens as tv
from tv_lens import Example, Prompt, Task, TaskVectors, Template
from tv_lens.engines import Capability

ARROW = Template()
SHOTS = (Example("hot", "cold"), Example("big", "small"))
ASKED = [("tall", "short"), ("wet", "dry and hot"), ("a", "b"), ("quick", "the slow fox")]
PROMPTS = [Prompt(SHOTS[: 1 + i % 2], query, answer, ARROW) for i, (query, answer) in enumerate(ASKED)]


def vectors_for(twins: Twins, n: int = 4) -> TaskVectors:
    values = torch.randn(n, 4, 32, generator=torch.Generator().manual_seed(3)) * 2
    return TaskVectors(values, twins.bridge.cfg.model_name, "t")


def plain_logprob(twins: Twins, text: str, answer: str, edit: tuple[int, Tensor] | None = None) -> float:
    """One pass of plain Hugging Face over prompt and answer; an edit is written at the prompt's last token."""
    start = ids_of(twins.bridge, text).shape[1]
    ids = ids_of(twins.bridge, text + answer)
    edits = [] if edit is None else [PlainEdit("resid_post", edit[0], start - 1, edit[1])]
    _, logits = hooked_run(twins, ids, edits)
    logprobs = logits.log_softmax(dim=-1)
    return sum(float(logprobs[position - 1, ids[0, position]]) for position in range(start, ids.shape[1]))


# log P(answer)


def test_answer_logprobs_are_those_of_one_plain_pass(twins: Twins) -> None:
    actual = tv.answer_logprobs(twins.bridge, PROMPTS)
    expected = [plain_logprob(twins, prompt.text, " " + str(prompt.answer)) for prompt in PROMPTS]
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    given = tv.answer_logprobs(twins.bridge, PROMPTS, ["x", "cold cold", "a b c", "hot"])
    expected = [
        plain_logprob(twins, prompt.text, " " + answer)
        for prompt, answer in zip(PROMPTS, ["x", "cold cold", "a b c", "hot"], strict=True)
    ]
    torch.testing.assert_close(given, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_patched_answer_logprobs_are_those_of_plain_hooks(twins: Twins) -> None:
    vectors = vectors_for(twins)
    actual = tv.answer_logprobs(twins.bridge, PROMPTS, vectors=vectors, layer=2)
    kept = tv.answer_logprobs(twins.bridge, PROMPTS, vectors=vectors, layer=2, keep_demonstrations=True)
    for i, prompt in enumerate(PROMPTS):
        for result, text in ((actual, prompt.zero_shot().text), (kept, prompt.text)):
            wanted = plain_logprob(twins, text, " " + str(prompt.answer), (2, vectors.values[i, 2]))
            assert result[i].item() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answer_logprobs_do_not_depend_on_the_batch(twins: Twins, batch_size: int) -> None:
    vectors = vectors_for(twins)
    whole = tv.answer_logprobs(twins.bridge, PROMPTS, vectors=vectors, layer=1)
    engine = tv.LocalEngine(twins.bridge, batch_size=batch_size)
    torch.testing.assert_close(
        tv.answer_logprobs(engine, PROMPTS, vectors=vectors, layer=1), whole, atol=1e-4, rtol=1e-4
    )


def test_answer_logprobs_without_a_cache() -> None:
    twins = make_twins("mamba")
    actual = tv.answer_logprobs(twins.bridge, PROMPTS)
    expected = [plain_logprob(twins, prompt.text, " " + str(prompt.answer)) for prompt in PROMPTS]
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_an_answer_after_a_plain_string_is_taken_literally(gpt2: Twins) -> None:
    actual = tv.answer_logprobs(gpt2.bridge, ["hot -> cold\nbig ->", "a"], [" small", "b c"])
    expected = [plain_logprob(gpt2, "hot -> cold\nbig ->", " small"), plain_logprob(gpt2, "a", "b c")]
    torch.testing.assert_close(actual, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_an_answer_that_merges_with_its_prompt_keeps_the_prompts_tokens(gpt2: Twins) -> None:
    """Written together, "the qui" and "ck" get other tokens; but generation has to produce "ck" after "the qui"."""
    tokenizer = gpt2.bridge.tokenizer
    together, apart = tokenizer.tokenize("the quick"), tokenizer.tokenize("the qui")
    assert together[: len(apart)] != apart
    actual = tv.answer_logprobs(gpt2.bridge, ["the qui"], ["ck"])
    ids = ids_of(gpt2.bridge, "the qui")
    total = 0.0
    for token in tokenizer("ck", add_special_tokens=False)["input_ids"]:
        total += float(plain_run(gpt2, ids)[1].log_softmax(-1)[token])
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    assert actual[0].item() == pytest.approx(total, abs=1e-4)


def test_wrong_use_of_logprobs_says_what_to_do(as_users_run_it: None) -> None:
    twins = make_twins("gpt2")
    bridge, vectors = twins.bridge, vectors_for(twins)
    original(bridge).register_forward_pre_hook(refuse)
    wrong: tuple[tuple[Callable[[], object], str], ...] = (
        (lambda: tv.answer_logprobs(bridge, ["a"]), "prompt 0 has no answer; pass answers="),
        (lambda: tv.answer_logprobs(bridge, PROMPTS, ["a"]), "for 4 prompts; give a list with one for each"),
        (lambda: tv.answer_logprobs(bridge, PROMPTS, "abcd"), "give a list with one for each"),
        (lambda: tv.answer_logprobs(bridge, PROMPTS, ["a", "b", "", "c"]), "prompt 2: the answer '' has no tokens"),
        (lambda: tv.answer_logprobs(bridge, PROMPTS, vectors=vectors), "given without a layer; pass layer="),
        (lambda: tv.answer_logprobs(bridge, PROMPTS, vectors=vectors, layer=9), "layer 9 is not one of"),
        (lambda: tv.answer_logprobs(bridge, ["a b"], ["b " * 126]), "prompt 0 has . tokens, with .* more to come"),
        (lambda: tv.divergence(bridge, [PROMPTS[0].zero_shot()], vectors.mean(), 1), "shots=1 or more"),
    )
    for call, message in wrong:
        with pytest.raises(tv.TvLensError, match=message):
            call()
    weak = tv.LocalEngine(bridge)
    weak.capabilities = frozenset(Capability) - {Capability.CONTINUE}
    with pytest.raises(tv.UnsupportedError, match="cannot generate more than one token"):
        tv.answer_logprobs(weak, PROMPTS)


# Divergence


def test_divergence_is_the_kl_of_plain_distributions(twins: Twins) -> None:
    vectors = vectors_for(twins)
    actual = tv.divergence(twins.bridge, PROMPTS, vectors, 1)
    for i, prompt in enumerate(PROMPTS):
        few_shot = plain_run(twins, ids_of(twins.bridge, prompt.text))[1].double().softmax(-1)
        ids = ids_of(twins.bridge, prompt.zero_shot().text)
        patched = plain_run(twins, ids, (1, ids.shape[1] - 1, vectors.values[i, 1]))[1].double().softmax(-1)
        expected = float((few_shot * (few_shot / patched).log()).sum())
        assert actual[i].item() == pytest.approx(expected, abs=1e-3)
        assert expected > 0.01


def test_writing_back_the_last_layer_gives_no_divergence(twins: Twins) -> None:
    """The last layer's own state, written into the few-shot prompt itself."""
    own = [[prompt.query] for prompt in PROMPTS]
    asked = [replace(prompt, query="x") for prompt in PROMPTS]
    vectors = tv.extract(twins.bridge, asked, own)
    actual = tv.divergence(twins.bridge, PROMPTS, vectors, 3, keep_demonstrations=True)
    torch.testing.assert_close(actual, torch.zeros(4), atol=1e-5, rtol=0)


# The first token


def spaced_digits() -> Any:
    """A tokenizer like SmolLM2's and Llama 2's: after "-> " a digit is two tokens, a bare space and the digit."""
    tokenizer = make_tokenizer()
    inner = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


NUMBERS = Task.from_mapping("numbers", {letter: str(i) for i, letter in enumerate("abcdefgh")})


def test_digits_are_scored_by_the_token_that_tells_them_apart() -> None:
    """By hand: every answer begins with a bare space, so its second token is judged."""
    twins = make_twins("llama", spaced_digits())
    bridge = twins.bridge
    split = bridge.tokenizer.tokenize("x -> 3", add_special_tokens=False)
    assert split[-2:] == ["Ġ", "3"]
    alone, told_apart = tv.first_token(bridge, ARROW), tv.first_token(bridge, ARROW, NUMBERS)
    assert (alone.name, alone.tokens) == ("first_token", 1)
    assert (told_apart.name, told_apart.tokens) == ("first_token (of 2)", 2)
    space, three, four = (bridge.tokenizer.convert_tokens_to_ids(token) for token in ("Ġ", "3", "4"))
    assert told_apart.accepts_ids is not None
    assert told_apart.accepts_ids([space, three], "3")
    assert told_apart.accepts_ids([space, three, four], "3")
    assert not told_apart.accepts_ids([space, four], "3")
    assert not told_apart.accepts_ids([space], "3")


def test_an_experiment_scores_digits_by_the_token_that_tells_them_apart() -> None:
    """The model is made to say " 3" to everything: one of the eight answers."""
    twins = make_twins("gpt2", spaced_digits())
    bridge = twins.bridge
    space, three = (bridge.tokenizer.convert_tokens_to_ids(token) for token in ("Ġ", "3"))

    def say(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        for row, last in enumerate(ids[:, -1].tolist()):
            output.logits[row] = 0
            output.logits[row, :, three if last == space else space] = 9
        return output

    original(bridge).register_forward_hook(say, with_kwargs=True)
    actual = tv.run_experiment(
        bridge, [NUMBERS], shots=1, n_dev=4, n_test=4, max_new_tokens=1, template=ARROW, layers=[0]
    )
    [result] = actual.results
    assert actual.settings["rules"] == {"numbers": "first_token (of 2)"}
    assert (actual.settings["scoring"], actual.settings["max_new_tokens"]) == ("first token", 1)
    for score in (result.evaluation.few_shot, result.evaluation.zero_shot, result.evaluation.patched):
        assert score.texts == ("3",) * 4
        assert score.correct == tuple(answer == "3" for answer in score.answers)
    both = (*result.evaluation.few_shot.answers, *result.sweep.scores[0].answers)
    assert "3" in both


def test_a_first_token_that_most_answers_share_is_passed_over() -> None:
    """By hand: the first pieces of most answers are equal; the second pieces all differ."""
    bridge = make_twins("llama").bridge
    tight = Template("{input}->{output}")
    alike = Task.from_mapping("alike", {"a": "zebra", "b": "zoo", "c": "zip", "d": "hot"})
    differing = Task.from_mapping("differing", {"a": "zebra", "b": "hot", "c": "cold", "d": "big"})
    assert bridge.tokenizer.tokenize("x->zebra")[-4:] == ["z", "e", "br", "a"]
    assert tv.first_token(bridge, tight, alike).tokens == 2
    assert tv.first_token(bridge, tight, differing).tokens == 1
    same = Task.from_mapping("same", {"a": "zebra", "b": "zebra", "c": "zebra"})
    assert tv.first_token(bridge, tight, same).tokens == 1  # one answer: nothing to distinguish


def test_ids_decide_where_text_cannot() -> None:
    """北 and 東 are three byte tokens each, all of which read as U+FFFD; their ids differ."""
    bridge = make_twins("llama").bridge
    rule = tv.first_token(bridge, Template("{input}->{output}"))
    ids = bridge.tokenizer("北", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    assert rule.accepts_ids is not None
    assert rule.accepts_ids(ids[:1], "北")
    other = bridge.tokenizer("é", add_special_tokens=False)["input_ids"]
    assert not rule.accepts_ids(other[:1], "北")
    assert not rule("\ufffd", "北")
    task = Task.from_mapping("t", {"a": "北", "b": "é"}, accepts=rule)
    completions = tv.Completions(("\ufffd", "\ufffd"), torch.tensor([ids[:1], ids[:1]]))
    prompts = [Prompt((), "a", "北"), Prompt((), "b", "é")]
    assert tv.score(task, prompts, completions).correct == (True, False)
    assert tv.score(task, prompts, list(completions)).correct == (False, False)
