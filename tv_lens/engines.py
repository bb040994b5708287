"""Run a model: texts in, reads and next-token logits out.

The only room that tokenises, pads, names a hook or holds a cache. Layer `l` is the output of block `l`,
`blocks.l.hook_resid_post`, everywhere. Rows are padded on the left and the mask is built from their lengths,
so the last position of a batch is every row's last real token, whatever the tokenizer says about padding.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import RemoteBridge, TransformerBridge

from tv_lens.prompts import half_character

# What an engine needs to go on from where a pass ended. Opaque outside the engine that made it.
Past: TypeAlias = Any

# One pass holds at most so many positions (keys and values) and so many logits, unless `batch_size` is given.
_POSITIONS = 8192
_LOGITS = 2**26


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


@dataclass(frozen=True)
class Patch:
    """What to write at the last position: one vector and one layer per row."""

    vectors: Float[Tensor, "batch d_model"]
    layers: Int[Tensor, " batch"]

    def keep(self, rows: Sequence[int]) -> Patch:
        """Only some of the rows."""
        index = torch.tensor(list(rows), dtype=torch.long)
        return Patch(self.vectors[index], self.layers[index])


@runtime_checkable
class Engine(Protocol):
    """What the rest of tv_lens asks of a way to run a model.

    An engine may offer more, and is asked for it where it does: `name`, `dtype` and `prepend_bos` (recorded as
    provenance), `continues` (False where `step` gives no past), `ends` (ids that end a text), `pad` (the id that
    fills ended rows), `progress`, `shared`, `select` and `halve` (see `LocalEngine`).
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


