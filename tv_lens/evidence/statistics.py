"""Intervals and tests for comparisons of conditions on the same queries, with one seed or several.

For one seed an interval is about queries drawn from the task's list, given this seed's demonstrations, vector and
layer, and this model. For several seeds it is about the mean over all seeds that could have been drawn, and all
queries. It is the wider of two: Student's t over the seeds' means, and the interval over queries with these seeds.

Layer and strength are chosen on dev prompts that share no input with the test prompts. No interval includes the
uncertainty of that choice: it is about the layer that was chosen, and valid for it. See docs/statistics.md.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64
from transformer_lens.utilities.statistics import success_rate_ci

from tv_lens.errors import TvLensError

Seeds: TypeAlias = Sequence[Sequence[float]]  # values[seed][query]
Sample: TypeAlias = Float64[np.ndarray, " query"]

_RESAMPLES = 4000
_CACHED_QUERIES = 250  # resampling weights of longer lists are not kept


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
    """Whether the first condition is at most `margin` worse than the second: `low`, the one-sided 95% lower bound of
    first minus second, is above `-margin`.
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


def accuracy_interval(correct: Seeds, *, confidence: float = 0.95) -> Interval:
    """The interval of the mean of the seeds' accuracies.

    One seed: exact (Clopper-Pearson). Several: Clopper-Pearson with the effective number of answers that the spread
    between seeds leaves (Korn and Graubard 1998), with Student's t for the few seeds, and at most all answers.

    Raises:
        TvLensError: no seed, no query, or a number other than 0 and 1.
    """
    (seeds,) = _checked(correct)
    if not _are_answers(seeds):
        raise TvLensError("an accuracy is of answers that are right (1) or wrong (0); use mean_interval for numbers")
    n, accuracy = sum(map(len, seeds)), _mean(seeds)
    between, within = _variance_between(seeds), accuracy * (1 - accuracy) / n
    widening = (_t(confidence, len(seeds) - 1) / _t(confidence, n - 1)) ** 2 if len(seeds) > 1 else 1.0
    effective = n if between * widening <= within else n * within / (between * widening)
    return _clopper_pearson(accuracy, effective, confidence)


def mean_interval(values: Seeds, *, confidence: float = 0.95) -> Interval:
    """The interval of the mean of numbers such as log-probabilities.

    Raises:
        TvLensError: no seed, no query, or a number that is not finite.
    """
    (seeds,) = _checked(values)
    return _widest(_over_seeds(seeds, confidence), _over_queries(seeds, confidence))


def difference_interval(first: Seeds, second: Seeds, *, confidence: float = 0.95) -> Interval:
    """The interval of the mean of `first` minus the mean of `second`, paired by query.

    Raises:
        TvLensError: no seed, no query, other shapes, or a number that is not finite.
    """
    ones, others = _checked(first, second)
    differences = [one - other for one, other in zip(ones, others, strict=True)]
    answers = _are_answers(ones + others)
    intervals = [_over_seeds(differences, confidence), _over_queries(differences, confidence)]
    if not answers:
        return _widest(*intervals)
    n, mean = sum(map(len, differences)), _mean(differences)
    unseen = 1 - ((1 - confidence) / 2) ** (1 / n)  # a change in any query may be this frequent and yet not be seen
    if all((each == mean).all() for each in differences):
        intervals.append(Interval(mean - unseen, mean + unseen))
    low, high = _widest(*intervals)
    return Interval(max(low, -1.0), min(high, 1.0))


def share_recovered(patched: Seeds, zero_shot: Seeds, few_shot: Seeds) -> Share | None:
    """The share of the few-shot gain that the vector recovers: (patched - zero-shot) / (few-shot - zero-shot), with its
    95% interval. None if the gain's 95% interval is not above 0: there may be no gain to recover.

    Raises:
        TvLensError: no seed, no query, other shapes, or a number that is not finite.
    """
    gain = difference_interval(few_shot, zero_shot)
    if gain.low <= 0:
        return None
    ours, zeros, fews = _checked(patched, zero_shot, few_shot)
    recovered = [one - zero for one, zero in zip(ours, zeros, strict=True)]
    gains = [one - zero for one, zero in zip(fews, zeros, strict=True)]
    value = _mean(recovered) / _mean(gains)
    # The mean of recovered - value * gains is 0; its interval, over the gain, is that of the share (linearized).
    rest = [one - value * gain for one, gain in zip(recovered, gains, strict=True)]
    low, high = _widest(_over_seeds(rest, 0.95), _over_queries(rest, 0.95))
    return Share(value, value + low / _mean(gains), value + high / _mean(gains))


