"""Mean differences and in-context vectors, against plain Hugging Face hooks and scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Twins, ids_of, original
from oracle import plain_run, refuse
from oracle_edits import PlainEdit, hooked_run
from sklearn.decomposition import PCA
from torch import Tensor

import tv_lens as tv
from tv_lens import Example, Prompt
from tv_lens.evidence.controls import Treatment
from tv_lens.methods.base import method_of
from tv_lens.shuffling import pair_within_sides, swap_demonstrations

POSITIVE = ["hot", "the quick brown fox", "a", "tall -> short"]
NEGATIVE = ["cold", "a b", "wet and dry", "x y z -> y"]
PAIRS = tv.ContrastivePairs("size", tuple(POSITIVE), tuple(NEGATIVE))
QUERIES = ["big ->", "a", "hot -> cold\nbig ->"]
LETTERS = tv.Task("upper", ("ab", "cold", "dog e", "quick", "fox", "tall", "g", "h"), str.upper)
PROMPTS = LETTERS.sample(4, shots=3, seed=0)
OTHER: Any = "sum"
SMALL: dict[str, Any] = {"shots": 3, "n_dev": 4, "n_test": 4, "max_new_tokens": 2}


def states(twins: Twins, texts: Sequence[str], bos: bool | None = None) -> Tensor:
    """The oracle for states: text layer d_model, one unpadded text at a time."""
    return torch.stack([plain_run(twins, ids_of(twins.bridge, text, bos))[0] for text in texts])


def unit(vector: Tensor) -> Tensor:
    scaled: Tensor = vector / vector.norm(dim=-1, keepdim=True)
    return scaled


def turned(x: Tensor, icv: Tensor, strength: float) -> Tensor:
    """The formula of in-context vectors, for activations of shape (..., d_model)."""
    cosine = (x @ -icv) / (x.norm(dim=-1) * icv.norm())
    y = strength * (1 + cosine.clamp(min=0))[..., None] * unit(icv)
    result: Tensor = x.norm(dim=-1, keepdim=True) * unit(unit(x) + y)
    return result


def turned_logits(twins: Twins, ids: Tensor, icv: Tensor, strength: float, until: int) -> Tensor:
    """The oracle for in-context vectors: plain hooks that turn the output of every block before position `until`."""

    def hook_for(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = torch.cat([turned(hidden[:, :until], icv[layer], strength), hidden[:, until:]], dim=1)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    handles = [block.register_forward_hook(hook_for(layer)) for layer, block in enumerate(twins.blocks)]
    try:
        with torch.no_grad():
            return twins.plain(input_ids=ids, use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        for handle in handles:
            handle.remove()


# Mean differences


@pytest.mark.parametrize("bos", [True, False])
def test_a_mean_difference_is_that_of_the_last_states(llama: Twins, bos: bool) -> None:
    """Of texts of unequal length, alone or in padded batches; the lists may differ in length."""
    expected = states(llama, POSITIVE, bos).mean(dim=0) - states(llama, NEGATIVE[:3], bos).mean(dim=0)
    for batch_size in (1, 3, None):
        engine = tv.LocalEngine(llama.bridge, batch_size=batch_size, prepend_bos=bos, progress=False)
        made = tv.mean_difference(engine, POSITIVE, NEGATIVE[:3])
        torch.testing.assert_close(made.values[0], expected, atol=1e-5, rtol=1e-4)
    assert (len(made), made.layers, made.op) == (1, (0, 1, 2, 3), "add")
    assert made.usage == tv.Usage(positions="all", every_step=True, strength=1.0)
    assert made.prompts == (*POSITIVE, *NEGATIVE[:3])
    assert made.options["positive"] == 4


def test_pairs_are_two_lists(llama: Twins, tmp_path: Path) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    for direction in ("mean", "pca"):
        made = tv.mean_difference(engine, PAIRS, direction=direction, strength=3.0)
        assert torch.equal(made.values, tv.mean_difference(engine, POSITIVE, NEGATIVE, direction=direction).values)
    assert (made.task, made.usage.strength, str(made.provenance)[:16]) == ("size", 3.0, "1 * size (mean_d")
    made.save(tmp_path / "v.safetensors")
    loaded = tv.TaskVectors.load(tmp_path / "v.safetensors")
    assert (loaded.usage, loaded.template, loaded.prompts) == (made.usage, made.template, made.prompts)


def test_the_principal_direction_is_that_of_centered_pairs(llama: Twins) -> None:
    """As repeng computes it: states in turn, each pair minus its mean, then scikit-learn's first component."""
    made = tv.mean_difference(llama.bridge, PAIRS, direction="pca")
    positive, negative = states(llama, POSITIVE), states(llama, NEGATIVE)
    center = (positive + negative) / 2
    for layer in range(4):
        stacked = np.empty((8, 32))
        stacked[::2], stacked[1::2] = (positive - center)[:, layer], (negative - center)[:, layer]
        component = torch.tensor(PCA(n_components=1).fit(stacked).components_[0], dtype=torch.float32)
        actual = made.values[0, layer]
        assert float(actual.norm()) == pytest.approx(1, abs=1e-5)
        assert abs(float(actual @ component)) == pytest.approx(1, abs=1e-5)
        assert float(((positive - negative)[:, layer] @ actual).mean()) > 0
    other_way = tv.mean_difference(llama.bridge, NEGATIVE, POSITIVE, direction="pca")
    torch.testing.assert_close(other_way.values, -made.values)


