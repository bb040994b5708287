from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from models import Twins, ids_of, make_twins, original
from oracle import count_positions, plain_generate, refuse
from results import make_settings, score_of
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv
from tv_lens import Evaluation, Prompt, Score, Sweep, Task, TaskVectors, Template
from tv_lens.evidence import experiments, tuning
from tv_lens.evidence.controls import ShuffledDemonstrations, Treatment, random_like
from tv_lens.evidence.other_tasks import least_similar
from tv_lens.methods import extraction

TASK = Task("upper", ("a", "bb", "cold", "dog", "quick brown", "fox", "wet", "x"), str.upper)


def test_a_sweep_equals_patching_layer_by_layer(twins: Twins) -> None:
    """For a rule that sees whole answers; `test_deciding.py` is about the others."""
    task = replace(TASK, accepts=tv.Rule("whole answers", tv.starts_with))
    prompts = TASK.sample(5, shots=2, seed=0)
    vectors = tv.extract(twins.bridge, prompts, TASK.substitutes(prompts, 2, seed=0))
    scaled = replace(vectors, values=vectors.values * torch.linspace(0.5, 4, 5)[:, None, None])
    for engine in (tv.LocalEngine(twins.bridge), tv.LocalEngine(twins.bridge, prepend_bos=False, batch_size=3)):
        for each in (scaled, scaled.mean()):
            sweep = tv.sweep_layers(engine, task, prompts, each, max_new_tokens=4)
            assert sweep.layers == (0, 1, 2, 3)
            for layer in sweep.layers:
                alone = tv.patch_generate(engine, prompts, each, layer, max_new_tokens=4)
                assert sweep.at(layer).texts == alone.texts
    some = tv.sweep_layers(engine, task, prompts, scaled, [3, 1], max_new_tokens=4)
    alone = tv.patch_generate(engine, prompts, scaled, 3, max_new_tokens=4)
    assert (some.layers, some.scores[0].texts) == ((3, 1), alone.texts)


def test_each_prompt_of_a_sweep_ends_at_its_own_separator(llama: Twins) -> None:
    template = tv.Template("{input} -> {output}", separator="never written")
    prompts = WORDS.sample(2, shots=1, seed=0, template=template)
    vectors = tv.extract(llama.bridge, prompts, WORDS.substitutes(prompts, 1, seed=0))
    free = tv.patch_generate(llama.bridge, prompts, vectors, 0, max_new_tokens=4).texts
    # A character that the model writes for this prompt.
    own = [
        replace(prompt, template=replace(template, separator=text[i]))
        for i, (prompt, text) in enumerate(zip(prompts, free, strict=True))
    ]
    sweep = tv.sweep_layers(llama.bridge, WORDS, own, vectors, max_new_tokens=4)
    for layer, score in zip(sweep.layers, sweep.scores, strict=True):
        for i, prompt in enumerate(own):
            alone = replace(vectors, values=vectors.values[i : i + 1], prompts=(), substitutes=())
            expected = tv.patch_generate(llama.bridge, [prompt], alone, layer, max_new_tokens=4)
            assert score.texts[i] == expected[0]
    assert all(len(text) < len(whole) for text, whole in zip(sweep.scores[0].texts, free, strict=True))


def test_a_sweep_runs_each_query_once_and_one_token_a_layer() -> None:
    twins = make_twins("llama")
    prompts = [Prompt((), query, "A", Template("{input} -> {output}")) for query in ("a", "b", "x")]
    length = twins.bridge.to_tokens("a ->").shape[1]
    vectors = TaskVectors(torch.ones(1, 4, 32), "tiny-llama", "t")
    count = count_positions(
        twins.bridge, lambda: tv.sweep_layers(twins.bridge, TASK, prompts, vectors, max_new_tokens=1)
    )
    assert count == 3 * (length - 1) + 3 * 4


def test_the_best_layer_is_the_first_maximum_and_ties_are_shown() -> None:
    sweep = Sweep((4, 9, 2, 7), (score_of(8), score_of(3), score_of(8), score_of(0)))
    assert (sweep.best, sweep.ties) == (2, (2, 4))
    assert sweep.at(9).accuracy == 0.3
    table = sweep.to_pandas()
    assert table["layer"].tolist() == [4, 9, 2, 7]
    assert table["best"].tolist() == [False, False, True, False]
    assert "best layer 2: 0.80 [0.44, 0.97], tied with [4]" in sweep._repr_html_()
    with pytest.raises(ValueError, match="layer 3 was not swept"):
        sweep.at(3)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Clopper and Pearson's closed forms: 0 of n reaches up to 1 - 0.025 ** (1 / n), and n of n mirrors it.
    [(0, 10, 0.0, 0.3084971), (10, 10, 0.6915029, 1.0), (0, 50, 0.0, 0.0711217)],
)
def test_the_interval_is_exact(right: int, n: int, low: float, high: float) -> None:
    assert score_of(right, n).interval == pytest.approx((low, high), abs=1e-6)


