"""Private parts of TransformerLens, torch, tokenizers, vLLM and Inspect. No other file uses any.

Each function here says what it needs them for, so that a new version of a library is checked in one place.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import RemoteBridge, TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf, configure_tokenizer
from transformer_lens.model_bridge.sources._driver_base import DriverBase
from transformer_lens.model_bridge.sources._hf_format import determine_architecture_from_hf_config
from transformer_lens.model_bridge.sources.inspect.driver import InspectDriver
from transformer_lens.model_bridge.sources.vllm.driver import VLLMDriver
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

# What is remembered about a model


@dataclass
class ModelState:
    """What all engines of one model share: a lock, and what was learned while running it.

    `depth` counts the sessions that are open; only the outermost sets things up and puts them back.
    """

    lock: Any = field(default_factory=threading.RLock)  # before Python 3.13, RLock is a function and not a type
    depth: int = 0
    max_rows: int | None = None
    padded_up_to: float | None = None
    checked_lengths: set[int] = field(default_factory=set)
    differentiable: set[str] = field(default_factory=set)


_STATES: WeakKeyDictionary[Any, ModelState] = WeakKeyDictionary()
_STATES_LOCK = threading.Lock()


def state_of(model: Any) -> ModelState:
    """The state shared by all engines of a model. It holds no reference to the model."""
    with _STATES_LOCK:
        return _STATES.setdefault(model, ModelState())


# Leaving no trace


def finish(put_back: Callable[[], None]) -> None:
    """Run `put_back` to its end, even if Ctrl-C interrupts it: a model may have a thousand modules."""
    try:
        put_back()
    except KeyboardInterrupt:
        put_back()
        raise


@contextmanager
def tokenizer_unchanged(tokenizer: Any, state: ModelState) -> Iterator[None]:
    """Tokenizing switches a fast tokenizer's padding on; this puts padding and truncation back."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state.lock.acquire()
    try:
        if backend is None:
            with _default_device_ignored():
                yield
            return
        padding, truncation = backend.padding, backend.truncation
        try:
            with _default_device_ignored():
                yield
        finally:
            finish(partial(_restore_tokenizer, backend, padding, truncation))
    finally:
        state.lock.release()


def _restore_tokenizer(backend: Any, padding: dict[str, Any] | None, truncation: dict[str, Any] | None) -> None:
    if padding is None:
        backend.no_padding()
    else:
        backend.enable_padding(**padding)
    if truncation is None:
        backend.no_truncation()
    else:
        backend.enable_truncation(**truncation)


@contextmanager
def model_unchanged(bridge: TransformerBridge, points: Sequence[HookPoint], state: ModelState) -> Iterator[None]:
    """One thread at a time, no dropout; train flags and hooks come back as they were, also after an exception."""
    state.lock.acquire()
    state.depth += 1
    try:
        if state.depth > 1:
            yield
            return
        models = (bridge, bridge.original_model)
        training = [module for model in models for module in model.modules() if module.training]
        hooks = [(point, list(point.fwd_hooks), list(point._forward_hooks)) for point in points]
        level = getattr(bridge, "context_level", 0)

        def put_back() -> None:
            for module in training:
                module.training = True
            # TransformerLens leaves its hooks on the model if Ctrl-C comes while it adds or removes them.
            for point, shown, keys in hooks:
                point.fwd_hooks[:] = shown
                for key in [key for key in point._forward_hooks if key not in keys]:
                    del point._forward_hooks[key]
            bridge.context_level = level

        try:
            for module in training:
                module.training = False
            yield
        finally:
            finish(put_back)
    finally:
        state.depth -= 1
        state.lock.release()


@contextmanager
def computing(device: torch.device, parameters: Iterable[nn.Parameter], grad: bool) -> Iterator[None]:
    """A graph only if `grad`, none of it for parameters, no autocast and no default device, whatever the caller has
    switched on.
    """
    was_enabled = torch.is_grad_enabled()
    frozen = [parameter for parameter in parameters if parameter.requires_grad] if grad else []
    try:
        torch.set_grad_enabled(grad)
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.autocast(device.type, enabled=False), _default_device_ignored():
            yield
    finally:
        finish(partial(_restore_gradients, was_enabled, frozen))


