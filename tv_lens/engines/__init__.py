"""Run a model: texts in, reads and next-token logits out.

The only room that tokenises, pads, names a hook or holds a cache. Layer `l` is the output of block `l` everywhere.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge import RemoteBridge, TransformerBridge

from tv_lens.engines.contract import Engine, Past, Patch, Replay, Tokens, bar, engine_name, run_all
from tv_lens.engines.local import LocalEngine
from tv_lens.engines.remote import RemoteEngine

__all__ = [
    "Engine",
    "LocalEngine",
    "Past",
    "Patch",
    "RemoteEngine",
    "Replay",
    "Tokens",
    "bar",
    "engine_for",
    "engine_name",
    "run_all",
]


def engine_for(model: Any) -> Engine:
    """The engine that runs `model`: itself, a `LocalEngine` around a `TransformerBridge`, or a `RemoteEngine` around a
    `RemoteBridge`.

    Raises:
        TypeError: nothing that tv_lens can run; the message says how to get there.
    """
    if isinstance(model, TransformerBridge):
        return LocalEngine(model)
    if isinstance(model, RemoteBridge):
        return RemoteEngine(model)
    if isinstance(model, Engine):
        return model
    raise TypeError(
        f"cannot run a {type(model).__name__}; pass a TransformerBridge, for instance "
        "transformer_lens.TransformerBridge.boot_transformers(name), or with hf_model= and tokenizer= for a "
        "Hugging Face model"
    )
