"""Intervals and tests of comparisons: hand calculations, other implementations, and simulations with a known truth."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float
from scipy import stats
from transformer_lens.utilities.statistics import sign_flip_permutation_pvalue

from tv_lens import TvLensError
from tv_lens.evidence.statistics import (
    Interval,
    Seeds,
    accuracy_interval,
    better_p_value,
    difference_interval,
    different_p_value,
    exact_interval,
    holm,
    intersection_union,
    mean_interval,
    non_inferiority,
    paired_p_value,
    share_recovered,
    smallest_detectable,
)

Answers = Bool[np.ndarray, "seed query"]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def answers(*counts: tuple[int, int]) -> list[list[int]]:
    """For each seed (right, all): so many right answers, then wrong ones."""
    return [[1] * right + [0] * (n - right) for right, n in counts]


def pairs(wins: int, losses: int, n: int) -> tuple[list[int], list[int]]:
    """Two conditions of one seed: the first wins, loses, and then both are right."""
    rest = [1] * (n - wins - losses)
    return [1] * wins + [0] * losses + rest, [0] * wins + [1] * losses + rest


def numbered(values: Seeds) -> list[list[str]]:
    """A different query for each answer of a seed; the same queries in each seed."""
    return [[str(i) for i in range(len(seed))] for seed in values]


def covers(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] - 1e-9 <= truth <= interval[1] + 1e-9


# Accuracies


@pytest.mark.parametrize(("right", "n"), [(0, 13), (7, 13), (13, 13), (1, 1), (49, 50)])
def test_one_seed_has_clopper_and_pearsons_interval(right: int, n: int) -> None:
    expected = stats.binomtest(right, n).proportion_ci(0.95)
    assert accuracy_interval(answers((right, n))) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert exact_interval([i < right for i in range(n)]) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_an_accuracy_over_seeds_has_the_effective_number_of_answers() -> None:
    # Accuracies 0.4, 0.6 and 0.8: variance 0.04, of the mean 0.04 / 3 = 0.01333. Binomial: 0.24 / 30 = 0.008.
    # t is 4.3027 with 2 degrees of freedom and 2.0452 with 29, so the effective number of answers is
    # 30 * 0.008 / (0.01333 * (4.3027 / 2.0452) ** 2) = 4.067.
    actual = accuracy_interval(answers((4, 10), (6, 10), (8, 10)))
    n = 4.0671
    expected = stats.beta.ppf(0.025, 0.6 * n, 0.4 * n + 1), stats.beta.ppf(0.975, 0.6 * n + 1, 0.4 * n)
    assert actual == pytest.approx(expected, abs=1e-4)


def test_seeds_that_agree_have_the_interval_of_all_answers() -> None:
    assert accuracy_interval(answers((6, 10), (6, 10), (6, 10))) == pytest.approx(accuracy_interval(answers((18, 30))))


def test_seeds_without_an_error_count_as_six_answers_each() -> None:
    low, high = accuracy_interval(answers((50, 50), (50, 50), (50, 50)))
    assert (low, high) == pytest.approx((0.025 ** (1 / 18), 1.0))


def test_seeds_that_differ_widen_the_interval() -> None:
    widths = [np.ptp(accuracy_interval(answers((10 - d, 20), (10, 20), (10 + d, 20)))) for d in range(0, 10, 3)]
    assert widths == sorted(widths)
    assert widths[-1] > 3 * widths[0]


# Differences


def test_the_bootstrap_has_two_imagined_queries() -> None:
    """All resamples of 2 + 2 pairs, by hand: a win, a tie, and the imagined win and loss."""
    totals = sorted(map(sum, itertools.product((1, 0, 1, -1), repeat=4)))
    # Student's t with 3 degrees of freedom is 1.5 at this confidence, and 4 of 4 - 1 pairs make it 1.7321.
    confidence = 1 - 2 * float(stats.t.sf(1.5, 3))
    skipped = math.floor(float(stats.norm.sf(1.5 * math.sqrt(4 / 3))) * len(totals))
    expected = max(totals[skipped] / 4, -1), min(totals[-1 - skipped] / 4, 1)
    # One resample has total -4, 4 have -3 and 14 have -2: the eleventh is -2. 16 have 4.
    assert (skipped, expected) == (10, (-0.5, 1.0))
    assert difference_interval([[1, 1]], [[0, 1]], confidence=confidence) == pytest.approx(expected)


def test_a_difference_over_seeds_is_at_least_as_wide_as_students_t() -> None:
    first, second = answers((20, 30), (26, 30), (23, 30)), answers((10, 30), (10, 30), (10, 30))
    # The seeds' differences are 10, 16 and 13 of 30: mean 0.43333, deviation 0.1, t = 4.3027.
    margin = 4.3027 * 0.1 / math.sqrt(3)
    low, high = difference_interval(first, second)
    assert low <= 0.43333 - margin + 1e-5
    assert high >= 0.43333 + margin - 1e-5


@pytest.mark.parametrize("seeds", [1, 3])
def test_no_interval_of_answers_is_a_point(seeds: int) -> None:
    right, wrong = answers(*[(20, 20)] * seeds), answers(*[(0, 20)] * seeds)
    for first, second in ((right, right), (right, wrong), (wrong, wrong), (wrong, right)):
        low, high = difference_interval(first, second)
        assert high - low > 0.1
        assert covers((low, high), float(np.mean(first) - np.mean(second)))


def test_numbers_have_at_least_students_interval() -> None:
    values = [-1.0, -2.5, -0.5, -4.0, -1.5]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    low, high = mean_interval([values])
    assert low <= expected.low
    assert high >= expected.high
    assert high - low < 1.3 * (expected.high - expected.low)
    seeds = [[-1.0, -2.0], [-3.0, -4.0], [-2.0, -2.0]]
    expected = stats.ttest_1samp([-1.5, -3.5, -2.0], 0).confidence_interval(0.95)
    assert mean_interval(seeds) == pytest.approx((expected.low, expected.high))


def test_a_single_number_has_no_bounds() -> None:
    assert mean_interval([[-1.5]]) == (-math.inf, math.inf)
    assert mean_interval([[-1.5, -1.5]]) == (-1.5, -1.5)


def test_nearly_equal_numbers_do_not_warn() -> None:
    """Scipy's bootstrap divides 0 by 0 for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        low, high = mean_interval([[0.0, 0.0, 0.0, 0.0, 1e-9]])
    assert low < 2e-10 < high


