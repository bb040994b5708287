"""Comparisons of methods: the same prompts for all, choices on dev, and statistics of what was measured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from models import Twins
from results import make_settings, score_of

import tv_lens as tv
from tv_lens import Choice, Comparison, Evaluation, Experiment, Score, Sweep, TaskResult
from tv_lens.evidence.controls import random_like
from tv_lens.evidence.results import tied_choices
from tv_lens.evidence.statistics import accuracy_interval, difference_interval, exact_interval, share_recovered
from tv_lens.evidence.tuning import tune


def odd(prediction: str, answer: str) -> bool:
    """A rule by which a random model is sometimes right."""
    return len(prediction) % 2 == 1


WORDS = tv.Task("upper", tuple(f"{a}{b}" for a in "abcdefgh" for b in "uvwx"), str.upper, odd, category="letters")
OTHER = replace(WORDS, name="double", answer=lambda text: text * 2, category="words")
METHODS = (tv.Extraction(), tv.MeanState(), tv.SeparatorVectors())
SMALL: dict[str, Any] = {
    "shots": 2,
    "n_train": 5,
    "n_dev": 4,
    "n_test": 6,
    "max_new_tokens": 3,
    "strengths": (1.0, 3.0),
    "layers": (0, 2),
}


@pytest.fixture(scope="module")
def comparison(llama: Twins) -> Comparison:
    return tv.compare(llama.bridge, [WORDS, OTHER], METHODS, **SMALL, seeds=(0, 4))


def result_of(comparison: Comparison, task: str, method: str, seed: int) -> TaskResult:
    return comparison.at(task, method).results[comparison.seeds.index(seed)]


def test_a_comparison_equals_its_parts(llama: Twins, comparison: Comparison) -> None:
    """Train, dev and test prompts, the vector, and the choice of layer and strength, each by hand."""
    assert comparison.seeds == (0, 4)
    for seed in comparison.seeds:
        half, rest = WORDS.split(9 / 15, seed=seed)
        prompts = half.sample(9, shots=2, seed=seed)
        train, dev = prompts[:5], prompts[5:]
        test = rest.sample(6, shots=2, seed=seed)
        vector = tv.MeanState()(tv.LocalEngine(llama.bridge), half, train, seed).mean()
        result = result_of(comparison, "upper", "mean_state", seed)
        assert result.train_prompts == tuple(prompt.text for prompt in train)
        assert result.dev_prompts == tuple(prompt.text for prompt in dev)
        assert result.test_prompts == tuple(prompt.text for prompt in test)
        sweeps = [
            tv.sweep_layers(llama.bridge, half, dev, vector, [0, 2], how=tv.add(strength), max_new_tokens=3)
            for strength in (1.0, 3.0)
        ]
        by_strength = sorted((result.sweep, *result.other_sweeps), key=lambda sweep: sweep.strength)
        assert [each.scores for each in by_strength] == [each.scores for each in sweeps]
        best = max(score.accuracy for sweep in sweeps for score in sweep.scores)
        chosen = result.evaluation
        assert isinstance(chosen.layer, int)
        assert sweeps[[1.0, 3.0].index(chosen.strength)].at(chosen.layer).accuracy == best
        texts = tv.patch_generate(
            llama.bridge, test, vector, chosen.layer, how=tv.add(chosen.strength), max_new_tokens=3
        )
        assert chosen.patched.texts == texts.texts
        assert chosen.few_shot.texts == tv.generate(llama.bridge, test, max_new_tokens=3).texts


def test_queries_of_train_dev_and_test_prompts_are_different(comparison: Comparison) -> None:
    for experiment in comparison.experiments:
        for result in experiment.results:
            queries = [
                {text.split("\n")[-1] for text in texts}
                for texts in (result.train_prompts, result.dev_prompts, result.test_prompts)
            ]
            assert sum(map(len, queries)) == len(set.union(*queries)) == 5 + 4 + 6


def test_all_methods_get_the_same_prompts_and_unpatched_answers(comparison: Comparison) -> None:
    for experiment in comparison.experiments:
        for task in comparison.tasks:
            own = [result for result in experiment.results if result.task == task]
            assert len({(r.train_prompts, r.dev_prompts, r.test_prompts, r.queries) for r in own}) == 1
            assert len({(r.evaluation.zero_shot, r.evaluation.few_shot) for r in own}) == 1


def test_measurements_are_those_of_the_public_functions(llama: Twins, comparison: Comparison) -> None:
    half, rest = WORDS.split(9 / 15, seed=4)
    train, test = half.sample(9, shots=2, seed=4)[:5], rest.sample(6, shots=2, seed=4)
    vector = tv.MeanState()(tv.LocalEngine(llama.bridge), half, train, 4).mean()
    scores = result_of(comparison, "upper", "mean_state", 4).evaluation
    assert isinstance(scores.layer, int)
    how = tv.add(scores.strength)
    patched = tv.answer_logprobs(llama.bridge, test, vectors=vector, layer=scores.layer, how=how)
    assert scores.patched.logprobs == pytest.approx(patched.tolist(), abs=1e-3)
    divergences = tv.divergence(llama.bridge, test, vector, scores.layer, how=how)
    assert scores.patched.divergences == pytest.approx(divergences.tolist(), abs=1e-4)
    alone = [prompt.zero_shot() for prompt in test]
    assert scores.zero_shot.logprobs == pytest.approx(tv.answer_logprobs(llama.bridge, alone).tolist(), abs=1e-3)
    assert scores.few_shot.logprobs == pytest.approx(tv.answer_logprobs(llama.bridge, test).tolist(), abs=1e-3)
    assert scores.few_shot.divergences is None


def test_conditions_ask_the_test_queries_in_other_ways(llama: Twins, comparison: Comparison) -> None:
    half, rest = WORDS.split(9 / 15, seed=0)
    train, test = half.sample(9, shots=2, seed=0)[:5], rest.sample(6, shots=2, seed=0)
    vector = tv.MeanState()(tv.LocalEngine(llama.bridge), half, train, 0).mean()
    result = result_of(comparison, "upper", "mean_state", 0)
    assert isinstance(result.evaluation.layer, int)
    assert result.conditions is not None
    expected = tv.across_conditions(
        llama.bridge,
        WORDS,
        test,
        {
            "patched": (
                replace(vector, usage=replace(vector.usage, strength=result.evaluation.strength)),
                result.evaluation.layer,
            )
        },
        conditions=[tv.shuffled_few_shot],
        max_new_tokens=3,
    )
    assert result.conditions.scores["shuffled few-shot"] == expected.scores["shuffled few-shot"]
    separators = result_of(comparison, "upper", "separator_vectors", 0).conditions
    assert separators is not None
    assert list(separators.scores) == ["shuffled few-shot"]  # a query alone has one separator
    assert set(comparison.conditions()["condition"]) == {"shuffled few-shot", "another template"}


def test_a_comparison_resumes(llama: Twins, tmp_path: Path) -> None:
    """After an interruption, after losing results and controls, and with more seeds."""

    def run(*seeds: int, folder: Path | None = tmp_path) -> Comparison:
        return tv.compare(llama.bridge, [WORDS], METHODS[:2], **SMALL, seeds=seeds, folder=folder)

    first = run(0)
    for path in [*tmp_path.glob("seed-0/*mean_state*.json"), *tmp_path.glob("seed-0/*control*")]:
        path.unlink()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("seed-0/*.json")}
    assert len(finished) == 2  # the settings, and the result of the other method
    again = run(0, 4)
    assert again.experiments[0] == first.experiments[0]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert again == run(0, 4, folder=None)


def test_comparisons_are_saved_and_read_back(comparison: Comparison, tmp_path: Path) -> None:
    comparison.save(tmp_path / "c.json")
    loaded = Comparison.load(tmp_path / "c.json")
    assert loaded == comparison
    pd.testing.assert_frame_equal(loaded.estimates(), comparison.estimates())
    comparison.save(tmp_path / "c.parquet")
    table = pd.read_parquet(tmp_path / "c.parquet")
    assert table["accuracy"].tolist() == comparison.estimates()["accuracy"].tolist()
    with pytest.raises(tv.TvLensError, match="saved as .json or .parquet"):
        comparison.save(tmp_path / "c.csv")
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(tv.TvLensError, match=r"c.json: not a saved comparison"):
        Comparison.load(tmp_path / "c.json")


def test_wrong_use_of_a_comparison_says_what_to_do(llama: Twins, as_users_run_it: None) -> None:
    for options, message in (
        ({"seeds": ()}, "seeds are .*at least one"),
        ({"seeds": (1, 1)}, "each of them once"),
        ({"strengths": ()}, "strengths are"),
        ({"strengths": (0.0,)}, "positive numbers"),
        ({"n_train": 0}, "n_train=0"),
    ):
        with pytest.raises(tv.TvLensError, match=message):
            tv.compare(llama.bridge, [WORDS], METHODS, **{**SMALL, **options})
    with pytest.raises(tv.TvLensError, match="give a list"):
        tv.compare(llama.bridge, WORDS, METHODS, **SMALL)  # type: ignore[arg-type]


# The statistics, on results made by hand


def answers(*right: int, n: int = 10) -> Score:
    """The answers of these numbers are right."""
    return Score(("x",) * n, ("y",) * n, tuple(i in right for i in range(n)), (-1.0,) * n, (0.5,) * n)


def made(task: str, method: str, patched: Score, controls: dict[str, Score], *, zero: Score, few: Score) -> TaskResult:
    n = len(patched.correct)
    texts = tuple(f"{task} {i}" for i in range(n))
    return TaskResult(
        task=task,
        category="made",
        sweep=Sweep((1, 2), (score_of(3), score_of(1)), 4),
        evaluation=Evaluation(1, zero_shot=zero, few_shot=few, patched=patched, controls=controls, n_layers=4),
        other_task=None,
        dev_prompts=("d",) * 10,
        test_prompts=texts,
        queries=texts,
        method=method,
    )


def made_comparison(*seeds: dict[tuple[str, str], tuple[Score, dict[str, Score]]]) -> Comparison:
    experiments = []
    for seed, cells in enumerate(seeds):
        methods = dict.fromkeys(method for _, method in cells)
        settings = make_settings(
            tasks=tuple(dict.fromkeys(task for task, _ in cells)),
            methods={method: {} for method in methods},
            method=", ".join(methods),
            seed=seed,
        )
        results = [
            made(task, method, patched, controls, zero=answers(), few=answers(*range(8)))
            for (task, method), (patched, controls) in cells.items()
        ]
        experiments.append(Experiment(settings, tuple(results)))
    return Comparison(tuple(experiments))


def test_estimates_by_hand() -> None:
    """One seed. Method b gets 8 of 10 right and a 2, all of them among b's: 6 discordant pairs, all for b."""
    controls = {"random": answers(), "shuffled": answers(0, 1, 2)}
    actual = made_comparison({("t", "a"): (answers(0, 1), controls), ("t", "b"): (answers(*range(8)), controls)})
    a, b = actual.estimates().to_dict("records")
    assert (a["accuracy"], b["accuracy"], a["few_shot"], a["zero_shot"]) == (0.2, 0.8, 0.8, 0)
    assert b["difference"] == pytest.approx(0.6)
    assert b["p_first"] == b["p_first_holm"] == pytest.approx(2 / 2**6)
    assert math.isnan(a["p_first"]) if isinstance(a["p_first"], float) else a["p_first"] is None
    # Against the shuffled control b wins 5 to 0, against random 8 to 0; the largest p-value counts.
    assert (b["strongest_control"], b["control_accuracy"]) == ("shuffled", pytest.approx(0.3))
    assert b["p_controls"] == pytest.approx(1 / 2**5)
    assert b["p_controls_holm"] == pytest.approx(2 / 2**5)  # of two tests
    assert a["p_controls"] == pytest.approx(1)  # 0 wins to 1
    assert b["p_zero_shot"] == pytest.approx(2 / 2**8)
    assert (a["share"], b["share"]) == (pytest.approx(0.25), pytest.approx(1))
    assert b["detectable"] == pytest.approx(0.5)  # 5 of 10: 1/2**5 < 0.05 < 1/2**4
    assert (b["logprob"], b["logprob_gain"], b["divergence"]) == (-1, 0, 0.5)
    [first, second] = actual.by_method().to_dict("records")
    assert (first["beats_controls"], second["beats_controls"], second["better"]) == (0, 0, 1)


