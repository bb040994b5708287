"""Intervals and tests for comparisons of conditions on the same queries, with one seed or several.

For one seed an interval is about queries drawn from the task's list, given this seed's demonstrations, vector and
layer, and this model. For several seeds it is about the mean over all seeds that could have been drawn, and all
queries: it is at least as wide as Student's t over the seeds' means, and as the interval over queries.

The tests are about the given seeds. Layer and strength are chosen on dev prompts that share no input with the test
prompts. No interval includes the uncertainty of that choice: it is about the chosen layer, and valid for it.

docs/statistics.md has the formulas, and how often the intervals cover the truth.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64
from transformer_lens.utilities.statistics import sign_flip_permutation_pvalue, success_rate_ci

from tv_lens.errors import TvLensError

Seeds: TypeAlias = Sequence[Sequence[float | int]]  # values[seed][query]; bools are 0 and 1
Queries: TypeAlias = Sequence[Sequence[str]]  # queries[seed][query]
Sample: TypeAlias = Float64[np.ndarray, " query"]

# If all queries of some seed give the same, the spread between seeds cannot be estimated well. Then each seed counts
# as this many queries at most.
_QUERIES_OF_A_UNIFORM_SEED = 6
# A nominal level at which the lower bound of a difference is too high in at most 5% of samples, by enumeration.
_LEVEL_OF_NON_INFERIORITY = 0.03
_RESAMPLES = 4000


class Interval(NamedTuple):
    """The lower and the upper end of an interval."""

    low: float
    high: float


class Share(NamedTuple):
    """The share of the few-shot gain that a vector recovers, with its 95% interval."""

    value: float
    low: float
    high: float


class NonInferiority(NamedTuple):
    """Whether the first condition is at most `margin` worse than the second: if `low`, the one-sided 95% lower bound
    of first minus second, is above `-margin`.
    """

    margin: float
    low: float
    holds: bool


def exact_interval(correct: Sequence[bool]) -> tuple[float, float]:
    """The exact (Clopper-Pearson) 95% interval of the accuracy."""
    interval = success_rate_ci(tuple(correct), confidence=0.95)
    return interval.ci_low, interval.ci_high


def paired_p_value(first: Sequence[bool], second: Sequence[bool]) -> float:
    """The two-sided p-value of McNemar's exact test: a binomial test of the pairs that only one side gets right."""
    from scipy.stats import binomtest

    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    if not only_first + only_second:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def accuracy_interval(correct: Seeds, *, queries: Queries | None = None, confidence: float = 0.95) -> Interval:
    """The interval of the mean of the seeds' accuracies.

    One seed: exact (Clopper-Pearson). Several: Clopper-Pearson with an effective number of answers, at most all of
    them, that has the variance between seeds and Student's t for their number (Korn and Graubard 1998). With `queries`,
    a query that several seeds have in common counts once in this number, here and in the other intervals.

    Raises:
        TvLensError: no seed, no query, or a number other than 0 and 1.
    """
    (seeds,) = _checked(correct)
    if not _are_answers(seeds):
        raise TvLensError("an accuracy is of answers that are right (1) or wrong (0); use mean_interval for numbers")
    accuracy, n = _mean(seeds), min(_effective_queries(seeds), _distinct(queries, seeds))
    within, between = accuracy * (1 - accuracy) / n, _variance_between(seeds)
    if len(seeds) > 1:
        between *= (_t(confidence, len(seeds) - 1) / _t(confidence, _queries(seeds) - 1)) ** 2
    return _clopper_pearson(accuracy, n if between <= within else n * within / between, confidence)


def mean_interval(values: Seeds, *, queries: Queries | None = None, confidence: float = 0.95) -> Interval:
    """The interval of the mean of numbers such as log-probabilities: the widest of Student's t over the seeds' means,
    Student's t over queries, and the bootstrap over queries. Infinite for a single query, and a point if all numbers
    are equal, since nothing bounds what was not seen.

    Raises:
        TvLensError: no seed, no query, or a number that is not finite.
    """
    (seeds,) = _checked(values)
    return _interval_of_numbers(seeds, confidence, _distinct(queries, seeds))


