"""A model split over two devices that need not exist: its tensors have a device and a shape and no values.

torch's `FakeTensorMode` refuses to compute with tensors of different devices, as a GPU does. The devices are called
`cpu:1` and `cpu:2`, because builds of torch without CUDA cannot index a `cuda` tensor even in this mode; the host is
`cpu`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from models import make_tokenizer, make_twins
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.model_bridge import TransformerBridge

FIRST, SECOND = "cpu:1", "cpu:2"
PLACES = {
    FIRST: ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"),
    SECOND: ("model.layers.2", "model.layers.3", "model.norm", "lm_head"),
}


class AsOnGPUs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What `FakeTensorMode` gets wrong about devices of one type: an index may be on the host or on the same device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "index_select"):
            indices = args[2:3] if name == "index_select" else args[1]
            for each in indices:
                if each is not None and each.device.index is not None and each.device != args[0].device:
                    raise RuntimeError(f"indices are on {each.device}, what they index is on {args[0].device}")
        if name == "cat":  # an empty cache begins on the host
            args = ([each for each in args[0] if each.numel()], *args[1:])
        return func(*args, **(kwargs or {}))


def _move(module: nn.Module, device: str) -> None:
    for each in module.modules():
        for name, tensor in each.named_parameters(recurse=False):
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            setattr(each, name, nn.Parameter(empty, requires_grad=False))
        for name, tensor in each.named_buffers(recurse=False):  # type: ignore[assignment]
            setattr(each, name, torch.empty(tensor.shape, dtype=tensor.dtype, device=device))


def split_bridge(monkeypatch: pytest.MonkeyPatch) -> tuple[TransformerBridge, FakeTensorMode]:
    """A bridge whose upper half is on the second device, as accelerate dispatches it."""
    mode, model = FakeTensorMode(allow_non_fake_inputs=True), make_twins("llama").plain
    model.hf_device_map = {name: device for device, names in PLACES.items() for name in names}
    with mode:
        for name, device in model.hf_device_map.items():
            _move(model.get_submodule(name), device)
            add_hook_to_module(model.get_submodule(name), AlignDevicesHook(execution_device=device))
        add_hook_to_module(model, AlignDevicesHook(execution_device=FIRST, io_same_device=True))
        bridge = TransformerBridge.boot_transformers("tiny-llama", hf_model=model, tokenizer=make_tokenizer())
    run = bridge.run_with_hooks

    def in_mode(ids: Tensor, *, attention_mask: Tensor, **options: Any) -> Any:
        with mode, AsOnGPUs():  # type: ignore[no-untyped-call]
            return run(ids.to(FIRST), attention_mask=attention_mask.to(FIRST), **options)

    monkeypatch.setattr(bridge, "run_with_hooks", in_mode)
    monkeypatch.setattr(bridge, "_accepts_derived_position_ids", lambda: False)  # it looks at values
    return bridge, mode
