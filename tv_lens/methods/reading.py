"""Reads that several methods share, made in one pass over each prompt."""

from __future__ import annotations

from collections.abc import Sequence

from tv_lens.answers import answer_ids
from tv_lens.engines import Engine, Wanted
from tv_lens.generation import encode
from tv_lens.methods.base import Read
from tv_lens.prompts import Example, Prompt, PromptFormat


def read_together(engine: Engine, reads: Sequence[Read]) -> None:
    """Read all of these once, for the methods that use them inside of `sharing_reads`. Demonstrations are run once for
    all the queries after them.
    """
    if engine.shared_reads is None or not reads:
        return
    distinct = list(dict.fromkeys(reads))
    ids = encode(engine, [read.prompt for read in distinct], 1)
    groups: dict[tuple[tuple[Example, ...], PromptFormat] | tuple[int, ...], list[Wanted]] = {}
    for i, (read, own) in enumerate(zip(distinct, ids, strict=True)):
        target = _first_token(engine, read.prompt, own, i) if read.judged else None
        # Queries without demonstrations have only the template in common, which is too little to be worth a group.
        key = (read.prompt.examples, read.prompt.template) if read.prompt.examples else tuple(own)
        groups.setdefault(key, []).append(Wanted(tuple(own), read.site, target))
    engine.shared_reads.read(engine, list(groups.values()))


def _first_token(engine: Engine, prompt: Prompt, ids: Sequence[int], number: int) -> int | None:
    return None if prompt.answer is None else answer_ids(engine, prompt, ids, prompt.answer, number)[0]