def difference_interval(
    first: Seeds, second: Seeds, *, queries: Queries | None = None, confidence: float = 0.95
) -> Interval:
    """The interval of the mean of `first` minus the mean of `second`, paired by query.

    Answers (0 or 1): the paired bootstrap over queries with two more, imagined queries, one that only the first
    condition gets right and one that only the second does, so that what was not seen has a chance. Numbers: as
    `mean_interval`. Both with Student's t over the seeds' means, if there are several.

    Raises:
        TvLensError: no seed, no query, other shapes, or a number that is not finite.
    """
    ones, others = _checked(first, second)
    differences, distinct = _difference(ones, others), _distinct(queries, ones)
    if not _are_answers(ones + others):
        return _interval_of_numbers(differences, confidence, distinct)
    changes = _interval_of_changes(differences, 1 - confidence, distinct)
    intervals = [_t_interval(_means(differences), confidence), changes]
    if len(differences) > 1:
        intervals += _intervals_of_one_direction(differences, confidence, queries)
    low, high = _widest(intervals)
    return Interval(max(low, -1.0), min(high, 1.0))


def share_recovered(
    patched: Seeds, zero_shot: Seeds, few_shot: Seeds, *, queries: Queries | None = None
) -> Share | None:
    """The share of the few-shot gain that the vector recovers, (patched - zero-shot) / (few-shot - zero-shot), with
    its 95% interval. None if the gain's own 95% interval is not above 0: there may be nothing to recover.

    The interval is the wider of the paired bootstrap of the ratio, with two imagined queries of which patching helps
    in one and hurts in the other, and of Fieller's interval over the seeds' means.

    Raises:
        TvLensError: no seed, no query, other shapes, or a number that is not finite.
    """
    ours, zeros, fews = _checked(patched, zero_shot, few_shot)
    if difference_interval(few_shot, zero_shot, queries=queries).low <= 0:
        return None
    recovered, gains = _difference(ours, zeros), _difference(fews, zeros)
    value = _mean(recovered) / _mean(gains)
    answers = _are_answers(ours + zeros + fews)
    intervals = [
        Interval(value, value),
        _bootstrapped_ratio(recovered, gains, _distinct(queries, ours), imagined=answers),
    ]
    if not answers:
        intervals.append(_fieller(np.concatenate(recovered), np.concatenate(gains)))
    if len(gains) > 1:
        intervals.append(_fieller(_means(recovered), _means(gains)))
    return Share(value, *_widest(intervals))


def better_p_value(first: Seeds, second: Seeds, queries: Queries) -> float:
    """The one-sided p-value that `first` is better than `second`, given these seeds: a sign-flip test over queries.

    The differences of a query are added over the seeds in which it appears, so that it counts once. If the conditions
    are equally good, each sum is as likely as its negative. Exact for answers; with one seed it is McNemar's exact
    test, one-sided. Of other numbers more than 12 are flipped at random.

    Raises:
        TvLensError: no seed, no query, other shapes, or a number that is not finite.
    """
    return _sign_flip(_by_query(first, second, queries), two_sided=False)


def different_p_value(first: Seeds, second: Seeds, queries: Queries) -> float:
    """The two-sided p-value of the test of `better_p_value`. With one seed it is McNemar's exact test.

    Raises:
        TvLensError: as `better_p_value`.
    """
    return _sign_flip(_by_query(first, second, queries), two_sided=True)