def test_an_interval_over_tasks_ends_at_the_largest_difference() -> None:
    """By hand: differences of -1 and 0 have a t interval of -0.5 -+ 6.35."""
    cells = {("t", "a"): answers(*range(10)), ("t", "b"): answers(), ("u", "a"): answers(), ("u", "b"): answers()}
    actual = made_comparison({key: (correct, {"random": answers()}) for key, correct in cells.items()})
    second = actual.by_method().to_dict("records")[1]
    assert (second["difference"], second["difference_low"], second["difference_high"]) == (-0.5, -1, 1)


def test_an_evaluation_names_the_strongest_control() -> None:
    actual = Evaluation(
        1,
        zero_shot=answers(),
        few_shot=answers(*range(9)),
        patched=answers(*range(6)),
        controls={"weak": answers(0), "strong": answers(*range(5)), "other": answers(9)},
    )
    assert actual.strongest_control == "strong"
    assert actual.p_controls == pytest.approx(1 / 2)  # one discordant pair
    without = replace(actual, controls={})
    assert (without.strongest_control, without.p_controls) == (None, None)


def test_tests_of_an_experiment_are_adjusted_over_its_rows() -> None:
    """By hand: p-values of 1/2**5 and 1/2**8, for two rows: twice the smaller, and the larger as it is."""
    controls = {"random": answers()}
    actual = made_comparison(
        {("t", "a"): (answers(*range(5)), controls), ("u", "a"): (answers(*range(8)), controls)}
    ).experiments[0]
    table = actual.tests()
    assert table["p_controls"].tolist() == pytest.approx([1 / 2**5, 1 / 2**8])
    assert table["p_controls_holm"].tolist() == pytest.approx([1 / 2**5, 2 / 2**8])
    summary = actual.summary()
    assert summary["p controls"].tolist() == ["0.03", "0.004"]
    assert summary["Holm"].tolist() == ["0.03", "0.008"]
    assert summary["p zero-shot"].tolist() == ["0.06", "0.008"]