def test_scores_follow_the_tasks_rule() -> None:
    prompts = [Prompt((), "a"), Prompt((), "bb", "own answer")]
    actual = tv.score(TASK, prompts, [" A ", "BB"])
    assert (actual.answers, actual.correct) == (("A", "own answer"), (True, False))
    assert actual.accuracy == 0.5
    assert actual.to_pandas()["correct"].tolist() == [True, False]
    assert "<table" in actual._repr_html_()
    with pytest.raises(ValueError, match="1 texts for 2 prompts"):
        tv.score(TASK, prompts, ["A"])


def test_wrong_use_of_a_sweep_says_what_to_do(as_users_run_it: None) -> None:
    twins = make_twins("gpt2")
    vectors = TaskVectors(torch.zeros(2, 4, 32), "tiny-gpt2", "t")
    prompts = TASK.sample(2, shots=1, seed=0, template=Template())
    for layers, message in (([], "at least one"), ([1, 1], "different ones"), ([0, 4], "layer 4 is not one of")):
        with pytest.raises(ValueError, match=message):
            tv.sweep_layers(twins.bridge, TASK, prompts, vectors, layers)
    for wrong in ([1.5], 2):
        with pytest.raises(ValueError, match="layer"):
            tv.sweep_layers(twins.bridge, TASK, prompts, vectors, wrong)  # type: ignore[arg-type]
    original(twins.bridge).register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match="prompt 1 has .* with 125 more to come, and the context of tiny-gpt2 is 128"):
        tv.sweep_layers(
            twins.bridge, TASK, [prompts[0], Prompt((), "a b c", "A", Template())], vectors, max_new_tokens=126
        )
    with pytest.raises(ValueError, match="2 vectors for 3 prompts"):
        tv.sweep_layers(twins.bridge, TASK, TASK.sample(3, shots=1, seed=0), vectors)
    with pytest.raises(ValueError, match="at least one Prompt"):
        tv.sweep_layers(twins.bridge, TASK, [], vectors)


# Evaluation and its controls


def odd(prediction: str, answer: str) -> bool:
    """A rule by which a random model is sometimes right."""
    return len(prediction) % 2 == 1


WORDS = Task("upper", tuple(f"{a}{b}" for a in "abcdefgh" for b in "uvwx"), str.upper, odd)
OTHER = Task("double", WORDS.inputs, lambda text: text * 2, odd)


def read(twins: Twins, task: Task, n: int = 4) -> TaskVectors:
    prompts = task.sample(n, shots=3, seed=1)
    return tv.extract(twins.bridge, prompts, task.substitutes(prompts, 2, seed=1))


def test_an_evaluation_holds_what_each_call_alone_gives(twins: Twins) -> None:
    prompts = WORDS.sample(6, shots=3, seed=0)
    vectors, other = read(twins, WORDS).mean(), read(twins, OTHER).mean()
    actual = tv.evaluate(twins.bridge, WORDS, prompts, vectors, 2, max_new_tokens=4, controls={"other": other}, seed=5)
    assert list(actual.conditions) == ["zero-shot", "few-shot", "patched", "random", "other", "shuffled"]
    assert actual.few_shot.texts == tv.generate(twins.bridge, prompts, max_new_tokens=4).texts
    alone = [prompt.zero_shot() for prompt in prompts]
    assert actual.zero_shot.texts == tv.generate(twins.bridge, alone, max_new_tokens=4).texts
    mixed = tv.shuffle_outputs(prompts, 5)
    controls = {
        "random": random_like(vectors, 6, 5),
        "other": other,
        # By the same method: the vectors were read with two substitutes.
        "shuffled": tv.extract(twins.bridge, mixed, WORDS.substitutes(prompts, 2, seed=5)).mean(),
    }
    for name, each in {"patched": vectors, **controls}.items():
        texts = tv.patch_generate(twins.bridge, prompts, each, 2, max_new_tokens=4).texts
        assert actual.conditions[name].texts == texts
    for score in actual.conditions.values():
        assert score.answers == tuple(prompt.query.upper() for prompt in prompts)
        assert score.correct == tuple(len(text) % 2 == 1 for text in score.texts)


def test_a_random_control_is_as_long_as_the_vector_and_points_elsewhere(gpt2: Twins) -> None:
    for vectors in (read(gpt2, WORDS, 8), read(gpt2, WORDS, 8).mean()):
        actual = random_like(vectors, 8, seed=0)
        assert len(actual) == 8
        assert torch.allclose(actual.values.norm(dim=-1), vectors.values.norm(dim=-1).expand(8, -1), rtol=1e-5)
        rows = torch.nn.functional.normalize(torch.cat([actual.values, vectors.values]), dim=-1)
        same = torch.einsum("ald,bld->lab", rows, rows) - torch.eye(len(rows))
        assert same[:, :8].abs().max() < 0.8  # in 32 dimensions; a repeated direction would give 1
        assert torch.equal(actual.values, random_like(vectors, 8, seed=0).values)
        assert not torch.allclose(actual.values, random_like(vectors, 8, seed=1).values)


