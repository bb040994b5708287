"""The part of a task that a model answers correctly."""

from __future__ import annotations

from dataclasses import replace

import pytest
from models import make_twins
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv

WORDS = ("a", "b", "cold", "dog", "fox", "hot", "big", "small")


def test_the_inputs_that_are_answered_correctly_are_kept() -> None:
    model = make_twins("gpt2").bridge
    probe = tv.Task("probe", WORDS, str.upper)
    prompts = probe.sample(len(probe), shots=2, seed=3)
    texts = tv.generate(model, prompts, max_new_tokens=2).texts
    own = {prompt.query: text for prompt, text in zip(prompts, texts, strict=True)}
    # The outputs of demonstrations are as before, so that the model's answers are; three answers are as expected.
    expected = {"cold", "dog", "hot"}

    def accepts(prediction: str, answer: str) -> bool:
        return answer.lower() in expected and prediction == own[answer.lower()]

    task = tv.Task("probe", WORDS, str.upper, accepts, category="made up")
    actual = task.known(model, shots=2, seed=3, max_new_tokens=2)
    assert actual.inputs == tuple(word for word in WORDS if word in expected)
    assert actual.name == "probe (known: 3 of 8)"
    assert (actual.category, actual.answer("dog"), actual.rule) == ("made up", "DOG", task.rule)
    vectors = tv.extract(model, actual.sample(1, shots=1, seed=0), [("a",)])
    assert vectors.provenance.task == "probe (known: 3 of 8)"


def test_a_task_that_the_model_cannot_do_says_so(as_users_run_it: None) -> None:
    task = tv.Task("never", WORDS, str.upper, lambda prediction, answer: False)
    with pytest.raises(
        tv.TvLensError, match=r"answers none of its 8 inputs correctly after 2 demonstrations \(it gives"
    ):
        task.known(make_twins("gpt2").bridge, shots=2, seed=0)


def test_the_demo_model_knows_part_of_the_past(demo: TransformerBridge) -> None:
    whole = tv.library()["present_to_past"]
    task = replace(whole, inputs=whole.inputs[:24])
    actual = task.known(tv.LocalEngine(demo, progress=False), shots=5, seed=0)
    assert 0.2 <= len(actual) / len(task) <= 0.8
    prompts = [prompt for prompt in task.sample(len(task), shots=5, seed=0) if prompt.query in actual.inputs]
    assert tv.score(task, prompts, tv.generate(demo, prompts)).accuracy == 1
