"""Run a `TransformerBridge` in this process.

Layer `l` is the output of block `l`, `blocks.l.hook_resid_post`. Rows are padded on the left and the mask is built
from their lengths, so the last position of a batch is every row's last real token, whatever the tokenizer says about
padding.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_readout

from tv_lens.engines.bridge import BridgeEngine, name_of, not_decoder_only, to_its_end
from tv_lens.engines.contract import Edits, Past, Patch, Replay, Tokens


class LocalEngine(BridgeEngine):
    """A `TransformerBridge` in this process, on one device or several.

    `batch_size` is the number of rows in a pass; by default as many as a budget of positions and logits
    allows. `prepend_bos` follows the model where it is None. `progress=False` turns progress bars off.

    Raises:
        TypeError: not a `TransformerBridge`.
        ValueError: the model has no decoder-only stack of blocks, no tokenizer, or no BOS token to prepend.
    """

    _to_tokens: ClassVar[dict[str, Any]] = {"move_to_device": False}

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
        hf_config = getattr(bridge.original_model, "config", None)
        if getattr(hf_config, "is_encoder_decoder", False):
            raise ValueError(not_decoder_only(name_of(bridge)))
        generation = getattr(bridge.original_model, "generation_config", None)
        super().__init__(
            bridge,
            "blocks.{layer}.hook_resid_post",
            n_ctx=_context(bridge),
            ends=getattr(generation, "eos_token_id", None),
            batch_size=batch_size,
            prepend_bos=prepend_bos,
            progress=progress,
        )
        # How many rows the pass at hand has, and how many there is memory for, once a pass has found out.
        self._tried: int = 1
        self._most: int | None = None
        # A recurrent state is no KV cache: where TransformerLens returns none, rows are run whole at each step, and
        # where it does, it cannot be widened. The forward of those it has no cache for (RWKV) takes a mask too, and
        # does not read it.
        recurrent = bool(getattr(bridge.original_model, "_is_stateful", False))
        self._masks = bool(getattr(bridge.adapter, "supports_kv_cache", True))
        self._caches = self._masks and not getattr(bridge.cfg, "is_stateful", False)
        text_config = hf_config.get_text_config() if hf_config is not None else None
        # LFM2 says only there that some of its layers are no attention.
        kinds = set(getattr(text_config, "layer_types", None) or ())
        attention = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        self._forks = self._caches and not recurrent and attention
        # Up to how many positions pads between a shared prefix and a tail do no harm. Local windows, buffers as
        # long as the context, and alibi count pads as positions; the rest goes by position ids, after the mask.
        alibi = getattr(bridge.cfg, "positional_embedding_type", None) == "alibi"
        windows = [
            getattr(text_config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")
        ]
        limits = [limit for limit in (*windows, self.n_ctx) if isinstance(limit, int) and limit > 0]  # 0: no window
        self._gaps_up_to: float = 0 if alibi else min(limits, default=math.inf)
        accepted = inspect.signature(bridge.original_model.forward).parameters
        self._keeps_logits = "logits_to_keep" in accepted

    @cached_property
    def weights(self) -> str:
        """A fingerprint of the model's weights, from some numbers of each: two models may have one name."""
        digest = hashlib.sha256()
        for name, weight in self.bridge.original_model.named_parameters():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            if not weight.is_meta:  # as accelerate leaves what it keeps on the disk
                some = weight.detach().flatten()[:: max(1, weight.numel() // 16)]
                digest.update(some.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    # Texts to tokens

    def shared(self, groups: Sequence[Sequence[str]], room: int = 0) -> Iterator[tuple[Tokens, Past]]:
        """Equal-sized groups of texts, each group run once up to where its texts part.

        Yields what is left of the rows, at least one token each, with the past to go on from. The rows are
        numbered through the groups. The shared part is found on token ids, as a tokenizer may merge letters
        across the place where texts part. Models whose cache cannot be widened get whole rows and no past.
        """
        if not self._caches:
            for tokens, past in super().shared(groups, room):
                self._tried = len(tokens.ids)
                yield tokens, past
            return
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

    # Tokens to numbers

    def read(self, tokens: Tokens, past: Past = None) -> Float[Tensor, "batch layer d_model"]:
        """The residual stream after each block at the last position; float32 on the CPU. No logits are made,
        and no other position is kept.
        """
        edits: Edits = ()
        if not self._caches:
            replay = Replay.after(past, tokens)
            tokens, edits, past = replay.tokens, replay.edits, None
        wanted = set(self._hooks)
        with self._quietly(), self.bridge.hooks(fwd_hooks=self._writes(edits, [])):
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
        there, and the extended past: the KV cache, in which the patch lives on, or the whole rows with their patches
        where the model keeps none. `past` is used up, so fork it first to use it again.
        """
        if self._caches:
            logits, past = self._run(tokens, () if patch is None else ((-1, patch),), past, keep=1)
        else:
            past = Replay.after(past, tokens, patch)
            logits, _ = self._run(past.tokens, past.edits, None, keep=1)
        return logits[:, -1].float(), past

    def readout(
        self, vectors: Float[Tensor, "batch d_model"], k: int
    ) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
        """The `k` likeliest tokens of each vector and their probabilities, through the model's own final norm and
        unembedding (TransformerLens's `logit_readout`); on the CPU.
        """
        with self._quietly():
            found = logit_readout(self.bridge, vectors, top_k=k, return_type="probs")
        if found.top_ids is None:
            raise RuntimeError(f"{self.name} gave no tokens for its vectors")
        return found.top_ids.cpu(), found.values.float().cpu()

    def fork(self, past: Past, copies: int = 1) -> Past:
        """An independent copy of the past with each row `copies` times in a row."""
        if isinstance(past, Replay):
            return past.copies(copies)
        forked = copy.deepcopy(past)
        if copies > 1:
            forked.batch_repeat_interleave(copies)
        return forked

    def select(self, past: Past, rows: Sequence[int]) -> Past | None:
        """The past of only these rows, for which the one given is used up; None where the model's state
        cannot be taken apart.
        """
        if isinstance(past, Replay):
            return past.keep(rows)
        if not self._forks:
            return None
        past.batch_select_indices(torch.tensor(list(rows), dtype=torch.long))
        return past

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

    # Inside

    def _rows(self, longest: int) -> int:
        fit = super()._rows(longest)
        return fit if self._most is None else min(fit, self._most)

    def _run(
        self, tokens: Tokens, edits: Edits, past: Past, keep: int
    ) -> tuple[Float[Tensor, "batch kept d_vocab"], Past]:
        fired: list[int] = []
        hooks = self._writes(edits, fired)
        with self._quietly():
            logits, past = self.bridge.run_with_hooks(
                self._put(tokens.ids),
                fwd_hooks=hooks,
                return_type="logits_and_cache",
                attention_mask=self._put(tokens.mask),
                past_key_values=past,
                use_cache=self._caches,
                **self._logits(keep),
            )
        if len(fired) != len(hooks):
            raise RuntimeError(
                f"{self.name}: {len(hooks)} layers were to be patched and {len(fired)} writes happened; "
                "the logits would not be those of a patched run"
            )
        if self._caches:
            seen = 0 if past is None else int(past.get_seq_length())
            if seen != tokens.mask.shape[1]:
                raise RuntimeError(
                    f"{self.name}: the KV cache holds {seen} of {tokens.mask.shape[1]} positions, so the next token "
                    f"would be wrong; transformer-lens {version('transformer-lens')} does not fill the cache of "
                    f"{type(self.bridge.original_model).__name__} in transformers {version('transformers')}. In 5.24 "
                    "it fills none (pip install 'transformers>=5.9,<5.24'); before, take another model"
                )
        return logits, past

    def _prefill(self, tokens: Tokens) -> Past:
        return self._run(tokens, (), None, keep=0)[1]

    def _writes(self, edits: Edits, fired: list[int]) -> list[tuple[str | Callable[..., Any], Callable[..., Any]]]:
        def write(layer: int, position: int, patch: Patch) -> Callable[..., Tensor]:
            rows = (patch.layers == layer).nonzero().squeeze(1)

            def hook(residual: Tensor, hook: Any) -> Tensor:
                fired.append(layer)
                patched = residual.clone()  # the model's own tensor may be read elsewhere
                patched[rows.to(residual.device), position] = patch.vectors[rows].to(residual)
                return patched

            return hook

        return [
            (self._hooks[layer], write(layer, position, patch))
            for position, patch in edits
            for layer in sorted(set(patch.layers.tolist()))
        ]

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
            to_its_end(put_back)


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
