"""The oracle: one unpadded text at a time through plain Hugging Face, with plain forward hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Twins, original
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


def plain_run(twins: Twins, ids: Tensor, write: tuple[int, int, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The oracle: one unpadded text through plain Hugging Face. Returns the output of every block at the last
    position (layer d_model) and the logits there; `write` = (layer, position, vector) overwrites one.
    """
    seen: dict[int, Tensor] = {}

    def hook_for(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if write is not None and write[0] == layer:
                hidden = hidden.clone()
                hidden[0, write[1]] = write[2]
                output = (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            seen[layer] = hidden[0, -1]
            return output

        return hook

    handles = [block.register_forward_hook(hook_for(layer)) for layer, block in enumerate(twins.blocks)]
    try:
        with torch.no_grad():
            logits = twins.plain(input_ids=ids, use_cache=False).logits[0, -1]
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([seen[layer] for layer in range(len(twins.blocks))]), logits


def plain_generate(twins: Twins, ids: Tensor, new: int, write: tuple[int, int, Tensor] | None = None) -> list[int]:
    """The oracle for text: greedy, the whole text again at each step, the write at the same absolute position."""
    chosen: list[int] = []
    for _ in range(new):
        logits = plain_run(twins, torch.cat([ids, torch.tensor([chosen], dtype=torch.long)], dim=1), write)[1]
        chosen.append(int(logits.argmax()))
    return chosen


def until_end(ids: Tensor) -> list[int]:
    """The ids up to the end of text."""
    actual = ids.tolist()
    return actual[: actual.index(1) + 1] if 1 in actual else actual


def refuse(*args: Any, **options: Any) -> None:
    """A hook for a model, or a method of an engine, that must not run."""
    raise AssertionError("the model was run")


def count_positions(bridge: TransformerBridge, run: Callable[[], Any]) -> int:
    """How many positions, including pads, went through the first block."""
    count = 0

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        hidden = args[0] if args else kwargs["hidden_states"]
        count += hidden.shape[0] * hidden.shape[1]

    blocks = next(m for m in original(bridge).modules() if isinstance(m, torch.nn.ModuleList))
    handle = blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return count
