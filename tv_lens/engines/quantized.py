"""Weights that only their own module can compute with: bitsandbytes, GPTQ, AWQ, torchao, FP8.

Nothing here reads such a weight. Vectors are read and written through TransformerLens's hooks, and a module is called
with what its weight would be multiplied with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from tv_lens.engines.drivers import finish, inner_tensors, remove_hooks

_STORAGE = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32})


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor is stored in another form than it is computed with: whole numbers, floats of one byte, or a
    wrapper.
    """
    narrow = tensor.is_floating_point() and tensor.element_size() < 2
    return tensor.ndim >= 2 and (tensor.dtype in _STORAGE or narrow or bool(inner_tensors(tensor)[0]))


def packed_modules(bridge: TransformerBridge) -> dict[str, nn.Module]:
    """The modules with quantized weights, by name."""
    return {name: module for name, module in bridge.original_model.named_modules() if _has_packed_weights(module)}


def _has_packed_weights(module: nn.Module) -> bool:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(map(is_packed, own))


def compute_dtype(bridge: TransformerBridge) -> torch.dtype:
    """The precision of the model's own floats; the bridge's configuration does not know that of a model that was
    loaded before.
    """
    wide = (each for each in bridge.original_model.parameters() if each.is_floating_point() and not is_packed(each))
    first = next(wide, None)
    dtype: torch.dtype = bridge.cfg.dtype if first is None else first.dtype
    return dtype


def stored_tensors(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Everything that a quantized module saves, by name: scales and codebooks are not always parameters or buffers."""
    for key, value in module.state_dict().items():
        if isinstance(value, Tensor):
            yield from _plain(f"{name}.{key}", value)


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those inside it; what else the wrapper computes with, such as how activations are rounded, is a
    part of the name.
    """
    inner, rest = inner_tensors(tensor)
    if not inner:
        yield name, tensor
    for part, each in inner.items():
        yield from _plain(f"{name}.{part} {rest}", each)


@contextmanager
def noting_lost_gradients(modules: Mapping[str, nn.Module], checked: set[str]) -> Iterator[list[str]]:
    """The names of modules that pass no gradient on to their input. Those that do are added to `checked`, and are not
    checked again.

    Kernels that were written for inference have no backward pass. Gradients would then flow past them, through the
    residual stream alone, and be wrong without an error.
    """
    lost: list[str] = []
    handles: list[Any] = []
    try:
        for name in modules.keys() - checked:
            # One by one, so that Ctrl-C leaves none that is not known.
            handles.append(modules[name].register_forward_hook(partial(_note, name, checked, lost)))  # noqa: PERF401
        yield lost
    finally:
        finish(partial(remove_hooks, handles))


def _note(name: str, checked: set[str], lost: list[str], module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    given = [each for each in args if isinstance(each, Tensor) and each.requires_grad]
    if name in checked or not given or not isinstance(output, Tensor):
        return
    if _passes_gradients(given[0], output):
        checked.add(name)
    else:
        lost.append(f"{name} ({type(module).__name__})")


def _passes_gradients(given: Tensor, output: Tensor) -> bool:
    """Whether the output has a gradient with respect to the input. That it requires one says nothing: torch gives
    operators without a backward pass a node that warns and returns none.
    """
    if not output.requires_grad:
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [slope] = torch.autograd.grad(output, [given], torch.ones_like(output), retain_graph=True, allow_unused=True)
    return slope is not None