def intersection_union(p_values: Sequence[float]) -> float:
    """The p-value that all alternatives hold, such as "better than each control": the largest (Berger 1982).

    Raises:
        TvLensError: no p-value, or one outside of 0 to 1.
    """
    return max(_checked_p_values(p_values))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P-values adjusted for the number of tests (Holm 1979), in the given order: the chance that any true null
    hypothesis is rejected is at most the level, however the tests depend on each other.

    Raises:
        TvLensError: a p-value outside of 0 to 1.
    """
    values = _checked_p_values(p_values) if len(p_values) else []
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return tuple(adjusted)


def non_inferiority(first: Seeds, second: Seeds, queries: Queries, *, margin: float = 0.1) -> NonInferiority:
    """Whether `first` is at most `margin` worse than `second`, by the one-sided 95% lower bound of the difference.

    For answers the bound is valid for small samples, too: it is at most what the exact bound on the frequency of
    worse answers leaves, with each distinct query counted once.

    Raises:
        TvLensError: a margin that is not above 0; no seed, no query, other shapes, or a number that is not finite.
    """
    if not 0 < margin < math.inf:
        raise TvLensError(f"a margin is a difference above 0, not {margin}")
    ones, others = _checked(first, second)
    _check_queries(queries, ones)
    if _are_answers(ones + others):
        low = _lowest_difference(_difference(ones, others), queries)
    else:
        low = difference_interval(first, second, queries=queries, confidence=0.9).low
    return NonInferiority(margin, low, low > -margin)


def smallest_detectable(n: int, *, level: float = 0.05) -> float | None:
    """The smallest difference of two accuracies over the same `n` queries that can reach a one-sided p of `level`:
    k / n, if the first condition is better in k queries, worse in none, and 2**-k is at most `level`. None if even
    n / n cannot.

    Raises:
        TvLensError: no query, or a level that is not between 0 and 1.
    """
    if n < 1 or not 0 < level < 1:
        raise TvLensError(f"the number of queries is at least 1 and the level between 0 and 1, not {n} and {level}")
    needed = next(k for k in range(1, 1100) if 0.5**k <= level)
    return needed / n if needed <= n else None


def _checked(*conditions: Seeds) -> tuple[list[Sample], ...]:
    """The numbers of each condition, one array per seed."""
    checked = tuple([np.asarray(seed, dtype=np.float64) for seed in condition] for condition in conditions)
    shapes = [[len(seed) for seed in condition] for condition in checked]
    if not all(shape == shapes[0] for shape in shapes):
        raise TvLensError(f"conditions are compared on the same queries of the same seeds; these have {shapes} queries")
    if not shapes[0] or 0 in shapes[0]:
        raise TvLensError(f"statistics need a seed or more, with a query or more each, not {shapes[0]} queries")
    if not all(np.isfinite(seed).all() for condition in checked for seed in condition):
        raise TvLensError("statistics need finite numbers; a log-probability of -inf or NaN is among these")
    return checked


def _checked_p_values(p_values: Sequence[float]) -> list[float]:
    values = [float(p) for p in p_values]
    if not values or not all(0 <= p <= 1 for p in values):
        raise TvLensError(f"at least one p-value is needed, each between 0 and 1, not {values[:8]}")
    return values


def _check_queries(queries: Queries, seeds: list[Sample]) -> None:
    expected, given = [len(seed) for seed in seeds], [len(texts) for texts in queries]
    if given != expected:
        raise TvLensError(f"each answer has a query: {expected} answers per seed, but {given} queries")


def _distinct(queries: Queries | None, seeds: list[Sample]) -> float:
    """The number of distinct queries; without their texts there is no limit."""
    if queries is None:
        return math.inf
    _check_queries(queries, seeds)
    return float(len({text for texts in queries for text in texts}))


def _are_answers(seeds: list[Sample]) -> bool:
    return all(bool(((seed == 0) | (seed == 1)).all()) for seed in seeds)


def _difference(ones: list[Sample], others: list[Sample]) -> list[Sample]:
    return [one - other for one, other in zip(ones, others, strict=True)]


def _means(seeds: list[Sample]) -> Float64[np.ndarray, " seed"]:
    """The seeds' means, in their order."""
    return np.array([math.fsum(seed) / len(seed) for seed in seeds])


def _mean(seeds: list[Sample]) -> float:
    """The mean of the seeds' means."""
    return math.fsum(_means(seeds)) / len(seeds)


def _variance_between(seeds: list[Sample]) -> float:
    """The variance of the mean of the seeds' means, from their spread; 0 for one seed."""
    return float(np.var(_means(seeds), ddof=1)) / len(seeds) if len(seeds) > 1 else 0.0


def _queries(seeds: list[Sample]) -> float:
    """The number of queries; seeds of unequal length count as if they had the harmonic mean of their lengths."""
    return round(len(seeds) ** 2 / math.fsum(1 / len(seed) for seed in seeds), 6)


def _effective_queries(seeds: list[Sample]) -> float:
    """The number of queries, or fewer if some seed's queries all give the same."""
    uniform = len(seeds) > 1 and any(float(np.ptp(seed)) < 1e-12 for seed in seeds)
    return min(_queries(seeds), float(_QUERIES_OF_A_UNIFORM_SEED * len(seeds))) if uniform else _queries(seeds)


def _t(confidence: float, df: float | int) -> float:
    """The quantile of Student's t for a two-sided interval; infinite without a degree of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, (1 + confidence) / 2)) if df > 0 else math.inf


def _clopper_pearson(share: float, n: float, confidence: float) -> Interval:
    """The Clopper-Pearson interval of a share of `n`, which need not be a whole number."""
    from scipy.special import betaincinv

    tail, hits = (1 - confidence) / 2, share * n
    low = 0.0 if share <= 0 else float(betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if share >= 1 else float(betaincinv(hits + 1, n - hits, 1 - tail))
    return Interval(low, high)


def _widest(intervals: Sequence[Interval]) -> Interval:
    return Interval(min(each.low for each in intervals), max(each.high for each in intervals))


def _t_interval(values: Float64[np.ndarray, " unit"], confidence: float) -> Interval:
    """Student's t interval of the mean of seeds' means or of queries; a point for a single one."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, mean)
    margin = _t(confidence, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean - margin, mean + margin)


