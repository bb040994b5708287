"""Planning is pure: every row once, within the limits, whatever the rows. No model runs here."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tv_lens.engines.planning import MAX_LOGITS, MAX_POSITIONS, Limits, padded, plan_batches, shared_length

IDS = st.lists(st.integers(1, 3), min_size=1, max_size=9)
GROUPS = st.lists(st.lists(IDS, min_size=1, max_size=5), min_size=1, max_size=6)
SIZE = st.none() | st.integers(1, 7)
LENGTH = st.integers(0, 14).map(float) | st.just(math.inf)
LIMITS = st.builds(
    Limits,
    d_vocab=st.just(100),
    batch_size=SIZE,
    max_rows=SIZE,
    padded_up_to=LENGTH,
    shares_prefixes=st.booleans(),
    gaps_up_to=LENGTH,
    caches_beyond=st.booleans(),
)


@settings(max_examples=500, derandomize=True, database=None, deadline=None)
@given(groups=GROUPS, limits=LIMITS, reach=st.integers(1, 4), new_tokens=st.integers(0, 6))
def test_every_row_is_run_once_and_within_the_limits(
    groups: list[list[list[int]]], limits: Limits, reach: int, new_tokens: int
) -> None:
    rows = [tuple(row) for group in groups for row in group]
    group_of = [g for g, group in enumerate(groups) for _ in group]
    seen: list[int] = []
    for batch in plan_batches(groups, limits, reach=reach, new_tokens=new_tokens):
        for part in batch.parts:
            seen += part.rows
            assert len(part.rows) == len(part.ids)
            longest = max(len(rows[row]) for row in part.rows)
            per_group = len(part.ids) // max(1, len(batch.prefixes))
            assert len(part.rows) <= max(limits.rows(longest), len(batch.prefixes))
            for i, (row, ids) in enumerate(zip(part.rows, part.ids, strict=True)):
                prefix = batch.prefixes[i // per_group] if batch.prefixes else ()
                assert prefix + ids == rows[row]  # nothing is lost, and in order
                assert not batch.prefixes or len(ids) >= reach  # edits and reads come after the prefix
            lengths = {len(rows[row]) for row in part.rows}
            tails = {len(ids) for ids in part.ids}
            if longest + new_tokens > limits.padded_up_to:
                assert len(lengths) == 1  # never padded
                assert not batch.prefixes  # and never shared
            if batch.prefixes and len(tails) > 1:
                assert max(map(len, batch.prefixes)) + max(tails) <= limits.gaps_up_to
            crosses = longest <= limits.padded_up_to < longest + new_tokens
            assert batch.replay == (crosses and not limits.caches_beyond)
        if batch.prefixes:
            assert limits.shares_prefixes
            assert all(batch.prefixes)
            rows_run = [row for part in batch.parts for row in part.rows]
            for g, group in enumerate(groups):
                own = [row for row in rows_run if group_of[row] == g]
                assert len(own) in (0, len(group))  # a group's prefix is run once
    assert sorted(seen) == list(range(len(rows)))


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(rows=st.lists(IDS, min_size=1, max_size=5), reach=st.integers(1, 4))
def test_the_shared_length_is_the_longest_that_leaves_enough(rows: list[list[int]], reach: int) -> None:
    start = shared_length(rows, reach)
    assert all(row[:start] == rows[0][:start] for row in rows)
    assert start == 0 or min(map(len, rows)) - start >= reach
    longer = start + 1
    same = all(row[:longer] == rows[0][:longer] and len(row) >= longer for row in rows)
    assert not (same and min(map(len, rows)) - longer >= reach)


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(groups=GROUPS, limits=LIMITS)
def test_the_most_padded_row_is_an_example_of_padding(groups: list[list[list[int]]], limits: Limits) -> None:
    rows = [tuple(row) for group in groups for row in group]
    for batch in plan_batches(groups, limits):
        whole = [rows[row] for part in batch.parts for row in part.rows]
        example = batch.most_padded()
        if example is None:
            assert len(set(map(len, whole))) == 1
        else:
            assert len(example[0]) == min(map(len, whole)) < len(example[1]) == max(map(len, whole))
            assert set(example) <= set(whole)


@pytest.mark.parametrize(
    ("changes", "longest", "rows"),
    [
        ({"d_vocab": 1000}, 1, min(MAX_POSITIONS, MAX_LOGITS // 1000)),
        ({"d_vocab": 1000}, 100, MAX_POSITIONS // 100),
        ({"d_vocab": 1000}, MAX_POSITIONS + 1, 1),
        ({"d_vocab": 256_000}, 10, MAX_LOGITS // 256_000),  # 262: a large vocabulary allows fewer rows
        ({"d_vocab": MAX_LOGITS + 1}, 1, 1),
        ({"d_vocab": 256_000, "batch_size": 999}, 10, 999),  # the user's choice wins
        ({"d_vocab": 1000, "max_rows": 3}, 1, 3),
        ({"d_vocab": 1000, "batch_size": 2, "max_rows": 3}, 1, 2),
        ({"d_vocab": 1000, "batch_size": 4, "max_rows": 3}, 1, 3),
    ],
)
def test_a_pass_is_as_large_as_the_budgets_allow(changes: dict[str, Any], longest: int, rows: int) -> None:
    assert Limits(**changes).rows(longest) == rows


@pytest.mark.parametrize(("most", "shared"), [(10, True), (9, False)])
def test_pads_are_put_in_the_middle_exactly_up_to_their_limit(most: int, shared: bool) -> None:
    """The longest prefix has 6 tokens and the longest tail 4."""
    groups = [[[1] * 6 + [2], [1] * 6 + [3]], [[4, 5, 6, 7, 8], [4, 9]]]
    batches = plan_batches(groups, Limits(shares_prefixes=True, gaps_up_to=float(most)))
    assert [bool(batch.prefixes) for batch in batches] == ([True] if shared else [False])


def test_a_large_vocabulary_makes_small_batches() -> None:
    rows = [[[1, 2, 3]] for _ in range(600)]
    sizes = [len(part.rows) for batch in plan_batches(rows, Limits(d_vocab=256_000)) for part in batch.parts]
    assert sizes == [262, 262, 76]


def test_rows_are_padded_on_the_left() -> None:
    ids, mask = padded([(5, 6, 7), (8,)], pad=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