def test_differences_of_numbers_are_paired() -> None:
    first, second = [[-1.0, -5.0, -9.0, -13.0]], [[-2.0, -6.5, -10.0, -14.5]]
    assert difference_interval(first, second) == mean_interval([[1.0, 1.5, 1.0, 1.5]])
    low, high = difference_interval(first, second)
    assert 0 < low < 1.25 < high


# Shares


def test_a_share_is_of_the_few_shot_gain() -> None:
    share = share_recovered(answers((14, 20)), answers((2, 20)), answers((18, 20)))
    assert share is not None
    assert share.value == pytest.approx(12 / 16)
    assert share.low < 0.75 < share.high


def test_there_is_no_share_without_a_gain() -> None:
    assert share_recovered(answers((5, 20)), answers((9, 20)), answers((10, 20))) is None
    assert share_recovered(answers((5, 20)), answers((18, 20)), answers((2, 20))) is None


def test_a_share_over_seeds_has_fiellers_interval() -> None:
    """At both ends the t statistic of recovered - share * gain, over seeds, is the quantile."""
    zero, few = answers((0, 400), (40, 400), (20, 400)), answers((360, 400), (340, 400), (390, 400))
    patched = answers((100, 400), (300, 400), (210, 400))
    share = share_recovered(patched, zero, few)
    assert share is not None
    recovered, gains = np.array([10, 26, 19]) / 40, np.array([36, 30, 37]) / 40
    for end in (share.low, share.high):
        statistic = stats.ttest_1samp(recovered - end * gains, 0).statistic
        assert abs(statistic) == pytest.approx(stats.t.ppf(0.975, 2))