@pytest.mark.parametrize("shots", [2, 3, 7])
def test_shuffled_demonstrations_keep_inputs_and_lose_every_pair(shots: int) -> None:
    prompts = WORDS.sample(20, shots=shots, seed=0)
    for before, after in zip(prompts, tv.shuffle_outputs(prompts, 3), strict=True):
        assert [each.input for each in after.examples] == [each.input for each in before.examples]
        assert sorted(each.output for each in after.examples) == sorted(each.output for each in before.examples)
        assert not set(after.examples) & set(before.examples)
        assert (after.query, after.answer) == (before.query, before.answer)
    with pytest.raises(ValueError, match="prompt 0 has 1 demonstrations"):
        tv.shuffle_outputs(WORDS.sample(1, shots=1, seed=0), 0)


def test_the_paired_test_is_mcnemars() -> None:
    """By hand: the two differ on 9 prompts, 8 times to 1: 2 * (C(9,0) + C(9,1)) / 2**9."""
    first = Score(("",) * 12, ("",) * 12, (True,) * 8 + (False,) + (True, True, False))
    second = Score(("",) * 12, ("",) * 12, (False,) * 8 + (True,) + (True, True, False))
    assert tv.mcnemar(first, second) == tv.mcnemar(second, first) == pytest.approx(2 * (1 + 9) / 512)
    assert tv.mcnemar(first, first) == 1
    with pytest.raises(ValueError, match="scores of the same prompts"):
        tv.mcnemar(first, score_of(3, 5))


def test_an_evaluations_table_names_layer_and_interval() -> None:
    actual = Evaluation(
        3, zero_shot=score_of(0), few_shot=score_of(9), patched=score_of(8), controls={"random": score_of(1)}
    )
    table = actual.to_pandas().set_index("condition")
    assert table["accuracy"].to_dict() == {"zero-shot": 0, "few-shot": 0.9, "patched": 0.8, "random": 0.1}
    assert table["layer"].isna().to_dict() == {"zero-shot": True, "few-shot": True, "patched": False, "random": False}
    assert table["layer"].dropna().tolist() == [3, 3]
    assert table.loc["zero-shot", "high"] == pytest.approx(0.3084971, abs=1e-6)
    # Patched differs from zero-shot on eight prompts, always in favor of patched, and from random on seven.
    assert actual.p_value == table.loc["zero-shot", "p_value"] == pytest.approx(2 / 2**8)
    assert table.loc["random", "p_value"] == pytest.approx(2 / 2**7)
    assert "few-shot" in actual._repr_html_()


def test_wrong_use_of_an_evaluation_says_what_to_do(gpt2: Twins, as_users_run_it: None) -> None:
    vectors = TaskVectors(torch.ones(1, 4, 32), "tiny-gpt2", "t")
    wide = TaskVectors(torch.ones(1, 4, 64), "tiny-gpt2", "t")
    prompts = WORDS.sample(2, shots=2, seed=0)
    original(gpt2.bridge).register_forward_pre_hook(refuse)
    for call, message in (
        (lambda: tv.evaluate(gpt2.bridge, WORDS, WORDS.sample(2, shots=0, seed=0), vectors, 1), "shots=1 or more"),
        (lambda: tv.evaluate(gpt2.bridge, WORDS, prompts, vectors, [1, 2]), "layer .1, 2. is not one of"),  # type: ignore[arg-type]
        (lambda: tv.evaluate(gpt2.bridge, WORDS, prompts, vectors, 4), "layer 4 is not one of"),
        (lambda: tv.evaluate(gpt2.bridge, WORDS, prompts, vectors, 1, controls={"x": wide}), "d_model 64"),
        (lambda: tv.evaluate(gpt2.bridge, WORDS, prompts, vectors, 1, controls={"patched": vectors}), "otherwise"),
        (lambda: tv.evaluate(gpt2.bridge, WORDS, prompts, vectors, 1, max_new_tokens=120), "prompt 0 has .* context"),
        (lambda: tv.evaluate(gpt2.bridge, WORDS, [], vectors, 1), "at least one Prompt"),
        (lambda: tv.conflict(gpt2.bridge, WORDS, TASK, prompts, vectors, 1), "2 queries are not inputs of the rival"),
        (lambda: tv.conflict(gpt2.bridge, WORDS, OTHER, WORDS.sample(2, shots=0, seed=0), vectors, 1), "shots=1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_conflicting_demonstrations_stay_and_the_vector_is_written_after_them(twins: Twins) -> None:
    prompts = WORDS.sample(3, shots=2, seed=0)
    noise = 3 * torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0))
    vectors = TaskVectors(noise, twins.bridge.cfg.model_name, "t")
    actual = tv.conflict(tv.LocalEngine(twins.bridge), WORDS, OTHER, prompts, vectors, 1, max_new_tokens=3)
    for i, prompt in enumerate(prompts):
        ids = ids_of(twins.bridge, prompt.text)
        for write, texts in (
            (None, actual.plain_task.texts),
            ((1, ids.shape[1] - 1, vectors.values[i, 1]), actual.patched_task.texts),
        ):
            chosen = plain_generate(twins, ids, 3, write)
            ended = chosen.index(1) if 1 in chosen else 3  # at the end of text
            assert texts[i] == twins.bridge.tokenizer.decode(chosen[:ended]).split("\n")[0].strip()
    assert actual.plain_rival.texts == actual.plain_task.texts
    assert actual.patched_rival.texts == actual.patched_task.texts
    assert actual.plain_task.answers == actual.patched_task.answers == tuple(p.query.upper() for p in prompts)
    assert actual.plain_rival.answers == actual.patched_rival.answers == tuple(p.query * 2 for p in prompts)
    assert actual.to_pandas()["scored as"].tolist() == ["upper", "double"] * 2
    assert "demonstrations of upper, vector of double at layer 1" in actual._repr_html_()


