"""A digest of everything that decides a model's outputs: weights, configuration, and the user's hooks.

Two models that give different logits get different fingerprints, so that a run kept in a folder is never continued with
another model: not with an ablated one, one with another rope base, or one with a hook on it.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tv_lens.engines.drivers import config_of, tensors_of, user_hooks
from tv_lens.engines.quantized import packed_modules, stored_tensors
from tv_lens.errors import TvLensError

# Tensors are hashed in pieces of so many numbers, so that a model on a GPU is not copied as a whole.
_PIECE = 2**24
# Where a configuration was loaded from, and with what, does not change what the model computes.
_IRRELEVANT = ("_name_or_path", "transformers_version", "use_cache", "output_attentions", "output_hidden_states")


def fingerprint_of(bridge: TransformerBridge) -> str:
    """The digest, 16 hexadecimal digits.

    Raises:
        TvLensError: a hook on the model whose behavior does not follow from its code and its values.
    """
    digest = xxhash.xxh3_64()
    config = {name: value for name, value in config_of(bridge).items() if name not in _IRRELEVANT}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    packed = packed_modules(bridge)
    plain = ((name, tensor) for name, tensor in tensors_of(bridge) if name.rpartition(".")[0] not in packed)
    stored = (each for name, module in packed.items() for each in stored_tensors(name, module))
    for name, tensor in chain(plain, stored):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        _add_tensor(digest, tensor)
    for name, function in user_hooks(bridge):
        digest.update(f"{name} {describe(function)}".encode())
    return digest.hexdigest()


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    if tensor.is_meta:  # accelerate leaves what it keeps on the disk
        return
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].cpu().contiguous()
        digest.update(piece.view(torch.uint8).numpy().data)


def describe(value: Any) -> str:
    """A text that is the same for two values only if they behave the same: of a function its code, its closure, its
    defaults and the globals that it uses.

    Raises:
        TvLensError: a value whose behavior cannot be described.
    """
    return _describe(value, set())


def _describe(value: Any, seen: set[int]) -> str:
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, slice, range)):
        return repr(value)
    if isinstance(value, (Tensor, np.ndarray)):
        digest = xxhash.xxh3_64()
        tensor = torch.as_tensor(value)
        _add_tensor(digest, tensor)
        return f"{tuple(tensor.shape)} {tensor.dtype} {digest.hexdigest()}"
    if isinstance(value, (ModuleType, type)):
        return value.__name__
    if id(value) in seen:  # a function that uses itself
        return "..."
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_describe(k, seen)}: {_describe(v, seen)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_describe(each, seen) for each in value]
        return str(sorted(parts) if isinstance(value, (set, frozenset)) else parts)
    if isinstance(value, functools.partial):
        return f"partial {_describe((value.func, value.args, value.keywords), seen)}"
    if isinstance(value, BuiltinFunctionType):
        owner = value.__self__
        of_a_module = owner is None or isinstance(owner, ModuleType)
        return value.__name__ if of_a_module else f"method {_describe((value.__name__, owner), seen)}"
    if isinstance(value, MethodType):
        return f"method {_describe((value.__func__, value.__self__), seen)}"
    if isinstance(value, FunctionType):
        return _describe_function(value, seen)
    raise TvLensError(
        f"a hook on the model uses {value!r:.80}, a {type(value).__name__}, so a run kept in a folder could not tell "
        "whether it is the same next time; run without a folder, or use a function of plain values and tensors"
    )


def _describe_function(function: FunctionType, seen: set[int]) -> str:
    if function.__module__.split(".")[0] in ("torch", "numpy", "einops", "transformer_lens", "transformers"):
        return f"{function.__module__}.{function.__qualname__}"
    names = _global_names(function.__code__)
    used = {name: function.__globals__[name] for name in sorted(names) if name in function.__globals__}
    closure = {
        name: cell.cell_contents
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    }
    parts = (closure, function.__defaults__, function.__kwdefaults__, used)
    return f"{_code(function.__code__)} {_describe(parts, seen)}"


def _code(code: CodeType) -> str:
    """What a code object computes, without where it was written."""
    constants = [_constant(each) for each in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def _constant(value: object) -> str:
    if inspect.iscode(value):
        return _code(value)
    if isinstance(value, frozenset):  # whose order differs from process to process
        return str(sorted(map(_constant, value)))
    return str(list(map(_constant, value))) if isinstance(value, tuple) else repr(value)


def _global_names(code: CodeType) -> set[str]:
    names = set(code.co_names)
    inner: Iterable[CodeType] = (each for each in code.co_consts if inspect.iscode(each))
    for each in inner:
        names |= _global_names(each)
    return names
