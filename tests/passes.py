"""Run texts through an engine's `forward` as the package does: encoded, batched, in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tv_lens.edits import RESID_POST, Edits, Site
from tv_lens.engines import Engine, Past, Tokens, map_rows


def tokens_of(engine: Engine, texts: Sequence[str]) -> Tokens:
    """All texts in one batch, in the order given."""
    rows = engine.text.encode(texts)
    longest = max(map(len, rows))
    pad = engine.info.pad_id
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return Tokens(torch.tensor(ids), torch.tensor(mask))


def read_groups(engine: Engine, groups: Sequence[Sequence[str]], site: Site = RESID_POST) -> Tensor:
    """The site at the last token of every text: row layer width."""
    actual: dict[int, Tensor] = {}

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        made = engine.forward(tokens, read=[site], past=past, logits=False, keep_past=False)
        actual.update(zip(rows, made.reads[site], strict=True))

    map_rows(engine, [engine.text.encode(group) for group in groups], work)
    return torch.stack([actual[row] for row in range(len(actual))])


def logits_of_groups(engine: Engine, groups: Sequence[Sequence[str]], edits: Edits = Edits()) -> Tensor:
    """Next-token logits after every text, with the edits made: row d_vocab."""
    actual: dict[int, Tensor] = {}

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        made = engine.forward(tokens, edits=edits, past=past, keep_past=False)
        assert made.logits is not None
        actual.update(zip(rows, made.logits.cpu(), strict=True))

    map_rows(engine, [engine.text.encode(group) for group in groups], work, edits=edits)
    return torch.stack([actual[row] for row in range(len(actual))])


def read_texts(engine: Engine, texts: Sequence[str], site: Site = RESID_POST) -> Tensor:
    """As `read_groups`, each text by itself."""
    return read_groups(engine, [[text] for text in texts], site)


def logits_of(engine: Engine, texts: Sequence[str], edits: Edits = Edits()) -> Tensor:
    """As `logits_of_groups`, each text by itself."""
    return logits_of_groups(engine, [[text] for text in texts], edits)