@pytest.mark.parametrize("direction", ["mean", "pca"])
def test_a_mean_difference_is_added_everywhere(llama: Twins, direction: Any) -> None:
    """At one layer, at every token of the prompt and at every generated one."""
    made = tv.mean_difference(llama.bridge, PAIRS, direction=direction, strength=1.5)
    vector, layer = 1.5 * made.values[0, 2], 2
    actual = tv.patched_logits(llama.bridge, QUERIES, made, layer)
    tokens = tv.patch_generate(llama.bridge, QUERIES, made, layer, max_new_tokens=3).tokens
    for row, text in enumerate(QUERIES):
        ids = ids_of(llama.bridge, text)
        for step in range(3):
            edits = [PlainEdit("resid_post", layer, position, vector, "add") for position in range(ids.shape[1])]
            logits = hooked_run(llama, ids, edits)[1][-1]
            if not step:
                torch.testing.assert_close(actual[row], logits, atol=1e-4, rtol=1e-4)
            assert int(logits.argmax()) == tokens[row, step]
            if int(tokens[row, step]) == 1:
                break
            ids = torch.cat([ids, tokens[row, step : step + 1][None]], dim=1)


# In-context vectors


def test_an_in_context_vector_is_a_component_plus_the_mean(llama: Twins) -> None:
    expected = []
    differences = states(llama, POSITIVE) - states(llama, NEGATIVE)
    for layer in range(4):
        fitted = PCA(n_components=1).fit(differences[:, layer].double().numpy())
        component, mean = torch.tensor(fitted.components_[0]), torch.tensor(fitted.mean_)
        expected.append(mean + (component if component @ mean >= 0 else -component))
    for batch_size in (1, None):
        engine = tv.LocalEngine(llama.bridge, batch_size=batch_size, progress=False)
        made = tv.in_context_vector(engine, PAIRS)
        torch.testing.assert_close(made.values[0], torch.stack(expected).float(), atol=1e-4, rtol=1e-4)
    assert made.op == "rotate"
    assert made.usage == tv.Usage(positions="all", strength=0.1, every_step=True, span="together")


def test_in_context_vectors_of_prompts_take_every_demonstration_once(llama: Twins) -> None:
    shots = tuple(Example(*pair) for pair in zip(NEGATIVE, POSITIVE, strict=True))
    prompts = [Prompt(shots[:2], "q", task="size"), Prompt(shots[1:], "r", task="size"), Prompt((), "s", task="size")]
    made = tv.in_context_vector(llama.bridge, prompts)
    torch.testing.assert_close(made.values, tv.in_context_vector(llama.bridge, PAIRS).values)
    assert (made.task, made.options["demonstrations"]) == ("size", 4)


