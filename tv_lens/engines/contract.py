"""What the rest of tv_lens asks of an engine, and how many texts are run through one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

# What an engine needs to go on from where a pass ended. Opaque outside the engine that made it.
Past: TypeAlias = Any


@dataclass(frozen=True)
class Tokens:
    """A batch of rows, padded on the left. `ids` are the positions to run; `mask` is 1 on every real position
    seen by the end of them, those already in the past included.

    `rows` says which of the texts the rows are; empty means in the order given.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch seen"]
    rows: tuple[int, ...] = ()

    def then(self, chosen: Int[Tensor, " batch"]) -> Tokens:
        """The next step: one chosen token a row, after all that was seen."""
        ids = rearrange(chosen, "batch -> batch 1")
        return Tokens(ids, torch.cat([self.mask, torch.ones_like(ids)], dim=1), self.rows)

    def keep(self, rows: Sequence[int]) -> Tokens:
        """Only some of the rows."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return Tokens(self.ids[index], self.mask[index], tuple(self.rows[i] for i in rows) if self.rows else ())

    def copies(self, n: int) -> Tokens:
        """Each row `n` times in a row, numbered anew."""
        return Tokens(
            repeat(self.ids, "batch pos -> (batch n) pos", n=n), repeat(self.mask, "batch pos -> (batch n) pos", n=n)
        )


@dataclass(frozen=True)
class Patch:
    """What to write at the last position: one vector and one layer per row."""

    vectors: Float[Tensor, "batch d_model"]
    layers: Int[Tensor, " batch"]

    def keep(self, rows: Sequence[int]) -> Patch:
        """Only some of the rows."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return Patch(self.vectors[index], self.layers[index])

    def copies(self, n: int) -> Patch:
        """Each row `n` times in a row."""
        return Patch(
            repeat(self.vectors, "batch d_model -> (batch n) d_model", n=n),
            repeat(self.layers, "batch -> (batch n)", n=n),
        )


# Positions, and what is written there.
Edits: TypeAlias = tuple[tuple[int, Patch], ...]


@dataclass(frozen=True)
class Replay:
    """The past of an engine that keeps no cache: the rows so far, all of them to be run again at each step, and what
    is written where in them. A position counts from the start of the padded row.
    """

    tokens: Tokens
    edits: Edits = ()

    @staticmethod
    def after(past: Replay | None, tokens: Tokens, patch: Patch | None = None) -> Replay:
        """The rows up to the end of `tokens`, with `patch` at their last position."""
        if past is None:
            past = Replay(replace(tokens, ids=tokens.ids[:, :0]))
        ids = torch.cat([past.tokens.ids, tokens.ids], dim=1)
        edit = () if patch is None else ((ids.shape[1] - 1, patch),)
        return Replay(replace(tokens, ids=ids), past.edits + edit)

    def keep(self, rows: Sequence[int]) -> Replay:
        """Only some of the rows."""
        return Replay(self.tokens.keep(rows), tuple((at, patch.keep(rows)) for at, patch in self.edits))

    def copies(self, n: int) -> Replay:
        """Each row `n` times in a row."""
        return Replay(self.tokens.copies(n), tuple((at, patch.copies(n)) for at, patch in self.edits))


@runtime_checkable
class Engine(Protocol):
    """What the rest of tv_lens asks of a way to run a model.

    An engine may offer more, and is asked for it where it does: `name`, `dtype`, `prepend_bos` and `weights` (recorded
    as provenance), `continues` (False where `step` gives no past), `ends` (ids that end a text), `pad` (the id that
    fills ended rows), `progress`, `check_patching` (raises ValueError where nothing can be written), `shared`,
    `select`, `halve` and `readout` (see `LocalEngine`).
    """

    n_layers: int
    d_model: int

    def batches(self, texts: Sequence[str]) -> Iterator[Tokens]:
        """The texts as padded batches; `Tokens.rows` says which is where."""
        ...

    def read(self, tokens: Tokens, past: Past = None) -> Float[Tensor, "batch layer d_model"]:
        """The residual stream after each block, at the last position; float32 on the CPU."""
        ...

    def step(
        self, tokens: Tokens, patch: Patch | None = None, past: Past = None
    ) -> tuple[Float[Tensor, "batch d_vocab"], Past]:
        """Next-token logits after the last position, and what is needed to go on. `past` is used up."""
        ...

    def fork(self, past: Past, copies: int = 1) -> Past:
        """An independent past with each row `copies` times in a row; the one given stays good."""
        ...

    def decode(self, ids: Int[Tensor, "batch new"]) -> list[str]:
        """The text of each row, special tokens left out."""
        ...


def engine_name(engine: Engine) -> str:
    """What the engine's model is called in messages and provenance."""
    return getattr(engine, "name", type(engine).__name__)


def run_all(
    engine: Engine, groups: Sequence[Sequence[str]], work: Callable[[list[int], Tokens, Past], None], room: int = 0
) -> None:
    """Give every text to `work(rows, tokens, past)`, many in a pass, behind a progress bar. The groups are of equal
    size and hold texts that begin alike; the rows are numbered through them.

    When memory runs out, what is left goes on in smaller passes, where the engine can make them so; `work` may
    then see a row a second time. Texts that leave no `room` for so many more tokens are refused before the first.

    Raises:
        ValueError: an empty text, or one too long.
    """
    k = len(groups[0])
    left = list(range(len(groups)))
    done: set[int] = set()

    def go_on() -> None:  # a function, as its end sets free what a failed pass held
        for tokens, past in _passes(engine, [groups[g] for g in left], room):
            rows = [left[row // k] * k + row % k for row in tokens.rows]
            work(rows, tokens, past)
            shown.update(len(set(rows) - done))
            done.update(rows)

    with bar(engine, k * len(groups)) as shown:
        while left:
            try:
                go_on()
            except torch.cuda.OutOfMemoryError:
                if not (hasattr(engine, "halve") and engine.halve()):
                    raise
            left = [g for g in left if not done.issuperset(range(g * k, g * k + k))]


def _passes(engine: Engine, groups: Sequence[Sequence[str]], room: int) -> Iterator[tuple[Tokens, Past]]:
    """Rows to run, with the past they go on from; an engine that cannot share gets every text whole."""
    if hasattr(engine, "shared"):
        yield from engine.shared(groups, room)
        return
    done = 0
    for tokens in engine.batches([text for group in groups for text in group]):
        size = len(tokens.ids)
        yield replace(tokens, rows=tokens.rows or tuple(range(done, done + size))), None
        done += size


def bar(engine: Engine, total: int, unit: str = "row") -> Any:
    """A progress bar, unless the engine has them turned off or it would be over in a second."""
    return tqdm(total=total, unit=unit, leave=False, delay=1, disable=not getattr(engine, "progress", False))
