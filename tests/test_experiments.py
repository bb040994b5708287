from __future__ import annotations

import pytest
import torch
from conftest import Twins, make_twins, refuse

import tv_lens as tv
from tv_lens import Prompt, Score, Sweep, Task, TaskVectors, Template

TASK = Task("upper", ("a", "bb", "cold", "dog", "quick brown", "fox", "wet", "x"), str.upper)


def test_a_sweep_equals_patching_layer_by_layer(twins: Twins) -> None:
    prompts = TASK.sample(5, shots=2, seed=0)
    vectors = tv.extract(twins.bridge, prompts, TASK.substitutes(prompts, 2, seed=0))
    scaled = TaskVectors(vectors.values * torch.linspace(0.5, 4, 5)[:, None, None], "m", "t")
    for engine in (tv.LocalEngine(twins.bridge), tv.LocalEngine(twins.bridge, prepend_bos=False, batch_size=3)):
        for each in (scaled, scaled.mean()):
            sweep = tv.sweep_layers(engine, TASK, prompts, each, max_new_tokens=4)
            assert sweep.layers == (0, 1, 2, 3)
            for layer in sweep.layers:
                alone = tv.patch_generate(engine, prompts, each, layer, max_new_tokens=4)
                assert sweep.at(layer).texts == alone.texts
    some = tv.sweep_layers(engine, TASK, prompts, scaled, [3, 1], max_new_tokens=4)
    alone = tv.patch_generate(engine, prompts, scaled, 3, max_new_tokens=4)
    assert (some.layers, some.scores[0].texts) == ((3, 1), alone.texts)


def test_a_sweep_runs_each_query_once_and_one_token_a_layer() -> None:
    twins = make_twins("llama")
    prompts = [Prompt((), query, "A", Template("{input} -> {output}")) for query in ("a", "b", "x")]
    length = twins.bridge.to_tokens("a ->").shape[1]
    vectors = TaskVectors(torch.ones(1, 4, 32), "m", "t")
    count = 0

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal count
        count += args[0].shape[0] * args[0].shape[1]

    twins.bridge.original_model.model.layers[0].register_forward_pre_hook(hook)
    tv.sweep_layers(twins.bridge, TASK, prompts, vectors, max_new_tokens=1)
    assert count == 3 * (length - 1) + 3 * 4


def score_of(right: int, n: int = 10) -> Score:
    return Score(("x",) * n, ("y",) * n, (True,) * right + (False,) * (n - right))


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
    found = tv.score(TASK, prompts, [" A ", "BB"])
    assert (found.answers, found.correct) == (("A", "own answer"), (True, False))
    assert found.accuracy == 0.5
    assert found.to_pandas()["correct"].tolist() == [True, False]
    assert "<table" in found._repr_html_()
    with pytest.raises(ValueError, match="1 texts for 2 prompts"):
        tv.score(TASK, prompts, ["A"])


def test_wrong_use_of_a_sweep_says_what_to_do(as_users_run_it: None) -> None:
    twins = make_twins("gpt2")
    vectors = TaskVectors(torch.zeros(2, 4, 32), "m", "t")
    prompts = TASK.sample(2, shots=1, seed=0)
    for layers, message in (([], "at least one"), ([1, 1], "different ones"), ([0, 4], "layer 4 is not one of")):
        with pytest.raises(ValueError, match=message):
            tv.sweep_layers(twins.bridge, TASK, prompts, vectors, layers)
    for wrong in ([1.5], 2):
        with pytest.raises(ValueError, match="layer"):
            tv.sweep_layers(twins.bridge, TASK, prompts, vectors, wrong)  # type: ignore[arg-type]
    twins.bridge.original_model.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match="prompt 1 has .* with 125 more to come, and the context of tiny-gpt2 is 128"):
        tv.sweep_layers(twins.bridge, TASK, [prompts[0], Prompt((), "a b c", "A")], vectors, max_new_tokens=126)
    with pytest.raises(ValueError, match="2 vectors for 3 prompts"):
        tv.sweep_layers(twins.bridge, TASK, TASK.sample(3, shots=1, seed=0), vectors)
    with pytest.raises(ValueError, match="at least one Prompt"):
        tv.sweep_layers(twins.bridge, TASK, [], vectors)