def test_a_share_of_numbers() -> None:
    zero, few = [[-5.0, -6.0, -7.0, -5.5]], [[-1.0, -1.5, -2.0, -1.0]]
    patched = [[-3.0, -4.0, -4.0, -3.5]]
    share = share_recovered(patched, zero, few)
    assert share is not None
    assert share.value == pytest.approx((2 + 2 + 3 + 2) / (4 + 4.5 + 5 + 4.5))
    assert 0 < share.low < share.value < share.high < 1


# Tests


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_with_one_seed_the_tests_are_mcnemars(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    wins, losses = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    one_sided = stats.binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1.0
    queries = numbered([first])
    assert better_p_value([first], [second], queries) == pytest.approx(one_sided, rel=1e-9)
    assert different_p_value([first], [second], queries) == pytest.approx(paired_p_value(first, second), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 6))
def test_with_several_seeds_the_tests_flip_the_signs_of_queries(draw: int, n_seeds: int, n: int) -> None:
    """A query's differences are added over seeds, and all 2**queries signs are tried (TransformerLens)."""
    random = np.random.default_rng(draw)
    first, second = random.integers(2, size=(2, n_seeds, n)).tolist()
    queries = [random.choice(list(LETTERS[:9]), size=n, replace=False).tolist() for _ in range(n_seeds)]
    sums = dict.fromkeys(LETTERS[:9], 0.0)
    for texts, ones, others in zip(queries, first, second, strict=True):
        for text, one, other in zip(texts, ones, others, strict=True):
            sums[text] += one - other
    effects = torch.tensor(list(sums.values()), dtype=torch.float64)
    for function, kind in ((better_p_value, "greater"), (different_p_value, "two-sided")):
        expected = float(sign_flip_permutation_pvalue(effects, alternative=kind))
        assert function(first, second, queries) == pytest.approx(expected)


def test_a_repeated_query_counts_once() -> None:
    first, second = [[1, 1, 1, 1, 1, 0]], [[0, 0, 0, 0, 0, 1]]
    once = better_p_value(first, second, numbered(first))
    assert once == pytest.approx(7 / 64)
    assert better_p_value(first * 3, second * 3, numbered(first * 3)) == pytest.approx(once)
    distinct = [[f"{seed} {i}" for i in range(6)] for seed in range(3)]
    assert better_p_value(first * 3, second * 3, distinct) < 0.01


def test_numbers_are_tested_by_their_signs() -> None:
    first, second = [[0.5, 1.25, 2.0, 0.75]], [[0.25, 1.0, 0.5, 0.5]]
    assert better_p_value(first, second, numbered(first)) == pytest.approx(1 / 16)
    assert different_p_value(first, second, numbered(first)) == pytest.approx(2 / 16)
    assert better_p_value(second, first, numbered(first)) == pytest.approx(1.0)


def test_holms_adjustment_by_hand() -> None:
    # Smallest first: 3 * 0.01, 2 * 0.03, and 1 * 0.04, which is not below the one before.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert holm([0.5, 0.02, 0.9, 0.02]) == pytest.approx((1.0, 0.08, 1.0, 0.08))
    assert holm([0.2]) == pytest.approx((0.2,))


def test_an_intersection_union_test_has_the_largest_p_value() -> None:
    assert intersection_union([0.01, 0.2, 0.03]) == 0.2


