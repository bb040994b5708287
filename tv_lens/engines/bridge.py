"""What engines around a bridge have in common: its name and sizes, and texts to tokens and back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from tv_lens.engines.contract import Past, Tokens
from tv_lens.prompts import half_character

# One pass holds at most so many positions (keys and values) and so many logits, unless `batch_size` is given.
_POSITIONS = 8192
_LOGITS = 2**26


class BridgeEngine:
    """A bridge's name, sizes and tokenizer. `n_ctx` is the longest row, None for no limit; `ends` are ids that end a
    text, those the model names beside its tokenizer's own.

    Raises:
        ValueError: `batch_size` below 1, no decoder-only stack of blocks, no tokenizer, or no BOS token to prepend.
    """

    # Whether pads are masked out; where they count as text, only rows of equal length run together.
    _masks: bool = True
    # What else the bridge's `to_tokens` is told.
    _to_tokens: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        bridge: Any,
        hooks: str,
        *,
        n_ctx: int | None,
        ends: int | Sequence[int] | None,
        batch_size: int | None,
        prepend_bos: bool | None,
        progress: bool,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more, or None for as many as fit")
        self.bridge, self.batch_size, self.progress, self.n_ctx = bridge, batch_size, progress, n_ctx
        cfg = bridge.cfg
        self.name = name_of(bridge)
        self.n_layers, self.d_model = int(cfg.n_layers), int(cfg.d_model)
        self._hooks = [hooks.format(layer=layer) for layer in range(self.n_layers)]
        # An encoder such as BERT has a loss over tokens, and generates nothing.
        if not (bridge.adapter.supports_causal_loss and bridge.adapter.supports_generation):
            raise ValueError(not_decoder_only(self.name))
        missing = [name for name in self._hooks if name not in bridge.hook_dict]
        if missing:
            raise ValueError(
                f"{self.name} has no hook {missing[0]} ({len(missing)} of {self.n_layers} layers missing), so its "
                "layers cannot be read or patched"
            )
        if bridge.tokenizer is None:
            raise ValueError(f"{self.name} was booted without a tokenizer; pass tokenizer=...")
        wanted = getattr(cfg, "default_prepend_bos", True) if prepend_bos is None else prepend_bos
        self.prepend_bos = bool(wanted)
        self.dtype = str(cfg.dtype).removeprefix("torch.")
        if prepend_bos and self._to_ids("a")[0] != bridge.tokenizer.bos_token_id:
            raise ValueError(f"prepend_bos=True, but the tokenizer of {self.name} has no BOS token; use None or False")
        self.ends = frozenset(_ids(bridge.tokenizer.eos_token_id) | _ids(ends))
        # Masked out, so any id would do.
        self.pad: int = next(iter(_ids(bridge.tokenizer.pad_token_id)), min(self.ends, default=0))

    def batches(self, texts: Sequence[str], room: int = 0) -> Iterator[Tokens]:
        """The texts in batches of similar length, the longest first, all tokenised and checked beforehand.

        Raises:
            ValueError: a text without tokens, one that is no Unicode, or longer than leaves `room` more in the context.
        """
        return self._batches(self._encode(texts, room))

    def shared(self, groups: Sequence[Sequence[str]], room: int = 0) -> Iterator[tuple[Tokens, Past]]:
        """Equal-sized groups of texts, as rows to run with the past they go on from; here whole rows and no past.
        The rows are numbered through the groups.
        """
        texts = [text for group in groups for text in group]
        for tokens in self._batches(self._encode(texts, room, per_prompt=len(groups[0]))):
            yield tokens, None

    def decode(self, ids: Int[Tensor, "batch new"]) -> list[str]:
        """The text of each row as it stands, special tokens left out."""
        decode = self.bridge.tokenizer.decode
        return [decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in ids.tolist()]

    # Inside

    def _batches(self, ids: Sequence[Sequence[int]]) -> Iterator[Tokens]:
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        return iter(
            [self._pad([ids[i] for i in rows], rows) for rows in self._chunks(order, [len(row) for row in ids])]
        )

    def _to_ids(self, text: str) -> list[int]:
        # A text that brings its own BOS does not get a second one.
        own = self.bridge.tokenizer.bos_token
        prepend = self.prepend_bos and not (own and text.startswith(own))
        if not text and not prepend:
            return []
        ids: list[int] = self.bridge.to_tokens(text, prepend_bos=prepend, truncate=False, **self._to_tokens)[0].tolist()
        return ids

    def _encode(self, texts: Sequence[str], room: int = 0, per_prompt: int = 1) -> list[list[int]]:
        if isinstance(texts, str) or not texts:
            raise ValueError(f"expected a list of at least one text, not {texts!r}")
        known: dict[str, list[int]] = {}  # one text at a time: batches keep an appended EOS in short rows
        with _tokenizer_as_it_was(self.bridge.tokenizer):
            for i, text in enumerate(texts):
                if half_character(text):
                    raise ValueError(
                        f"prompt {i // per_prompt} holds half of a surrogate pair, which is no character: "
                        f"{_start(text)}; write the whole character"
                    )
                ids = known[text] = known.get(text) or self._to_ids(text)
                if not ids:
                    raise ValueError(
                        f"prompt {i // per_prompt} is {text!r}, which has no tokens; the model needs at least one"
                    )
                if self.n_ctx is not None and len(ids) + room > self.n_ctx:
                    new = f", with {room} more to come," if room else ""
                    raise ValueError(
                        f"prompt {i // per_prompt} has {len(ids)} tokens{new} and the context of {self.name} is "
                        f"{self.n_ctx}: {_start(text)}; use fewer shots, shorter texts or fewer new tokens"
                    )
        return [known[text] for text in texts]

    def _rows(self, longest: int) -> int:
        return self.batch_size or max(1, min(_POSITIONS // longest, _LOGITS // int(self.bridge.cfg.d_vocab)))

    def _chunks(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """`order`, the longest first, in pieces of as many as go into one pass."""
        first = 0
        while first < len(order):
            longest = lengths[order[first]]
            rows = order[first : first + self._rows(longest)]
            chunk = [row for row in rows if self._masks or lengths[row] == longest]
            yield chunk
            first += len(chunk)

    def _pad(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> Tokens:
        longest = max(map(len, ids))
        return Tokens(
            torch.tensor([[self.pad] * (longest - len(row)) + list(row) for row in ids]),
            torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
            tuple(rows),
        )


def name_of(bridge: Any) -> str:
    """The model's name; booted from a folder, it is called by the folder's: a user's path is nobody's provenance."""
    name = str(getattr(bridge.cfg, "model_name", None) or bridge.cfg.architecture)
    return Path(name).name if os.path.isdir(name) else name


def not_decoder_only(name: str) -> str:
    return (
        f"{name} is not a decoder-only language model: it has no last position to read a task at and to answer from; "
        "use a causal language model"
    )


def _ids(value: int | Sequence[int] | None) -> set[int]:
    """Configurations hold one id, several or none."""
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


def _start(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


@contextmanager
def _tokenizer_as_it_was(tokenizer: Any) -> Iterator[None]:
    """Tokenising switches the fast tokenizer's padding on; this puts padding and truncation back."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    padding, truncation = backend.padding, backend.truncation

    def put_back() -> None:
        backend.no_padding() if padding is None else backend.enable_padding(**padding)
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)

    try:
        yield
    finally:
        to_its_end(put_back)


def to_its_end(put_back: Callable[[], None]) -> None:
    """Ctrl-C in the middle of it waits until all is put back: a model may have a thousand modules."""
    try:
        put_back()
    except KeyboardInterrupt:
        put_back()
        raise