def _tail(error: float, n: int) -> float:
    """The tail of bootstrap means that makes up for small samples: for the missing factor n / (n - 1) in the variance,
    and for t (Hesterberg 2015, section 3.3).
    """
    from scipy.special import ndtr

    return float(ndtr(-math.sqrt(n / (n - 1)) * _t(1 - error, n - 1)))


def _interval_of_numbers(seeds: list[Sample], confidence: float, distinct: float) -> Interval:
    """The widest of t over seeds, and t and the bias-corrected and accelerated bootstrap over queries. The latter two
    are wider by the square root of how often a query is repeated on average.
    """
    from scipy.stats import DegenerateDataWarning, bootstrap

    values, mean = np.sort(np.concatenate(seeds)), _mean(seeds)
    if len(values) == 1:
        return Interval(-math.inf, math.inf)
    intervals = [_t_interval(_means(seeds), confidence), _t_interval(values, confidence)]
    if np.ptp(values) > 1e-12 * np.abs(values).max():
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            # Without an acceleration the ends are NaN, and the other intervals are used.
            warnings.simplefilter("ignore", DegenerateDataWarning)
            low, high = bootstrap(
                (values,),
                np.mean,
                n_resamples=_RESAMPLES,
                batch=max(1, 2**20 // len(values)),
                confidence_level=1 - 2 * _tail(1 - confidence, len(values)),
                method="BCa",
                rng=np.random.default_rng(0),
            ).confidence_interval
        if math.isfinite(low) and math.isfinite(high):
            intervals.append(Interval(float(low), float(high)))
    center = math.fsum(values) / len(values)  # not the mean, for seeds of unequal length
    wider = max(1.0, math.sqrt(len(values) / distinct))
    over_queries = [
        Interval(mean + wider * (each.low - center), mean + wider * (each.high - center)) for each in intervals[1:]
    ]
    return _widest([intervals[0], *over_queries])


def _interval_of_changes(differences: list[Sample], error: float, distinct: float) -> Interval:
    """The paired bootstrap interval of the mean of differences of answers, with two imagined queries, one of each
    direction. The bootstrap distribution is computed, not drawn.
    """
    values = np.concatenate(differences)
    counts = np.array([(values == 0).sum(), (values == 1).sum(), (values == -1).sum()], dtype=np.float64)
    counts = counts * min(1.0, distinct / len(values)) + np.array([0.0, 1.0, 1.0])
    drawn = int(min(_effective_queries(differences), distinct)) + 2
    chances = np.zeros(2 * drawn + 1)  # of a single draw, by its value: 0, 1, ..., -2, -1
    chances[[0, 1, -1]] = counts / counts.sum()
    totals = np.roll(np.fft.ifft(np.fft.fft(chances) ** drawn).real, drawn)  # of the sum, -drawn to drawn
    tail = _tail(error, drawn)
    low = int(np.searchsorted(np.cumsum(totals), tail)) - drawn
    high = drawn - int(np.searchsorted(np.cumsum(totals[::-1]), tail))
    shift = _mean(differences) - float(values.mean())  # for seeds of unequal length
    return Interval(low / drawn + shift, high / drawn + shift)


def _intervals_of_one_direction(
    differences: list[Sample], confidence: float, queries: Queries | None
) -> list[Interval]:
    """If no answer changes for the worse, or none for the better, the interval of the share that changes."""
    intervals = []
    if all((each >= 0).all() for each in differences):
        intervals.append(
            accuracy_interval([list(each) for each in differences], queries=queries, confidence=confidence)
        )
    if all((each <= 0).all() for each in differences):
        low, high = accuracy_interval([list(-each) for each in differences], queries=queries, confidence=confidence)
        intervals.append(Interval(-high, -low))
    return intervals


def _lowest_difference(differences: list[Sample], queries: Queries) -> float:
    """The one-sided 95% lower bound of the mean of differences of answers."""
    worse = math.fsum(float((each < 0).mean()) for each in differences) / len(differences)
    distinct = _distinct(queries, differences)
    n = min(_effective_queries(differences), distinct)
    bounds = [
        _t_interval(_means(differences), 0.9).low,
        _interval_of_changes(differences, 2 * _LEVEL_OF_NON_INFERIORITY, distinct).low,
        _mean(differences) + worse - _clopper_pearson(worse, n, 0.9).high,
    ]
    if len(differences) > 1:
        bounds += [each.low for each in _intervals_of_one_direction(differences, 0.9, queries)]
    return max(-1.0, min(bounds))


def _fieller(recovered: Float64[np.ndarray, " unit"], gains: Float64[np.ndarray, " unit"]) -> Interval:
    """Fieller's 95% interval of the ratio of two means: the ratios r for which the t interval of recovered - r gains
    includes 0. Infinite if the interval of the gains does.
    """
    scale = _t(0.95, len(gains) - 1) ** 2 / len(gains)
    (a, c), (_, b) = scale * np.cov(recovered, gains)
    top, bottom = float(recovered.mean()), float(gains.mean())
    square, half, rest = bottom**2 - b, top * bottom - c, top**2 - a
    if square <= 0:
        return Interval(-math.inf, math.inf)
    root = math.sqrt(max(half**2 - square * rest, 0.0))
    return Interval(float(half - root) / float(square), float(half + root) / float(square))


def _bootstrapped_ratio(recovered: list[Sample], gains: list[Sample], distinct: float, *, imagined: bool) -> Interval:
    """The paired 95% percentile interval of the ratio of two means. A resample without a gain counts as the worst."""
    more = [np.array([1.0, -1.0]), np.zeros(2)] if imagined else [np.zeros(0), np.zeros(0)]
    top, bottom = np.concatenate([*recovered, more[0]]), np.concatenate([*gains, more[1]])
    order = np.lexsort((bottom, top))
    top, bottom = top[order], bottom[order]
    value = _mean(recovered) / _mean(gains)
    residuals = [one - value * other for one, other in zip(recovered, gains, strict=True)]
    drawn = int(min(_effective_queries(residuals), distinct)) + len(more[0])
    random = np.random.default_rng(0)
    tops, bottoms = np.empty(_RESAMPLES), np.empty(_RESAMPLES)
    for batch in np.array_split(np.arange(_RESAMPLES), 1 + _RESAMPLES * drawn // 2**20):
        chosen = random.integers(len(top), size=(len(batch), drawn))
        tops[batch], bottoms[batch] = top[chosen].mean(axis=1), bottom[chosen].mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = tops / bottoms
    lows, highs = np.where(bottoms > 0, ratios, -np.inf), np.where(bottoms > 0, ratios, np.inf)
    skipped = math.floor(_tail(0.05, drawn) * _RESAMPLES)
    return Interval(float(np.sort(lows)[skipped]), float(np.sort(highs)[-1 - skipped]))


def _by_query(first: Seeds, second: Seeds, queries: Queries) -> Float64[np.ndarray, " query"]:
    """First minus second, added over the seeds in which a query appears, in ascending order."""
    ones, others = _checked(first, second)
    _check_queries(queries, ones)
    sums: dict[str, list[float]] = defaultdict(list)
    for texts, differences in zip(queries, _difference(ones, others), strict=True):
        for text, difference in zip(texts, differences, strict=True):
            sums[text].append(float(difference))
    return np.sort([math.fsum(each) for each in sums.values()])


def _sign_flip(sums: Float64[np.ndarray, " query"], *, two_sided: bool) -> float:
    """How likely a total at least as large as that of `sums` (in absolute value, if two-sided) is, if each sign is a
    fair coin.
    """
    if not (sums == np.round(sums)).all():
        import torch

        kind = "two-sided" if two_sided else "greater"
        return float(sign_flip_permutation_pvalue(torch.from_numpy(sums), n_permutations=9999, alternative=kind))
    steps: Int64[np.ndarray, " query"] = np.abs(sums[sums != 0]).astype(np.int64)
    chances = np.zeros(int(steps.sum()) + 1)  # of the totals -steps.sum(), ..., steps.sum(), in steps of 2
    chances[0] = 1.0
    for step in steps.tolist():
        chances[step:] += chances[:-step].copy()
        chances /= 2
    totals = 2 * np.arange(len(chances)) - steps.sum()
    observed = int(sums.sum())
    if two_sided:
        return min(1.0, 2 * float(chances[totals >= abs(observed)].sum()))
    return min(1.0, float(chances[totals >= observed].sum()))