def test_the_smallest_detectable_difference() -> None:
    # Five wins and no loss: 1 / 32 is below 0.05, 1 / 16 is not. Seven: 1 / 128 is below 0.01.
    assert [smallest_detectable(n) for n in (13, 5, 4, 100)] == [5 / 13, 1.0, None, 0.05]
    assert smallest_detectable(20, level=0.01) == 7 / 20
    assert smallest_detectable(1, level=0.5) == 1.0


@pytest.mark.parametrize("n", [5, 13, 50])
def test_the_smallest_detectable_difference_is_detected(n: int) -> None:
    smallest = smallest_detectable(n)
    assert smallest is not None
    wins = round(smallest * n)
    for k, detected in ((wins, True), (wins - 1, False)):
        first, second = pairs(k, 0, n)
        assert (better_p_value([first], [second], numbered([first])) <= 0.05) == detected


# Non-inferiority


@pytest.mark.parametrize("n", [6, 13, 20])
def test_equal_answers_of_few_queries_prove_nothing(n: int) -> None:
    right = answers((n, n))
    assert not non_inferiority(right, right, numbered(right)).holds


def test_equal_answers_of_many_queries_are_as_good() -> None:
    right = answers((60, 80))
    result = non_inferiority(right, right, numbered(right))
    assert result.holds
    assert result.margin == 0.1
    # If the first condition loses in 1 - 0.05 ** (1 / 80) of queries, no loss is seen in 5% of samples.
    assert result.low == pytest.approx(0.05 ** (1 / 80) - 1)
    assert not non_inferiority(right, right, numbered(right), margin=0.03).holds


def test_the_same_queries_again_are_not_more_evidence() -> None:
    right = answers(*[(10, 20)] * 5)
    distinct = [[f"{seed} {i}" for i in range(20)] for seed in range(5)]
    assert non_inferiority(right, right, numbered(right)).low < non_inferiority(right, right, distinct).low


def test_better_conditions_are_not_inferior() -> None:
    first, second = pairs(20, 3, 50)
    assert non_inferiority([first], [second], numbered([first])).holds
    assert not non_inferiority([second], [first], numbered([first])).holds
    assert non_inferiority([[-1.0, -2.0, -3.0]], [[-3.0, -4.5, -5.0]], [["a", "b", "c"]], margin=0.5).holds


# What does not change a result


def rounded(result: object) -> object:
    return pytest.approx(result) if result is not None else None


@pytest.mark.parametrize("kind", ["answers", "numbers"])
@pytest.mark.parametrize("n_seeds", [1, 3])
def test_the_order_of_queries_and_seeds_does_not_matter(kind: str, n_seeds: int) -> None:
    random = np.random.default_rng(5)
    few, patched, zero = (random.random((n_seeds, 17)) < p for p in (0.9, 0.6, 0.1))
    if kind == "numbers":
        few, patched, zero = (random.normal(mean, 1, (n_seeds, 17)) for mean in (-1, -2, -5))  # type: ignore[assignment]
    queries = np.array([random.permutation(list(LETTERS))[:17] for _ in range(n_seeds)])

    def results(order: Sequence[Sequence[int]]) -> list[object]:
        few_, patched_, zero_, queries_ = (
            [each[seed][indices].tolist() for seed, indices in enumerate(order)][::-1]
            for each in (few, patched, zero, queries)
        )
        values: list[object] = [
            difference_interval(patched_, zero_),
            mean_interval(patched_),
            share_recovered(patched_, zero_, few_),
            better_p_value(patched_, zero_, queries_),
            different_p_value(few_, patched_, queries_),
            non_inferiority(patched_, few_, queries_).low,
        ]
        return values + ([accuracy_interval(patched_)] if kind == "answers" else [])

    plain = results([range(17)] * n_seeds)
    shuffled = results([random.permutation(17).tolist() for _ in range(n_seeds)])
    assert [rounded(value) for value in plain] == shuffled


