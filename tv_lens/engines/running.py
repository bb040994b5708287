"""Run many rows through an engine: in batches, in order, with a progress bar, and in smaller batches if memory runs
out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from tqdm.auto import tqdm

from tv_lens.edits import Edits
from tv_lens.engines.base import Engine, Past, Replay, Tokens
from tv_lens.engines.planning import Batch, Part, padded, plan_batches

# What is done with a batch: its rows' numbers, their tokens, the past to continue from, and their edits.
Work: TypeAlias = Callable[[list[int], Tokens, Past, Edits], None]


def map_rows(
    engine: Engine,
    groups: Sequence[Sequence[Sequence[int]]],
    work: Work,
    *,
    edits: Edits = Edits(),
    reach: int = 1,
    new_tokens: int = 0,
) -> None:
    """Give every row of token ids to `work`, many in a pass.

    The groups hold rows that begin alike; what the rows of a group share is run once. Rows are numbered through the
    groups, and `edits` refers to these numbers. The last `reach` tokens of every row
    are read, and `new_tokens` more will be added to each.

    When memory runs out, the remaining groups continue in smaller passes, so `work` may see a row a second time.
    """
    firsts = [0, *accumulate(len(group) for group in groups)]
    run = _Run(engine, groups, firsts, work, edits, max(reach, edits.reach), new_tokens)
    with engine.session(), progress_bar(engine, firsts[-1]) as shown:
        remaining = list(range(len(groups)))
        while remaining:
            try:
                run.run(remaining, shown)
            except torch.cuda.OutOfMemoryError:
                if not engine.shrink(run.rows_tried):
                    raise
            remaining = [g for g in remaining if not run.done.issuperset(range(firsts[g], firsts[g + 1]))]


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
    done: set[int] = field(default_factory=set)
    rows_tried: int = 1

    # A separate method, so that the tensors of a failed pass are freed when it returns.
    def run(self, remaining: Sequence[int], shown: Any) -> None:
        numbers = [row for g in remaining for row in range(self.firsts[g], self.firsts[g + 1])]
        for batch in self.plan(remaining):
            prefix, past = self.prefix(batch)
            for i, part in enumerate(batch.parts):
                rows = [numbers[row] for row in part.rows]
                is_last = i + 1 == len(batch.parts)
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
            batches = plan_batches(groups, self.engine.limits, reach=self.reach, new_tokens=self.new_tokens)
            examples = [example for batch in batches if (example := batch.most_padded())]
            self.rows_tried = 2  # as many as the comparison runs
            if batches == previous or all(self.engine.padding_is_safe(*example) for example in examples):
                return batches
            previous = batches

    def prefix(self, batch: Batch) -> tuple[Tokens | None, Past]:
        """The shared prefixes of a batch, and the past after them."""
        if not batch.prefixes:
            return None, None
        tokens = Tokens(*padded(batch.prefixes, self.engine.info.pad_id))
        self.rows_tried = len(tokens)
        return tokens, self.engine.forward(tokens, logits=False).past

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


def progress_bar(engine: Engine, total: int, unit: str = "row") -> Any:
    """A progress bar, unless the engine has them turned off or it would be over in a second."""
    return tqdm(total=total, unit=unit, leave=False, delay=1, disable=not engine.progress)
