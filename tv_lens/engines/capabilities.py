"""What a `TransformerBridge` can do, worked out from its configuration. Tested by a table of architectures.

Three things about a model decide how its rows may be batched:

cache      whether it keeps keys and values that can be widened to several continuations of one prefix
padding    up to which length a padded row is computed as it is alone
gaps       up to which length pads between a prefix and the rows after it do no harm
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from tv_lens.edits import ATTN_OUT, MLP_OUT, RESID_POST, SITES, Site
from tv_lens.engines.drivers import (
    accepts_argument,
    config_of,
    generation_end_ids,
    is_recurrent,
)
from tv_lens.engines.projection import Projection
from tv_lens.engines.quantized import compute_dtype

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "seq_length",
    "max_sequence_length",
)
_WINDOW_NAMES = ("sliding_window", "window_size", "attention_chunk_size")


@dataclass(frozen=True)
class Support:
    """How a model can be run.

    `keeps_cache`: a pass returns keys and values to continue from. `forks`: they can be copied and widened.
    `padded_up_to`: rows of unequal length can share a pass up to so many positions (0: never).
    `gaps_up_to`: pads may be between a shared prefix and a row up to so many positions.
    `caches_beyond`: a cache may grow past `padded_up_to`. `keeps_logits`: logits can be computed for some positions
    only.
    """

    n_ctx: int | None
    end_ids: frozenset[int]
    keeps_cache: bool
    forks: bool
    padded_up_to: float
    gaps_up_to: float
    caches_beyond: bool
    keeps_logits: bool


def support_of(bridge: TransformerBridge) -> Support:
    """How the model can be run."""
    config = config_of(bridge)
    # The forward of models that TransformerLens has no cache for (RWKV) accepts a mask and ignores it.
    masks_pads = bool(bridge.adapter.supports_kv_cache)
    # A cache for a window of one token should hold none, and holds all: its steps are wrong.
    keeps_cache = masks_pads and not bridge.cfg.is_stateful and config.get("sliding_window") != 1
    # LFM2 says only in `layer_types` that some of its layers are not attention.
    kinds = set(config.get("layer_types") or ())
    n_ctx = _first_number(config, _CONTEXT_NAMES) if config else int(bridge.cfg.n_ctx)
    # Alibi counts pads as positions, and so do local windows and buffers as long as the context.
    alibi = bridge.cfg.positional_embedding_type == "alibi"
    windows = [config[name] for name in _WINDOW_NAMES if _is_size(config.get(name))]
    limits = windows + ([] if n_ctx is None else [n_ctx])
    padded_up_to, caches_beyond = _padding(config)
    return Support(
        n_ctx=n_ctx,
        end_ids=generation_end_ids(bridge),
        keeps_cache=keeps_cache,
        forks=keeps_cache and not is_recurrent(bridge) and kinds <= _ATTENTION,
        padded_up_to=padded_up_to if masks_pads else 0.0,
        gaps_up_to=0.0 if alibi else float(min(limits, default=math.inf)),
        caches_beyond=caches_beyond,
        keeps_logits=accepts_argument(bridge, "logits_to_keep"),
    )


def _padding(config: Mapping[str, Any]) -> tuple[float, bool]:
    """Up to how many positions rows can be padded, and whether a cache may grow past that."""
    limits: list[float] = [math.inf]
    caches_beyond = True
    for rope in _ropes(config):
        kind = str(rope.get("rope_type") or rope.get("type") or "")
        original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
        if kind == "longrope":
            # The longest row of a pass decides which frequencies all its rows get; cached keys keep theirs.
            limits.append(float(original or 0))
            caches_beyond = False
        elif "dynamic" in kind:
            limits.append(float(original or config.get("max_position_embeddings") or 0))
            caches_beyond = False
    if config.get("attn_temperature_tuning"):  # Llama 4: computed from places in the padded row
        limits.append(float(config.get("floor_scale") or 0) - 1)
    if config.get("sliding_window") == 1:
        limits.append(0.0)
    return min(limits), caches_beyond


def _ropes(config: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    """The model's rope parameters, for all layers or for each type of layer."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [each for each in rope.values() if isinstance(each, Mapping)]
    return nested or [rope]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value > 0  # 0: no window


def _first_number(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    """The model's own limit of positions; if its configuration has none, TransformerLens makes one up."""
    return next((config[name] for name in names if _is_size(config.get(name))), None)


# BLOOM's attention and MLP add the residual stream to their output themselves.
_OWN_HOOKS = {
    "BloomForCausalLM": {
        ATTN_OUT: "blocks.{layer}.attn.o.hook_out",
        MLP_OUT: "blocks.{layer}.mlp.out.hook_out",
    }
}


def hooks_of(bridge: TransformerBridge, n_layers: int) -> dict[Site, dict[int, str]]:
    """For each site that the model has, the hook of every layer that has it."""
    present = bridge.hook_dict
    own = _OWN_HOOKS.get(str(bridge.cfg.architecture), {})
    hooks = {}
    for site in SITES.values():
        pattern = own.get(site, site.local_hook)
        names = {layer: pattern.format(layer=layer) for layer in range(n_layers)}
        named = {layer: name for layer, name in names.items() if name in present}
        if named or site == RESID_POST:
            hooks[site] = named
    return hooks


def head_shape(bridge: TransformerBridge, layers: Iterable[int]) -> tuple[int, int]:
    """The number of heads and their width, (0, 0) without attention.

    Taken from the output projection: d_model / n_heads is wrong for Gemma 2, Qwen 3 and Mistral-Nemo.
    """
    for layer in layers:
        try:
            n_heads, d_head, _ = bridge.blocks[layer].attn.W_O.shape
        except (AttributeError, NotImplementedError, ValueError):
            # Quantized weights refuse to be read; multi-head latent attention has values of another width than keys.
            return int(bridge.cfg.n_heads), int(config_of(bridge).get("v_head_dim") or bridge.cfg.d_head)
        return int(n_heads), int(d_head)
    return 0, 0


def projection_of(bridge: TransformerBridge, layer: int, n_heads: int) -> Projection:
    """How the outputs of a layer's heads get into the residual stream."""
    block = bridge.blocks[layer]
    linear = block.attn.o.original_component
    has_norm = f"blocks.{layer}.ln1_post.hook_out" in bridge.hook_dict
    tensors = [*linear.parameters(), *linear.buffers()]  # GPTQ and AWQ keep their weights in buffers
    floats = [each for each in tensors if each.is_floating_point() and each.element_size() > 1]
    device = next((each.device for each in tensors), torch.device("cpu"))
    return Projection(
        linear=linear,
        norm=block.ln1_post.original_component if has_norm else None,
        multiplier=float(config_of(bridge).get("residual_multiplier") or 1.0),
        n_heads=n_heads,
        dtype=floats[0].dtype if floats else compute_dtype(bridge),
        # Offloaded weights are on no device until their module is called.
        device=torch.device(bridge.cfg.device or "cpu") if device.type == "meta" else device,
    )