def test_the_order_of_conditions_turns_a_difference_around() -> None:
    random = np.random.default_rng(6)
    for n_seeds in (1, 3):
        first, second = random.integers(2, size=(2, n_seeds, 20)).tolist()
        low, high = difference_interval(first, second)
        assert difference_interval(second, first) == pytest.approx((-high, -low))
        wrong = [[1 - answer for answer in seed] for seed in first]
        low, high = accuracy_interval(first)
        assert accuracy_interval(wrong) == pytest.approx((1 - high, 1 - low))


def test_results_are_repeatable() -> None:
    values = np.random.default_rng(7).normal(size=(3, 20)).tolist()
    assert mean_interval(values) == mean_interval(values)
    zero = [[value - 3 for value in seed] for seed in values]
    few = [[value**2 for value in seed] for seed in values]
    assert share_recovered(values, zero, few) == share_recovered(values, zero, few)


# Mistakes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy_interval([]), "need a seed or more"),
        (lambda: accuracy_interval([[1, 0], []]), r"a query or more each, not [2, 0]"),
        (lambda: accuracy_interval([[0.5]]), "use mean_interval"),
        (lambda: difference_interval([[1, 0]], [[1]]), "the same queries of the same seeds"),
        (lambda: mean_interval([[-math.inf]]), "finite"),
        (lambda: better_p_value([[1, 0]], [[0, 0]], [["a"]]), r"[2] answers per seed, but [1] queries"),
        (lambda: non_inferiority([[1, 0]], [[0, 0]], [["a"]]), r"[2] answers per seed, but [1] queries"),
        (lambda: non_inferiority([[1]], [[1]], [["a"]], margin=0.0), "above 0"),
        (lambda: holm([0.5, 1.5]), "between 0 and 1"),
        (lambda: intersection_union([]), "at least one"),
        (lambda: smallest_detectable(0), "at least 1"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TvLensError, match=re.escape(message)):
        call()


# Simulations with a known truth. All chances are exact or have a fixed seed, so these tests give the same everywhere.


def chances_of(wins: float, losses: float, n: int) -> Float[np.ndarray, "wins losses"]:
    """The chance of each number of wins and of losses among n pairs."""
    table = np.zeros((n + 1, n + 1))
    for k in range(n + 1):
        for m in range(n + 1 - k):
            table[k, m] = stats.multinomial.pmf([k, m, n - k - m], n, [wins, losses, max(1 - wins - losses, 0.0)])
    return table


@pytest.mark.parametrize("n", [6, 13, 20])
def test_bounds_of_one_seed_are_valid_by_enumeration(n: int, as_users_run_it: None) -> None:
    """Every possible sample by its chance: intervals cover in 95%, and lower bounds are too high in at most 5%."""
    outcomes = [(k, m) for k in range(n + 1) for m in range(n + 1 - k)]
    intervals, bounds = {}, {}
    for k, m in outcomes:
        first, second = pairs(k, m, n)
        intervals[k, m] = difference_interval([first], [second])
        bounds[k, m] = non_inferiority([first], [second], numbered([first])).low
    rates = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.9)
    worst, least = 0.0, 1.0
    for wins, losses in [pair for pair in itertools.product(rates, rates) if sum(pair) <= 1]:
        chances, truth = chances_of(wins, losses, n), wins - losses
        least = min(least, sum(chances[each] for each in outcomes if covers(intervals[each], truth)))
        worst = max(worst, sum(chances[each] for each in outcomes if bounds[each] > truth + 1e-9))
    print(f"\none seed of {n} queries: least coverage {least:.3f}, a bound is too high in at most {worst:.3f}")
    assert least >= 0.95
    assert worst <= 0.05


def tolerated(runs: int, rate: float = 0.05) -> float:
    """Three standard errors of a rate over so many runs."""
    return 3 * math.sqrt(rate * (1 - rate) / runs)


def accuracies(random: np.random.Generator, mean: float, deviation: float, shape: tuple[int, int]) -> np.ndarray:
    """True accuracies of seeds, from the beta distribution."""
    if deviation == 0 or mean in (0, 1):
        return np.full(shape, float(mean))
    size = mean * (1 - mean) / deviation**2 - 1
    return random.beta(mean * size, (1 - mean) * size, shape)


