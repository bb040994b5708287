"""Which rows are run together, and which share a prefix. Pure: token ids in, batches out, no model.

group     texts that begin alike, such as one prompt's demonstrations with several queries
batch     groups that are run together: their shared prefixes in one pass, then their rows in parts
part      rows of one pass: what is left of them after the prefix
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

Ids: TypeAlias = tuple[int, ...]

# One pass holds at most so many positions (keys and values) and so many logits, unless `batch_size` is given: on a CPU
# larger passes are not faster.
MAX_POSITIONS = 8192
MAX_LOGITS = 2**26

# A fourth of the memory is for prefixes that are kept, the rest for a pass.
_SHARE_OF_PREFIXES = 4


@dataclass(frozen=True)
class Costs:
    """How many bytes a pass needs.

    `cache` is for the keys and values of one position; `position` and `pair` are for the activations of one block, for
    each position and for each pair of positions that attend; `logits` is for each position that gets logits, with what
    is computed from them; `row` is for the reads and edits of one row. Without `picks_logits` every position that is
    run gets logits.
    """

    cache: int = 0
    position: int = 0
    pair: int = 0
    logits: int = 0
    row: int = 0
    n_blocks: int = 1
    picks_logits: bool = True

    def of_row(self, length: int, *, run: int | None = None, n_logits: int = 1, graph: bool = False) -> int:
        """The bytes of a row of `length` positions, of which the last `run` are computed (None: all). A graph holds
        the activations of all blocks, and twice the logits.
        """
        run = length if run is None else min(run, length)
        blocks, copies = (self.n_blocks, 2) if graph else (1, 1)
        # Keys and values twice: those of the shared prefix, and the rows' copies of them.
        held = 2 * self.cache * length + self.row
        activations = blocks * run * (self.position + self.pair * length)
        return held + activations + copies * self.logits * (n_logits if self.picks_logits else run)


@dataclass(frozen=True)
class Limits:
    """How an engine's rows may be batched.

    `batch_size` is the number of rows in a pass; None computes it from `memory` in bytes, as far as it is known, and
    with `is_capped` from `MAX_POSITIONS` and `MAX_LOGITS`. One row is always run. `max_rows` is the most that memory
    could hold before. Rows of unequal length share a pass only up to `padded_up_to`
    positions, new tokens included. Prefixes are shared if `shares_prefixes`, and pads between a prefix and the rows
    after it are allowed up to `gaps_up_to` positions. A cache may grow across `padded_up_to` only if
    `caches_beyond` says so.
    """

    d_vocab: int = 1
    batch_size: int | None = None
    max_rows: int | None = None
    padded_up_to: float = math.inf
    shares_prefixes: bool = False
    gaps_up_to: float = math.inf
    caches_beyond: bool = True
    memory: int | None = None
    costs: Costs = Costs()
    is_capped: bool = True

    def rows(self, longest: int, new_tokens: int = 0) -> int:
        """How many rows of at most `longest` tokens go into one pass, each of which gets `new_tokens` more."""
        fit = self.batch_size or max(
            1, min(self._capped(longest), self._fitting(self.costs.of_row(longest + new_tokens)))
        )
        return fit if self.max_rows is None else min(fit, self.max_rows)

    def graph_rows(self, longest: int, *, run: int, n_logits: int = 1) -> int:
        """How many rows of at most `longest` tokens go into a pass that keeps the graph of the last `run`."""
        return max(1, self._fitting(self.costs.of_row(longest, run=run, n_logits=n_logits, graph=True)))

    def logit_rows(self) -> int:
        """For how many positions logits can be held at once, with what is computed from them."""
        return max(1, min(MAX_LOGITS // self.d_vocab, self._fitting(self.costs.logits)))

    def kept_positions(self) -> int:
        """How many positions of shared prefixes may be kept between calls."""
        if self.memory is None or not self.costs.cache:
            return MAX_POSITIONS
        return min(MAX_POSITIONS, self.memory // _SHARE_OF_PREFIXES // self.costs.cache)

    def _capped(self, longest: int) -> int:
        return min(MAX_POSITIONS // longest, MAX_LOGITS // self.d_vocab) if self.is_capped else sys.maxsize

    def _fitting(self, each: int) -> int:
        if self.memory is None or not each:
            return sys.maxsize
        return (self.memory - self.memory // _SHARE_OF_PREFIXES) // each


@dataclass(frozen=True)
class Part:
    """Rows of one pass: their numbers, and their ids after the prefix."""

    rows: tuple[int, ...]
    ids: tuple[Ids, ...]


@dataclass(frozen=True)
class Batch:
    """Rows that are run together.

    `prefixes` hold one prefix per group, or nothing if none is shared; each part then has the same number of rows of
    every group, group by group. With `replay` no cache may be kept, because its entries would change as the rows grow.
    """

    prefixes: tuple[Ids, ...]
    parts: tuple[Part, ...]
    replay: bool = False

    def most_padded(self) -> tuple[Ids, Ids] | None:
        """The shortest and the longest whole row, if any row of this batch is padded."""
        whole = [ids for part in self.parts for ids in self._whole(part)]
        short, long = min(whole, key=len), max(whole, key=len)
        return (short, long) if len(short) < len(long) else None

    def _whole(self, part: Part) -> list[Ids]:
        if not self.prefixes:
            return list(part.ids)
        per_group = len(part.ids) // len(self.prefixes)
        return [self.prefixes[i // per_group] + ids for i, ids in enumerate(part.ids)]


def plan_batches(
    groups: Sequence[Sequence[Sequence[int]]],
    limits: Limits,
    *,
    reach: int = 1,
    new_tokens: int = 0,
    single: bool = False,
) -> list[Batch]:
    """Batches that hold every row once, long rows first.

    The rows are numbered through the groups. A shared prefix leaves at least `reach` tokens of every row, which is
    where edits and reads are. `new_tokens` more tokens will be generated after each row. With `single` a group of one
    row has a prefix, too: for rows that are run many times.
    """
    fewest = 1 if single else 2
    numbered, first = [], 0
    for group in groups:
        numbered.append(_Group(tuple(map(tuple, group)), first))
        first += len(group)
    shared, alone = [], []
    for each in numbered:
        shares = limits.shares_prefixes and len(each.ids) >= fewest
        start = shared_length(each.ids, reach) if shares else 0
        if start and max(map(len, each.ids)) + new_tokens <= limits.padded_up_to:
            shared.append(replace(each, start=start))
        else:
            alone += [(each.first + i, ids) for i, ids in enumerate(each.ids)]
    batches = _plan_rows(alone, limits, new_tokens)
    for size in sorted({len(each.ids) for each in shared}, reverse=True):
        batches += _plan_groups([each for each in shared if len(each.ids) == size], limits, new_tokens)
    return batches


def shared_length(rows: Sequence[Sequence[int]], reach: int = 1) -> int:
    """How many tokens the rows begin with in common, at least `reach` tokens of each left over."""
    most = min(map(len, rows)) - reach
    for i, column in enumerate(zip(*rows, strict=False)):
        if i >= most or len(set(column)) > 1:
            return max(0, min(i, most))
    return max(0, most)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """The rows as one tensor, padded on the left, and its mask."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device="cpu"), torch.tensor(mask, device="cpu")


