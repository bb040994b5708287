"""The engine interface: what the rest of tv_lens needs from something that runs a model.

An engine turns a batch of tokens into a `Pass`: next-token logits, reads of activations, and a past to continue from.
All changes to the model are passed as `Edits`. What it can do it declares as `Capability`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tv_lens.edits import RESID_POST, Edits, Site
from tv_lens.engines.planning import Limits
from tv_lens.engines.text import ModelInfo, Stop, TextCodec
from tv_lens.errors import TvLensError, UnsupportedError

if TYPE_CHECKING:
    from tv_lens.engines.reading import Reads

# What an engine needs to continue a pass. Opaque outside the engine that made it.
Past: TypeAlias = Any


class Capability(Enum):
    """What an engine can do; the values complete the sentence "it cannot ..."."""

    PATCH = "write a vector into a prompt"
    ADD = "add a vector to an activation"
    KEEP_NORM = "rescale an activation after an addition"
    ROTATE = "turn an activation toward a vector"
    LINEAR = "add a linear function of an activation"
    LOGITS = "give logits after several positions"
    POSITIONS = "write or read at several positions of a prompt"
    CONTINUE = "generate more than one token"
    GRADIENTS = "give gradients"
    READOUT = "read vectors through the model's unembedding"
    PROJECT = "project the outputs of attention heads into the residual stream"
    BATCHED_ANSWERS = "answer many rows in one call"


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of rows, padded on the left. For authors of engines.

    Attributes:
        ids: the positions to run.
        mask: 1 on every real position seen by the end of them, including those that are already in the past.

    Examples:
        >>> batch = Tokens(torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]]))
        >>> batch.then(torch.tensor([8, 9])).mask.shape
        torch.Size([2, 3])
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch seen"]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self) -> list[list[int]]:
        """The ids of each row, without its pads."""
        own = self.mask[:, self.mask.shape[1] - self.ids.shape[1] :].bool()
        return [ids[seen].tolist() for ids, seen in zip(self.ids, own, strict=True)]

    def then(self, chosen: Int[Tensor, " batch"]) -> Tokens:
        """The next step: one chosen token per row, after everything seen so far.

        Args:
            chosen: one token for each row.

        Returns:
            The next step, after everything seen so far.
        """
        ids = rearrange(chosen, "batch -> batch 1")
        return Tokens(ids, torch.cat([self.mask, torch.ones_like(ids)], dim=1))

    def keep(self, rows: Sequence[int]) -> Tokens:
        """Only some of the rows.

        Args:
            rows: the rows that stay.

        Returns:
            A smaller batch.
        """
        index = torch.tensor(list(rows), dtype=torch.long, device="cpu")
        return Tokens(self.ids[index], self.mask[index])

    def repeat(self, n: int) -> Tokens:
        """Each row `n` times in succession.

        Args:
            n: how many times.

        Returns:
            A larger batch, in which each row appears `n` times in succession.
        """
        return Tokens(
            repeat(self.ids, "batch pos -> (batch n) pos", n=n), repeat(self.mask, "batch seen -> (batch n) seen", n=n)
        )

    def check_positions(self, edits: Edits) -> None:
        """Raise TvLensError if an edit would write into a pad, or outside the positions that are run.

        Args:
            edits: what will be written.

        Raises:
            TvLensError: an edit would write into a pad, or outside the positions that are run.
        """
        width, seen = self.ids.shape[1], self.mask.shape[1]
        for edit in edits:
            inside = -edit.position <= width
            if not inside or not bool(self.mask[edit.rows, seen + edit.position].all()):
                lengths = self.mask[edit.rows].sum(dim=1)
                row = int(edit.rows[lengths.argmin()])
                raise TvLensError(
                    f"row {row} has {int(lengths.min())} tokens, {width} of them in this pass, so there is none at "
                    f"position {edit.position} to write to"
                )


@dataclass(frozen=True, eq=False)
class Pass:
    """What came out of one forward pass.

    `logits` are those after the last position, or after each of the last positions if a number of them was asked for;
    None if none were. `reads` hold the sites asked for; their layer axis follows `Engine.layers_of(site)`. If several
    sums were asked for (see `Engine.forward`), their axis follows that.
    """

    logits: Float[Tensor, "batch *pos d_vocab"] | None = None
    reads: Mapping[Site, Float[Tensor, "batch layer *sum width"]] = field(default_factory=dict)
    past: Past = None


class Engine(ABC):
    """Something that runs a model. A custom one derives from this class (see `docs/extending.md`); it sets the
    attributes and defines `forward`. An engine that keeps no cache derives from `StatelessEngine` instead.

    Attributes:
        info: the model's name, sizes and settings.
        text: the tokenizer.
        capabilities: what the engine can do.
        reasons: why it cannot do something, by capability.
        sites: what can be read and written.
        progress: whether progress bars are shown.
        positions_run: the positions that the model has run, pads included; 0 in an engine that does not count.
        shared_reads: what several methods share (see `sharing_reads`); None outside of an experiment.

    Examples:
        >>> engine = tv.engine_for(model)
        >>> engine.n_layers, engine.d_model
        (4, 32)
    """

    info: ModelInfo
    text: TextCodec
    capabilities: frozenset[Capability] = frozenset()
    # Why a capability is missing, and what to do about it, as the end of a sentence that begins with the model's name.
    reasons: Mapping[Capability, str] = {}
    sites: frozenset[Site] = frozenset({RESID_POST})
    progress: bool = False
    positions_run: int = 0
    shared_reads: Reads | None = None

    @property
    def limits(self) -> Limits:
        """How rows may be batched."""
        return Limits(d_vocab=self.info.d_vocab)

    @abstractmethod
    def forward(  # noqa: PLR0913 - the one way to run a model
        self,
        tokens: Tokens,
        *,
        edits: Edits = Edits(),
        read: Sequence[Site] = (),
        weights: Float[Tensor, "batch *sum window"] | None = None,
        past: Past = None,
        logits: bool | int = True,
        keep_past: bool = True,
        grad: bool = False,
    ) -> Pass:
        """Run the tokens, with the edits applied.

        Args:
            tokens: the batch.
            edits: what to write; their positions count from the end of `tokens`.
            read: sites to read, in float32 on the CPU, after the edits.
            weights: how much each of the last `window` positions counts in a read, which is then their weighted sum;
                None reads the last position alone. With an axis before the last one, several sums are read in the same
                pass, such as several positions separately.
            past: what an earlier pass returned. It is consumed; fork it first to use it again.
            logits: whether to compute the logits (float32) after the last position, or after each of how many of the
                last positions.
            keep_past: whether the pass will be continued.
            grad: whether to keep the graph, so that gradients reach the edits' values. Parameters never get any.

        Returns:
            Logits, reads and the past.
        """

    def fork(self, past: Past, copies: int = 1) -> Past:
        """An independent past with each row `copies` times in succession; `past` itself remains usable.

        Args:
            past: remains usable.
            copies: of each row, in succession.

        Returns:
            An independent past.

        Raises:
            UnsupportedError: the engine cannot continue a pass.
        """
        raise UnsupportedError(self.cannot(Capability.CONTINUE))

    def select(self, past: Past, rows: Sequence[int]) -> Past | None:
        """The past of only these rows, for which `past` is consumed; None if it cannot be taken apart.

        Args:
            past: is consumed.
            rows: the rows that stay.

        Returns:
            The past of only these rows; None if it cannot be taken apart.

        Raises:
            UnsupportedError: the engine cannot continue a pass.
        """
        raise UnsupportedError(self.cannot(Capability.CONTINUE))

    def answers(
        self, rows: Sequence[Sequence[int]], edits: Edits, *, max_new_tokens: int, stops: Sequence[Stop]
    ) -> list[list[int]]:
        """The most likely continuation of every row, for engines that batch rows themselves; they get all rows of a
        sweep or an evaluation at once. No edit is made at every step.

        Args:
            rows: the ids of each row.
            edits: what is written.
            max_new_tokens: how many tokens an answer may have.
            stops: what ends each row's answer.

        Returns:
            The ids of each answer, up to the first that ends it: one of `info.end_ids` or of the row's stop, or the one
            that completes its text.

        Raises:
            UnsupportedError: the engine does not batch rows itself.
        """
        raise UnsupportedError(self.cannot(Capability.BATCHED_ANSWERS))

    def readout(
        self, vectors: Float[Tensor, "batch d_model"], k: int
    ) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
        """Tokens that vectors point to, through the model's final norm and unembedding.

        Args:
            vectors: of the residual stream.
            k: how many tokens.

        Returns:
            The most likely tokens of each vector and their probabilities; on the CPU.

        Raises:
            UnsupportedError: the engine cannot reach the unembedding.
        """
        raise UnsupportedError(self.cannot(Capability.READOUT))

    def head_outputs(self, heads: Float[Tensor, "row width"], layer: int) -> Float[Tensor, "head d_model"]:
        """What each attention head of a layer adds to the residual stream, mean over rows: its output through the
        output projection, without the projection's bias, and through the scale of a norm that follows; on the CPU.

        `heads` are the outputs of all heads of the layer, as read from `HEADS`.

        Args:
            heads: the outputs of all heads of the layer, as read from `HEADS`.
            layer: the layer.

        Returns:
            One vector for each head, on the CPU.

        Raises:
            UnsupportedError: the engine cannot reach heads.
        """
        raise UnsupportedError(self.cannot(Capability.PROJECT))

    def layers_of(self, site: Site) -> tuple[int, ...]:
        """The layers that have the site; all of them unless the engine says otherwise.

        Args:
            site: the site.

        Returns:
            The layers that have it; all of them unless the engine says otherwise.
        """
        return tuple(range(self.info.n_layers))

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around all passes of one public call: what must be set up once, and put back at the end."""
        yield

    def padding_is_safe(self, short: Sequence[int], long: Sequence[int]) -> bool:
        """Whether a row gives the same reads padded to the length of another as it does alone.

        An engine that answers False must from then on have `limits` that do not pad rows of that length.

        Args:
            short: the ids of a row.
            long: the ids of a longer row.

        Returns:
            Whether the first gives the same reads padded to the length of the second as it does alone.
        """
        return True

    def shrink(self, rows: int) -> bool:
        """After a pass of `rows` rows ran out of memory: allow fewer from now on. False if there is no way.

        Args:
            rows: of the pass that ran out of memory.

        Returns:
            Whether there is a way to allow fewer from now on.
        """
        return False

    def fingerprint(self) -> str | None:
        """A digest of everything that decides the model's outputs; None if it cannot be computed."""
        return None

    # What follows is the same for every engine.

    @property
    def name(self) -> str:
        """The model's name in messages and provenance."""
        return self.info.name

    @property
    def n_layers(self) -> int:
        """The number of blocks."""
        return self.info.n_layers

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.info.d_model

    def require(self, capability: Capability) -> None:
        """Raise UnsupportedError if the engine lacks a capability; the message says what it can do.

        Args:
            capability: what is needed.

        Raises:
            UnsupportedError: the engine lacks it; the message says what it can do.
        """
        if capability not in self.capabilities:
            raise UnsupportedError(self.cannot(capability))

    def require_site(self, site: Site) -> None:
        """Raise UnsupportedError if the engine cannot reach a site.

        Args:
            site: what is needed.

        Raises:
            UnsupportedError: the engine cannot reach it.
        """
        if site not in self.sites:
            reachable = ", ".join(sorted(each.name for each in self.sites))
            raise UnsupportedError(f"{self.name} gives no access to {site}; it has {reachable}")

    def cannot(self, capability: Capability) -> str:
        """The message about a missing capability.

        Args:
            capability: what is missing.

        Returns:
            The message about it.
        """
        can = ", ".join(each.name for each in Capability if each in self.capabilities) or "nothing else"
        reason = self.reasons.get(capability, f"cannot {capability.value}; this engine has {can}")
        return f"{self.name} {reason}"