def test_seeds_count_a_query_once() -> None:
    """The same six wins in two seeds are six queries, and not twelve."""
    cells = {("t", "a"): (answers(*range(6)), {"random": answers()})}
    actual = made_comparison(cells, cells)
    [row] = actual.estimates().to_dict("records")
    assert (row["n"], row["seeds"]) == (20, 2)
    assert row["p_controls"] == pytest.approx(1 / 2**6)
    assert row["detectable"] == pytest.approx(0.5)


def test_experiments_of_different_settings_are_not_a_comparison() -> None:
    one = made_comparison({("t", "a"): (answers(1), {})}).experiments[0]
    other = replace(one, settings=replace(one.settings, shots=3, seed=1))
    with pytest.raises(tv.TvLensError, match=r"differ in \['shots'\]"):
        Comparison((one, other))
    with pytest.raises(tv.TvLensError, match="give each a different one"):
        Comparison((one, one))
    with pytest.raises(tv.TvLensError, match="at least one"):
        Comparison(())
    with pytest.raises(tv.TvLensError, match="'u' with 'a' was not run"):
        Comparison((one,)).at("u", "a")


# Choosing layers and strengths


def test_ties_go_to_the_preferred_choice_then_to_strength_one_then_to_the_lowest_layer() -> None:
    one = Sweep((3, 5), (score_of(4), score_of(4)), 9, 1.0)
    strong = Sweep((3, 5), (score_of(4), score_of(1)), 9, 2.0)
    weak = Sweep((3, 5), (score_of(4), score_of(4)), 9, 0.25)
    assert tied_choices([strong, weak, one]) == (
        Choice(3, 1.0),
        Choice(5, 1.0),
        Choice(3, 2.0),
        Choice(3, 0.25),
        Choice(5, 0.25),
    )
    assert tied_choices([strong, weak, one], Choice(5, 0.25))[0] == Choice(5, 0.25)
    assert tied_choices([strong, weak, one], Choice(5, 2.0))[0] == Choice(3, 1.0)  # which is not among the best


