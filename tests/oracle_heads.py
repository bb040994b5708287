"""The oracle for attention heads: plain Hugging Face, one unpadded text at a time, one head after another."""

from __future__ import annotations

from typing import Any

import torch
from models import Twins, ids_of
from oracle_edits import PlainEdit, child, hooked_run, output_projection
from torch import Tensor, nn

# The norm between the attention and the residual stream, by the class of its block.
_POST_NORMS = {
    "Gemma2DecoderLayer": "post_attention_layernorm",
    "Gemma3DecoderLayer": "post_attention_layernorm",
    "Olmo2DecoderLayer": "post_attention_layernorm",
    "Olmo3DecoderLayer": "post_attention_layernorm",
    "Glm4DecoderLayer": "post_self_attn_layernorm",
}


def post_norm(block: nn.Module) -> nn.Module | None:
    """The norm after the attention, if there is one."""
    name = _POST_NORMS.get(type(block).__name__)
    return None if name is None else child(block, (name,))


def head_states(twins: Twins, text: str, layer: int) -> Tensor:
    """The outputs of all heads at the last token, before the output projection."""
    return hooked_run(twins, ids_of(twins.bridge, text))[0]["heads", layer][0, -1]


def attention_added(twins: Twins, text: str, layer: int) -> Tensor:
    """What the attention adds to the residual stream at the last token: its output, behind the norm if there is one."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output.reshape(-1, output.shape[-1])[-1])

    norm = post_norm(twins.blocks[layer]) or output_projection(twins.blocks[layer])
    assert norm is not None
    handle = norm.register_forward_hook(hook)
    try:
        with torch.no_grad():
            twins.plain(input_ids=ids_of(twins.bridge, text), use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def head_added(twins: Twins, text: str, layer: int, head: int, n_heads: int) -> Tensor:
    """What one head adds to the residual stream at the last token, by the formula."""
    projection, norm = output_projection(twins.blocks[layer]), post_norm(twins.blocks[layer])
    assert projection is not None
    z = head_states(twins, text, layer)
    alone = torch.zeros_like(z)
    d_head = len(z) // n_heads
    alone[head * d_head : (head + 1) * d_head] = z[head * d_head : (head + 1) * d_head]
    part: Tensor = (projection(alone[None, None]) - projection(torch.zeros_like(alone)[None, None]))[0, 0]
    if norm is None:
        return part
    whole = projection(z[None, None])[0, 0]
    weight: Any = norm.weight
    gain = 1 + weight if type(norm).__name__.startswith("Gemma") else weight
    epsilon: Any = norm.eps if "eps" in vars(norm) else norm.variance_epsilon
    scaled: Tensor = part * gain / (whole.pow(2).mean() + epsilon).sqrt()
    return scaled


def next_logprobs(twins: Twins, text: str, edits: list[PlainEdit], n_heads: int) -> Tensor:
    """Log-probabilities of the next token."""
    return hooked_run(twins, ids_of(twins.bridge, text), edits, n_heads)[1][-1].log_softmax(dim=-1)


def head_logprob(twins: Twins, text: str, target: int, layer: int, head: int, value: Tensor, n_heads: int) -> float:
    """log P(target) with one head's output at the last token replaced."""
    position = ids_of(twins.bridge, text).shape[1] - 1
    return float(next_logprobs(twins, text, [PlainEdit("heads", layer, position, value, "set", head)], n_heads)[target])
