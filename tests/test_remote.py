"""The same numbers through a remote bridge as through a local one, on the CPU; vLLM only if it is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from models import Twins, ids_of, make_tokenizer, make_twins
from oracle import plain_generate, plain_run, until_end
from passes import read_texts, tokens_of
from transformer_lens.model_bridge import RemoteBridge, TransformerBridge
from transformer_lens.model_bridge.sources.vllm.driver import VLLMDriver

import tv_lens as tv

WORDS = tv.Task.from_mapping("upper", {word: word.upper() for word in ("a", "hot", "cold", "big", "small", "wet fox")})
NEVER = tv.Template("{input} -> {output}", separator="\n\n\n\n")
PROMPTS = WORDS.sample(4, shots=2, seed=0, template=NEVER)
SUBSTITUTES = WORDS.substitutes(PROMPTS, 2, seed=0)
# Sizes for the tiny model; no compilation, which would take minutes.
VLLM = {"max_model_len": 128, "max_num_batched_tokens": 64, "enforce_eager": True, "dtype": torch.float32}


class Pair(NamedTuple):
    """One model: remote, local, and in plain Hugging Face."""

    remote: RemoteBridge
    local: TransformerBridge
    twins: Twins


def refuse(*args: Any, **kwargs: Any) -> None:
    """For a bridge that must not run."""
    raise AssertionError("the model was run")


def saved(folder: Path, name: str = "llama", **changes: Any) -> Twins:
    twins = make_twins(name, **changes)
    twins.plain.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return twins


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox"])
def inspected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    if importlib.util.find_spec("inspect_ai") is None:
        pytest.skip('needs inspect_ai: pip install "tv_lens[inspect]"')
    folder = tmp_path_factory.mktemp("saved") / f"tiny-{request.param}"
    twins = saved(folder, request.param)
    local = TransformerBridge.boot_transformers(str(folder), device="cpu")
    return Pair(RemoteBridge.boot_inspect(str(folder)), local, twins)


@pytest.fixture(scope="module")
def vllm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip('needs vLLM and a GPU (or a build of it for the CPU): pip install "tv_lens[vllm]"')
    if not torch.cuda.is_available() and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        pytest.skip("vLLM is here and no GPU; with a build for the CPU set VLLM_CPU_KVCACHE_SPACE=1")
    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    saved(folder, hidden_size=128, vocab_size=320)
    return folder


def same(pair: Pair) -> None:
    """Every verb, remote against local; local is held to plain hooks by the tests of the engine."""
    remote, local = (tv.engine_for(bridge) for bridge in pair[:2])
    assert isinstance(remote, tv.RemoteEngine)
    assert remote.name == local.name
    assert (remote.info.end_ids, remote.info.pad_id) == (local.info.end_ids, local.info.pad_id)
    vectors, expected = (tv.extract(each, PROMPTS, SUBSTITUTES) for each in (remote, local))
    torch.testing.assert_close(vectors.values, expected.values, atol=1e-4, rtol=0)
    for layer in (0, [3, 2, 1, 0]):
        actual, wanted = (tv.patched_logits(each, PROMPTS, expected, layer) for each in (remote, local))
        torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0)
        written, again = (tv.patch_generate(each, PROMPTS, expected, layer) for each in (remote, local))
        assert torch.equal(written.tokens, again.tokens)
    assert torch.equal(tv.generate(remote, PROMPTS).tokens, tv.generate(local, PROMPTS).tokens)
    sampler = tv.sample(temperature=2.0, seed=1)
    drawn, wanted_draw = (tv.generate(each, PROMPTS, sampler=sampler) for each in (remote, local))
    assert drawn.texts == wanted_draw.texts
    swept, wanted_sweep = (
        tv.sweep_layers(each, WORDS, PROMPTS, expected, max_new_tokens=3) for each in (remote, local)
    )
    assert swept == wanted_sweep
    assert len({score.texts for score in swept.scores}) > 1  # layers differ
    seen, wanted_seen = (tv.evaluate(each, WORDS, PROMPTS, expected, 1, max_new_tokens=3) for each in (remote, local))
    assert seen == wanted_seen


def test_inspect_gives_what_the_local_bridge_gives(inspected: Pair) -> None:
    same(inspected)


def test_inspect_reads_and_writes_as_plain_hooks(inspected: Pair) -> None:
    engine, twins = tv.RemoteEngine(inspected.remote, batch_size=3), inspected.twins
    vectors = torch.randn(4, engine.n_layers, engine.d_model, generator=torch.Generator().manual_seed(3)) * 3
    asked = [prompt.zero_shot() for prompt in PROMPTS]
    reads = read_texts(engine, [prompt.text for prompt in asked])
    task_vectors = tv.TaskVectors(vectors, engine.name, "t")
    actual = tv.patched_logits(engine, PROMPTS, task_vectors, 2)
    chosen = tv.patch_generate(engine, PROMPTS, task_vectors, 2, max_new_tokens=3).tokens
    for i, prompt in enumerate(asked):
        ids = ids_of(inspected.local, prompt.text)
        write = (2, ids.shape[1] - 1, vectors[i, 2])
        torch.testing.assert_close(reads[i], plain_run(twins, ids)[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(actual[i], plain_run(twins, ids, write)[1], atol=1e-4, rtol=0)
        assert until_end(chosen[i]) == until_end(torch.tensor(plain_generate(twins, ids, 3, write)))


def test_a_read_sees_the_patches_before_it(inspected: Pair) -> None:
    """A row patched at its second position, read at its third: a plain hook at the second."""
    engine, twins = tv.RemoteEngine(inspected.remote), inspected.twins
    tokens = tokens_of(engine, ["hot"])
    at = tokens.ids.shape[1] - 1
    vector = torch.full((1, 32), 2.0)
    past = engine.forward(tokens, edits=tv.Edits.per_row(vector, torch.tensor([1]))).past
    then = tokens.then(torch.tensor([7]))
    actual = engine.forward(then, read=[tv.RESID_POST], past=engine.fork(past)).reads[tv.RESID_POST]
    ids = torch.cat([tokens.ids, torch.tensor([[7]])], dim=1)
    torch.testing.assert_close(actual[0], plain_run(twins, ids, (1, at, vector[0]))[0], atol=1e-4, rtol=0)


def test_inspect_reads_several_positions_separately(inspected: Pair) -> None:
    remote, local = (tv.separator_vectors(each, PROMPTS, SUBSTITUTES, own=True) for each in inspected[:2])
    torch.testing.assert_close(remote.values, local.values, atol=1e-4, rtol=0)


def test_wrong_use_is_refused_before_anything_runs(inspected: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspected.remote, "forward", refuse)
    name = tv.RemoteEngine(inspected.remote).name
    with pytest.raises(ValueError, match=f"prompt 1 has [0-9]+ tokens, with 7 more to come, and the context of {name}"):
        tv.generate(inspected.remote, [tv.Prompt((), "a"), tv.Prompt((), "b " * 61)])
    with pytest.raises(ValueError, match="layer 4 is not one of"):
        tv.patch_generate(inspected.remote, PROMPTS, tv.TaskVectors(torch.zeros(4, 4, 32), name, "t"), 4)


def test_engines_that_cannot_patch_say_so_before_anything_runs(
    inspected: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An Inspect provider that holds no model, and vLLM's own driver, not running, as it is booted by default."""
    vectors = tv.TaskVectors(torch.zeros(1, 4, 32), "m", "t")
    monkeypatch.setattr(inspected.remote, "forward", refuse)

    def each_is_refused(message: str) -> None:
        for call in (
            lambda: tv.patch_generate(inspected.remote, PROMPTS, vectors, 1),
            lambda: tv.patched_logits(inspected.remote, PROMPTS, vectors, 1),
            lambda: tv.sweep_layers(inspected.remote, WORDS, PROMPTS, vectors),
            lambda: tv.evaluate(inspected.remote, WORDS, PROMPTS, vectors, 1),
            lambda: tv.run_experiment(inspected.remote, [WORDS], shots=1),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    api = inspected.remote._driver._model.api
    with monkeypatch.context() as patched:
        patched.delattr(api, "_hf")
        each_is_refused("is run by an Inspect provider that cannot write at one position, .* boot_inspect")
    config = SimpleNamespace(max_model_len=65, try_get_generation_config=lambda: {"eos_token_id": [1, 5]})
    driver = object.__new__(VLLMDriver)
    driver._llm = SimpleNamespace(llm_engine=SimpleNamespace(model_config=config))
    driver._enable_batching = driver._enable_position_interventions = False
    driver._max_num_batched_tokens = 256
    monkeypatch.setattr(inspected.remote, "_driver", driver)
    each_is_refused("was booted without enable_position_interventions=True, so no vector .*boot_vllm")
    engine = tv.RemoteEngine(inspected.remote)
    assert (engine.info.n_ctx, engine.info.end_ids) == (64, frozenset({1, 5}))
    with pytest.raises(ValueError, match="is 64"):
        engine.text.encode(["b " * 35])


def test_a_local_bridge_is_not_a_remote_one(as_users_run_it: None) -> None:
    bridge = make_twins("gpt2").bridge
    with pytest.raises(TypeError, match="RemoteEngine runs a RemoteBridge, not a TransformerBridge; .*boot_vllm"):
        tv.RemoteEngine(bridge)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=str)