def _restore_gradients(was_enabled: bool, frozen: Sequence[nn.Parameter]) -> None:
    torch.set_grad_enabled(was_enabled)
    for parameter in frozen:
        parameter.requires_grad_(True)


@contextmanager
def _default_device_ignored() -> Iterator[None]:
    """Libraries create tensors without naming a device, and expect them on the CPU."""
    if torch.get_default_device().type == "cpu":
        yield
        return
    with torch.device("cpu"):
        yield


# Hooks


def components_of(bridge: TransformerBridge, points: Iterable[HookPoint]) -> dict[HookPoint, nn.Module]:
    """The components whose outputs the hook points are."""
    wanted = set(points)
    modules = bridge.original_model.modules()
    return {m.hook_out: m for m in modules if isinstance(m, GeneralizedComponent) and m.hook_out in wanted}


def has_output_hooks(component: nn.Module) -> bool:
    """Whether somebody changes the component's output with a torch forward hook.

    Such a hook runs after TransformerLens's hook point, so there a read would be too early.
    """
    return bool(component._forward_hooks)


@contextmanager
def output_hooks(hooks: Sequence[tuple[nn.Module, Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    """Torch forward hooks on modules, after those that are there already; they get the first output."""
    handles: list[Any] = []
    try:
        for module, function in hooks:
            handles.append(module.register_forward_hook(partial(_first_changed, function)))
        yield
    finally:
        finish(partial(remove_hooks, handles))


def _first_changed(function: Callable[[Tensor], Tensor | None], module: nn.Module, args: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    changed = function(first)
    if changed is None:
        return None
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def remove_hooks(handles: Sequence[Any]) -> None:
    """Remove hooks from their modules."""
    for handle in handles:
        handle.remove()


def user_hooks(bridge: TransformerBridge) -> list[tuple[str, Callable[..., Any]]]:
    """Every hook on the model that is not TransformerLens's own: where it is, and the function."""
    hooks_of_user: list[tuple[str, Callable[..., Any]]] = []
    points = {point: name for name, point in bridge.hook_dict.items()}
    for point, name in points.items():
        hooks_of_user += [(name, handle.user_hook) for handle in point.fwd_hooks if handle.user_hook is not None]
    for name, module in bridge.original_model.named_modules():
        if isinstance(module, HookPoint):
            continue
        for kind, hooks in (("output", module._forward_hooks), ("input", module._forward_pre_hooks)):
            for function in hooks.values():
                if not _is_library_hook(function):
                    hooks_of_user.append((f"{name or 'model'} {kind}", function))
    return hooks_of_user


def _is_library_hook(function: Callable[..., Any]) -> bool:
    while isinstance(function, partial):
        function = function.func
    module = inspect.getmodule(function)
    return module is not None and module.__name__.split(".")[0] in (
        "transformer_lens",
        "transformers",  # which keeps hooks on the model after a pass that asked for hidden states
        "accelerate",
        "tv_lens",
    )


def tensors_of(bridge: TransformerBridge) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters and buffers, by name.

    Rotary frequencies that the model changes with the length of its input are left out: they follow from the
    configuration.
    """
    yield from bridge.original_model.named_parameters()
    rope = str(config_of(bridge).get("rope_parameters"))
    changes = "longrope" in rope or "dynamic" in rope
    for name, buffer in bridge.original_model.named_buffers():
        if not (changes and name.endswith("inv_freq")):
            yield name, buffer


def inner_tensors(tensor: Tensor) -> tuple[dict[str, Tensor], str]:
    """The tensors inside a wrapper, such as the numbers and scales of torchao's quantized weights, and its other
    values as text; nothing for a plain tensor.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return {}, ""
    names, rest = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}, str(rest)


# Remote bridges


@dataclass(frozen=True)
class RemoteFacts:
    """What a remote bridge was booted with. The bridge does not expose it; its driver knows.

    `cannot_patch` says why vectors cannot be written, "" if they can. `values_per_position` is whether one hook takes a
    different vector at each of several positions. `batches` is whether it takes several rows at once.
    """

    n_ctx: int
    end_ids: frozenset[int]
    batches: bool
    cannot_patch: str
    values_per_position: bool


def remote_facts(bridge: RemoteBridge) -> RemoteFacts:
    """How a remote bridge can be used."""
    driver, n_ctx = bridge._driver, int(bridge.cfg.n_ctx)
    if isinstance(driver, VLLMDriver):
        return _vllm_facts(driver, n_ctx)
    if isinstance(driver, InspectDriver):
        # Of Inspect's providers only TransformerLens's own, which holds the model itself, edits at a position.
        model = getattr(driver._model.api, "_hf", None)
        generation = getattr(model, "generation_config", None)
        reason = "" if model is not None else "is run by an Inspect provider that cannot write at one position"
        return RemoteFacts(n_ctx, ids_of(getattr(generation, "eos_token_id", None)), False, reason, True)
    return RemoteFacts(n_ctx, frozenset(), False, "", False)


def _vllm_facts(driver: VLLMDriver, n_ctx: int) -> RemoteFacts:
    config = driver._llm.llm_engine.model_config
    ends = ids_of(config.try_get_generation_config().get("eos_token_id"))
    n_ctx = min(n_ctx, config.max_model_len - 1)  # vLLM needs room for one token more
    if not driver._enable_batching:
        n_ctx = min(n_ctx, driver._max_num_batched_tokens)
    can_patch = driver._enable_position_interventions
    reason = "" if can_patch else "was booted without enable_position_interventions=True"
    return RemoteFacts(n_ctx, ends, bool(driver._enable_batching), reason, False)


class _NoDriver(DriverBase):
    """For a bridge that knows its model's configuration and tokenizer, and runs nothing."""

    supported_hook_points = frozenset({"embed.hook_out"})  # a RemoteBridge refuses a driver without any

    def forward(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError("this bridge only describes its model")


def described(name: str) -> tuple[RemoteBridge, frozenset[int]]:
    """A bridge of the model's configuration and tokenizer, set up as `boot_transformers` sets them up but without any
    weights, and the ids that its generation configuration ends a text with.
    """
    config = AutoConfig.from_pretrained(name)
    architecture = determine_architecture_from_hf_config(config)  # type: ignore[no-untyped-call]
    settings = build_bridge_config_from_hf(config, architecture, name, torch.float32)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(settings)
    tokenizer = configure_tokenizer(AutoTokenizer.from_pretrained(name), adapter.cfg)
    bridge = RemoteBridge(adapter, tokenizer, _NoDriver(adapter.cfg, tokenizer))
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:  # a model need not have one
        generation = GenerationConfig.from_model_config(config)
    return bridge, ids_of(generation.eos_token_id)


def ids_of(value: int | Sequence[int] | None) -> frozenset[int]:
    """Configurations hold one id, several or none."""
    if value is None:
        return frozenset()
    return frozenset([value]) if isinstance(value, int) else frozenset(value)


# Configurations


def config_of(bridge: TransformerBridge) -> Mapping[str, Any]:
    """The text model's Hugging Face configuration; empty if the model has none."""
    config = getattr(bridge.original_model, "config", None)
    if config is None:
        return {}
    whole: dict[str, Any] = config.get_text_config().to_dict()
    whole["is_encoder_decoder"] = bool(getattr(config, "is_encoder_decoder", False))
    return whole


def generation_end_ids(bridge: TransformerBridge) -> frozenset[int]:
    """The ids that the model's generation configuration ends a text with."""
    generation = getattr(bridge.original_model, "generation_config", None)
    return ids_of(getattr(generation, "eos_token_id", None))


def is_recurrent(bridge: TransformerBridge) -> bool:
    """Whether the model carries a recurrent state, whose cache cannot be widened."""
    return bool(getattr(bridge.original_model, "_is_stateful", False))


def accepts_argument(bridge: TransformerBridge, name: str) -> bool:
    """Whether the Hugging Face model's forward has a parameter of that name."""
    return name in inspect.signature(bridge.original_model.forward).parameters