# The whole experiment

SMALL: dict[str, Any] = {"shots": 2, "n_dev": 6, "n_test": 7, "max_new_tokens": 2}
THIRD = Task("reverse", WORDS.inputs, lambda text: text[::-1], odd)
TASKS = (WORDS, OTHER, THIRD)


@pytest.fixture(scope="module")
def experiment(llama: Twins) -> tv.Experiment:
    return tv.run_experiment(llama.bridge, TASKS, **SMALL)


def test_an_experiment_equals_its_parts(llama: Twins, experiment: tv.Experiment) -> None:
    """Each step by hand, with the public functions."""
    means = {}
    for task in TASKS:
        dev, _ = task.split(6 / 13, seed=0)
        prompts = dev.sample(6, shots=2, seed=0, template=tv.PAPER)
        means[task.name] = tv.extract(llama.bridge, prompts, dev.substitutes(prompts, 2, seed=0)).mean()
    others = [result.other_task for result in experiment.results]
    for result, task, other in zip(experiment.results, TASKS, others, strict=True):
        dev, test = task.split(6 / 13, seed=0)
        prompts = dev.sample(6, shots=2, seed=0, template=tv.PAPER)
        sweep = tv.sweep_layers(llama.bridge, dev, prompts, means[task.name], max_new_tokens=2)
        assert result.sweep == sweep
        mixed = tv.shuffle_outputs(prompts, 0)
        shuffled = tv.extract(llama.bridge, mixed, dev.substitutes(mixed, 2, seed=0)).mean()
        asked = test.sample(7, shots=2, seed=0, template=tv.PAPER)
        assert other is not None
        assert other != task.name
        for controls in ({"other task": means[other], "shuffled": shuffled}, {"other task": means[other]}):
            assert result.evaluation == tv.evaluate(
                llama.bridge,
                dev,  # from whose inputs the substitutes of the shuffled prompts are drawn
                asked,
                means[task.name],
                sweep.best,
                max_new_tokens=2,
                controls=controls,
                dev=prompts,
            )
        assert torch.equal(experiment.vectors[task.name].values, means[task.name].values)


@pytest.mark.parametrize("seed", [1, 7])
def test_the_seed_reaches_every_draw(llama: Twins, seed: int) -> None:
    """The split, the prompts, the substitutes, the shuffling and the random control, each by hand."""
    actual = tv.run_experiment(llama.bridge, [WORDS], **SMALL | {"shots": 4}, seed=seed)
    dev, test = WORDS.split(6 / 13, seed=seed)
    prompts = dev.sample(6, shots=4, seed=seed, template=tv.PAPER)
    vector = tv.extract(llama.bridge, prompts, dev.substitutes(prompts, 2, seed=seed)).mean()
    assert torch.equal(actual.vectors["upper"].values, vector.values)
    mixed = tv.shuffle_outputs(prompts, seed)
    shuffled = tv.extract(llama.bridge, mixed, dev.substitutes(mixed, 2, seed=seed)).mean()
    asked = test.sample(7, shots=4, seed=seed, template=tv.PAPER)
    [result] = actual.results
    noise = random_like(vector, 6 + 7, seed)  # for the dev prompts, and then for the test prompts
    noises = [replace(noise, values=noise.values[rows]) for rows in (slice(6), slice(6, None))]
    for name, (on_dev, on_test) in {
        "patched": (vector, vector),
        "random": noises,
        "shuffled": (shuffled, shuffled),
    }.items():
        sweep = tv.sweep_layers(llama.bridge, dev, prompts, on_dev, max_new_tokens=2)
        # A control that several layers suit equally well gets the vector's.
        layer = result.sweep.best if result.sweep.best in sweep.ties else sweep.best
        assert result.evaluation.layer_of(name) == layer
        texts = tv.patch_generate(llama.bridge, asked, on_test, layer, max_new_tokens=2)
        assert result.evaluation.conditions[name].texts == texts.texts


def test_the_shuffled_control_permutes_by_the_seed(llama: Twins) -> None:
    prompts = WORDS.sample(3, shots=4, seed=0)
    method = tv.Extraction(substitutes=1)
    vectors = method(tv.LocalEngine(llama.bridge), WORDS, prompts, 7)
    treatment = Treatment(tv.LocalEngine(llama.bridge), WORDS, prompts, vectors, method, seed=7, n=3)
    actual = ShuffledDemonstrations()(treatment)
    assert actual is not None
    mixed = tv.shuffle_outputs(prompts, 7)
    assert mixed != tv.shuffle_outputs(prompts, 0)
    expected = tv.extract(llama.bridge, mixed, WORDS.substitutes(mixed, 1, seed=7))
    assert torch.equal(actual.values, expected.values)


