"""Texts to token ids and back, and what each token of a prompt is for.

The role of a token comes from the one tokenization that is run: a token belongs to the segment of the prompt in which
its last character is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tv_lens.edits import ROLES, Positions, Site
from tv_lens.errors import TvLensError, UnsupportedError
from tv_lens.prompts import Prompt, SegmentRole, has_lone_surrogate

# A token's role: that of its segment, or "bos" for what the tokenizer puts in front of the text.
TokenRole = SegmentRole | str


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model.

    `n_ctx` is the longest row, None for no limit. `end_ids` end a text. `pad_id` fills the rows of a batch, and of
    `Completions.tokens`. `prepend_bos` says whether a BOS token is put in front of texts, `bos` which one ("" for
    none), and `bos_reason` why.
    """

    name: str
    n_layers: int
    d_model: int
    d_vocab: int = 1
    n_heads: int = 0
    d_head: int = 0
    n_ctx: int | None = None
    dtype: str = "float32"
    prepend_bos: bool | None = None
    bos: str | None = None
    bos_reason: str = ""
    end_ids: frozenset[int] = frozenset()
    pad_id: int = 0

    def width(self, site: Site) -> int:
        """The width of a site's vectors."""
        return self.n_heads * self.d_head if site.per_head else self.d_model


@dataclass(frozen=True)
class Stop:
    """Where an answer ends: at a text, or at one of some special tokens (which have no text)."""

    text: str | None = None
    ids: frozenset[int] = frozenset()


