"""Tiny random models of several architectures, each beside an untouched twin that plain Hugging Face runs."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PLOTLY_RENDERER", "plotly_mimetype")  # no copy of Plotly in every figure of a notebook

import pytest
import torch
import transformers
from jaxtyping import config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv

torch.set_num_threads(2)

TEXTS = (
    "hot -> cold\nbig ->",
    "a ->",
    "hot -> cold\nbig -> small\ntall -> short\nwet ->",
    "the quick brown fox ->",
)

_SIZES = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_ROTARY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_SMALL = _ROTARY | {"num_hidden_layers": 3}
_FULL = {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"}
_FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "bias": False}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}),
    "llama": ("LlamaConfig", _ROTARY),
    "gpt_neox": (
        "GPTNeoXConfig",
        {k: v for k, v in _ROTARY.items() if k != "num_key_value_heads"} | {"use_parallel_residual": True},
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128, "window_size": 8}
        | {"attention_types": [[["global", "local"], 2]]},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 128}),
    "mistral": ("MistralConfig", _ROTARY | {"sliding_window": 6}),
    "lfm2": ("Lfm2Config", _ROTARY | {"layer_types": ["conv", "full_attention"] * 2}),
    "qwen3_next": (
        "Qwen3NextConfig",
        _ROTARY
        | {"head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16, "num_hidden_layers": 3}
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8}),
    "mamba2": (
        "Mamba2Config",
        {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1}
        | {"chunk_size": 8},
    ),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "gpt_neox sequential": ("GPTNeoXConfig", _FULL | {"use_parallel_residual": False}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "codegen": ("CodeGenConfig", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "rotary_dim": 4}),
    "qwen2": ("Qwen2Config", _SMALL),
    "qwen3": ("Qwen3Config", _SMALL | {"head_dim": 8}),
    "gemma": ("GemmaConfig", _SMALL | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", _SMALL | {"head_dim": 8, "sliding_window": 6}),
    "gemma3": ("Gemma3TextConfig", _SMALL | {"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2}),
    "phi": ("PhiConfig", _FULL),
    "phi3": ("Phi3Config", _SMALL),
    "opt": (
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"max_position_embeddings": 128, "word_embed_proj_dim": 32},
    ),
    "falcon": ("FalconConfig", _FALCON | {"multi_query": True}),
    "falcon alibi": ("FalconConfig", _FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False}),
    "falcon 40b": ("FalconConfig", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo": ("OlmoConfig", _SMALL),
    "olmo2": ("Olmo2Config", _SMALL),
    "olmo3": ("Olmo3Config", _SMALL | {"sliding_window": 6}),
    "mixtral": ("MixtralConfig", _SMALL | {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2MoeConfig", _SMALL | _EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", _SMALL | _EXPERTS | {"head_dim": 8}),
    "olmoe": ("OlmoeConfig", _SMALL | {"num_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOssConfig",
        _SMALL | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "granite": ("GraniteConfig", _SMALL),
    "cohere": ("CohereConfig", _SMALL),
    "cohere2": ("Cohere2Config", _SMALL | {"sliding_window": 6}),
    "glm4": ("Glm4Config", _SMALL | {"head_dim": 8}),
    "smollm3": ("SmolLM3Config", _SMALL),
    "starcoder2": ("Starcoder2Config", _SMALL),
    "stablelm": ("StableLmConfig", _SMALL),
    "deepseek_v3": (
        "DeepseekV3Config",
        _FULL
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1}
        | {"topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
        | {"v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    ),
    "rwkv": ("RwkvConfig", {"hidden_size": 32, "num_hidden_layers": 3, "context_length": 128}),
}
ARCHITECTURES = ("gpt2", "llama", "gpt_neox", "gpt_neo", "bloom", "mpt", "mistral")


class Twins(NamedTuple):
    """A model as TransformerLens runs it, and the same weights as Hugging Face does."""

    bridge: TransformerBridge
    plain: Any
    blocks: Any  # the plain model's list of blocks


def make_tokenizer(bos: bool = True, pad: str | None = "<pad>", side: str = "right") -> Any:
    """A byte-level BPE tokenizer; with a BOS of its own or none, `pad` a token of its own, the EOS, or None."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    inner.train_from_iterator(TEXTS * 5, trainer)
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    tokens = {"eos_token": "</s>", **({"bos_token": "<s>"} if bos else {}), **({"pad_token": pad} if pad else {})}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, padding_side=side, **tokens)
    made.init_kwargs["name_or_path"] = "tiny"
    made.init_kwargs["add_bos_token"] = True
    return made


def make_twins(name: str, tokenizer: Any = None, seed: int = 0, **changes: Any) -> Twins:
    """Twins of a tiny random model."""
    kind, settings = _CONFIGS[name]
    config = getattr(transformers, kind)(**(_SIZES | settings | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # or everything would be within 1e-4 of everything
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    model.config.architectures = [type(model).__name__]
    plain = copy.deepcopy(model)
    blocks = next(module for module in plain.modules() if isinstance(module, torch.nn.ModuleList))
    bridge = TransformerBridge.boot_transformers(
        f"tiny-{name}", hf_model=model, tokenizer=tokenizer or make_tokenizer(), device="cpu"
    )
    return Twins(bridge, plain, blocks)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def twins(request: pytest.FixtureRequest) -> Twins:
    return make_twins(request.param)


@pytest.fixture(scope="module")
def llama() -> Twins:
    return make_twins("llama")


@pytest.fixture
def gpt2() -> Twins:
    return make_twins("gpt2")


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the run-time type check, which would refuse a wrong type before our own message can."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@functools.cache
def demo_or_reason() -> TransformerBridge | str:
    """The demo model, or why it is not to be had here."""
    try:
        return tv.demo_model()
    except tv.DemoModelError as error:
        if "cannot be downloaded" not in str(error) or os.environ.get("TV_LENS_NEED_DEMO"):
            raise
        return f"needs the network once: {error}"


@pytest.fixture(scope="session")
def demo() -> TransformerBridge:
    found = demo_or_reason()
    return pytest.skip(found) if isinstance(found, str) else found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks run on the demo model too."""
    notebooks = [item for item in items if item.path.suffix == ".ipynb"]
    if notebooks and isinstance(demo_or_reason(), str):
        for item in notebooks:
            item.add_marker(pytest.mark.skip(str(demo_or_reason())))


def ids_of(bridge: TransformerBridge, text: str, prepend_bos: bool | None = None) -> Tensor:
    return bridge.to_tokens(text, prepend_bos=prepend_bos)


def plain_run(twins: Twins, ids: Tensor, write: tuple[int, int, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """The oracle: one unpadded text through plain Hugging Face. Gives the output of every block at the last
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
    found = ids.tolist()
    return found[: found.index(1) + 1] if 1 in found else found


def refuse(module: Any, args: Any) -> None:
    """A hook for a model that must not run."""
    raise AssertionError("the model was run")


def count_positions(bridge: TransformerBridge, run: Callable[[], Any]) -> int:
    """How many positions, pads among them, went through the first block."""
    count = 0

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        hidden = args[0] if args else kwargs["hidden_states"]
        count += hidden.shape[0] * hidden.shape[1]

    blocks = next(m for m in bridge.original_model.modules() if isinstance(m, torch.nn.ModuleList))
    handle = blocks[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return count
