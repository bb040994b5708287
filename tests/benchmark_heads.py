"""The effects of all attention heads three ways, for `benchmark.py`: whole prompts one by one, as published code runs
them; tv_lens; and plain Hugging Face on the fewest positions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv


def target_of(bridge: TransformerBridge, prompt: tv.Prompt) -> int:
    """The answer's first token."""
    whole = prompt.text + prompt.template.continuation(prompt.query, str(prompt.answer))
    return int(bridge.to_tokens(whole)[0, bridge.to_tokens(prompt.text).shape[1]])


@torch.no_grad()
def loop_effects(bridge: TransformerBridge, prompts: Sequence[tv.Prompt], mean: Tensor) -> Tensor:
    """Whole prompts, one by one, once for each head."""
    effects = torch.empty(len(prompts), *mean.shape[:2])
    for i, prompt in enumerate(prompts):
        ids, target = bridge.to_tokens(prompt.text), target_of(bridge, prompt)
        base = bridge(ids)[0, -1].softmax(-1)[target]
        for layer, head in product(range(mean.shape[0]), range(mean.shape[1])):

            def write(z: Tensor, hook: Any, layer: int = layer, head: int = head) -> Tensor:
                z = z.clone()
                z[0, -1, head] = mean[layer, head]
                return z

            logits = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", write)])
            effects[i, layer, head] = logits[0, -1].softmax(-1)[target] - base
    return effects


@torch.no_grad()
def floor_effects(bridge: TransformerBridge, plain: Any, prompts: Sequence[tv.Prompt], mean: Tensor) -> None:
    """The prompt up to its last token, once; then one token for each head, as many rows in a pass as tv_lens has."""
    projections = [module for name, module in plain.named_modules() if name.endswith("self_attn.o_proj")]
    n_layers, n_heads, d_head = mean.shape
    cells = list(product(range(n_layers), range(n_heads)))
    for prompt in prompts:
        row = bridge.to_tokens(prompt.text)[0].tolist()
        prefix = plain(input_ids=torch.tensor([row[:-1]]), use_cache=True, logits_to_keep=1).past_key_values
        for first in range(0, len(cells) + 1, size := 8192 // len(row)):
            some = cells[first : first + size]
            past = copy.deepcopy(prefix)
            past.batch_repeat_interleave(n_rows := min(size, len(cells) + 1 - first))  # the last one is unpatched

            def write(module: Any, args: Any, layer: int, some: Any = some) -> Any:
                z = args[0].clone()
                for slot, (own, head) in enumerate(some):
                    if own == layer:
                        z[slot, -1, head * d_head : (head + 1) * d_head] = mean[layer, head]
                return (z, *args[1:])

            handles = [
                projections[layer].register_forward_pre_hook(partial(write, layer=layer))
                for layer in sorted({layer for layer, _ in some})
            ]
            plain(
                input_ids=torch.tensor([[row[-1]]]).repeat(n_rows, 1),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1].softmax(-1)
            for handle in handles:
                handle.remove()


def head_effects(
    bridge: TransformerBridge, engine: tv.Engine, plain: Any, prompts: Sequence[tv.Prompt], means: tv.TaskVectors
) -> list[tuple[Any, ...]]:
    """The three ways by name, and for the loop a part of it."""
    mixed, mean = tv.shuffle_outputs(prompts, 0), means.by_head.mean(dim=0)
    return [
        ("tv_lens", lambda: tv.head_effects(engine, prompts, means).values),
        ("loop", lambda: loop_effects(bridge, mixed, mean), lambda: loop_effects(bridge, mixed[:1], mean[:1, :1])),
        ("floor", lambda: floor_effects(bridge, plain, mixed, mean)),
    ]
