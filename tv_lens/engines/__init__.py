"""Run a model: tokens in, next-token logits and activations out.

The only folder that runs a model, tokenizes, pads, names a hook or holds a cache. To run something else, derive from
`Engine` (or from `StatelessEngine` if it keeps no cache), and register it: `engine_for.register(MyModel)(MyEngine)`.
"""

from __future__ import annotations

from functools import singledispatch
from typing import TypeAlias

from transformer_lens.model_bridge import RemoteBridge, TransformerBridge

from tv_lens.engines.base import Capability, Engine, Pass, Past, Replay, StatelessEngine, Tokens
from tv_lens.engines.gradients import gradient
from tv_lens.engines.local import LocalEngine
from tv_lens.engines.planning import Limits
from tv_lens.engines.reading import LastTokens, Reads, Wanted, sharing_reads
from tv_lens.engines.remote import RemoteEngine
from tv_lens.engines.running import Prefixes, map_rows, progress_bar
from tv_lens.engines.serving import vllm_engine
from tv_lens.engines.text import ModelInfo, Stop, TextCodec
from tv_lens.errors import UnsupportedError

__all__ = [
    "Capability",
    "Engine",
    "LastTokens",
    "Limits",
    "LocalEngine",
    "Model",
    "ModelInfo",
    "Pass",
    "Past",
    "Prefixes",
    "Reads",
    "RemoteEngine",
    "Replay",
    "StatelessEngine",
    "Stop",
    "TextCodec",
    "Tokens",
    "Wanted",
    "engine_for",
    "gradient",
    "map_rows",
    "progress_bar",
    "sharing_reads",
    "vllm_engine",
]

Model: TypeAlias = TransformerBridge | RemoteBridge | Engine
"""What public functions take as `model`: a bridge, or an engine to control batch size and BOS."""


@singledispatch
def engine_for(model: object) -> Engine:
    """The engine that runs a model: itself, a `LocalEngine` around a `TransformerBridge`, or a `RemoteEngine` around a
    `RemoteBridge`. Other types can be registered: `engine_for.register` (see `docs/extending.md`).

    Args:
        model: a bridge, an engine, or a model of a registered type.

    Returns:
        An engine; an engine is returned as it is.

    Raises:
        UnsupportedError: tv_lens cannot run it; the message says what to pass instead.

    Examples:
        >>> tv.engine_for(model) is model
        True
    """
    kind = type(model).__name__
    if kind.startswith("Peft"):
        raise UnsupportedError(
            f"cannot run a {kind}; merge its adapter and pass a bridge: TransformerBridge.boot_transformers(name, "
            "hf_model=model.merge_and_unload(), tokenizer=tokenizer)"
        )
    raise UnsupportedError(
        f"cannot run a {kind}; pass a TransformerBridge, for instance "
        "transformer_lens.TransformerBridge.boot_transformers(name), or with hf_model= and tokenizer= for a "
        "Hugging Face model"
    )


@engine_for.register
def _(model: Engine) -> Engine:
    return model


@engine_for.register
def _(model: TransformerBridge) -> Engine:
    return LocalEngine(model)


@engine_for.register
def _(model: RemoteBridge) -> Engine:
    return RemoteEngine(model)
