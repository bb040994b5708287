"""Half precision, and models split over devices: vectors follow each layer, results are float32 on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Twins, ids_of, make_tokenizer, make_twins, original
from oracle import plain_generate, plain_run, until_end
from passes import tokens_of
from transformer_lens.model_bridge import TransformerBridge
from two_devices import FIRST, SECOND, split_bridge

import tv_lens as tv

NEVER = tv.Template("{input} -> {output}", separator="\n\n\n\n")
WORDS = tv.Task.from_mapping("upper", {word: word.upper() for word in ("a", "hot", "cold", "big", "small", "wet fox")})
PROMPTS = WORDS.sample(4, shots=2, seed=0, template=NEVER)
SUBSTITUTES = WORDS.substitutes(PROMPTS, 2, seed=0)


def as_plain_hooks(bridge: TransformerBridge, twins: Twins, tolerance: float) -> None:
    """Reads and patched logits are float32, on the CPU, and as close to plain float32 hooks as the precision allows."""
    vectors = tv.extract(bridge, PROMPTS, SUBSTITUTES)
    layers = [0, 1, 2, 3]
    actual = tv.patched_logits(bridge, PROMPTS, vectors, layers)
    for tensor in (vectors.values, actual):
        assert (tensor.dtype, tensor.device.type) == (torch.float32, "cpu")
    for i, (prompt, queries) in enumerate(zip(PROMPTS, SUBSTITUTES, strict=True)):
        own = [plain_run(twins, ids_of(bridge, prompt.asking(query).text))[0] for query in queries]
        torch.testing.assert_close(vectors.values[i], torch.stack(own).mean(0), atol=tolerance, rtol=tolerance)
        ids = ids_of(bridge, prompt.zero_shot().text)
        plain = plain_run(twins, ids, (layers[i], ids.shape[1] - 1, vectors.values[i, layers[i]]))[1]
        torch.testing.assert_close(actual[i], plain, atol=tolerance, rtol=tolerance)
        assert (actual[i] - plain_run(twins, ids)[1]).abs().max() > 2 * tolerance  # the patch did more than rounding


# Bounds from the formats: 11 and 8 bits of fraction, over some ten roundings a layer in four layers.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_half_precision_is_near_float32(name: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    twins = saved(tmp_path, name)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu", dtype=dtype)
    assert next(original(bridge).parameters()).dtype == dtype
    as_plain_hooks(bridge, twins, tolerance)


def saved(folder: Path, name: str) -> Twins:
    twins = make_twins(name)
    twins.plain.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return twins


def test_a_layer_in_another_precision_gets_its_vector_in_its_own() -> None:
    """One half-precision block among float32 ones: the patch is cast for that layer and no other."""
    twins = make_twins("llama")
    lower, upper = original(twins.bridge).model.layers[1:3]
    lower.register_forward_hook(lambda module, args, output: output.half())
    upper.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    engine = tv.LocalEngine(twins.bridge)
    tokens = tokens_of(engine, ["hot ->"])
    logits = engine.forward(tokens, edits=tv.Edits.per_row(torch.ones(1, 32) / 3, torch.tensor([1]))).logits
    assert logits is not None
    ids = tokens.ids
    expected = plain_run(twins, ids, (1, ids.shape[1] - 1, (torch.ones(32) / 3).half().float()))[1]
    torch.testing.assert_close(logits[0], expected, atol=0.02, rtol=0)


@pytest.fixture(scope="module", params=["cpu", "disk"])
def split(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TransformerBridge, Twins]:
    """A model that accelerate has split: two of its layers are kept on the disk or on the CPU, and
    come in for their turn only.
    """
    accelerate = pytest.importorskip("accelerate")
    twins = make_twins("llama")
    folder = tmp_path_factory.mktemp("offload")
    model = make_twins("llama").plain
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    if request.param == "disk":
        where |= {f"model.layers.{layer}": ("disk" if layer in (1, 2) else "cpu") for layer in range(4)}
        model = accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True)
        assert next(model.model.layers[1].parameters()).device.type == "meta"
    else:
        model = accelerate.cpu_offload(model, torch.device("cpu"))
        assert next(model.model.layers[0].parameters()).device.type == "meta"
    model.config.architectures = [type(model).__name__]
    bridge = TransformerBridge.boot_transformers("tiny-llama", hf_model=model, tokenizer=make_tokenizer())
    return bridge, twins


def test_a_split_model_reads_and_writes_as_plain_hooks(split: tuple[TransformerBridge, Twins]) -> None:
    as_plain_hooks(*split, 1e-4)


def test_a_split_model_generates_and_sweeps(split: tuple[TransformerBridge, Twins]) -> None:
    bridge, twins = split
    values = torch.randn(4, 4, 32, generator=torch.Generator().manual_seed(3)) * 3
    vectors = tv.TaskVectors(values, "tiny-llama", "t")
    actual = tv.patch_generate(bridge, PROMPTS, vectors, 2, max_new_tokens=3).tokens
    # A rule that cannot decide early, so that the answers are whole.
    task = replace(WORDS, accepts=tv.Rule("whole answers", lambda prediction, answer: prediction == answer))
    swept = tv.sweep_layers(bridge, task, PROMPTS, vectors, max_new_tokens=2)
    for i, prompt in enumerate(PROMPTS):
        ids = ids_of(bridge, prompt.zero_shot().text)
        last = ids.shape[1] - 1
        chosen = plain_generate(twins, ids, 3, (2, last, vectors.values[i, 2]))
        assert until_end(actual[i]) == until_end(torch.tensor(chosen))
        for layer in range(4):
            plain = until_end(torch.tensor(plain_generate(twins, ids, 2, (layer, last, vectors.values[i, layer]))))
            assert swept.at(layer).texts[i] == NEVER.cut(bridge.tokenizer.decode(plain, skip_special_tokens=True))


@pytest.mark.parametrize("kept", ["cpu", "disk"])
def test_a_custom_device_map(kept: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    twins = saved(tmp_path / "model", "llama")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    where |= {f"model.layers.{layer}": kept if layer in (1, 2) else "cpu" for layer in range(4)}
    bridge = TransformerBridge.boot_transformers(
        str(tmp_path / "model"), device_map=where, offload_folder=str(tmp_path / "offload")
    )
    inner = next(original(bridge).model.layers[1].parameters())
    assert inner.device.type == ("meta" if kept == "disk" else "cpu")
    as_plain_hooks(bridge, twins, 1e-4)


def split_engine(monkeypatch: pytest.MonkeyPatch) -> tuple[tv.LocalEngine, Any]:
    bridge, mode = split_bridge(monkeypatch)
    assert (bridge.cfg.device, bridge.cfg.n_devices) == (FIRST, 2)
    engine = tv.LocalEngine(bridge, progress=False)
    monkeypatch.setattr(engine, "_put", lambda tensor: tensor)  # done inside of the mode
    return engine, mode


@pytest.mark.parametrize("logits", [True, False, 2])
@pytest.mark.parametrize("op", ["set", "add", "rotate"])
def test_tensors_go_to_the_device_of_what_they_are_written_into(
    monkeypatch: pytest.MonkeyPatch, op: Any, logits: bool | int
) -> None:
    """Edits below and above the border between two devices, and reads of all layers."""
    engine, _ = split_engine(monkeypatch)
    tokens = tokens_of(engine, ["hot -> cold", "a quick ->"])
    edits = tv.Edits.per_row(torch.ones(2, 32), torch.tensor([1, 3]), op=op)
    if op == "set":
        edits = tv.Edits((*edits, *tv.Edits.per_row(torch.ones(2, 32), torch.tensor([0, 2]), site=tv.HEADS)))
    weights = torch.full((2, 2), 0.5)
    output = engine.forward(tokens, edits=edits, read=[tv.RESID_POST, tv.HEADS], weights=weights, logits=logits)
    assert {str(each.device) for each in output.reads.values()} == {"cpu"}
    assert {tuple(each.shape) for each in output.reads.values()} == {(2, 4, 32)}
    assert (output.logits is None) == (logits is False)


def test_a_cache_on_two_devices_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, mode = split_engine(monkeypatch)
    tokens = tokens_of(engine, ["hot -> cold", "a quick ->", "wet ->"])
    past = engine.forward(tokens, logits=False).past
    with mode:
        fewer = engine.select(past, [0, 2])
    assert fewer is not None
    assert [str(each.keys.device) for each in fewer.layers] == [FIRST, FIRST, SECOND, SECOND]
    step = tokens.keep([0, 2]).then(torch.tensor([5, 6]))
    edits = tv.Edits.per_row(torch.ones(2, 32), torch.tensor([0, 2]))
    assert engine.forward(step, edits=edits, past=fewer).logits is not None


def test_a_tensor_on_the_other_device_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above could not fail."""
    engine, mode = split_engine(monkeypatch)
    tokens = tokens_of(engine, ["hot ->"])
    with mode:
        nothing = torch.zeros(0, dtype=torch.long, device=FIRST)
    monkeypatch.setattr(engine, "_logits_to_keep", lambda logits: {"logits_to_keep": nothing})
    with pytest.raises(RuntimeError, match="indices are on cpu:1, what they index is on cpu:2"):
        engine.forward(tokens, logits=False)

    def write_from_the_first_device(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return activation + torch.ones(32, device=FIRST)

    monkeypatch.undo()
    engine, _ = split_engine(monkeypatch)
    engine.bridge.add_hook("blocks.3.hook_resid_post", write_from_the_first_device)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device|found two different devices"):
        engine.forward(tokens, logits=True)
