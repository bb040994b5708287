"""Run a `TransformerBridge` in this process.

Layer `l` is the output of block `l`, `blocks.l.hook_resid_post`. Rows are padded on the left and the mask is built from
their lengths, so the last position of a batch is every row's last real token, whatever the tokenizer says about
padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import logit_readout

from tv_lens.edits import HEADS, RESID_POST, Edits, Site
from tv_lens.engines.base import Capability, Engine, Pass, Past, Replay, Tokens
from tv_lens.engines.bridge import BridgeCodec, check_batch_size, info_of, not_decoder_only
from tv_lens.engines.capabilities import head_shape, hooks_of, projection_of, support_of
from tv_lens.engines.drivers import (
    components_of,
    computing,
    config_of,
    has_output_hooks,
    model_unchanged,
    output_hooks,
    state_of,
)
from tv_lens.engines.fingerprint import fingerprint_of
from tv_lens.engines.hooks import reader, writer
from tv_lens.engines.memory import available_memory, check_memory, costs_of
from tv_lens.engines.planning import Limits, padded
from tv_lens.engines.quantized import compute_dtype, noting_lost_gradients, packed_modules
from tv_lens.errors import EngineError, TvLensError, UnsupportedError, warn

_CAPABILITIES = frozenset(Capability) - {Capability.BATCHED_ANSWERS}

# How far a padded row may be from the same row alone, as a share of the activation's length. Quantized models count
# as half precision: some round activations too, and then by the largest one of the whole batch.
_TOLERANCE = {"float64": 1e-3, "float32": 1e-3}
_HALF_TOLERANCE = 0.1


# So many vectors at once are read through the unembedding, if memory allows.
_READ_OUT = 64


class LocalEngine(Engine):
    """A `TransformerBridge` in this process, on one device or several.

    `batch_size` is the number of rows in a pass; by default as many as fit into `memory`, a number of bytes for keys
    and values, activations, logits, reads and edits. `memory=None` is half of the GPU's free memory when the engine is
    first used, or 2 GiB on a CPU. If memory runs out all the same, smaller passes follow.
    `prepend_bos=None` follows the model's configuration. `progress=False` turns progress bars off.

    Several threads may use one model: each public call waits for the one before it.

    Raises:
        UnsupportedError: not a `TransformerBridge`, or not a decoder-only model.
        TvLensError: `batch_size` or `memory` below 1, no tokenizer, or no BOS token to prepend.

    Examples:
        >>> engine = tv.LocalEngine(model.bridge, batch_size=8, prepend_bos=False, progress=False)
        >>> engine.info.prepend_bos
        False
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        *,
        batch_size: int | None = None,
        memory: int | None = None,
        prepend_bos: bool | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(bridge, TransformerBridge):
            raise UnsupportedError(
                f"LocalEngine runs a TransformerBridge, not a {type(bridge).__name__}; boot one with "
                "TransformerBridge.boot_transformers(name, hf_model=..., tokenizer=...)"
            )
        self.bridge, self.batch_size, self.progress = bridge, check_batch_size(batch_size), progress
        self.memory = check_memory(memory)
        if config_of(bridge).get("is_encoder_decoder"):
            raise UnsupportedError(not_decoder_only(bridge))
        self._support = support_of(bridge)
        self._state = state_of(bridge.original_model)
        self._hooks = hooks_of(bridge, int(bridge.cfg.n_layers))
        info = info_of(
            bridge,
            n_ctx=self._support.n_ctx,
            end_ids=self._support.end_ids,
            prepend_bos=prepend_bos,
            hooks=self._hooks[RESID_POST],
        )
        n_heads, d_head = head_shape(bridge, self._hooks.get(HEADS, {}))
        dtype = compute_dtype(bridge)
        self.info = replace(info, n_heads=n_heads, d_head=d_head, dtype=str(dtype).removeprefix("torch."))
        self._costs = costs_of(
            bridge, dtype, keeps_cache=self._support.keeps_cache, picks_logits=self._support.keeps_logits
        )
        self.text = BridgeCodec(bridge, self.info, move_to_device=False)
        self.capabilities = _CAPABILITIES
        self.sites = frozenset(self._hooks)

    @property
    def limits(self) -> Limits:
        """How rows may be batched: by the model's configuration, and by what was learned while running it."""
        learned = self._state.padded_up_to
        padded_up_to = self._support.padded_up_to
        return Limits(
            d_vocab=self.info.d_vocab,
            batch_size=self.batch_size,
            max_rows=self._state.max_rows,
            padded_up_to=padded_up_to if learned is None else min(padded_up_to, learned),
            shares_prefixes=self._support.forks,
            gaps_up_to=self._support.gaps_up_to,
            caches_beyond=self._support.caches_beyond,
            memory=self._memory,
            costs=self._costs,
            is_capped=torch.device(self.bridge.cfg.device or "cpu").type == "cpu",
        )

    @cached_property
    def _memory(self) -> int:
        if self.memory is not None:
            return self.memory
        return available_memory(each.device for each in self.bridge.original_model.parameters())

    def layers_of(self, site: Site) -> tuple[int, ...]:
        """The layers that have the site; hybrid models have attention heads in some only."""
        self.require_site(site)
        return tuple(self._hooks[site])

    def forward(  # noqa: PLR0913 - as Engine.forward
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
        """Run the tokens with the edits applied, as `Engine.forward` says.

        The past is the KV cache, in which edits live on. A model that keeps none, or whose cached keys would change as
        the rows grow, gets whole rows with all their edits at each step.
        """
        if self._support.keeps_cache and not isinstance(past, Replay):
            return self._run(tokens, edits, read, weights, past, logits, keep_past, grad)
        whole = Replay.after(past, tokens, edits)
        output = self._run(whole.tokens, whole.edits, read, weights, None, logits, False, grad)
        return replace(output, past=whole if keep_past else None)

    def fork(self, past: Past, copies: int = 1) -> Past:
        """An independent copy of the past with each row `copies` times in succession."""
        if isinstance(past, Replay):
            return past.repeat(copies)
        forked = copy.deepcopy(past)
        if copies > 1:
            forked.batch_repeat_interleave(copies)
        return forked

    def select(self, past: Past, rows: Sequence[int]) -> Past | None:
        """The past of only these rows, for which `past` is consumed; None if the model's state cannot be split."""
        if isinstance(past, Replay):
            return past.keep(rows)
        if not self._support.forks:
            return None
        past.batch_select_indices(torch.tensor(list(rows), dtype=torch.long, device="cpu"))
        return past

    def readout(
        self, vectors: Float[Tensor, "batch d_model"], k: int
    ) -> tuple[Int[Tensor, "batch k"], Float[Tensor, "batch k"]]:
        """The `k` most likely tokens of each vector and their probabilities, through the model's own final norm and
        unembedding (TransformerLens's `logit_readout`); on the CPU.

        Raises:
            UnsupportedError: an unembedding whose weights are quantized, or offloaded.
        """
        try:
            with self.session(), self._computing(grad=False):
                result = logit_readout(
                    self.bridge,
                    vectors,
                    top_k=k,
                    return_type="probs",
                    chunk_size=max(1, min(_READ_OUT, self.limits.logit_rows() // 2)),  # it makes twice the copies
                )
        except NotImplementedError as error:
            raise UnsupportedError(
                f"{self.name}: the unembedding cannot be read, because its weights are quantized or offloaded; load "
                f"the model with its lm_head as it is ({error})"
            ) from error
        if result.top_ids is None:
            raise EngineError(f"{self.name} gave no tokens for its vectors")
        return result.top_ids.cpu(), result.values.float().cpu()

    def head_outputs(self, heads: Float[Tensor, "row width"], layer: int) -> Float[Tensor, "head d_model"]:
        """What each attention head of a layer adds to the residual stream, as `Engine.head_outputs` says.

        Raises:
            TvLensError: a layer without attention heads.
        """
        self._point(HEADS, layer)
        projection = projection_of(self.bridge, layer, self.info.n_heads)
        with self.session(), self._computing(grad=False):
            return projection(heads)

    @contextmanager
    def session(self) -> Iterator[None]:
        """One thread at a time, no dropout; the model is as it was afterwards. Modules are visited once per session."""
        with model_unchanged(self.bridge, self._points, self._state):
            yield

    def padding_is_safe(self, short: Sequence[int], long: Sequence[int]) -> bool:
        """Compare a padded row with the same row alone, once per model and class of lengths (powers of two).

        The configuration names what is known to go wrong under padding; this finds the rest.
        """
        length_class = len(long).bit_length()
        if length_class in self._state.checked_lengths or len(long) > self.limits.padded_up_to:
            return True
        pad = self.info.pad_id
        with self.session():
            together = self.forward(
                Tokens(*padded([short, long], pad)), read=[RESID_POST], logits=False, keep_past=False
            )
            alone = self.forward(Tokens(*padded([short], pad)), read=[RESID_POST], logits=False, keep_past=False)
        expected = alone.reads[RESID_POST][0]
        error = (together.reads[RESID_POST][0] - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
        self._state.checked_lengths.add(length_class)
        tolerance = _HALF_TOLERANCE if self._packed else _TOLERANCE.get(self.info.dtype, _HALF_TOLERANCE)
        if float(error.max()) < tolerance:
            return True
        self._state.padded_up_to = float(2 ** (length_class - 1) - 1)
        warn(
            f"{self.name}: a row of {len(short)} tokens padded to {len(long)} is off by {float(error.max()):.1%} from "
            f"the same row alone; rows of more than {self._state.padded_up_to:.0f} tokens are now run only with rows "
            "of equal length, which is slower"
        )
        return False

    def shrink(self, rows: int) -> bool:
        """From now on at most half as many rows in a pass, for all engines of the model; False for a single row."""
        if rows < 2:
            return False
        if self._state.max_rows is None:
            warn(
                f"{self.name}: no memory for {rows} rows in a pass; continuing with fewer. "
                f"LocalEngine(model, batch_size={rows // 2}) starts there"
            )
        self._state.max_rows = rows // 2
        return True

    def fingerprint(self) -> str:
        """A digest of the model's weights, its configuration, and the hooks that the user has on it."""
        return fingerprint_of(self.bridge)

    def _run(  # noqa: PLR0913 - as Engine.forward
        self,
        tokens: Tokens,
        edits: Edits,
        read: Sequence[Site],
        weights: Float[Tensor, "batch *sum window"] | None,
        past: Past,
        logits: bool | int,
        keep_past: bool,
        grad: bool,
    ) -> Pass:
        tokens.check_positions(edits)
        self.positions_run += tokens.ids.numel()
        fired: list[HookPoint] = []
        reads: dict[Site, dict[int, Tensor]] = {site: {} for site in read}
        hooks = self._write_hooks(edits, tokens.ids.shape[1], fired)
        n_writes = len(hooks)
        hooks += self._read_hooks(reads, weights, grad)
        caching = past is not None or (keep_past and self._support.keeps_cache)
        with self.session(), self._noting_lost_gradients(grad) as lost:
            components = {p: c for p, _ in hooks if (c := self._components.get(p)) is not None and has_output_hooks(c)}
            with self._computing(grad), output_hooks([(components[p], f) for p, f in hooks if p in components]):
                output, past = self.bridge.run_with_hooks(
                    self._put(tokens.ids),
                    fwd_hooks=[
                        (str(point.name), partial(_lens_hook, f)) for point, f in hooks if point not in components
                    ],
                    return_type="logits_and_cache",
                    attention_mask=self._put(tokens.mask),
                    past_key_values=past,
                    use_cache=caching,
                    **self._logits_to_keep(logits),
                )
        if lost:
            raise UnsupportedError(
                f"{self.name} gives no gradients: {len(lost)} quantized modules ({lost[0]}, ...) have no backward "
                "pass, so gradients would be wrong; load the model in a precision or quantization that can be trained "
                "(bfloat16, bitsandbytes on a GPU, torchao int8 weights), or use methods without gradients"
            )
        if len(fired) != n_writes:
            raise EngineError(
                f"{self.name}: {n_writes} writes were to be made and {len(fired)} were; the logits would not be those "
                "of a patched run"
            )
        if caching:
            self._check_cache(past, tokens.mask.shape[1])
        return Pass(
            logits=_last_logits(output, logits),
            reads={site: self._stacked(site, by_layer) for site, by_layer in reads.items()},
            past=past if keep_past else None,
        )

    def _write_hooks(
        self, edits: Edits, width: int, fired: list[HookPoint]
    ) -> list[tuple[HookPoint, Callable[[Tensor], Tensor | None]]]:
        by_point: dict[HookPoint, list[Any]] = {}
        for edit in edits:
            by_point.setdefault(self._point(edit.site, edit.layer), []).append(edit)

        return [
            (point, partial(_write_and_note, fired, point, writer(some, width, self.info.d_head)))
            for point, some in by_point.items()
        ]

    def _read_hooks(
        self, reads: dict[Site, dict[int, Tensor]], weights: Float[Tensor, "batch *sum window"] | None, grad: bool
    ) -> list[tuple[HookPoint, Callable[[Tensor], Tensor | None]]]:
        read = reader(weights, grad)
        return [
            (self._point(site, layer), partial(_read_into, by_layer, layer, read))
            for site, by_layer in reads.items()
            for layer in self.layers_of(site)
        ]

    def _stacked(self, site: Site, by_layer: dict[int, Tensor]) -> Float[Tensor, "batch layer *sum width"]:
        missing = [layer for layer in self.layers_of(site) if layer not in by_layer]
        if missing:
            raise EngineError(f"{self.name} gave no read of {site} at the layers {missing}")
        return torch.stack([by_layer[layer].cpu() for layer in self.layers_of(site)], dim=1)

    def _check_cache(self, past: Any, expected: int) -> None:
        seen = 0 if past is None else int(past.get_seq_length())
        if seen != expected:
            raise EngineError(
                f"{self.name}: the KV cache holds {seen} of {expected} positions, so the next token would be wrong; "
                f"transformer-lens {version('transformer-lens')} does not fill the cache of "
                f"{type(self.bridge.original_model).__name__} in transformers {version('transformers')}. "
                "transformers 5.24 is not supported: pip install 'transformers>=5.9,<5.24'"
            )

    def _point(self, site: Site, layer: int) -> HookPoint:
        self.require_site(site)
        if layer not in self._hooks[site]:
            raise TvLensError(f"layer {layer} of {self.name} has no {site}; the layers {list(self._hooks[site])} have")
        return self._hook_points[self._hooks[site][layer]]

    @cached_property
    def _hook_points(self) -> dict[str, HookPoint]:
        present = self.bridge.hook_dict
        return {name: present[name] for names in self._hooks.values() for name in names.values()}

    @cached_property
    def _components(self) -> dict[HookPoint, nn.Module]:
        return components_of(self.bridge, self._hook_points.values())

    def _noting_lost_gradients(self, grad: bool) -> AbstractContextManager[list[str]]:
        return noting_lost_gradients(self._packed if grad else {}, self._state.differentiable)

    @cached_property
    def _packed(self) -> dict[str, nn.Module]:
        return packed_modules(self.bridge)

    @property
    def _points(self) -> list[HookPoint]:
        return list(self._hook_points.values())

    def _computing(self, grad: bool) -> Any:
        return computing(torch.device(self.bridge.cfg.device or "cpu"), self.bridge.original_model.parameters(), grad)

    def _logits_to_keep(self, logits: bool | int) -> dict[str, Any]:
        if not self._support.keeps_logits:
            return {}
        # A number counts from the end, where 0 would mean all; an empty slice makes no logits. An index tensor would
        # have to be on the unembedding's device, and accelerate moves every tensor to the first one.
        return {"logits_to_keep": int(logits) if logits else slice(0, 0)}

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.bridge.cfg.device)


def _last_logits(
    output: Float[Tensor, "batch pos d_vocab"], logits: bool | int
) -> Float[Tensor, "batch *pos d_vocab"] | None:
    if not logits:
        return None
    return output[:, -1].float() if logits is True else output[:, -logits:].float()


def _lens_hook(function: Callable[[Tensor], Tensor | None], activation: Tensor, hook: Any) -> Tensor | None:
    """`function` as TransformerLens calls it."""
    return function(activation)


def _write_and_note(
    fired: list[HookPoint], point: HookPoint, write: Callable[[Tensor], Tensor], activation: Tensor
) -> Tensor:
    fired.append(point)
    return write(activation)


def _read_into(by_layer: dict[int, Tensor], layer: int, read: Callable[[Tensor], Tensor], activation: Tensor) -> None:
    by_layer[layer] = read(activation)
