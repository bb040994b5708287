"""Run many rows through an engine: in batches, in order, with a progress bar, and in smaller batches if memory runs
out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeAlias

import torch

from tv_lens.edits import Edits
from tv_lens.engines.base import Engine, Past, Replay, Tokens
from tv_lens.engines.planning import MAX_POSITIONS, Batch, Ids, Limits, Part, padded, plan_batches
from tv_lens.progress import Bar, bar

# What is done with a batch: its rows' numbers, their tokens, the past to continue from, and their edits.
Work: TypeAlias = Callable[[list[int], Tokens, Past, Edits], None]


@dataclass
class Prefixes:
    """The pasts of shared prefixes, kept for rows that are run many times. No more than `most` positions are kept, and
    no more than the engine's memory allows.
    """

    most: int = MAX_POSITIONS
    _pasts: dict[tuple[Ids, ...], tuple[Tokens, Past]] = field(default_factory=dict)
    _positions: int = 0

    def get(self, prefixes: tuple[Ids, ...]) -> tuple[Tokens, Past] | None:
        """The tokens of these prefixes and the past after them, if they are kept."""
        return self._pasts.get(prefixes)

    def keep(self, prefixes: tuple[Ids, ...], tokens: Tokens, past: Past, limits: Limits) -> bool:
        """Keep the past, which must then be forked before it is used; False if there is too much already."""
        if self._positions + tokens.ids.numel() > min(self.most, limits.kept_positions()):
            return False
        self._pasts[prefixes] = tokens, past
        self._positions += tokens.ids.numel()
        return True

    def clear(self) -> None:
        """Free all of them."""
        self._pasts.clear()
        self._positions = 0


def map_rows(  # noqa: PLR0913 - its options are keywords
    engine: Engine,
    groups: Sequence[Sequence[Sequence[int]]],
    work: Work,
    *,
    edits: Edits = Edits(),
    reach: int = 1,
    new_tokens: int = 0,
    kept: Prefixes | None = None,
    max_rows: int | None = None,
) -> None:
    """Give every row of token ids to `work`, many in a pass.

    The groups hold rows that begin alike; what the rows of a group share is run once. Rows are numbered through the
    groups, and `edits` refers to these numbers. The last `reach` tokens of every row are read, and `new_tokens` more
    will be added to each.

    With `kept`, prefixes are looked up there, and kept for the next call with the same groups. `max_rows` is the most
    rows of a pass, for work that needs more memory than a pass alone.

    When memory runs out, the remaining groups continue in smaller passes, so `work` may see a row a second time.
    """
    firsts = [0, *accumulate(len(group) for group in groups)]
    run = _Run(engine, groups, firsts, work, edits, max(reach, edits.reach), new_tokens, kept, max_rows)
    with engine.session(), progress_bar(engine, firsts[-1]) as shown:
        remaining = list(range(len(groups)))
        while remaining:
            try:
                run.run(remaining, shown)
            except RuntimeError as error:
                if not is_out_of_memory(error) or not engine.shrink(run.rows_tried):
                    raise
                if kept is not None:
                    kept.clear()
            remaining = [g for g in remaining if not run.done.issuperset(range(firsts[g], firsts[g + 1]))]


# Only CUDA and XPU have a class for it.
_OUT_OF_MEMORY = (
    "can't allocate memory",  # on a CPU
    "not enough memory",  # on a CPU, Windows
    "backend out of memory",  # Apple
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


@dataclass
class _Run:
    """One call of `map_rows`: what is to be done, and what has been done."""

    engine: Engine
    groups: Sequence[Sequence[Sequence[int]]]
    firsts: Sequence[int]
    work: Work
    edits: Edits
    reach: int
    new_tokens: int
    kept: Prefixes | None
    max_rows: int | None
    done: set[int] = field(default_factory=set)
    rows_tried: int = 1

    # A separate method, so that the tensors of a failed pass are freed when it returns.
    def run(self, remaining: Sequence[int], shown: Bar) -> None:
        numbers = [row for g in remaining for row in range(self.firsts[g], self.firsts[g + 1])]
        for batch in self.plan(remaining):
            prefix, past, is_kept = self.prefix(batch)
            for i, part in enumerate(batch.parts):
                rows = [numbers[row] for row in part.rows]
                is_last = i + 1 == len(batch.parts) and not is_kept
                shown.begin(len(set(rows) - self.done))
                self.run_part(rows, batch, part, prefix, past, is_last)
                shown.update(len(set(rows) - self.done))
                self.done.update(rows)

    # A separate method, so that a part's past is freed before the next one is made.
    def run_part(
        self, rows: list[int], batch: Batch, part: Part, prefix: Tokens | None, past: Past, is_last: bool
    ) -> None:
        tokens, start = self.start(batch, part, prefix, past, is_last)
        self.work(rows, tokens, start, self.edits.keep(rows))

    def plan(self, remaining: Sequence[int]) -> list[Batch]:
        """Batches for the remaining groups, none of them padded in a way that the model gets wrong."""
        groups = [self.groups[g] for g in remaining]
        previous: list[Batch] | None = None
        while True:
            batches = plan_batches(
                groups, self.limits, reach=self.reach, new_tokens=self.new_tokens, single=self.kept is not None
            )
            examples = [example for batch in batches if (example := batch.most_padded())]
            self.rows_tried = 2  # as many as the comparison runs
            if batches == previous or all(self.engine.padding_is_safe(*example) for example in examples):
                return batches
            previous = batches

    @property
    def limits(self) -> Limits:
        limits = self.engine.limits
        if self.max_rows is None:
            return limits
        most = self.max_rows if limits.max_rows is None else min(self.max_rows, limits.max_rows)
        return replace(limits, max_rows=most)

    def prefix(self, batch: Batch) -> tuple[Tokens | None, Past, bool]:
        """The shared prefixes of a batch, the past after them, and whether it is kept for another call."""
        if not batch.prefixes:
            return None, None, False
        known = None if self.kept is None else self.kept.get(batch.prefixes)
        if known is not None:
            return *known, True
        tokens = Tokens(*padded(batch.prefixes, self.engine.info.pad_id))
        self.rows_tried = len(tokens)
        past = self.engine.forward(tokens, logits=False).past
        return tokens, past, self.kept is not None and self.kept.keep(batch.prefixes, tokens, past, self.limits)

    def start(self, batch: Batch, part: Part, prefix: Tokens | None, past: Past, is_last: bool) -> tuple[Tokens, Past]:
        """The rows of a part after their prefixes, and a separate past for them."""
        ids, mask = padded(part.ids, self.engine.info.pad_id)
        self.rows_tried = len(ids)
        if prefix is None:
            tokens = Tokens(ids, mask)
            return tokens, Replay.start(tokens) if batch.replay else None
        copies = len(ids) // len(prefix)
        mask = torch.cat([prefix.repeat(copies).mask, mask], dim=1)
        # The last part may consume the past itself.
        own = past if is_last and copies == 1 else self.engine.fork(past, copies)
        return Tokens(ids, mask), own


def progress_bar(engine: Engine, total: int, unit: str = "rows", *, shown: bool = True) -> AbstractContextManager[Bar]:
    """A bar that counts, unless the engine's are turned off; see `tv_lens.progress`."""
    return bar(total, unit, shown=engine.progress and shown)