def test_equal_differences_are_their_mean(llama: Twins) -> None:
    """One demonstration, or the same twice, has no principal component."""
    expected = (states(llama, POSITIVE[1:2]) - states(llama, NEGATIVE[1:2]))[0]
    for times in (1, 2):
        pairs = tv.ContrastivePairs("p", (POSITIVE[1],) * times, (NEGATIVE[1],) * times)
        made = tv.in_context_vector(tv.LocalEngine(llama.bridge, batch_size=3, progress=False), pairs)
        torch.testing.assert_close(made.values[0], expected, atol=1e-4, rtol=1e-4)


def test_activations_are_turned_at_all_positions_of_all_blocks(llama: Twins) -> None:
    """Next-token logits of rows of unequal length, together and one by one, and the answer's tokens behind them."""
    made = tv.in_context_vector(llama.bridge, PAIRS, strength=0.4)
    icv, how = made.values[0], tv.rotate(0.4, every_step=False)
    answers = [" cold and", "b c", " the small fox"]
    together = tv.patched_logits(llama.bridge, QUERIES, made, 3)
    logprobs = tv.answer_logprobs(llama.bridge, QUERIES, answers, vectors=made, layer=3)
    once = tv.answer_logprobs(llama.bridge, QUERIES, answers, vectors=made, layer=3, how=how)
    assert float((logprobs - once).abs().max()) > 1e-3
    for row, (text, answer) in enumerate(zip(QUERIES, answers, strict=True)):
        prompt, whole = ids_of(llama.bridge, text), ids_of(llama.bridge, text + answer)
        length = prompt.shape[1]
        assert torch.equal(whole[:, :length], prompt)
        assert whole.shape[1] - length > 1
        expected = turned_logits(llama, prompt, icv, 0.4, length)[-1]
        torch.testing.assert_close(together[row], expected, atol=1e-4, rtol=1e-4)
        alone = tv.patched_logits(llama.bridge, [text], made, 3)[0]
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
        for actual, until in ((logprobs, whole.shape[1]), (once, length)):
            scores = turned_logits(llama, whole, icv, 0.4, until).log_softmax(dim=-1)[length - 1 : -1]
            total = scores.gather(1, whole[0, length:, None]).sum()
            assert float(actual[row]) == pytest.approx(float(total), abs=1e-3)


def test_norms_are_kept(llama: Twins) -> None:
    """What each block gives to the next is turned but not longer or shorter, read through plain hooks."""
    made = tv.in_context_vector(llama.bridge, PAIRS, strength=0.5)
    model = original(llama.bridge).model
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}

    def keep_output(layer: int) -> Any:
        return lambda module, args, output: before.update({layer: output[0] if isinstance(output, tuple) else output})

    def keep_input(layer: int) -> Any:
        return lambda module, args, kwargs: after.update({layer: args[0] if args else kwargs["hidden_states"]})

    following = [*model.layers[1:], model.norm]
    handles = [
        *(each._original_component.register_forward_hook(keep_output(i)) for i, each in enumerate(model.layers)),
        *(each.register_forward_pre_hook(keep_input(i), with_kwargs=True) for i, each in enumerate(following)),
    ]
    try:
        tv.patched_logits(tv.LocalEngine(llama.bridge, progress=False), QUERIES[2:], made, 3)
    finally:
        for handle in handles:
            handle.remove()
    length = ids_of(llama.bridge, QUERIES[2]).shape[1]
    for layer in range(4):
        assert after[layer].shape == before[layer].shape == (1, length, 32)
        torch.testing.assert_close(after[layer].norm(dim=-1), before[layer].norm(dim=-1), atol=1e-4, rtol=1e-5)
        cosines = torch.nn.functional.cosine_similarity(after[layer], before[layer], dim=-1)
        assert float(cosines.max()) < 0.99


@pytest.mark.parametrize("make", [tv.mean_difference, tv.in_context_vector])
def test_strength_0_changes_nothing(llama: Twins, make: Any) -> None:
    made = make(llama.bridge, PAIRS, strength=0.0)
    plain = torch.stack([plain_run(llama, ids_of(llama.bridge, text))[1] for text in QUERIES])
    torch.testing.assert_close(tv.patched_logits(llama.bridge, QUERIES, made, 3), plain, atol=1e-4, rtol=1e-4)
    changed = tv.patched_logits(llama.bridge, QUERIES, replace(made, usage=replace(made.usage, strength=0.5)), 3)
    assert float((changed - plain).abs().max()) > 0.01