def test_vllm_gives_what_the_local_bridge_gives(vllm_folder: Path, settings: dict[str, int]) -> None:
    devices = max(settings.values(), default=1)
    if torch.cuda.is_available() and torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} GPUs")
    if not torch.cuda.is_available() and devices > 1 and "|" not in os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ""):
        pytest.skip("on CPUs two workers need separate cores; set VLLM_CPU_OMP_THREADS_BIND='0|1'")
    local = TransformerBridge.boot_transformers(str(vllm_folder), device="cpu")
    with RemoteBridge.boot_vllm(str(vllm_folder), enable_position_interventions=True, **VLLM, **settings) as remote:
        same(Pair(remote, local, None))  # type: ignore[arg-type]


def test_vllm_in_batches_reads_and_generates_and_says_that_it_cannot_patch(vllm_folder: Path) -> None:
    local = TransformerBridge.boot_transformers(str(vllm_folder), device="cpu")
    with RemoteBridge.boot_vllm(str(vllm_folder), enable_batching=True, **VLLM) as remote:
        vectors, expected = (tv.extract(each, PROMPTS, SUBSTITUTES) for each in (remote, local))
        torch.testing.assert_close(vectors.values, expected.values, atol=1e-4, rtol=0)
        assert torch.equal(tv.generate(remote, PROMPTS).tokens, tv.generate(local, PROMPTS).tokens)
        for call in (
            lambda: tv.patch_generate(remote, PROMPTS, expected, 1),
            lambda: tv.sweep_layers(remote, WORDS, PROMPTS, expected),
            lambda: tv.run_experiment(remote, [WORDS]),
        ):
            with pytest.raises(ValueError, match="tiny-llama was booted without enable_position_interventions=True"):
                call()


def test_vllm_refuses_rows_that_do_not_fit(vllm_folder: Path) -> None:
    with (
        RemoteBridge.boot_vllm(str(vllm_folder), **VLLM) as remote,
        pytest.raises(ValueError, match="and the context of tiny-llama is 64"),
    ):
        tv.generate(remote, [tv.Prompt((), "b " * 35)], max_new_tokens=1)