def naive_bootstrap(correct: Seeds) -> Interval:
    """Seeds and queries drawn again, and percentiles: no correction for few seeds."""
    random, values = np.random.default_rng(0), np.array(correct, dtype=float)
    seeds = random.integers(len(values), size=(300, len(values), 1))
    queries = random.integers(values.shape[1], size=(300, len(values), values.shape[1]))
    low, high = np.quantile(values[seeds, queries].mean(axis=(1, 2)), [0.025, 0.975])
    return Interval(float(low), float(high))


def coverage_of_accuracies(
    method: Callable[[Seeds], Interval], n_seeds: int, n: int, mean: float, deviation: float, *, runs: int
) -> tuple[float, float]:
    """How often the interval covers the mean over all seeds, and its mean width."""
    random = np.random.default_rng([n_seeds, n, int(100 * mean), int(100 * deviation)])
    known = cache(lambda counts: method(answers(*((right, n) for right in counts))))
    rights = random.binomial(n, accuracies(random, mean, deviation, (runs, n_seeds)))
    intervals = [known(tuple(sorted(row))) for row in rights.tolist()]
    widths = [each.high - each.low for each in intervals]
    return sum(covers(each, mean) for each in intervals) / runs, sum(widths) / runs


def cells(n_seeds: int, means: Sequence[float]) -> list[tuple[int, int, float, float]]:
    deviations = (0.0,) if n_seeds == 1 else (0.0, 0.05, 0.15)
    grid = itertools.product((n_seeds,), (13, 20, 50), means, deviations)
    return [cell for cell in grid if cell[3] == 0 or cell[2] not in (0, 1)]


@pytest.mark.parametrize("n_seeds", [1, 2, 3, 5])
def test_intervals_of_accuracies_cover_the_truth(n_seeds: int, as_users_run_it: None) -> None:
    runs = 1000
    print("\nseeds  n   accuracy  deviation  coverage  width")
    for cell in cells(n_seeds, (0, 0.05, 0.3, 0.5, 0.9, 1)):
        coverage, width = coverage_of_accuracies(lambda correct: accuracy_interval(correct), *cell, runs=runs)
        print(f"{n_seeds:5}  {cell[1]:2}  {cell[2]:8}  {cell[3]:9}  {coverage:8.3f}  {width:.3f}")
        assert coverage >= 0.95 - tolerated(runs), cell


def test_a_naive_bootstrap_does_not_cover_the_truth(as_users_run_it: None) -> None:
    """The simulation can fail: it rejects a bootstrap of few seeds, and the interval of all answers."""
    runs = 400
    pooled = cache(lambda right, n: accuracy_interval(answers((right, n))))
    methods: dict[str, Callable[[Seeds], Interval]] = {
        "naive bootstrap": naive_bootstrap,
        "all answers as of one seed": lambda correct: pooled(sum(map(sum, correct)), sum(map(len, correct))),
    }
    for name, method in methods.items():
        for n_seeds in (2, 3):
            coverage, _ = coverage_of_accuracies(method, n_seeds, 50, 0.5, 0.15, runs=runs)
            print(f"\n{name}, {n_seeds} seeds: coverage {coverage:.3f}")
            assert coverage < 0.95 - tolerated(runs)


def two_conditions(
    random: np.random.Generator, means: tuple[float, float], deviation: float, shape: tuple[int, int, int]
) -> tuple[Answers, Answers]:
    """Answers of two conditions, by run, seed and query. Half of the variance of what makes a query easy is shared."""
    shared = random.normal(size=shape)
    both = []
    for mean in means:
        ease = stats.norm.cdf(math.sqrt(0.5) * (shared + random.normal(size=shape)))
        both.append(ease < accuracies(random, mean, deviation, shape[:2])[..., None])
    return both[0], both[1]