def test_what_overwrites_has_no_strength_and_what_is_added_has_all(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge)
    prompts = WORDS.sample(4, shots=2, seed=0)
    states = tv.MeanState()(engine, WORDS, prompts, 0).mean()
    for vectors, strengths in ((states, (1.0, 3.0)), (replace(states, op="set"), (1.0,))):
        tuned = tune(engine, WORDS, prompts, {"v": vectors}, layers=[1, 2], strengths=(1.0, 3.0), max_new_tokens=2)
        assert tuple(sweep.strength for sweep in tuned["v"].sweeps) == strengths
        assert all(sweep.layers == (1, 2) for sweep in tuned["v"].sweeps)


def test_vectors_and_controls_are_tuned_as_each_of_them_alone(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge)
    prompts = WORDS.sample(4, shots=2, seed=0)
    vectors = tv.MeanState()(engine, WORDS, prompts, 0).mean()
    candidates = {"patched": vectors, "random": random_like(vectors, 4, 0)}
    together = tune(engine, WORDS, prompts, candidates, layers=None, strengths=(1.0, 3.0), max_new_tokens=2)
    for name, each in candidates.items():
        alone = tune(engine, WORDS, prompts, {name: each}, layers=None, strengths=(1.0, 3.0), max_new_tokens=2)
        assert alone[name].sweeps == together[name].sweeps
        assert set(alone[name].ties) == set(together[name].ties)


