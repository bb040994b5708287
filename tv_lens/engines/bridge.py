"""What engines around a bridge have in common: the model's facts, and its tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformer_lens.model_bridge import RemoteBridge, TransformerBridge

from tv_lens.engines.drivers import ids_of, state_of, tokenizer_unchanged
from tv_lens.engines.text import ModelInfo, TextCodec
from tv_lens.errors import TvLensError, UnsupportedError

Bridge = TransformerBridge | RemoteBridge


def info_of(
    bridge: Bridge,
    *,
    n_ctx: int | None,
    end_ids: frozenset[int],
    prepend_bos: bool | None,
    hooks: Mapping[int, str],
) -> ModelInfo:
    """The model's facts, `end_ids` being those it names beside its tokenizer's own.

    Raises:
        UnsupportedError: the model is not a decoder-only stack of blocks.
        TvLensError: no tokenizer, or no BOS token to prepend.
    """
    name, cfg = name_of(bridge), bridge.cfg
    # An encoder such as BERT has a loss over tokens, but cannot generate.
    if not (bridge.adapter.supports_causal_loss and bridge.adapter.supports_generation):
        raise UnsupportedError(not_decoder_only(bridge))
    missing = [layer for layer in range(int(cfg.n_layers)) if layer not in hooks]
    if missing:
        raise UnsupportedError(
            f"{name} has no hook for the output of block {missing[0]} ({len(missing)} of {cfg.n_layers} layers "
            "missing), so its layers cannot be read or patched"
        )
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        raise TvLensError(f"{name} was booted without a tokenizer; pass tokenizer=...")
    ends = ids_of(tokenizer.eos_token_id) | end_ids
    pad = tokenizer.pad_token_id
    prepends = bool(cfg.default_prepend_bos if prepend_bos is None else prepend_bos)
    bos, reason = _bos(bridge, name, prepends, wanted=prepend_bos)
    return ModelInfo(
        name=name,
        n_layers=int(cfg.n_layers),
        d_model=int(cfg.d_model),
        d_vocab=int(cfg.d_vocab),
        n_ctx=n_ctx,
        dtype=str(cfg.dtype).removeprefix("torch."),
        prepend_bos=prepends,
        bos=bos,
        bos_reason=reason,
        end_ids=ends,
        pad_id=int(pad) if pad is not None else min(ends, default=0),  # masked out, so any id would do
    )


def _bos(bridge: Bridge, name: str, prepends: bool, wanted: bool | None) -> tuple[str, str]:
    """The token that is put in front of texts ("" for none), and why."""
    tokenizer = bridge.tokenizer
    with tokenizer_unchanged(tokenizer, state_of(tokenizer)):
        first = bridge.to_tokens("a", prepend_bos=prepends)[0].tolist()[0]
    is_bos = first == tokenizer.bos_token_id
    if wanted and not is_bos:
        raise TvLensError(f"prepend_bos=True, but the tokenizer of {name} has no BOS token; use None or False")
    reason = (
        "as the model's configuration in TransformerLens asks" if wanted is None else f"as prepend_bos={wanted} asks"
    )
    if not prepends:
        return "", reason
    if not is_bos:
        return "", "because the tokenizer has no BOS token"
    if tokenizer.bos_token_id == tokenizer.eos_token_id:
        reason += "; it is also the end-of-text token, because the tokenizer has no other BOS"
    return str(tokenizer.bos_token), reason


# A token for one byte of a character that is not in the vocabulary (sentencepiece).
_BYTE = re.compile("<0x[0-9A-F]{2}>")


class BridgeCodec(TextCodec):
    """The tokenizer of a bridge, used through `to_tokens`, one text at a time: batches keep an appended EOS in short
    rows. `options` are extra keyword arguments for `to_tokens`.
    """

    def __init__(self, bridge: Bridge, info: ModelInfo, **options: Any) -> None:
        super().__init__(info)
        self._bridge, self._options = bridge, options
        self._state = state_of(bridge.tokenizer)

    def to_ids(self, text: str) -> list[int]:
        """The ids of a text. A text that brings its own BOS does not get a second one."""
        own = self._bridge.tokenizer.bos_token
        prepend = bool(self.info.prepend_bos) and not (own and text.startswith(own))
        if not text and not prepend:
            return []
        with tokenizer_unchanged(self._bridge.tokenizer, self._state):
            tokens = self._bridge.to_tokens(text, prepend_bos=prepend, truncate=False, **self._options)
        ids: list[int] = tokens[0].tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        text: str = self._bridge.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def settled(self, ids: Sequence[int]) -> str:
        """The text that no later ids can change. Tokenizers written in Python may join pieces in any way, so for them
        nothing is known.
        """
        tokenizer = self._bridge.tokenizer
        if not tokenizer.is_fast:
            return ""
        kept = list(ids)
        # Bytes in a row that are not valid UTF-8 together all decode to U+FFFD, characters that were complete included.
        while kept and (_BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(kept[-1]))) or not self.decode(kept[-1:])):
            kept.pop()
        return super().settled(kept)

    def piece_ids(self, text: str) -> list[int]:
        """The ids of a text that continues another one, with nothing in front."""
        if not text:
            return []
        with tokenizer_unchanged(self._bridge.tokenizer, self._state):
            tokens = self._bridge.to_tokens(text, prepend_bos=False, truncate=False, **self._options)
        ids: list[int] = tokens[0].tolist()
        return ids

    def token(self, token: int) -> str:
        """A token as text; a special token by its name."""
        return self.decode([token]) or str(self._bridge.tokenizer.convert_ids_to_tokens(token))

    def chat(self, messages: Sequence[Mapping[str, str]], *, ask: bool, **options: Any) -> str:
        """A conversation as the tokenizer's own chat template writes it."""
        tokenizer = self._bridge.tokenizer
        if not tokenizer.chat_template:
            return super().chat(messages, ask=ask, **options)
        try:
            with tokenizer_unchanged(tokenizer, self._state):
                text: str = tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=ask, **options
                )
        except (TemplateError, ValueError) as error:
            raise TvLensError(f"the chat template of {self.info.name} refuses the messages: {error}") from error
        return text

    def chat_dates(self) -> list[str]:
        """Today's date in the forms that the chat template's calls of `strftime_now` ask for."""
        forms = re.findall(r"strftime_now\(\s*(['\"])(.*?)\1", str(self._bridge.tokenizer.chat_template))
        return [datetime.now().strftime(form) for _, form in forms]

    def special_ids(self, text: str) -> frozenset[int]:
        """The special tokens that are written out in a text."""
        with tokenizer_unchanged(self._bridge.tokenizer, self._state):
            ids = self._bridge.tokenizer(text, add_special_tokens=False)["input_ids"]
        return frozenset(each for each in ids if not self.decode([each]))

    def ends(self, text: str, ids: Sequence[int]) -> list[int]:
        """Where each token ends in the text, from the tokenizer's own offsets if they are of the same ids."""
        tokenizer = self._bridge.tokenizer
        if not tokenizer.is_fast:
            return super().ends(text, ids)
        with tokenizer_unchanged(tokenizer, self._state):
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets, own = encoded["offset_mapping"], encoded["input_ids"]
        in_front = len(ids) - len(own)
        if in_front < 0 or list(ids[in_front:]) != list(own):
            return super().ends(text, ids)
        return [0] * in_front + [end for _, end in offsets]


def name_of(bridge: Bridge) -> str:
    """The model's name; for a local path, only the folder's name, so that user paths do not end up in saved files."""
    name = str(bridge.cfg.model_name or bridge.cfg.architecture)
    return Path(name).name if os.path.isdir(name) else name


def not_decoder_only(bridge: Bridge) -> str:
    """The message about a model of another kind."""
    return (
        f"{name_of(bridge)} is not a decoder-only language model: it has no last position to read a task at and to "
        "answer from; use a causal language model"
    )


def check_batch_size(batch_size: int | None) -> int | None:
    """The batch size, if it is one."""
    if batch_size is not None and batch_size < 1:
        raise TvLensError(f"batch_size is {batch_size}; use 1 or more, or None for as many as fit")
    return batch_size