@pytest.mark.parametrize("n_seeds", [1, 2, 3, 5])
def test_intervals_of_differences_cover_the_truth(n_seeds: int, as_users_run_it: None) -> None:
    runs = 200
    print("\nseeds  n   accuracies  deviation  coverage  width")
    for means in ((0, 0), (0.05, 0), (0.5, 0.3), (0.9, 0.05), (1, 0.9), (0.9, 0.9)):
        for n, deviation in itertools.product((13, 50), (0.0,) if n_seeds == 1 else (0.0, 0.05, 0.15)):
            random = np.random.default_rng([n_seeds, n, *(int(100 * mean) for mean in means), int(100 * deviation)])
            first, second = two_conditions(random, means, deviation, (runs, n_seeds, n))
            intervals = [difference_interval(a.tolist(), b.tolist()) for a, b in zip(first, second, strict=True)]
            coverage = np.mean([covers(each, means[0] - means[1]) for each in intervals])
            width = np.mean([np.ptp(each) for each in intervals])
            print(f"{n_seeds:5}  {n:2}  {means!s:10}  {deviation:9}  {coverage:8.3f}  {width:.3f}")
            assert coverage >= 0.95 - tolerated(runs), (n, means, deviation)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_intervals_of_numbers_cover_the_truth(n_seeds: int, as_users_run_it: None) -> None:
    runs = 100
    print("\nseeds  n   distribution  deviation  coverage")
    for n, deviation in itertools.product((13, 50), (0.0, 0.5) if n_seeds > 1 else (0.0,)):
        for name in ("normal", "exponential"):
            random = np.random.default_rng([n_seeds, n, int(10 * deviation), len(name)])
            shape = (runs, n_seeds, n)
            values = random.normal(size=shape) if name == "normal" else 1 - random.exponential(size=shape)
            values += deviation * random.normal(size=shape[:2])[..., None]
            coverage = np.mean([covers(mean_interval(each.tolist()), 0) for each in values])
            print(f"{n_seeds:5}  {n:2}  {name:12}  {deviation:9}  {coverage:8.3f}")
            assert coverage >= 0.95 - tolerated(runs), (n, deviation, name)


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_intervals_of_shares_cover_the_truth(n_seeds: int, as_users_run_it: None) -> None:
    runs = 100
    print("\nseeds  n   share  deviation  coverage  with a share")
    for n, share, deviation in itertools.product((13, 50), (0, 0.5, 1), (0.05,) if n_seeds > 1 else (0.0,)):
        random = np.random.default_rng([n_seeds, n, int(10 * share), int(100 * deviation)])
        zero, few = two_conditions(random, (0.1, 0.9), deviation, (runs, n_seeds, n))
        patched, _ = two_conditions(random, (0.1 + 0.8 * share, 0.5), deviation, (runs, n_seeds, n))
        results = [share_recovered(*(each[i].tolist() for each in (patched, zero, few))) for i in range(runs)]
        known = [each for each in results if each is not None]
        coverage = np.mean([covers(each[1:], share) for each in known])
        print(f"{n_seeds:5}  {n:2}  {share:5}  {deviation:9}  {coverage:8.3f}  {len(known) / runs:.2f}")
        assert coverage >= 0.95 - tolerated(len(known)), (n, share, deviation)


