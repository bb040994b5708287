"""Reads at the last token of rows of token ids, kept while several methods share them, so that no row is run twice."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tv_lens.edits import Edits, Site
from tv_lens.engines.base import Engine, Past, Tokens
from tv_lens.engines.planning import Ids
from tv_lens.engines.running import map_rows
from tv_lens.errors import EngineError


@dataclass(frozen=True)
class Wanted:
    """What is read of a row: a site at its last token, and how likely `target` is to come next, if it is given."""

    ids: Ids
    site: Site
    target: int | None = None


@dataclass(frozen=True, eq=False)
class LastTokens:
    """What was read of some rows: the site, and for rows with targets their log-probabilities and whether they are the
    most likely tokens.
    """

    values: Float[Tensor, "row layer width"]
    logprobs: Float[Tensor, " row"] | None = None
    right: Bool[Tensor, " row"] | None = None


@dataclass(eq=False)
class _Row:
    """What is known of a row, and its share of the passes that it was read in."""

    sites: dict[Site, Float[Tensor, "layer width"]] = field(default_factory=dict)
    targets: dict[int, tuple[float, bool]] = field(default_factory=dict)
    positions: float = 0.0
    seconds: float = 0.0

    def holds(self, wanted: Wanted) -> bool:
        """Whether all that is wanted of the row is known."""
        return wanted.site in self.sites and (wanted.target is None or wanted.target in self.targets)


@dataclass
class Charge:
    """What the rows that were used have cost, less what was run for them: added to what a method ran by itself, this
    charges a row to every method that uses it, and to no other.
    """

    positions: float = 0.0
    seconds: float = 0.0


@dataclass(eq=False)
class Reads:
    """Rows that have been read, and what they cost. Rows that are in `charged` are not charged again."""

    charge: Charge = field(default_factory=Charge)
    charged: set[Ids] = field(default_factory=set)
    _rows: dict[Ids, _Row] = field(default_factory=dict)

    def missing(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """What has not been read yet."""
        return [each for each in wanted if each.ids not in self._rows or not self._rows[each.ids].holds(each)]

    def read(self, engine: Engine, groups: Sequence[Sequence[Wanted]]) -> None:
        """Run the rows of which something is missing. The rows of a group begin alike, and what they share is run
        once. Everything that is wanted of a row is read in one pass.
        """
        needs: list[list[Wanted]] = []
        for group in groups:
            missing = {each.ids for each in self.missing(group)}
            if missing:
                needs.append([each for each in group if each.ids in missing])
        if not needs:
            return
        rows = [list(dict.fromkeys(each.ids for each in group)) for group in needs]
        flat = [ids for group in rows for ids in group]
        sites: dict[Ids, set[Site]] = {ids: set() for ids in flat}
        targets: dict[Ids, set[int]] = {ids: set() for ids in flat}
        for each in (each for group in needs for each in group):
            sites[each.ids].add(each.site)
            targets[each.ids] |= set() if each.target is None else {each.target}
        started, before = time.perf_counter(), engine.positions_run

        def work(numbers: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
            chosen = [flat[number] for number in numbers]
            read = list(dict.fromkeys(site for ids in chosen for site in sites[ids]))
            logits = any(targets[ids] for ids in chosen)
            output = engine.forward(tokens, read=read, past=past, logits=logits, keep_past=False)
            for slot, ids in enumerate(chosen):
                row = self._rows.setdefault(ids, _Row())
                for site in sites[ids]:
                    row.sites[site] = output.reads[site][slot].clone()
                if targets[ids] and output.logits is not None:
                    row.targets |= _judged(engine, output.logits[slot], targets[ids])

        map_rows(engine, rows, work)
        total = sum(map(len, flat))
        positions, seconds = engine.positions_run - before, time.perf_counter() - started
        self.charge.positions -= positions
        self.charge.seconds -= seconds
        for ids in flat:
            self._rows[ids].positions += positions * len(ids) / total
            self._rows[ids].seconds += seconds * len(ids) / total

    def use(self, wanted: Sequence[Wanted]) -> LastTokens:
        """What has been read of these rows, in order."""
        rows = [self._rows[each.ids] for each in wanted]
        for ids in {each.ids for each in wanted} - self.charged:
            self.charge.positions += self._rows[ids].positions
            self.charge.seconds += self._rows[ids].seconds
            self.charged.add(ids)
        values = torch.stack([row.sites[each.site] for row, each in zip(rows, wanted, strict=True)])
        judged = [row.targets[each.target] for row, each in zip(rows, wanted, strict=True) if each.target is not None]
        if len(judged) < len(wanted):
            return LastTokens(values)
        logprobs = torch.tensor([logprob for logprob, _ in judged], dtype=torch.float32, device="cpu")
        return LastTokens(values, logprobs, torch.tensor([right for _, right in judged], device="cpu"))


def _judged(engine: Engine, logits: Float[Tensor, " d_vocab"], targets: set[int]) -> dict[int, tuple[float, bool]]:
    """The log-probability of each target, and whether it is the most likely token."""
    if not bool(logits.amax().isfinite()):
        raise EngineError(f"{engine.name}: the logits after a prompt are NaN or infinite, so no token is likely")
    total, most_likely = logits.logsumexp(dim=-1), int(logits.argmax())
    return {target: (float(logits[target] - total), target == most_likely) for target in targets}


@contextmanager
def sharing_reads(engine: Engine) -> Iterator[Reads]:
    """Keep every read at a last token until the end, for all that runs on this engine."""
    if engine.shared_reads is not None:
        yield engine.shared_reads
        return
    engine.shared_reads = reads = Reads()
    try:
        yield reads
    finally:
        engine.shared_reads = None