class TextCodec(ABC):
    """A model's tokenizer. A subclass defines `to_ids` and `decode`."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    @abstractmethod
    def to_ids(self, text: str) -> list[int]:
        """The ids of a text as the model gets it, with what the tokenizer puts in front."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""

    def settled(self, ids: Sequence[int]) -> str:
        """The beginning of the text that is the same in all rows that start with `ids`.

        By default all of the text but U+FFFD at its end, which may be part of a character. If more ids can change
        other text too, a subclass must leave that out as well.
        """
        return self.decode(ids).rstrip("\ufffd")

    def piece_ids(self, text: str) -> list[int]:
        """The ids of a text that continues another one, with nothing in front."""
        return self.to_ids(text)

    def token(self, token: int) -> str:
        """A token as text, for tables."""
        return self.decode([token]) or f"<token {token}>"

    def chat(self, messages: Sequence[Mapping[str, str]], *, ask: bool, **options: Any) -> str:
        """A conversation as the tokenizer's chat template writes it; with `ask`, up to where the assistant's next
        message begins.

        Raises:
            UnsupportedError: there is no chat template.
            TvLensError: the template refuses the messages.
        """
        raise UnsupportedError(f"{self.info.name} has no chat template; use a Template")

    def chat_dates(self) -> list[str]:
        """Today's date, in every form in which the chat template can write it."""
        return []

    def special_ids(self, text: str) -> frozenset[int]:
        """The special tokens that are written out in a text."""
        return frozenset()

    def ends(self, text: str, ids: Sequence[int]) -> list[int]:
        """For each token the number of characters of `text` up to its end; 0 for tokens before the text.

        By default computed by decoding the ids piece by piece, which is slow but works for every tokenizer whose
        decoded ids give the text back.
        """
        pieces = [min(len(self.decode(ids[: i + 1])), len(text)) for i in range(len(ids))]
        return pieces[:-1] + [len(text)]

    def encode(self, texts: Sequence[str], *, new_tokens: int = 0, per_prompt: int = 1) -> list[list[int]]:
        """The ids of every text, each checked to leave `new_tokens` more tokens in the context.

        Raises:
            TvLensError: no texts, invalid Unicode, a text without tokens, or one too long. `per_prompt` texts belong to
                each prompt that the message names.
        """
        if isinstance(texts, str) or not texts:
            raise TvLensError(f"expected a list of at least one text, not {texts!r}")
        known: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            if text not in known:
                known[text] = self._checked(text, i // per_prompt, new_tokens)
        return [known[text] for text in texts]

    def _checked(self, text: str, prompt: int, new_tokens: int) -> list[int]:
        if has_lone_surrogate(text):
            raise TvLensError(
                f"prompt {prompt} holds half of a surrogate pair, which is not a character: {_start(text)}; write the "
                "whole character"
            )
        ids = self.to_ids(text)
        if not ids:
            raise TvLensError(f"prompt {prompt} is {text!r}, which has no tokens; the model needs at least one")
        n_ctx = self.info.n_ctx
        if n_ctx is not None and len(ids) + new_tokens > n_ctx:
            new = f", with {new_tokens} more to come," if new_tokens else ""
            raise TvLensError(
                f"prompt {prompt} has {len(ids)} tokens{new} and the context of {self.info.name} is {n_ctx}: "
                f"{_start(text)}; use fewer shots, shorter texts or fewer new tokens"
            )
        return ids

    def stop_of(self, prompt: Prompt) -> Stop:
        """Where the prompt's answer ends."""
        text = prompt.template.stop
        return Stop() if text is None else Stop(text, self.special_ids(text))

    def roles(self, prompt: Prompt, ids: Sequence[int]) -> list[TokenRole]:
        """What each token of the prompt is for."""
        text = prompt.text
        roles: list[TokenRole] = []
        for end in self.ends(text, ids):
            role: TokenRole = "bos"
            begun = 0
            for segment in prompt.segments if end else ():
                role, begun = segment.role, begun + len(segment.text)
                if end <= begun:
                    break
            roles.append(role)
        return roles

    def positions(self, prompt: Prompt, ids: Sequence[int], positions: Positions, number: int) -> list[int]:
        """The positions of a prompt that `positions` names, counted from its end, in order.

        "separators" are the last token between each input and its output, the query's included (Dong et al., arXiv
        2506.09048); "outputs" every token of the demonstrations' outputs; "query" every token of the query; "all" every
        token, BOS included.

        Raises:
            TvLensError: prompt `number` has no such token, or `positions` is something else.
        """
        if positions == "last":
            return [-1]
        if not isinstance(positions, str):
            return _numbers(positions, len(ids), number)
        if positions not in ROLES:
            raise TvLensError(f"positions is {positions!r}; use {', '.join(map(repr, ROLES))} or negative numbers")
        if positions == "all":
            return list(range(-len(ids), 0))
        roles = self.roles(prompt, ids)
        if positions == "separators":
            chosen = _last_of_runs(roles, "separator")
            expected = prompt.shots + 1
        else:
            role = {"outputs": "output", "query": "query"}[positions]
            chosen, expected = [i for i, each in enumerate(roles) if each == role], 1
        if len(chosen) < expected:
            raise TvLensError(
                f"prompt {number} has {len(chosen)} tokens for positions={positions!r}: {_start(prompt.text)}; "
                "show_tokens(model, prompt) shows what each token is for; keep_demonstrations=True keeps those of the "
                "demonstrations"
            )
        return [i - len(ids) for i in chosen]


def _numbers(positions: Sequence[int], length: int, number: int) -> list[int]:
    numbers = set(positions)
    if not numbers or len(numbers) < len(positions) or not all(isinstance(i, int) and i < 0 for i in numbers):
        raise TvLensError(
            f"positions are {positions!r}; use different negative numbers, which count from the end: -1 is the last "
            "token"
        )
    if min(numbers) < -length:
        raise TvLensError(f"prompt {number} has {length} tokens, so there is none at position {min(numbers)}")
    return sorted(numbers)


def _last_of_runs(roles: Sequence[TokenRole], role: TokenRole) -> list[int]:
    """The last token of each uninterrupted run of a role."""
    chosen, end = [], 0
    for each, run in groupby(roles):
        end += len(list(run))
        if each == role:
            chosen.append(end - 1)
    return chosen


def _start(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")
