"""The oracle for edits: plain Hugging Face hooks at every site, on one unpadded text at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from models import Twins, ids_of
from torch import Tensor, nn

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_OUTPUT = ("o_proj", "out_proj", "c_proj", "dense")
_MLP = ("mlp", "feed_forward", "ffn")


class PlainEdit(NamedTuple):
    """One write at one absolute position of one text."""

    site: str
    layer: int
    position: int
    value: Tensor
    op: str = "set"
    head: int | None = None
    keep_norm: bool = False


def child(module: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """The first submodule of one of these names."""
    return next((inner for name, inner in module.named_children() if name in names), None)


def output_projection(block: nn.Module) -> nn.Module | None:
    """The output projection of the attention heads."""
    attention = child(block, _ATTENTION)
    if attention is None:
        return None
    inner = child(attention, ("attention",)) or attention
    return child(inner, _OUTPUT)


def has_site(twins: Twins, site: str, layer: int) -> bool:
    """Whether the oracle knows the site in this block."""
    block = twins.blocks[layer]
    if site == "resid_post":
        return True
    if site == "mlp_out":
        return child(block, _MLP) is not None
    return output_projection(block) is not None


def apply(activation: Tensor, edits: Sequence[PlainEdit], n_heads: int) -> Tensor:
    """The edits in order, on an activation of shape (1, pos, width)."""
    activation = activation.clone()
    for edit in edits:
        width = activation.shape[-1]
        part = slice(0, width)
        if edit.head is not None:
            part = slice(edit.head * width // n_heads, (edit.head + 1) * width // n_heads)
        before = activation[0, edit.position, part].clone()
        if edit.op == "set":
            after = edit.value
        else:
            after = before + edit.value
            if edit.keep_norm:
                after = after / after.norm() * before.norm()
        activation[0, edit.position, part] = after
    return activation


def hooked_run(
    twins: Twins, ids: Tensor, edits: Sequence[PlainEdit] = (), n_heads: int = 4, grad: bool = False
) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """All sites at all positions, by site and layer, and the logits at all positions."""
    seen: dict[tuple[str, int], Tensor] = {}
    handles = []

    def after(site: str, layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            shape = first.shape
            changed = changed_at(site, layer, first.reshape(1, -1, shape[-1])).reshape(shape)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def before(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any) -> Any:
            return (changed_at("heads", layer, args[0]), *args[1:])

        return hook

    def changed_at(site: str, layer: int, activation: Tensor) -> Tensor:
        own = [edit for edit in edits if (edit.site, edit.layer) == (site, layer)]
        changed = apply(activation, own, n_heads) if own else activation
        seen[site, layer] = changed.clone()  # falcon adds to it in place
        return changed

    for layer, block in enumerate(twins.blocks):
        handles.append(block.register_forward_hook(after("resid_post", layer)))
        projection, mlp = output_projection(block), child(block, _MLP)
        if mlp is not None and type(mlp).__name__ == "BloomMLP":  # which adds the residual stream to its output
            mlp = mlp.get_submodule("dense_4h_to_h")
        if projection is not None:
            handles.append(projection.register_forward_hook(after("attn_out", layer)))
            handles.append(projection.register_forward_pre_hook(before(layer)))
        if mlp is not None:
            handles.append(mlp.register_forward_hook(after("mlp_out", layer)))
    try:
        with torch.set_grad_enabled(grad):
            logits = twins.plain(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return seen, logits[0]


def separators(twins: Twins, text: str, bos: bool | None = None) -> tuple[Tensor, list[int]]:
    """The ids of a text, and the last token that ends within each "->", or the space after it, by the tokenizer's own
    offsets.
    """
    ids = ids_of(twins.bridge, text, bos)
    offsets = twins.bridge.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    in_front = ids.shape[1] - len(offsets)
    ends = [match.end() for match in re.finditer("-> ?", text)]
    return ids, [in_front + max(i for i, (_, last) in enumerate(offsets) if last <= end) for end in ends]