def test_the_other_task_is_of_another_category(llama: Twins) -> None:
    """Of several, it is the least similar by name and vectors; "plurals" is like "plural"."""
    named = {"plural": "words", "singular": "words", "sum": "numbers", "plurals": "numbers"}
    tasks = [replace(WORDS, name=name, category=category) for name, category in named.items()]
    actual = tv.run_experiment(llama.bridge, tasks, **SMALL | {"n_dev": 4, "n_test": 2, "layers": [1]})
    assert actual.results[0].other_task == "sum"
    assert all(named[str(result.other_task)] != result.category for result in actual.results)
    for i, result in enumerate(actual.results):
        _, test = tasks[i].split(4 / 6, seed=0)
        asked = test.sample(2, shots=2, seed=0)
        other = actual.vectors[str(result.other_task)]
        texts = tv.patch_generate(llama.bridge, asked, other, 1, max_new_tokens=2).texts
        assert result.evaluation.controls["other task"].texts == texts


def test_without_categories_the_least_similar_vector_is_the_other_task() -> None:
    """By hand: cosines of 1, 0.6 and 0, and names that are equally alike."""
    tasks = [replace(WORDS, name=f"task {i}") for i in range(4)]
    values = torch.tensor([[1.0, 0], [1, 0], [0.6, 0.8], [0, 1]])

    def vectors(i: int) -> TaskVectors:
        return TaskVectors(values[i].expand(1, 3, 2).clone(), "tiny", tasks[i].name)

    assert [least_similar(i, tasks, vectors) for i in range(4)] == [3, 3, 0, 0]
    one_known = [replace(task, category="words") if i < 2 else task for i, task in enumerate(tasks)]
    assert least_similar(0, one_known, vectors) == 3  # tasks without a category are not known to differ
    assert least_similar(0, tasks[:1], vectors) is None


def test_another_tasks_vectors_are_refused_on_resume(llama: Twins, tmp_path: Path) -> None:
    """So are those of another model or another depth: everything in a folder is checked."""
    folder = tmp_path / "run"
    tasks = [WORDS, OTHER]
    tv.run_experiment(llama.bridge, tasks, **SMALL, folder=folder)
    upper, double = folder / "task-upper.safetensors", folder / "task-double.safetensors"
    good, vectors = upper.read_bytes(), TaskVectors.load(upper)
    upper.write_bytes(double.read_bytes())
    with pytest.raises(ValueError, match=r"task-upper.safetensors: vectors of 'double' and tiny-llama, not of 'upper'"):
        tv.run_experiment(llama.bridge, tasks, **SMALL, folder=folder)
    replace(vectors, model="other").save(upper)
    with pytest.raises(ValueError, match=r"task-upper.safetensors: vectors of 'upper' and other, not"):
        tv.run_experiment(llama.bridge, tasks, **SMALL, folder=folder)
    replace(vectors, n_layers=9).save(upper)
    with pytest.raises(ValueError, match=r"task-upper.safetensors: vectors for 9 layers, not 4"):
        tv.run_experiment(llama.bridge, tasks, **SMALL, folder=folder)
    upper.write_bytes(good)
    (folder / "task-upper.json").write_bytes((folder / "task-double.json").read_bytes())
    with pytest.raises(ValueError, match="a damaged result .it is of the task 'double', not 'upper'"):
        tv.run_experiment(llama.bridge, tasks, **SMALL, folder=folder)


def test_alternatives_count_wherever_answers_are_scored(gpt2: Twins) -> None:
    """Every text that the model gives is an accepted alternative to the expected answer."""
    strict = Task("upper", WORDS.inputs, str.upper)
    prompts = strict.sample(4, shots=2, seed=0)
    texts = tv.generate(gpt2.bridge, prompts, max_new_tokens=2)
    assert not any(tv.score(strict, prompts, texts).correct)
    lenient = replace(
        strict, accepted={str(prompt.answer): ("zzz", text) for prompt, text in zip(prompts, texts, strict=True)}
    )
    assert all(tv.score(lenient, prompts, texts).correct)
    vectors = TaskVectors(torch.ones(1, 4, 32), "tiny-gpt2", "t")
    actual = tv.evaluate(gpt2.bridge, lenient, prompts, vectors, 1, max_new_tokens=2)
    assert actual.few_shot.texts == texts.texts
    assert all(actual.few_shot.correct)


