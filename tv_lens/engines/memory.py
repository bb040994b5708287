"""How much memory a pass may use, and how much its rows need.

row     2 * keys and values + activations of one block + attention of one block + logits + reads and edits

Keys and values count twice, for a shared prefix and for the rows that continue it. Activations are freed block by
block. These are estimates from the model's configuration, a little too large rather than too small.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformer_lens.model_bridge import TransformerBridge

from tv_lens.engines.drivers import config_of
from tv_lens.engines.planning import Costs
from tv_lens.errors import TvLensError

# For a pass on a CPU, in bytes, unless `memory` is given.
CPU_MEMORY = 2 * 2**30

# How much of a GPU's free memory is used, unless `memory` is given. The rest is for what the estimate leaves out.
_SHARE_OF_FREE = 0.5

# Residual stream, norm, queries, keys, values, attention output, their sum, and a copy for writing.
_WIDTHS = 8
# Gate, up, and their product.
_MLP_WIDTHS = 3
_FLOAT32 = 4


def check_memory(memory: int | None) -> int | None:
    """The budget, if it is one.

    Raises:
        TvLensError: not a number of bytes.
    """
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise TvLensError(
            f"memory is {memory!r}; give the bytes that a pass may use, such as 4 * 2**30, or None for as much as "
            "there is"
        )
    return memory


def available_memory(devices: Iterable[torch.device]) -> int:
    """What a pass may use if nobody says: half of what is free on the GPU that has least, `CPU_MEMORY` on a CPU."""
    free = [_free(device) for device in set(devices) if device.type == "cuda"]
    return int(_SHARE_OF_FREE * min(free)) if free else CPU_MEMORY


def _free(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    # torch keeps what it has freed, for itself.
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def costs_of(bridge: TransformerBridge, dtype: torch.dtype, *, keeps_cache: bool, picks_logits: bool) -> Costs:
    """What a row costs, by the model's configuration. `dtype` is that of its activations."""
    cfg, config, size = bridge.cfg, config_of(bridge), dtype.itemsize
    # Models without attention have no heads.
    n_layers, n_heads, d_model = int(cfg.n_layers), max(1, int(cfg.n_heads or 1)), int(cfg.d_model)
    key = value = max(0, int(cfg.d_head or 0))
    n_kept = int(cfg.n_key_value_heads or n_heads)
    if config.get("kv_lora_rank"):  # multi-head latent attention caches the keys and values of all heads
        n_kept, value = n_heads, int(config.get("v_head_dim") or value)
        key = int(config.get("qk_nope_head_dim") or key) + int(config.get("qk_rope_head_dim") or 0)
    # The model's own logits, their float32 copy, and what is computed from them.
    of_logit = size + 2 * _FLOAT32
    return Costs(
        cache=n_layers * n_kept * (key + value) * size if keeps_cache else 0,
        position=(_WIDTHS * d_model + _MLP_WIDTHS * int(cfg.d_mlp or 4 * d_model)) * size,
        pair=n_heads * (2 * size + _FLOAT32),  # scores, their softmax in float32, and the softmax as it is used
        logits=int(cfg.d_vocab) * of_logit,
        row=2 * n_layers * d_model * _FLOAT32,
        n_blocks=n_layers,
        picks_logits=picks_logits,
    )