def headline_p_values(
    random: np.random.Generator, accuracies: Sequence[float], *, rows: int, n_seeds: int
) -> tuple[list[float], list[float]]:
    """For each row of a table the p-value of patched against all controls, and one that takes repeated queries for
    new ones. The first accuracy is that of patched, the others are of controls. Whether a condition answers a query is
    decided once: it is the same in each seed in which the query appears.
    """
    honest: list[float] = []
    pooled: list[float] = []
    for _ in range(rows):
        knows = random.random((len(accuracies), 26)) < np.array(accuracies)[:, None]
        tests = [random.permutation(26)[:20] for _ in range(n_seeds)]
        patched, *controls = [[row[test].tolist() for test in tests] for row in knows]
        queries = [[LETTERS[i] for i in test] for test in tests]
        apart = [[f"{seed} {text}" for text in texts] for seed, texts in enumerate(queries)]
        for target, texts in ((honest, queries), (pooled, apart)):
            target.append(intersection_union([better_p_value(patched, each, texts) for each in controls]))
    return honest, pooled


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_adjusted_tests_keep_their_level(n_seeds: int, as_users_run_it: None) -> None:
    """A table of 8 tasks with 2 controls each. If the vector equals all controls, or one (the others being far worse),
    Holm's p-values call any row better in at most 5% of tables. Without Holm, or with repeated queries counted as new
    ones, it is more.
    """
    runs, rows = 150, 8
    print("\nseeds  vector equals  with Holm  without  repeated queries as new")
    for name, accuracies in (("all controls", (0.5, 0.5, 0.5)), ("one control", (0.6, 0.6, 0.0))):
        random = np.random.default_rng([n_seeds, len(name)])
        tables = [headline_p_values(random, accuracies, rows=rows, n_seeds=n_seeds) for _ in range(runs)]
        adjusted = np.mean([min(holm(honest)) <= 0.05 for honest, _ in tables])
        unadjusted = np.mean([min(honest) <= 0.05 for honest, _ in tables])
        pooled = np.mean([min(holm(wrong)) <= 0.05 for _, wrong in tables])
        print(f"{n_seeds:5}  {name:13}  {adjusted:9.3f}  {unadjusted:7.3f}  {pooled:.3f}")
        assert adjusted <= 0.05 + tolerated(runs)
        if name == "one control":
            assert unadjusted > 0.05 + tolerated(runs)
            assert n_seeds == 1 or pooled > 0.05 + tolerated(runs)


def test_adjusted_tests_keep_their_level_beside_true_effects(as_users_run_it: None) -> None:
    """Four tasks of which the vector works, and four of which it equals a control: any of the latter is called better
    in at most 5% of tables, and the former are called better.
    """
    runs = 200
    random = np.random.default_rng(11)
    false, right = [], []
    for _ in range(runs):
        works, _ = headline_p_values(random, (0.95, 0.1, 0.0), rows=4, n_seeds=1)
        equal, _ = headline_p_values(random, (0.6, 0.6, 0.0), rows=4, n_seeds=1)
        adjusted = holm([*works, *equal])
        false.append(min(adjusted[4:]) <= 0.05)
        right.append(np.mean([p <= 0.05 for p in adjusted[:4]]))
    print(f"\nfour true effects: called better {np.mean(right):.3f}; any false one {np.mean(false):.3f}")
    assert np.mean(false) <= 0.05 + tolerated(runs)
    assert np.mean(right) > 0.95


def test_non_inferiority_over_seeds_keeps_its_level(as_users_run_it: None) -> None:
    """If the first condition is worse by exactly the margin, it is called as good in at most 5% of runs."""
    runs = 300
    print("\nseeds  n   deviation  called as good")
    for n_seeds, n, deviation in itertools.product((2, 3, 5), (13, 50), (0.0, 0.05)):
        random = np.random.default_rng([n_seeds, n, int(100 * deviation)])
        first, second = two_conditions(random, (0.8, 0.9), deviation, (runs, n_seeds, n))
        queries = [[f"{seed} {i}" for i in range(n)] for seed in range(n_seeds)]
        pairs = zip(first.tolist(), second.tolist(), strict=True)
        rate = np.mean([non_inferiority(one, other, queries).holds for one, other in pairs])
        print(f"{n_seeds:5}  {n:2}  {deviation:9}  {rate:.3f}")
        assert rate <= 0.05 + tolerated(runs), (n_seeds, n, deviation)