def test_scores_of_different_prompts_are_not_compared() -> None:
    """Neither the paired test nor any result type accepts them."""
    mine, other = score_of(3), replace(score_of(3), answers=("z",) * 10)
    for make in (
        lambda: tv.mcnemar(mine, other),
        lambda: Evaluation(1, mine, mine, other, {}),
        lambda: Evaluation(1, mine, mine, mine, {"random": other}),
        lambda: Sweep((1, 2), (mine, other)),
        lambda: tv.Conflict("a", "b", 1, mine, mine, other, mine),
    ):
        with pytest.raises(ValueError, match="of the same prompts"):
            make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Score((), (), ()), "a text, an answer and a verdict for each prompt"),
        (lambda: Score(("a",), ("b", "c"), (True,)), "not 1, 2 and 1"),
        (lambda: Sweep((), ()), "a score for each"),
        (lambda: Sweep((1, 1), (score_of(1), score_of(2))), "different layers"),
        (lambda: Sweep((1, 4), (score_of(1), score_of(2)), 4), "layer 4 is not one of a model with 4 layers"),
        (lambda: Evaluation(-1, score_of(1), score_of(1), score_of(1), {}), "layer -1 is not one of"),
        (lambda: Evaluation(1, score_of(1), score_of(1), score_of(1), {"patched": score_of(1)}), "name them otherwise"),
        (lambda: make_settings(tasks=()), "at least one task"),
        (lambda: make_settings(layers=(4,)), "are not those of a model with 4 layers"),
        (lambda: make_settings(data={}), "a fingerprint of its data"),
        (lambda: tv.Experiment(make_settings(), ()), "at least one result"),
        (lambda: tv.TopTokens("t", 1, (("a",),), ((1, 2),), ((0.5,),)), "one entry for each vector and rank"),
    ],
)
def test_a_result_that_does_not_fit_together_cannot_be_made(make: Any, message: str) -> None:
    with pytest.raises(tv.TvLensError, match=message):
        make()


