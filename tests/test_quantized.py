"""Quantized models: the same as a plain model with the dequantized weights, whatever the weights are stored as.

`Packed` stores its weights as GPTQ and AWQ do. torchao and bitsandbytes are tested if they are installed:
pip install -e '.[quantized]'
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import make_tokenizer, make_twins, original
from torch import Tensor, nn
from torch.nn.functional import linear
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv
from tv_lens.engines.quantized import packed_modules

TASK = tv.Task("upper", ("a", "hot", "cold", "big", "small", "wet fox"), str.upper)
PROMPTS = TASK.sample(4, shots=2, seed=0)
SUBSTITUTES = TASK.substitutes(PROMPTS, 2, seed=0)
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}  # 4-bit blocks are 64 numbers wide


class Packed(nn.Module):
    """Four int8 numbers in each int32, in a buffer; there is no `weight`."""

    def __init__(self, plain: nn.Linear, has_backward: bool) -> None:
        super().__init__()
        weight = plain.weight.detach()
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", (weight / scales).round().to(torch.int8).view(torch.int32))
        self.register_buffer("scales", scales)
        self.has_backward = has_backward

    def dequantized(self) -> Tensor:
        qweight, scales = self.get_buffer("qweight"), self.get_buffer("scales")
        return qweight.view(torch.int8).float() * scales

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.has_backward):
            return linear(inputs, self.dequantized())


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: each for name, each in model.named_modules() if isinstance(each, nn.Linear) and not name.endswith("head")
    }


def replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    for name, each in linears(model).items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, make(each))
    return model


def plain_linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight.clone())
    return module


def bridge_of(model: Any) -> TransformerBridge:
    return TransformerBridge.boot_transformers("tiny-llama", hf_model=model, tokenizer=make_tokenizer(), device="cpu")


def packed(has_backward: bool) -> TransformerBridge:
    return bridge_of(replaced(make_twins("llama", **SIZES).plain, lambda each: Packed(each, has_backward)))


def dequantized() -> TransformerBridge:
    def rounded(each: nn.Linear) -> nn.Linear:
        return plain_linear(Packed(each, True).dequantized())

    return bridge_of(replaced(make_twins("llama", **SIZES).plain, rounded))


def everything(bridge: TransformerBridge) -> list[Tensor]:
    """Reads, writes, heads, and what they add to the residual stream."""
    engine = tv.LocalEngine(bridge, progress=False)
    vectors = tv.extract(engine, PROMPTS, SUBSTITUTES)
    heads = tv.read_heads(engine, PROMPTS)
    return [
        vectors.values,
        tv.patched_logits(engine, PROMPTS, vectors, 1, how=tv.add(2.0)),
        heads.values,
        tv.head_effects(engine, PROMPTS, heads).values,
        tv.function_vector(engine, heads, [(0, 1), (1, 3)]).values,
    ]


def gradients(bridge: TransformerBridge) -> Tensor:
    engine = tv.LocalEngine(bridge, progress=False)
    return tv.head_effects(engine, PROMPTS, tv.read_heads(engine, PROMPTS), how="attribution").values


def assert_alike(actual: TransformerBridge, expected: TransformerBridge, tolerance: float) -> None:
    for one, other in zip(everything(actual), everything(expected), strict=True):
        assert (one.dtype, one.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def test_packed_weights_give_what_their_dequantized_values_give() -> None:
    actual = packed(has_backward=True)
    assert len(packed_modules(actual)) == 14
    with pytest.raises(AttributeError):
        _ = actual.blocks[0].attn.W_O  # otherwise it would be a plain model
    expected = dequantized()
    assert packed_modules(expected) == {}
    assert_alike(actual, expected, 1e-4)
    torch.testing.assert_close(gradients(actual), gradients(expected), atol=1e-4, rtol=1e-4)


def test_gradients_that_a_kernel_would_lose_are_an_error() -> None:
    """Through the residual stream alone they would be wrong."""
    bridge = packed(has_backward=False)
    before = [len(each._forward_hooks) for each in original(bridge).modules()]
    match = r"tiny-llama gives no gradients: \d+ quantized modules \(.*\(Packed\), ...\) have no backward pass"
    with pytest.raises(tv.UnsupportedError, match=match):
        gradients(bridge)
    with pytest.raises(tv.UnsupportedError, match=match):
        tv.learn(tv.LocalEngine(bridge, progress=False), PROMPTS, epochs=1)
    assert [len(each._forward_hooks) for each in original(bridge).modules()] == before
    assert tv.extract(bridge, PROMPTS, SUBSTITUTES).values.isfinite().all()


def test_a_packed_weight_counts_in_the_fingerprint() -> None:
    bridge = packed(has_backward=True)
    engine = tv.LocalEngine(bridge)
    before = engine.fingerprint()
    module = next(iter(packed_modules(bridge).values()))
    module.get_buffer("qweight")[0, 0] += 1
    changed = engine.fingerprint()
    module.get_buffer("scales")[0] *= 1.01
    assert len({before, changed, engine.fingerprint()}) == 3


def test_the_precision_is_that_of_a_model_that_was_loaded_before() -> None:
    bridge = bridge_of(make_twins("llama").plain.to(torch.bfloat16))
    assert tv.LocalEngine(bridge).info.dtype == "bfloat16"
    assert tv.LocalEngine(make_twins("llama").bridge).info.dtype == "float32"


def test_an_unembedding_that_cannot_be_read_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = make_twins("llama").bridge
    head = original(bridge).lm_head.original_component
    vectors = tv.TaskVectors(torch.ones(1, 4, 32), "tiny-llama", "t")
    head.weight = nn.Parameter(head.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(
        tv.UnsupportedError, match="tiny-llama: the unembedding cannot be read, because its weights are"
    ):
        tv.top_tokens(bridge, vectors, 1)


# Real libraries


def test_torchao_weights_give_what_their_dequantized_values_give() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = make_twins("llama", **SIZES).plain
    only_blocks = {"filter_fn": lambda module, name: isinstance(module, nn.Linear) and not name.endswith("head")}
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), **only_blocks)
    plain = make_twins("llama", **SIZES).plain
    for name, each in linears(model).items():
        weight: Any = each.weight
        plain.get_submodule(name).weight.data = weight.dequantize()
    actual, expected = bridge_of(model), bridge_of(plain)
    assert_alike(actual, expected, 1e-4)
    torch.testing.assert_close(gradients(actual), gradients(expected), atol=1e-4, rtol=1e-4)
    weights_only = tv.LocalEngine(actual).fingerprint()

    model = make_twins("llama", **SIZES).plain
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(), **only_blocks)
    rounds_activations = bridge_of(model)
    assert tv.LocalEngine(rounds_activations).fingerprint() != weights_only  # the same weights, other logits
    with pytest.raises(tv.UnsupportedError, match="have no backward pass"):
        gradients(rounds_activations)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_is_near_what_its_weights_round_to(bits: int, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    twins = make_twins("llama", **SIZES)
    twins.plain.save_pretrained(tmp_path)
    quantized = transformers.BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantized, device_map={"": "cpu"}
    )
    rounded = make_twins("llama", **SIZES).plain
    if bits == 4:  # whose weights are far from the plain ones
        for name, each in linears(model).items():
            weight: Any = each.weight
            rounded.get_submodule(name).weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    bridge, near = bridge_of(model), bridge_of(rounded)
    reads, _, heads, _, added = everything(bridge)
    expected = everything(near)
    for actual, plain in ((reads, expected[0]), (heads, expected[2]), (added, expected[4])):
        assert (actual - plain).norm() / plain.norm() < 0.05
    assert tv.LocalEngine(bridge).fingerprint() == tv.LocalEngine(bridge).fingerprint()
    if bits == 8:
        torch.testing.assert_close(gradients(bridge), gradients(near), atol=0.01, rtol=0.2)
    else:
        with pytest.raises(tv.UnsupportedError, match="have no backward pass"):
            gradients(bridge)