# As methods


@pytest.mark.parametrize("direction", ["mean", "pca"])
def test_the_methods_compare_inputs_and_outputs(llama: Twins, direction: Any) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    shown = list(dict.fromkeys(example for prompt in PROMPTS for example in prompt.examples))
    assert len(shown) < 12  # some are shown twice
    inputs, outputs = [each.input for each in shown], [each.output for each in shown]
    method = tv.MeanDifference(strength=2.0, direction=direction)
    made = method(engine, LETTERS, PROMPTS, 0)
    by_hand = tv.mean_difference(engine, outputs, inputs, direction=direction, strength=2.0)
    assert torch.equal(made.values, by_hand.values)
    assert (made.task, made.usage, method_of(made.mean())) == ("upper", by_hand.usage, method)
    turn = tv.InContextVector(strength=0.3)
    assert torch.equal(turn(engine, LETTERS, PROMPTS, 0).values, tv.in_context_vector(engine, PROMPTS).values)
    assert method_of(turn(engine, LETTERS, PROMPTS, 0).mean()) == turn


def whole_answers(prediction: str, answer: str) -> bool:
    """A rule that cannot decide early, so that sweeps give whole answers."""
    return prediction == answer


def test_an_experiment_compares_both_methods(llama: Twins, tmp_path: Path) -> None:
    task = replace(LETTERS, accepts=whole_answers)
    methods = [tv.MeanDifference(strength=2.0), tv.InContextVector()]
    options: dict[str, Any] = {"methods": methods, "folder": tmp_path / "run", **SMALL}
    actual = tv.run_experiment(llama.bridge, [task], **options)
    mean, turn = actual.results
    assert (mean.sweep.layers, turn.sweep.layers) == ((0, 1, 2, 3), (3,))
    assert mean.evaluation.layer in (0, 1, 2, 3)
    assert turn.evaluation.layer == (0, 1, 2, 3)
    assert list(mean.evaluation.controls) == list(turn.evaluation.controls) == ["random", "shuffled"]
    vector = actual.vectors["upper, in_context_vector"]
    dev, _ = task.split(0.5, seed=0)
    texts = tv.patch_generate(llama.bridge, dev.sample(4, shots=3, seed=0), vector, 3, max_new_tokens=2)
    assert turn.sweep.scores[0].texts == tuple(texts)
    assert tv.run_experiment(llama.bridge, [task], **options) == actual  # from its folder


def test_the_control_swaps_half_of_the_demonstrations(llama: Twins) -> None:
    """Permuted outputs would give the same mean difference."""
    engine, method = tv.LocalEngine(llama.bridge, progress=False), tv.MeanDifference()
    made = method(engine, LETTERS, PROMPTS, 0)
    permuted = method(engine, LETTERS, tv.shuffle_outputs(PROMPTS, 0), 0)
    shown = {example for prompt in PROMPTS for example in prompt.examples}
    mixed = method.shuffled(PROMPTS, 1)
    assert mixed is not None
    assert mixed == swap_demonstrations(PROMPTS, 1)
    assert mixed != method.shuffled(PROMPTS, 2)
    swapped = {Example(each.output, each.input) for prompt in mixed for each in prompt.examples} & shown
    assert len(swapped) == len(shown) // 2
    for before, after in zip(PROMPTS, mixed, strict=True):
        expected = [Example(each.output, each.input) if each in swapped else each for each in before.examples]
        assert list(after.examples) == expected
        assert after.query == before.query
    treatment = Treatment(engine, LETTERS, PROMPTS, made, method, seed=1, n=4)
    control = tv.ShuffledDemonstrations()(treatment)
    assert control is not None
    signs = [-1 if each in swapped else 1 for each in shown]
    differences = states(llama, [each.output for each in shown]) - states(llama, [each.input for each in shown])
    mean = (differences * torch.tensor(signs)[:, None, None]).mean(dim=0)
    torch.testing.assert_close(control.values[0], mean, atol=1e-5, rtol=1e-4)
    assert float(permuted.values.norm()) > float(control.values.norm())


