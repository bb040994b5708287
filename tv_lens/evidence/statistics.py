"""Intervals and tests for answers that are right or wrong. scipy and TransformerLens compute them.

The interval is about queries drawn independently from the task's list, given these demonstrations and this model. It
does not include the uncertainty of choosing a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformer_lens.utilities.statistics import success_rate_ci


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
