"""Tiny random models of many architectures, each with an identical twin that plain Hugging Face runs."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

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
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
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
# Models that compute positions from the padded row themselves, beyond some length, and odd windows of attention.
LENGTH_DEPENDENT: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "Phi3Config",
        _SMALL
        | {"original_max_position_embeddings": 40}
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [3.0, 4.0, 6.0, 9.0],
                "original_max_position_embeddings": 40,
            }
        },
    ),
    "llama4 temperature": (
        "Llama4TextConfig",
        _SMALL
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"attn_temperature_tuning": True, "floor_scale": 16, "attn_scale": 0.5, "attention_chunk_size": 64}
        | {"no_rope_layers": [1, 0, 1], "use_qk_norm": False},
    ),
    "a window of 1": ("MistralConfig", _SMALL | {"sliding_window": 1}),
    "a window of 2": ("Gemma3TextConfig", _SMALL | {"head_dim": 8, "sliding_window": 2, "sliding_window_pattern": 2}),
    "chunked attention": (
        "Llama4TextConfig",
        _SMALL
        | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
        | {"attn_temperature_tuning": False, "attention_chunk_size": 6, "no_rope_layers": [1, 0, 1]}
        | {"use_qk_norm": False},
    ),
}
ARCHITECTURES = ("gpt2", "llama", "gpt_neox", "gpt_neo", "bloom", "mpt", "mistral")


class Twins(NamedTuple):
    """A model as TransformerLens runs it, and the same weights as Hugging Face does."""

    bridge: TransformerBridge
    plain: Any
    blocks: Any  # the plain model's list of blocks


def make_tokenizer(bos: bool = True, pad: str | None = "<pad>", side: str = "right") -> Any:
    """A byte-level BPE tokenizer, with or without a BOS; `pad` is the padding token (None: no padding token)."""
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
    kind: Any = transformers.PreTrainedTokenizerFast  # transformers leaves its constructor untyped
    tokenizer = kind(tokenizer_object=inner, padding_side=side, **tokens)
    tokenizer.init_kwargs["name_or_path"] = "tiny"
    tokenizer.init_kwargs["add_bos_token"] = True
    return tokenizer


def make_twins(name: str, tokenizer: Any = None, seed: int = 0, **changes: Any) -> Twins:
    """Twins of a tiny random model."""
    kind, settings = (CONFIGS | LENGTH_DEPENDENT)[name]
    config = getattr(transformers, kind)(**(_SIZES | settings | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kinds: Any = transformers.AutoModelForCausalLM  # transformers leaves `from_config` untyped
        model = kinds.from_config(config).eval()
        for parameter in model.parameters():  # at the usual scale all outputs would be within 1e-4 of each other
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    model.config.architectures = [type(model).__name__]
    plain = copy.deepcopy(model)
    blocks = next(module for module in plain.modules() if isinstance(module, torch.nn.ModuleList))
    bridge = TransformerBridge.boot_transformers(
        f"tiny-{name}", hf_model=model, tokenizer=tokenizer or make_tokenizer(), device="cpu"
    )
    return Twins(bridge, plain, blocks)


def original(bridge: TransformerBridge) -> Any:
    """The Hugging Face model that the bridge wraps."""
    return bridge.original_model


def ids_of(bridge: TransformerBridge, text: str, prepend_bos: bool | None = None) -> Tensor:
    return bridge.to_tokens(text, prepend_bos=prepend_bos)