@dataclass(frozen=True)
class _Group:
    """Rows that begin alike: their ids, the number of the first, and how many tokens they share."""

    ids: tuple[Ids, ...]
    first: int
    start: int = 0

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


def _plan_rows(rows: Sequence[tuple[int, Ids]], limits: Limits, new_tokens: int) -> list[Batch]:
    """Batches of whole rows."""
    batches = []
    queue = sorted(rows, key=lambda row: -len(row[1]))
    while queue:
        longest = len(queue[0][1])
        size = limits.rows(longest, new_tokens)
        mixed = longest + new_tokens <= limits.padded_up_to
        chunk = [row for row in queue[:size] if mixed or len(row[1]) == longest]
        queue = queue[len(chunk) :]
        crosses = longest <= limits.padded_up_to < longest + new_tokens and not limits.caches_beyond
        part = Part(tuple(row for row, _ in chunk), tuple(ids for _, ids in chunk))
        batches.append(Batch((), (part,), replay=crosses))
    return batches


def _plan_groups(groups: Sequence[_Group], limits: Limits, new_tokens: int) -> Iterator[Batch]:
    """Batches of groups of one size, each with a shared prefix."""
    queue = sorted(groups, key=lambda group: -group.longest)
    while queue:
        chunk = queue[: limits.rows(queue[0].longest, new_tokens)]
        queue = queue[len(chunk) :]
        lengths = {len(ids) - group.start for group in chunk for ids in group.ids}
        seen = max(group.start for group in chunk) + max(lengths)
        if (len(lengths) > 1 and seen > limits.gaps_up_to) or seen + new_tokens > limits.padded_up_to:
            whole = [(group.first + i, ids) for group in chunk for i, ids in enumerate(group.ids)]
            yield from _plan_rows(whole, limits, new_tokens)
            continue
        width = max(1, limits.rows(chunk[0].longest, new_tokens) // len(chunk))
        parts = []
        for start in range(0, len(chunk[0].ids), width):
            members = [(group, i) for group in chunk for i in range(start, min(len(group.ids), start + width))]
            rows = tuple(group.first + i for group, i in members)
            parts.append(Part(rows, tuple(group.ids[i][group.start :] for group, i in members)))
        yield Batch(tuple(group.ids[0][: group.start] for group in chunk), tuple(parts))