def better_p_value(first: Seeds, second: Seeds, queries: Sequence[Sequence[str]]) -> float:
    """The one-sided p-value of the exact sign-flip test that `first` is better than `second`, given these seeds.

    Differences of the same query are added over the seeds, so a repeated query counts as one. If both conditions are
    equally good, each query's sum is as likely as its negative. With one seed it is McNemar's exact test, one-sided.

    Raises:
        TvLensError: no seed, no query, other shapes, or a number that is not finite.
    """
    sums = _by_query(first, second, queries)
    return _tail(sums, float(sums.sum()))


def different_p_value(first: Seeds, second: Seeds, queries: Sequence[Sequence[str]]) -> float:
    """The two-sided p-value of the test of `better_p_value`. With one seed it is McNemar's exact test.

    Raises:
        TvLensError: as `better_p_value`.
    """
    sums = _by_query(first, second, queries)
    return min(1.0, 2 * _tail(sums, abs(float(sums.sum()))))


def intersection_union(p_values: Sequence[float]) -> float:
    """The p-value that all alternatives hold at once, as "better than every control": the largest (Berger 1982).

    Raises:
        TvLensError: no p-value, or one outside of 0 to 1.
    """
    return max(_checked_p_values(p_values))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P-values adjusted for the number of tests (Holm 1979), in the given order: the chance that any true null
    hypothesis is rejected is at most the level, however the tests depend on each other.

    Raises:
        TvLensError: no p-value, or one outside of 0 to 1.
    """
    values = _checked_p_values(p_values)
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return tuple(adjusted)


def non_inferiority(
    first: Seeds, second: Seeds, queries: Sequence[Sequence[str]], *, margin: float = 0.1
) -> NonInferiority:
    """Whether `first` is at most `margin` worse than `second`: the one-sided 95% lower bound of the difference, which
    is the lower end of its 90% interval, is above `-margin`.

    Raises:
        TvLensError: a margin that is not above 0; no seed, no query, other shapes, or a number that is not finite.
    """
    if not 0 < margin < math.inf:
        raise TvLensError(f"a margin is above 0, not {margin}")
    low = difference_interval(first, second, confidence=0.9).low
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
        raise TvLensError(
            f"conditions are compared on the same seeds and queries; these have {shapes} queries per seed"
        )
    if not shapes[0] or 0 in shapes[0]:
        raise TvLensError(f"statistics need a seed or more, with a query or more each, not {shapes[0]} queries")
    if not all(np.isfinite(seed).all() for condition in checked for seed in condition):
        raise TvLensError("statistics need finite numbers; a log-probability of -inf or NaN is among these")
    return checked


def _checked_p_values(p_values: Sequence[float]) -> list[float]:
    values = [float(p) for p in p_values]
    if not values or not all(0 <= p <= 1 for p in values):
        raise TvLensError(f"p-values are between 0 and 1, and at least one; these are {values[:8]}")
    return values


def _are_answers(seeds: list[Sample]) -> bool:
    return all(((seed == 0) | (seed == 1)).all() for seed in seeds)


def _mean(seeds: list[Sample]) -> float:
    """The mean of the seeds' means."""
    return math.fsum(float(seed.mean()) for seed in seeds) / len(seeds)


def _variance_between(seeds: list[Sample]) -> float:
    """The variance of the mean of the seeds' means, from their spread; 0 for one seed."""
    if len(seeds) == 1:
        return 0.0
    return float(np.var([seed.mean() for seed in seeds], ddof=1)) / len(seeds)