class LocalEngine:
    """A `TransformerBridge` in this process, on one device or several.

    `batch_size` is the number of rows in a pass; by default as many as a budget of positions and logits
    allows. `prepend_bos` follows the model where it is None. `progress=False` turns progress bars off.

    Raises:
        TypeError: not a `TransformerBridge`.
        ValueError: the model has no decoder-only stack of blocks, no tokenizer, or no BOS token to prepend.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        *,
        batch_size: int | None = None,
        prepend_bos: bool | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(bridge, TransformerBridge):
            raise TypeError(
                f"LocalEngine runs a TransformerBridge, not a {type(bridge).__name__}; boot one with "
                "TransformerBridge.boot_transformers(name, hf_model=..., tokenizer=...)"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more, or None for as many as fit")
        self.bridge, self.batch_size, self.progress = bridge, batch_size, progress
        # How many rows the pass at hand has, and how many there is memory for, once a pass has found out.
        self._tried: int = 1
        self._most: int | None = None
        cfg = bridge.cfg
        # A model booted from a folder is called by the folder's name: a user's path is nobody's provenance.
        model_name = str(getattr(cfg, "model_name", None) or type(bridge.original_model).__name__)
        self.name = Path(model_name).name if os.path.isdir(model_name) else model_name
        self.n_layers, self.d_model = int(cfg.n_layers), int(cfg.d_model)
        self.n_ctx = _context(bridge)
        self._hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(self.n_layers)]

        hf_config = getattr(bridge.original_model, "config", None)
        missing = [name for name in self._hooks if name not in bridge.hook_dict]
        if getattr(hf_config, "is_encoder_decoder", False) or not bridge.adapter.supports_causal_loss:
            raise ValueError(
                f"{self.name} is not a decoder-only language model: it has no last position to read a task at "
                "and to answer from; use a causal language model"
            )
        if missing:
            raise ValueError(
                f"{self.name} has no hook {missing[0]} ({len(missing)} of {self.n_layers} layers missing), so its "
                "layers cannot be read or patched"
            )
        # A recurrent state is no KV cache: nothing to continue from where TransformerLens returns none, and
        # nothing that can be widened where it does.
        recurrent = bool(getattr(bridge.original_model, "_is_stateful", False))
        self.continues = bool(
            getattr(bridge.adapter, "supports_kv_cache", True) and not getattr(cfg, "is_stateful", False)
        )
        self._forks = self.continues and not recurrent
        # Up to how many positions pads between a shared prefix and a tail do no harm. Local windows, buffers as
        # long as the context, and alibi count pads as positions; the rest goes by position ids, after the mask.
        alibi = getattr(cfg, "positional_embedding_type", None) == "alibi"
        text_config = hf_config.get_text_config() if hf_config is not None else None
        windows = [
            getattr(text_config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")
        ]
        limits = [limit for limit in (*windows, self.n_ctx) if isinstance(limit, int)]
        self._gaps_up_to: float = 0 if alibi else min(limits, default=math.inf)
        accepted = inspect.signature(bridge.original_model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted

        if bridge.tokenizer is None:
            raise ValueError(f"{self.name} was booted without a tokenizer; pass tokenizer=...")
        wanted = getattr(cfg, "default_prepend_bos", True) if prepend_bos is None else prepend_bos
        self.prepend_bos = bool(wanted)
        self.dtype = str(cfg.dtype).removeprefix("torch.")
        if prepend_bos and self._to_ids("a")[0] != bridge.tokenizer.bos_token_id:
            raise ValueError(f"prepend_bos=True, but the tokenizer of {self.name} has no BOS token; use None or False")
        generation = getattr(bridge.original_model, "generation_config", None)
        self.ends = frozenset(_ids(bridge.tokenizer.eos_token_id) | _ids(getattr(generation, "eos_token_id", None)))
        # Masked out, so any id would do.
        self.pad: int = next(iter(_ids(bridge.tokenizer.pad_token_id)), min(self.ends, default=0))

    # Texts to tokens and back

    def batches(self, texts: Sequence[str], room: int = 0) -> Iterator[Tokens]:
        """The texts in batches of similar length, the longest first, all tokenised and checked beforehand.

        Raises:
            ValueError: a text without tokens, one that is no Unicode, or longer than leaves `room` more in the context.
        """
        ids = self._encode(texts, room)
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        return iter(
            [self._pad([ids[i] for i in rows], rows) for rows in self._chunks(order, [len(row) for row in ids])]
        )

    def shared(self, groups: Sequence[Sequence[str]], room: int = 0) -> Iterator[tuple[Tokens, Past]]:
        """Equal-sized groups of texts, each group run once up to where its texts part.

        Yields what is left of the rows, at least one token each, with the past to go on from. The rows are
        numbered through the groups. The shared part is found on token ids, as a tokenizer may merge letters
        across the place where texts part. Models whose cache cannot be widened get whole rows and no past.
        """
        k = len(groups[0])
        flat = self._encode([text for group in groups for text in group], room, per_prompt=k)
        rows = [flat[g * k : (g + 1) * k] for g in range(len(groups))]
        starts = [_shared_length(group) if self._forks and k > 1 else 0 for group in rows]
        lengths = [max(map(len, group)) for group in rows]
        for alone in (False, True):  # never a row of nothing but pads among the prefixes
            order = [g for g in range(len(rows)) if (starts[g] == 0) == alone]
            order.sort(key=lambda g: -lengths[g])
            for chunk in self._chunks(order, lengths):
                start = {g: starts[g] for g in chunk}
                tails = [len(row) - start[g] for g in chunk for row in rows[g]]
                gaps, seen = len(set(tails)) > 1, max(start.values()) + max(tails)
                if gaps and seen > self._gaps_up_to:
                    start = dict.fromkeys(chunk, 0)
                prefix = None
                if any(start.values()):
                    prefix = self._pad([rows[g][0][: start[g]] for g in chunk], chunk)
                    self._tried = len(chunk)
                    past = self._prefill(prefix)
                width = max(1, self._rows(max(lengths[g] for g in chunk)) // len(chunk))
                for first in range(0, k, width):
                    members = range(first, min(k, first + width))
                    self._tried = len(chunk) * len(members)
                    tokens = self._pad(
                        [rows[g][m][start[g] :] for g in chunk for m in members],
                        [g * k + m for g in chunk for m in members],
                    )
                    if prefix is None:
                        yield tokens, None
                        continue
                    before = repeat(prefix.mask, "batch seen -> (batch copies) seen", copies=len(members))
                    mask = torch.cat([before, tokens.mask], dim=1)
                    yield Tokens(tokens.ids, mask, tokens.rows), self.fork(past, len(members))

    def decode(self, ids: Int[Tensor, "batch new"]) -> list[str]:
        """The text of each row as it stands, special tokens left out."""
        decode = self.bridge.tokenizer.decode
        return [decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in ids.tolist()]

    # Tokens to numbers

    def read(self, tokens: Tokens, past: Past = None) -> Float[Tensor, "batch layer d_model"]:
        """The residual stream after each block at the last position; float32 on the CPU. No logits are made,
        and no other position is kept.
        """
        wanted = set(self._hooks)
        with self._quietly():
            _, cache = self.bridge.run_with_cache(
                self._put(tokens.ids),
                attention_mask=self._put(tokens.mask),
                # A callable, as a list stores each read under its alias too.
                names_filter=lambda name: name in wanted,
                pos_slice=-1,
                return_cache_object=False,
                output_attentions=False,
                use_cache=past is not None,
                past_key_values=past,
                **self._logits(0),
            )
        if set(cache) != wanted:
            raise RuntimeError(f"{self.name} gave no read of {sorted(wanted - set(cache))}")
        reads = torch.stack([cache[name].float().cpu() for name in self._hooks])
        return rearrange(reads, "layer batch 1 d_model -> batch layer d_model")

    def step(
        self, tokens: Tokens, patch: Patch | None = None, past: Past = None
    ) -> tuple[Float[Tensor, "batch d_vocab"], Past]:
        """Next-token logits (float32, on the model's device) after the last position, with `patch` written
        there, and the extended cache. The patch lives on in the cache; `past` is used up, so fork it first to
        use it again. A model that keeps no KV cache (`continues` is False) gives None instead.
        """
        logits, past = self._run(tokens, patch, past, keep=1)
        return logits[:, -1].float(), past

    def fork(self, past: Past, copies: int = 1) -> Past:
        """An independent copy of the cache with each row `copies` times in a row."""
        forked = copy.deepcopy(past)
        if copies > 1:
            forked.batch_repeat_interleave(copies)
        return forked

    def select(self, past: Past, rows: Sequence[int]) -> Past | None:
        """The cache of only these rows, for which the one given is used up; None where the model's state
        cannot be taken apart.
        """
        if not self._forks:
            return None
        past.batch_select_indices(torch.tensor(list(rows), dtype=torch.long))
        return past

    # Inside

    def _run(
        self, tokens: Tokens, patch: Patch | None, past: Past, keep: int
    ) -> tuple[Float[Tensor, "batch kept d_vocab"], Past]:
        fired: list[int] = []
        hooks = [] if patch is None else self._writes(patch, fired)
        with self._quietly():
            logits, past = self.bridge.run_with_hooks(
                self._put(tokens.ids),
                fwd_hooks=hooks,
                return_type="logits_and_cache",
                attention_mask=self._put(tokens.mask),
                past_key_values=past,
                use_cache=self.continues,
                **self._logits(keep),
            )
        if len(fired) != len(hooks):
            raise RuntimeError(
                f"{self.name}: {len(hooks)} layers were to be patched and {len(fired)} writes happened; "
                "the logits would not be those of a patched run"
            )
        if self.continues:
            seen = 0 if past is None else int(past.get_seq_length())
            if seen != tokens.mask.shape[1]:
                raise RuntimeError(
                    f"{self.name}: the KV cache holds {seen} of {tokens.mask.shape[1]} positions, so the "
                    f"next token would be wrong; transformer-lens {version('transformer-lens')} does not fill the "
                    f"caches of transformers {version('transformers')}: pip install 'transformers>=5.9,<5.24'"
                )
        return logits, past

    def _prefill(self, tokens: Tokens) -> Past:
        return self._run(tokens, None, None, keep=0)[1]

    def _writes(self, patch: Patch, fired: list[int]) -> list[tuple[str | Callable[..., Any], Callable[..., Any]]]:
        def write(layer: int) -> Callable[..., Tensor]:
            rows = (patch.layers == layer).nonzero().squeeze(1)

            def hook(residual: Tensor, hook: Any) -> Tensor:
                fired.append(layer)
                patched = residual.clone()  # the model's own tensor may be read elsewhere
                patched[rows.to(residual.device), -1] = patch.vectors[rows].to(residual)
                return patched

            return hook

        return [(self._hooks[layer], write(layer)) for layer in sorted(set(patch.layers.tolist()))]

    def _logits(self, keep: int) -> dict[str, Any]:
        if not self._keeps_logits:
            return {}
        # A number counts from the end, where 0 would mean all; an empty index makes no logits.
        return {"logits_to_keep": keep or torch.empty(0, dtype=torch.long, device=self.bridge.cfg.device)}

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.bridge.cfg.device)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """No graph and no dropout; each module's train flag and our hook points come back as they were, also when a
        pass raises.
        """
        training = [
            module
            for model in (self.bridge, self.bridge.original_model)
            for module in model.modules()
            if module.training
        ]
        grad, hook_dict = torch.is_grad_enabled(), self.bridge.hook_dict
        points = [hook_dict[name] for name in self._hooks]
        hooks = [(point, list(point.fwd_hooks), list(point._forward_hooks)) for point in points]
        level = getattr(self.bridge, "context_level", 0)

        def put_back() -> None:
            torch.set_grad_enabled(grad)
            for module in training:
                module.training = True
            # TransformerLens leaves its hooks there where Ctrl-C comes while it adds or removes them.
            for point, shown, keys in hooks:
                point.fwd_hooks[:] = shown
                for key in [key for key in point._forward_hooks if key not in keys]:
                    del point._forward_hooks[key]
            self.bridge.context_level = level

        try:
            torch.set_grad_enabled(False)
            for module in training:
                module.training = False
            yield
        finally:
            _to_its_end(put_back)

    def _to_ids(self, text: str) -> list[int]:
        # A text that brings its own BOS does not get a second one.
        own = self.bridge.tokenizer.bos_token
        prepend = self.prepend_bos and not (own and text.startswith(own))
        if not text and not prepend:
            return []
        return self.bridge.to_tokens(text, prepend_bos=prepend, move_to_device=False, truncate=False)[0].tolist()

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
        fit = self.batch_size or max(1, min(_POSITIONS // longest, _LOGITS // int(self.bridge.cfg.d_vocab)))
        return fit if self._most is None else min(fit, self._most)

    def halve(self) -> bool:
        """From now on no more than half as many rows in a pass as the last one had; False where it had one."""
        if self._tried < 2:
            return False
        if self._most is None:
            warnings.warn(
                f"{self.name}: no memory for {self._tried} rows in a pass; going on with fewer. "
                f"LocalEngine(model, batch_size={self._tried // 2}) begins there",
                stacklevel=2,
            )
        self._most = self._tried // 2
        return True

    def _chunks(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        """`order`, the longest first, in pieces of as many as go into one pass."""
        first = 0
        while first < len(order):
            rows = self._rows(lengths[order[first]])
            yield list(order[first : first + rows])
            first += rows

    def _pad(self, ids: Sequence[Sequence[int]], rows: Sequence[int]) -> Tokens:
        longest = max(map(len, ids))
        return Tokens(
            torch.tensor([[self.pad] * (longest - len(row)) + list(row) for row in ids]),
            torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
            tuple(rows),
        )


def engine_for(model: Any) -> Engine:
    """The engine that runs `model`: itself, or a `LocalEngine` around a `TransformerBridge`.

    Raises:
        TypeError: nothing that tv_lens can run; the message says how to get there.
    """
    if isinstance(model, TransformerBridge):
        return LocalEngine(model)
    if isinstance(model, RemoteBridge):
        raise TypeError("a RemoteBridge cannot be run yet; boot the model with TransformerBridge.boot_transformers")
    if isinstance(model, Engine):
        return model
    raise TypeError(
        f"cannot run a {type(model).__name__}; pass a TransformerBridge, for instance "
        "transformer_lens.TransformerBridge.boot_transformers(name), or with hf_model= and tokenizer= for a "
        "Hugging Face model"
    )


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
    if isinstance(engine, LocalEngine) or hasattr(engine, "shared"):
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


def _context(bridge: TransformerBridge) -> int | None:
    """The model's own limit of positions; where its configuration has none, TransformerLens makes one up."""
    config = getattr(bridge.original_model, "config", None)
    if config is None:
        return int(bridge.cfg.n_ctx)
    known = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length", "max_sequence_length")
    limits = [getattr(config.get_text_config(), name, None) for name in known]
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)


def _shared_length(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens the rows begin with in common, at least one token of each left over."""
    shortest = min(map(len, rows)) - 1
    for i, column in enumerate(zip(*rows, strict=False)):
        if i >= shortest or len(set(column)) > 1:
            return i
    return shortest


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
        _to_its_end(put_back)


def _to_its_end(put_back: Callable[[], None]) -> None:
    """Ctrl-C in the middle of it waits until all is put back: a model may have a thousand modules."""
    try:
        put_back()
    except KeyboardInterrupt:
        put_back()
        raise