@pytest.mark.parametrize("method", [tv.MeanDifference(direction="pca"), tv.InContextVector()], ids=str)
def test_a_component_is_controlled_by_pairs_within_inputs_and_outputs(llama: Twins, method: Any) -> None:
    """Swapped pairs would have the same principal component."""
    engine = tv.LocalEngine(llama.bridge, progress=False)
    mixed = method.shuffled(PROMPTS, 1)
    assert mixed != method.shuffled(PROMPTS, 2)
    shown = {example for prompt in PROMPTS for example in prompt.examples}
    inputs, outputs = {each.input for each in shown}, {each.output for each in shown}
    pairs = {example for prompt in mixed for example in prompt.examples}
    assert len(pairs) == len(shown)
    assert all(set(pair) <= inputs or set(pair) <= outputs for pair in pairs)
    assert sorted(pair.input for pair in pairs) == sorted(pair.output for pair in pairs)
    made, control = (method(engine, LETTERS, prompts, 0).values[0] for prompts in (PROMPTS, mixed))
    cosines = torch.nn.functional.cosine_similarity(made, control, dim=-1)
    assert float(cosines.abs().max()) < 0.95
    assert method.shuffled([Prompt((Example("a", "b"), Example("c", "d"), Example("e", "f")), "q")], 0) is None
    with pytest.raises(tv.TvLensError, match="4 or more are paired anew"):
        pair_within_sides([Prompt((Example("a", "b"),), "q")], 0)


def test_inverse_demonstrations_are_swapped_together() -> None:
    shots = (Example("a", "b"), Example("b", "a"), Example("c", "d"))
    for seed in range(6):
        [mixed] = swap_demonstrations([Prompt(shots, "q")], seed)
        assert len(set(mixed.examples)) == 3
    method = tv.MeanDifference()
    assert method.shuffled([Prompt(shots[:2], "q")], 0) is None
    assert method.shuffled([Prompt(shots[:1], "q")], 0) is None
    with pytest.raises(tv.TvLensError, match="show 1 different demonstrations"):
        swap_demonstrations([Prompt(shots[:2], "q")], 0)


# What is refused


def test_sides_that_the_model_does_not_distinguish_have_no_direction(llama: Twins) -> None:
    with pytest.raises(tv.TvLensError, match="does not distinguish the two sides"):
        tv.mean_difference(llama.bridge, ["a", "b"], ["b", "a"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: tv.mean_difference(model, POSITIVE, []), "at least one Prompt"),
        (lambda model: tv.mean_difference(model, POSITIVE), "negative texts are missing"),
        (lambda model: tv.mean_difference(model, PAIRS, NEGATIVE), "holds both lists"),
        (lambda model: tv.mean_difference(model, POSITIVE, NEGATIVE, direction=OTHER), "'sum'; use 'mean' or 'pca'"),
        (lambda model: tv.mean_difference(model, PAIRS, strength=float("nan")), "strength is nan"),
        (lambda model: tv.mean_difference(model, POSITIVE, ["a"], direction="pca"), "4 positive and 1 negative"),
        (lambda model: tv.mean_difference(model, ["a"], ["a"], direction="pca"), "both texts of every pair are equal"),
        (lambda model: tv.mean_difference(model, ["a"], ["a" * 200]), "prompt 1 has .* context"),
        (lambda model: tv.in_context_vector(model, PROMPTS, strength=float("inf")), "strength is inf"),
        (lambda model: tv.in_context_vector(model, [Prompt((), "q")]), "have no demonstrations"),
        (lambda model: tv.in_context_vector(model, [Prompt((Example("a", "a"),), "q")]), "every pair are equal"),
        (lambda model: tv.MeanDifference(direction=OTHER), "'sum'; use 'mean' or 'pca'"),
        (lambda model: tv.InContextVector(strength=float("nan")), "strength is nan"),
    ],
)
def test_what_has_no_direction_is_refused_before_the_model_runs(
    llama: Twins, monkeypatch: pytest.MonkeyPatch, as_users_run_it: None, call: Any, message: str
) -> None:
    monkeypatch.setattr(tv.LocalEngine, "forward", refuse)
    with pytest.raises(tv.TvLensError, match=message):
        call(llama.bridge)
