"""Linear task vectors against scikit-learn's ridge regression, read and written by plain Hugging Face hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import Twins, ids_of
from oracle import plain_run, refuse
from sklearn.linear_model import Ridge
from torch import Tensor

import tv_lens as tv
from tv_lens import LinearVector, linear_vector
from tv_lens.edits import Edit, LinearMap
from tv_lens.engines.hooks import writer
from tv_lens.evidence.controls import random_like
from tv_lens.methods.base import method_of
from tv_lens.methods.extraction import read_site

# Inputs of one to four tokens, so that rows are of unequal length.
TASK = tv.Task("upper", tuple(a * n for a in "bdfgjkmpqvxyz" for n in (1, 2, 3, 4)), str.upper)
FEW = TASK.sample(6, shots=2, seed=0)
ASKED = TASK.sample(4, shots=3, seed=1)
SMALL: dict[str, Any] = {"shots": 2, "n_dev": 5, "n_test": 4, "max_new_tokens": 2}


def states(twins: Twins, prompts: Sequence[tv.Prompt]) -> Tensor:
    """The residual stream after every block at the last token, by plain Hugging Face: prompt layer d_model."""
    return torch.stack([plain_run(twins, ids_of(twins.bridge, prompt.text))[0] for prompt in prompts])


def regressions(twins: Twins, prompts: Sequence[tv.Prompt], penalty: float = 5.0) -> list[Ridge]:
    """For each layer scikit-learn's regression of the effect of the demonstrations on the query's own state."""
    few, zero = (states(twins, each).double() for each in (prompts, [p.zero_shot() for p in prompts]))
    return [
        Ridge(alpha=penalty).fit(zero[:, layer].numpy(), (few - zero)[:, layer].numpy())
        for layer in range(len(twins.blocks))
    ]


def with_prediction(
    twins: Twins, ids: Tensor, layer: int, position: int, predict: Callable[[Any], Any], strength: float = 1.0
) -> Tensor:
    """Next-token logits of plain Hugging Face, whose hook adds the prediction from its own activation."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        own = hidden[0, position].double().numpy()[None]
        hidden[0, position] += strength * torch.tensor(predict(own)[0], dtype=torch.float32)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = twins.blocks[layer].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logits: Tensor = twins.plain(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        handle.remove()
    return logits


@pytest.mark.parametrize(("n", "penalty", "rank"), [(6, 0.3, 6), (40, 5.0, 32)])
def test_the_edit_is_the_prediction_of_ridge_regression(llama: Twins, n: int, penalty: float, rank: int) -> None:
    """With fewer prompts than dimensions, and with more."""
    prompts = TASK.sample(n, shots=2, seed=0)
    vectors = linear_vector(llama.bridge, prompts, penalty=penalty)
    assert vectors.maps is not None
    assert (vectors.values.shape, vectors.op) == ((1, 4, 32), "add")
    assert vectors.maps.inward.shape == vectors.maps.outward.shape == (4, rank, 32)
    zero = states(llama, [prompt.zero_shot() for prompt in prompts])
    new = states(llama, ASKED)
    by_layer = regressions(llama, prompts, penalty)
    for layer in (0, 3):
        expected = by_layer[layer]
        linear_map = vectors.maps.at(layer)
        for x in (zero[:, layer], new[:, layer]):
            predicted = vectors.values[0, layer] + x @ linear_map.inward.T @ linear_map.outward
            np.testing.assert_allclose(predicted, expected.predict(x.double().numpy()), atol=2e-3, rtol=1e-3)
        lengths = np.linalg.norm(expected.predict(zero[:, layer].double().numpy()), axis=1)
        assert float(vectors.maps.lengths[layer]) == pytest.approx(lengths.mean(), rel=1e-3)
        actual = tv.patched_logits(llama.bridge, ASKED, vectors, layer)
        for i, prompt in enumerate(ASKED):
            ids = ids_of(llama.bridge, prompt.zero_shot().text)
            logits = with_prediction(llama, ids, layer, ids.shape[1] - 1, expected.predict)
            torch.testing.assert_close(actual[i], logits, atol=2e-3, rtol=1e-3)
            assert (logits - plain_run(llama, ids)[1]).abs().max() > 0.1  # it does something


def test_answers_are_those_of_plain_hooks(gpt2: Twins) -> None:
    """Three tokens, with the edit at the end of the prompt; all prompts together as one by one."""
    vectors = linear_vector(gpt2.bridge, FEW)
    predict = regressions(gpt2, FEW)[1].predict
    actual = tv.patch_generate(gpt2.bridge, ASKED, vectors, 1, max_new_tokens=3)
    for i, prompt in enumerate(ASKED):
        ids = ids_of(gpt2.bridge, prompt.zero_shot().text)
        chosen: list[int] = []
        for _ in range(3):
            row = torch.cat([ids, torch.tensor([chosen], dtype=torch.long)], dim=1)
            chosen.append(int(with_prediction(gpt2, row, 1, ids.shape[1] - 1, predict).argmax()))
        own = [token for token in actual.tokens[i].tolist() if token != 2]  # pads
        assert own == chosen[: len(own)]
        assert tv.patch_generate(gpt2.bridge, [prompt], vectors, 1, max_new_tokens=3)[0] == actual[i]


def test_a_strength_scales_all_that_is_added(llama: Twins) -> None:
    vectors = linear_vector(llama.bridge, FEW)
    predict = regressions(llama, FEW)[2].predict
    for actual, strength in [
        (tv.patched_logits(llama.bridge, ASKED, vectors, 2, how=tv.add(0.5)), 0.5),
        (tv.patched_logits(llama.bridge, ASKED, vectors * 2, 2), 2.0),
        (tv.patched_logits(llama.bridge, ASKED, -vectors, 2), -1.0),
    ]:
        for i, prompt in enumerate(ASKED):
            ids = ids_of(llama.bridge, prompt.zero_shot().text)
            logits = with_prediction(llama, ids, 2, ids.shape[1] - 1, predict, strength)
            torch.testing.assert_close(actual[i], logits, atol=2e-3, rtol=1e-3)


def test_demonstrations_that_change_nothing_give_an_edit_of_zero(llama: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_demonstrations(engine: Any, groups: Any, site: Any, positions: Any) -> Tensor:
        return read_site(engine, [[prompt.zero_shot() for prompt in group] for group in groups], site, positions)

    monkeypatch.setattr("tv_lens.methods.linear.read_site", without_demonstrations)
    vectors = linear_vector(llama.bridge, FEW)
    assert vectors.maps is not None
    assert not vectors.values.any()
    assert not vectors.maps.outward.any()
    assert not vectors.maps.lengths.any()
    queries = [prompt.zero_shot() for prompt in ASKED]
    patched = tv.patched_logits(llama.bridge, ASKED, vectors, 1)
    for i, query in enumerate(queries):
        torch.testing.assert_close(patched[i], plain_run(llama, ids_of(llama.bridge, query.text))[1])


def test_half_precision_models_round_only_the_result() -> None:
    """The parts of what is added nearly cancel: 1000 and -999."""
    offset, x = torch.full((1, 8), 1000.0), torch.full((1, 1, 8), 2.0, dtype=torch.bfloat16)
    outward = torch.full((1, 8), -1000.0 / 16 + 1 / 16)
    edit = Edit(offset, torch.tensor([0]), 0, op="add", linear=LinearMap(torch.ones(1, 8), outward))
    written = writer([edit], width=1, d_head=1)(x)
    assert written.dtype == torch.bfloat16
    assert written.tolist() == [[[3.0] * 8]]  # 2 + 1000 + 16 * outward


def test_some_layers_are_as_in_all_layers(llama: Twins) -> None:
    every, some = linear_vector(llama.bridge, FEW), linear_vector(llama.bridge, FEW, layers=[3, 1])
    assert some.maps is not None
    assert every.maps is not None
    assert some.layers == (1, 3)
    torch.testing.assert_close(some.values, every.values[:, [1, 3]])
    torch.testing.assert_close(some.maps.outward, every.maps.outward[[1, 3]])
    logits = tv.patched_logits(llama.bridge, ASKED, some, 3)
    torch.testing.assert_close(logits, tv.patched_logits(llama.bridge, ASKED, every, 3))


def test_a_file_holds_all_of_it(llama: Twins, tmp_path: Path) -> None:
    vectors = LinearVector(penalty=2.5)(tv.LocalEngine(llama.bridge), TASK, FEW, 0).mean()
    vectors.save(tmp_path / "v.safetensors")
    loaded = tv.TaskVectors.load(tmp_path / "v.safetensors")
    assert loaded.maps is not None
    assert vectors.maps is not None
    for name in ("inward", "outward", "lengths"):
        assert torch.equal(getattr(loaded.maps, name), getattr(vectors.maps, name))
    assert torch.equal(loaded.values, vectors.values)
    assert (loaded.options["penalty"], loaded.provenance) == (2.5, vectors.provenance)
    assert method_of(loaded) == LinearVector(penalty=2.5)


def test_an_experiment_and_its_controls(llama: Twins) -> None:
    actual = tv.run_experiment(llama.bridge, [TASK], methods=[LinearVector()], **SMALL)
    [result] = actual.results
    assert list(result.evaluation.controls) == ["random", "shuffled"]
    vectors = actual.vectors["upper"]
    assert vectors.maps is not None
    noise = random_like(vectors, 7, 0)
    assert noise.maps is None
    torch.testing.assert_close(noise.values.norm(dim=-1), vectors.maps.lengths.expand(7, -1))
    patched = tv.patch_generate(llama.bridge, ASKED, random_like(vectors, 4, 0), 1, max_new_tokens=2)
    evaluated = tv.evaluate(llama.bridge, TASK, ASKED, vectors, 1, max_new_tokens=2)
    assert evaluated.controls["random"].texts == tuple(patched)
    shuffled = linear_vector(llama.bridge, tv.shuffle_outputs(ASKED, 0))
    texts = tv.patch_generate(llama.bridge, ASKED, shuffled, 1, max_new_tokens=2)
    assert evaluated.controls["shuffled"].texts == tuple(texts)
    one = tv.evaluate(llama.bridge, TASK, ASKED[:1], vectors, 1, max_new_tokens=2)
    assert list(one.controls) == ["random"]  # one prompt is too few for a regression


def test_the_divergence_is_between_plain_models(llama: Twins) -> None:
    vectors = linear_vector(llama.bridge, FEW)
    predict = regressions(llama, FEW)[2].predict
    actual = tv.divergence(llama.bridge, ASKED, vectors, 2)
    for i, prompt in enumerate(ASKED):
        few = plain_run(llama, ids_of(llama.bridge, prompt.text))[1].double().log_softmax(dim=-1)
        ids = ids_of(llama.bridge, prompt.zero_shot().text)
        patched = with_prediction(llama, ids, 2, ids.shape[1] - 1, predict).double().log_softmax(dim=-1)
        assert float(actual[i]) == pytest.approx(float((few.exp() * (few - patched)).sum()), rel=1e-2, abs=1e-4)


def test_linear_vectors_are_not_summed_or_written_over_anything(llama: Twins) -> None:
    vectors = linear_vector(llama.bridge, FEW)
    added = tv.MeanState()(tv.LocalEngine(llama.bridge), TASK, FEW, 0).mean()
    for left, right in [(vectors, vectors), (vectors, added), (added, vectors)]:
        with pytest.raises(tv.TvLensError, match="cannot be summed"):
            left + right
    with pytest.raises(tv.TvLensError, match=r"use how=add\(strength\)"):
        tv.patched_logits(llama.bridge, ASKED, vectors, 1, how=tv.overwrite)


def test_bad_input_is_refused_before_the_model_runs(llama: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tv.LocalEngine(llama.bridge)
    monkeypatch.setattr(tv.LocalEngine, "forward", refuse)
    for penalty in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(tv.TvLensError, match="use a number above 0"):
            linear_vector(engine, FEW, penalty=penalty)
        with pytest.raises(tv.TvLensError, match="use a number above 0"):
            LinearVector(penalty=penalty)
    with pytest.raises(tv.TvLensError, match="one prompt is too few"):
        linear_vector(engine, FEW[:1])
    with pytest.raises(tv.TvLensError, match="prompt 1 has no demonstrations"):
        linear_vector(engine, [FEW[0], replace(FEW[1], examples=())])
    with pytest.raises(tv.TvLensError, match="layer 4 is not one of"):
        linear_vector(engine, FEW, layers=[4])
    for layers in ([], [1, 1]):
        with pytest.raises(tv.TvLensError, match="give a list of different ones"):
            linear_vector(engine, FEW, layers=layers)