def test_dev_and_test_share_no_input(experiment: tv.Experiment) -> None:
    for result in experiment.results:
        shown = [
            set(re.findall(r"example:(\w+)->", "\n".join(texts))) for texts in (result.dev_prompts, result.test_prompts)
        ]
        assert len(shown[0] | shown[1]) > 20
        assert not shown[0] & shown[1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_result_and_another_seed_does_not(llama: Twins, experiment: tv.Experiment) -> None:
    random.seed(99)
    torch.manual_seed(99)
    engine = tv.LocalEngine(llama.bridge, batch_size=3, progress=False)
    again = tv.run_experiment(engine, TASKS, **SMALL)
    assert again == experiment
    assert tv.run_experiment(engine, TASKS, **SMALL, seed=1).results != experiment.results


def test_the_tables_say_everything(experiment: tv.Experiment) -> None:
    tidy = experiment.to_pandas()
    assert list(tidy) == [
        *("task", "category", "condition", "layer", "n", "accuracy", "low", "high", "p_value"),
        *("model", "scoring", "method", "shots", "seed"),
    ]
    conditions = ["zero-shot", "few-shot", "patched", "random", "other task", "shuffled"]
    assert tidy["condition"].tolist() == conditions * 3
    assert tidy["task"].tolist() == ["upper"] * 6 + ["double"] * 6 + ["reverse"] * 6
    assert set(tidy["n"]) == {7}
    assert set(tidy["model"]) == {"tiny-llama"}
    summary = experiment.summary()
    assert summary["task"].tolist() == ["upper", "double", "reverse"]
    assert summary["patched"].tolist() == [str(result.evaluation.patched) for result in experiment.results]
    assert "scoring full answer" in experiment._repr_html_()
    settings = {"shots", "n_dev", "n_test", "seed", "substitutes", "method", "template", "max_new_tokens", "scoring"}
    assert settings <= set(experiment.settings)
    assert {"model", "n_layers", "d_model", "prepend_bos", "layers", "tasks", "data", "rules", "versions"} <= set(
        experiment.settings
    )


def test_an_interrupted_run_resumes_and_repeats_nothing(
    llama: Twins, experiment: tv.Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[str] = []
    extracted: list[str] = []
    really_tune, really_extract = tuning.tune, extraction.extract

    def tune(engine: Any, task: Task, *args: Any, **options: Any) -> Any:
        swept.append(task.name)
        if swept == ["upper", "double"]:
            raise KeyboardInterrupt
        return really_tune(engine, task, *args, **options)

    def extract(engine: Any, prompts: Any, substitutes: Any, **options: Any) -> TaskVectors:
        extracted.append(prompts[0].task)
        return really_extract(engine, prompts, substitutes, **options)

    monkeypatch.setattr(experiments, "tune", tune)
    monkeypatch.setattr(extraction, "extract", extract)
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tv.run_experiment(llama.bridge, TASKS, **SMALL, folder=folder)
    actual = tv.run_experiment(llama.bridge, TASKS, **SMALL, folder=folder)
    assert swept == ["upper", "double", "double", "reverse"]
    # Each task once for its vector and once with shuffled outputs.
    assert sorted(extracted) == sorted(["upper", "double", "reverse"] * 2)
    assert actual == experiment
    for name, vectors in experiment.vectors.items():
        assert torch.equal(actual.vectors[name].values, vectors.values)

    swept.clear()
    extracted.clear()
    monkeypatch.setattr(tv.LocalEngine, "forward", refuse)
    assert tv.run_experiment(llama.bridge, TASKS, **SMALL, folder=folder) == experiment
    assert (swept, extracted) == ([], [])
    assert not [path for path in folder.iterdir() if path.suffix not in (".json", ".safetensors")]


def test_a_folder_of_another_run_is_refused(llama: Twins, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = Task("upper", (*WORDS.inputs[:-1], "zz"), str.upper, odd)
    for tasks, options, message in (
        ([WORDS], {"seed": 1}, "seed was 0, is 1"),
        ([WORDS], {"shots": 3}, "shots was 2, is 3"),
        ([WORDS], {"across": True}, "method was extract, is extract_across"),
        ([changed], {}, "data was"),
        ([OTHER], {}, "tasks was .*name the existing ones as well"),
        ([replace(WORDS, accepts=tv.exact_match)], {}, "rules was .*odd.*, is .*exact_match"),
    ):
        with pytest.raises(ValueError, match=message):
            tv.run_experiment(llama.bridge, tasks, **{**SMALL, **options}, folder=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no experiment"):
        tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=tmp_path)
    (folder / "settings.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"settings.json: no settings of an experiment"):
        tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=folder)


def test_a_damaged_result_is_named(llama: Twins, tmp_path: Path) -> None:
    tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=tmp_path)
    kept = tmp_path / "task-upper.json"
    for content in (kept.read_bytes()[:-50], b"[]", b"{}", b"\xff"):
        kept.write_bytes(content)
        with pytest.raises(ValueError, match=r"task-upper.json: a damaged result .* delete it"):
            tv.run_experiment(llama.bridge, [WORDS], **SMALL, folder=tmp_path)


def test_tasks_whose_names_are_not_file_names_get_separate_files(llama: Twins, tmp_path: Path) -> None:
    tasks = [replace(WORDS, name=name) for name in ("a/b", "a:b", "../c", "é" * 200)]
    actual = tv.run_experiment(llama.bridge, tasks, **SMALL, folder=tmp_path / "run")
    assert len(list((tmp_path / "run").glob("task-*.json"))) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert tv.run_experiment(llama.bridge, tasks, **SMALL, folder=tmp_path / "run") == actual


def test_results_are_saved_and_read_back(experiment: tv.Experiment, tmp_path: Path) -> None:
    experiment.save(tmp_path / "e.json")
    loaded = tv.Experiment.load(tmp_path / "e.json")
    assert loaded == experiment
    pd.testing.assert_frame_equal(loaded.to_pandas(), experiment.to_pandas())
    experiment.save(tmp_path / "e.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "e.parquet"), experiment.to_pandas(), check_dtype=False)
    with pytest.raises(ValueError, match="saved as .json or .parquet"):
        experiment.save(tmp_path / "e.xlsx")
    content = (tmp_path / "e.json").read_bytes()
    for wrong in (content[:-9], b"{}", b"[" * 100_000, b"\x00\xff"):
        (tmp_path / "e.json").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"e.json: not a saved experiment, or the file is corrupted"):
            tv.Experiment.load(tmp_path / "e.json")


def test_an_experiment_across_prompts(llama: Twins) -> None:
    actual = tv.run_experiment(llama.bridge, [WORDS], **SMALL, across=True)
    dev, _ = WORDS.split(6 / 13, seed=0)
    prompts = dev.sample(6, shots=2, seed=0, template=tv.PAPER)
    assert torch.equal(actual.vectors["upper"].values, tv.extract_across(llama.bridge, prompts).mean().values)
    assert actual.settings["method"] == "extract_across"
    assert actual.results[0].other_task is None  # there is no other task


def test_first_token_scoring_is_named_for_what_it_is(llama: Twins) -> None:
    task = Task.from_mapping("t", {text: "cold" if i % 2 else "small" for i, text in enumerate(WORDS.inputs)})
    actual = tv.run_experiment(llama.bridge, [task], **{**SMALL, "max_new_tokens": 1})
    assert actual.settings["scoring"] == "first token"
    rule = tv.first_token(llama.bridge, tv.PAPER)
    score = actual.results[0].evaluation.few_shot
    assert score.correct == tuple(rule(text, answer) for text, answer in zip(score.texts, score.answers, strict=True))


def test_the_first_token_rule_scores_dev_and_test(llama: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "first_token", lambda *args: tv.Rule("all", lambda prediction, answer: True))
    task = replace(WORDS, accepts=tv.Rule("none", lambda prediction, answer: False))
    [result] = tv.run_experiment(llama.bridge, [task], **SMALL | {"max_new_tokens": 1}).results
    assert {score.accuracy for score in result.sweep.scores} == {1}
    assert {score.accuracy for score in result.evaluation.conditions.values()} == {1}


def test_another_methods_result_is_refused_on_resume(llama: Twins, tmp_path: Path) -> None:
    methods: list[tv.Method] = [tv.Extraction(substitutes=2), tv.AcrossPrompts()]
    tv.run_experiment(llama.bridge, [WORDS], **SMALL, methods=methods, folder=tmp_path)
    one, other = sorted(path for path in tmp_path.glob("*.json") if path.name != "settings.json")
    one.write_bytes(other.read_bytes())
    with pytest.raises(tv.TvLensError, match="damaged result .it is of the method '.*', not '.*'.*delete it"):
        tv.run_experiment(llama.bridge, [WORDS], **SMALL, methods=methods, folder=tmp_path)


def test_wrong_use_of_an_experiment_says_what_to_do(llama: Twins, tmp_path: Path) -> None:
    few = Task("few", ("a", "b", "c", "d"), str.upper)
    for tasks, options, message in (
        ([], {}, "at least one"),
        ([WORDS, WORDS], {}, "each with a different name"),
        ([WORDS], {"n_dev": 0}, "n_dev=0"),
        ([WORDS], {"shots": 0}, "shots=0"),
        ([WORDS, few], {"shots": 5}, "task 'few': 5 shots and a query need 6"),
        ([WORDS], {"max_new_tokens": 0}, "max_new_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tv.run_experiment(llama.bridge, tasks, **{**SMALL, **options}, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_real_effect_beats_its_controls(demo: TransformerBridge) -> None:
    """The gerund on the demo model, small, but enough to separate patched from zero-shot and from every control."""
    task = tv.library()["present_to_gerund"]
    rival = tv.library()["present_to_past"]
    layers = [5, 17, 18, 19, 20]
    actual = tv.run_experiment(demo, [task, rival], n_dev=20, n_test=30, layers=layers)
    evaluation = actual.results[0].evaluation
    assert isinstance(evaluation.layer, int)
    assert evaluation.layer >= 17
    assert evaluation.few_shot.accuracy >= 0.6
    assert evaluation.patched.accuracy >= 0.4
    assert evaluation.zero_shot.accuracy <= 0.1
    assert evaluation.p_value < 0.01
    assert evaluation.controls["random"].accuracy <= 0.1
    assert evaluation.controls["other task"].accuracy <= 0.2
    assert evaluation.patched.accuracy > evaluation.controls["shuffled"].accuracy

    prompts = rival.sample(20, shots=5, seed=2, template=tv.PAPER)
    clash = tv.conflict(demo, rival, task, prompts, actual.vectors[task.name], evaluation.layer)
    assert clash.plain_task.accuracy >= 0.3
    assert clash.plain_rival.accuracy <= 0.1
    assert clash.patched_task.accuracy <= 0.1
    assert clash.patched_rival.accuracy >= 0.7


def test_shuffled_demonstrations_are_as_wrong_as_can_be() -> None:
    """By hand: of a a b c none need be correct; of a a a b one a must get an a."""
    for outputs, least in (("aabc", 0), ("aaab", 2), ("aabb", 0), ("aaaa", 4), ("abcde", 0), ("aabbc", 0)):
        examples = tuple(tv.Example(str(i), output) for i, output in enumerate(outputs))
        kept = set()
        for seed in range(20):
            [mixed] = tv.shuffle_outputs([Prompt(examples, "q")], seed)
            assert sorted(each.output for each in mixed.examples) == sorted(outputs)
            kept.add(sum(a == b for a, b in zip(mixed.examples, examples, strict=True)))
        assert kept == {least}, outputs


def test_an_evaluation_refuses_the_wrong_number_of_vectors(gpt2: Twins, as_users_run_it: None) -> None:
    original(gpt2.bridge).register_forward_pre_hook(refuse)
    prompts = WORDS.sample(5, shots=2, seed=0)
    with pytest.raises(ValueError, match="3 vectors for 5 prompts"):
        tv.evaluate(gpt2.bridge, WORDS, prompts, TaskVectors(torch.ones(3, 4, 32), "tiny-gpt2", "t"), 1)
    with pytest.raises(ValueError, match="vectors are a Tensor"):
        tv.evaluate(gpt2.bridge, WORDS, prompts, torch.ones(1, 32), 1)  # type: ignore[arg-type]


FEW: dict[str, Any] = {"shots": 2, "n_dev": 4, "n_test": 4, "max_new_tokens": 2}


def test_a_folder_belongs_to_one_models_weights(tmp_path: Path) -> None:
    """Two models may have the same name; one does not get the other's results."""
    tv.run_experiment(make_twins("gpt2", seed=0).bridge, [WORDS], folder=tmp_path, **FEW)
    with pytest.raises(ValueError, match="other settings .weights was [0-9a-f]{16}, is [0-9a-f]{16}"):
        tv.run_experiment(make_twins("gpt2", seed=1).bridge, [WORDS], folder=tmp_path, **FEW)


def test_a_folder_belongs_to_one_rule(gpt2: Twins, tmp_path: Path) -> None:
    yes = replace(WORDS, accepts=tv.Rule("yes", lambda p, a: True))
    no = replace(WORDS, accepts=tv.Rule("no", lambda p, a: False))
    actual = tv.run_experiment(gpt2.bridge, [yes], folder=tmp_path, **FEW)
    assert actual.results[0].evaluation.patched.accuracy == 1
    with pytest.raises(ValueError, match="other settings .rules was"):
        tv.run_experiment(gpt2.bridge, [no], folder=tmp_path, **FEW)


def test_numpy_numbers_and_long_names_can_be_saved(gpt2: Twins, tmp_path: Path, as_users_run_it: None) -> None:
    import numpy as np

    layers: Any = list(np.arange(0, 4, 2))
    seed: Any = np.int64(1)
    task = replace(WORDS, name="北" * 80)
    actual = tv.run_experiment(gpt2.bridge, [task], folder=tmp_path, layers=layers, seed=seed, **FEW)
    again = tv.run_experiment(gpt2.bridge, [task], folder=tmp_path, layers=[0, 2], seed=1, **FEW)
    assert again.results == actual.results
    assert actual.results[0].sweep.layers == (0, 2)