def test_a_table_over_ties_shows_the_range_on_test(llama: Twins) -> None:
    """With a rule that accepts everything, all layers tie, and all of them are tested."""
    task = replace(WORDS, accepts=tv.Rule("all", lambda prediction, answer: True))
    [result] = tv.run_experiment(llama.bridge, [task], shots=2, n_dev=3, n_test=3, max_new_tokens=2).results
    assert [choice.layer for choice in result.ties] == [0, 1, 2, 3]
    assert result.tied_accuracies == (1, 1, 1, 1)
    mixed = replace(result, tied_accuracies=(1.0, 0.25, 0.5, 1.0))
    assert mixed.test_range == (0.25, 1)
    experiment = Experiment(make_settings(tasks=("upper",)), (mixed,))
    assert experiment.summary()["over ties"].tolist() == ["0.25-1.00"]
    with pytest.raises(tv.TvLensError, match="2 test accuracies for 4 layers"):
        replace(result, tied_accuracies=(1.0, 1.0))


def test_an_evaluation_with_dev_prompts_wants_one_vector(llama: Twins) -> None:
    prompts, dev = WORDS.sample(3, shots=2, seed=0), WORDS.sample(3, shots=2, seed=1)
    each = tv.MeanState()(tv.LocalEngine(llama.bridge), WORDS, prompts, 0)
    with pytest.raises(tv.TvLensError, match=r"3 vectors are given for 'patched'.*vectors.mean\(\)"):
        tv.evaluate(llama.bridge, WORDS, prompts, each, 1, dev=dev)


def test_a_strength_multiplies_what_is_written(llama: Twins) -> None:
    options: dict[str, Any] = {"shots": 2, "n_dev": 4, "n_test": 4, "max_new_tokens": 3, "layers": [1]}
    [result] = tv.run_experiment(llama.bridge, [WORDS], methods=[tv.MeanState()], strengths=[4.0], **options).results
    dev, test = WORDS.split(0.5, seed=0)
    vector = tv.MeanState()(tv.LocalEngine(llama.bridge), dev, dev.sample(4, shots=2, seed=0), 0).mean()
    asked = test.sample(4, shots=2, seed=0)
    texts = tv.patch_generate(llama.bridge, asked, vector, 1, how=tv.add(4.0), max_new_tokens=3).texts
    assert result.evaluation.patched.texts == texts
    assert result.evaluation.strength == 4
    assert set(result.evaluation.to_pandas()["strength"].dropna()) == {4.0}


def test_answers_that_are_repeated_in_every_seed_say_no_more_than_those_of_one() -> None:
    first, second, few = (1, 1, 1, 0, 0, 0, 0, 1), (0, 0, 0, 0, 0, 0, 0, 1), (1,) * 8
    queries = [[str(i) for i in range(8)]]
    one = accuracy_interval([first], queries=queries)
    assert one == pytest.approx(exact_interval([bool(each) for each in first]))
    assert accuracy_interval([first] * 3, queries=queries * 3) == pytest.approx(one)
    assert accuracy_interval([first] * 3).low > one.low  # as if they were different queries
    difference = difference_interval([first], [second], queries=queries)
    assert difference_interval([first] * 3, [second] * 3, queries=queries * 3) == pytest.approx(difference)
    share = share_recovered([first] * 3, [(0,) * 8] * 3, [few] * 3, queries=queries * 3)
    as_if_different = share_recovered([first] * 3, [(0,) * 8] * 3, [few] * 3)
    assert share is not None
    assert as_if_different is not None
    assert share.low < as_if_different.low
    assert share.high > as_if_different.high