@dataclass(frozen=True)
class Replay:
    """The past of an engine that keeps no cache: the rows so far, which are run again at each step, and their edits,
    with positions counted from the end of the rows.
    """

    tokens: Tokens
    edits: Edits = Edits()

    @staticmethod
    def start(tokens: Tokens) -> Replay:
        """A past of no tokens: `tokens`, run after it, are run whole at each step."""
        return Replay(replace(tokens, ids=tokens.ids[:, :0]))

    @staticmethod
    def after(past: Replay | None, tokens: Tokens, edits: Edits) -> Replay:
        """The rows up to the end of `tokens`, with `edits` in them."""
        if past is None:
            past = Replay.start(tokens)
        ids = torch.cat([past.tokens.ids, tokens.ids], dim=1)
        return Replay(Tokens(ids, tokens.mask), Edits((*past.edits.before(tokens.ids.shape[1]), *edits)))

    def keep(self, rows: Sequence[int]) -> Replay:
        """Only some of the rows."""
        return Replay(self.tokens.keep(rows), self.edits.keep(rows))

    def repeat(self, n: int) -> Replay:
        """Each row `n` times in succession."""
        return Replay(self.tokens.repeat(n), self.edits.repeat(n))


class StatelessEngine(Engine):
    """An engine that keeps no cache. A subclass defines `run`, which gets whole rows at every step."""

    def require_plain(self, *, logits: bool | int, grad: bool) -> None:
        """Raise UnsupportedError if gradients or logits after several positions are asked for, and there are none."""
        if grad:
            self.require(Capability.GRADIENTS)
        if not isinstance(logits, bool):
            self.require(Capability.LOGITS)

    @abstractmethod
    def run(
        self,
        tokens: Tokens,
        *,
        edits: Edits,
        read: Sequence[Site],
        weights: Float[Tensor, "batch *sum window"] | None,
        logits: bool | int,
        grad: bool,
    ) -> Pass:
        """Run whole rows, with all edits made in them so far. The arguments are those of `forward`."""

    def forward(  # noqa: PLR0913 - the one way to run a model
        self,
        tokens: Tokens,
        *,
        edits: Edits = Edits(),
        read: Sequence[Site] = (),
        weights: Float[Tensor, "batch *sum window"] | None = None,
        past: Past = None,
        logits: bool | int = True,
        keep_past: bool = True,
        grad: bool = False,
    ) -> Pass:
        """Run the rows so far, with the new tokens and edits at their end."""
        whole = Replay.after(past, tokens, edits)
        self.positions_run += whole.tokens.ids.numel()
        output = self.run(whole.tokens, edits=whole.edits, read=read, weights=weights, logits=logits, grad=grad)
        return replace(output, past=whole if keep_past else None)

    def fork(self, past: Past, copies: int = 1) -> Past:
        """The rows so far, each `copies` times in succession."""
        return past.repeat(copies)

    def select(self, past: Past, rows: Sequence[int]) -> Past:
        """Only some of the rows so far."""
        return past.keep(rows)