def _t(confidence: float, df: int) -> float:
    """The two-sided quantile of Student's t; infinite without a degree of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(df, (1 + confidence) / 2)) if df else math.inf


def _clopper_pearson(share: float, n: float, confidence: float) -> Interval:
    """The Clopper-Pearson interval of a share of `n`, which need not be a whole number."""
    from scipy.special import betaincinv

    tail, hits = (1 - confidence) / 2, share * n
    low = 0.0 if share <= 0 else float(betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if share >= 1 else float(betaincinv(hits + 1, n - hits, 1 - tail))
    return Interval(low, high)


def _widest(*intervals: Interval) -> Interval:
    return Interval(min(each.low for each in intervals), max(each.high for each in intervals))


def _over_seeds(seeds: list[Sample], confidence: float) -> Interval:
    """Student's t interval over the seeds' means; a point for one seed, which says nothing about others."""
    mean = _mean(seeds)
    if len(seeds) == 1:
        return Interval(mean, mean)
    margin = _t(confidence, len(seeds) - 1) * math.sqrt(_variance_between(seeds))
    return Interval(mean - margin, mean + margin)


def _over_queries(seeds: list[Sample], confidence: float) -> Interval:
    """The percentile bootstrap interval of the mean of the seeds' means, with queries drawn again within each seed.

    Its level makes up for the bootstrap's missing factor n / (n - 1) and for t in small samples (Hesterberg 2015,
    section 3.3).
    """
    from scipy.special import ndtr

    n = min(map(len, seeds))
    if n == 1:
        return Interval(-math.inf, math.inf) if len(seeds) == 1 else _over_seeds(seeds, confidence)
    draws = sum(_weights(len(seed), i) @ seed for i, seed in enumerate(seeds)) / len(seeds)
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * _t(confidence, sum(map(len, seeds)) - len(seeds))))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _weights(n: int, seed: int) -> Float64[np.ndarray, "draw query"]:
    """How much each of `n` queries weighs in each resample; the same whenever it is called."""
    return _kept_weights(n, seed) if n <= _CACHED_QUERIES else _drawn_weights(n, seed)


def _drawn_weights(n: int, seed: int) -> Float64[np.ndarray, "draw query"]:
    return np.random.default_rng([n, seed]).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) / n


_kept_weights = functools.lru_cache(maxsize=16)(_drawn_weights)


def _by_query(first: Seeds, second: Seeds, queries: Sequence[Sequence[str]]) -> Float64[np.ndarray, " query"]:
    """First minus second, added over the seeds in which a query appears."""
    ones, others = _checked(first, second)
    if [len(seed) for seed in queries] != [len(seed) for seed in ones]:
        raise TvLensError(
            f"a query for each answer: {[len(seed) for seed in queries]} queries per seed "
            f"for {[len(seed) for seed in ones]} answers"
        )
    sums: dict[str, float] = defaultdict(float)
    for texts, one, other in zip(queries, ones, others, strict=True):
        for text, difference in zip(texts, one - other, strict=True):
            sums[text] += float(difference)
    return np.array(list(sums.values()))


def _tail(sums: Float64[np.ndarray, " query"], observed: float) -> float:
    """How likely the sum is at least `observed` if the sign of each summand is a fair coin: exact for whole numbers,
    by convolution; else by random signs (TransformerLens).
    """
    if not (sums == np.round(sums)).all():
        import torch
        from transformer_lens.utilities.statistics import sign_flip_permutation_pvalue

        values = torch.from_numpy(sums if sums.sum() >= 0 or observed < 0 else -sums)
        return float(sign_flip_permutation_pvalue(values, n_permutations=9999, alternative="greater"))
    steps: Int64[np.ndarray, " query"] = np.abs(sums).astype(np.int64)
    chances = np.ones(1)  # of the sums -reach, -reach + 2, ..., reach
    reach = 0
    for step in steps[steps > 0]:
        longer = np.zeros(len(chances) + int(step))
        longer[: len(chances)] += chances / 2
        longer[int(step) :] += chances / 2
        chances, reach = longer, reach + int(step)
    totals = 2 * np.arange(len(chances)) - reach
    return min(1.0, float(chances[totals >= observed].sum()))
