"""The same numbers through a vLLM server with vllm-lens as through a local model.

Every test runs against a server that speaks the plug-in's protocol (`lens_server.py`). With TV_LENS_VLLM naming the
`vllm` command of an environment that has both, the comparisons are run against it, too.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from lens_server import LensServer, serialized
from models import Twins, make_tokenizer, make_twins
from oracle import plain_generate, plain_run, until_end
from passes import tokens_of
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv
from tv_lens.engines import Capability, Stop
from tv_lens.engines.vllm import VLLMEngine
from tv_lens.engines.vllm_wire import decode_tensor, encode_tensor

WORDS = tv.Task.from_mapping("upper", {word: word.upper() for word in ("a", "hot", "cold", "big", "small", "wet fox")})
NEVER = tv.Template("{input} -> {output}", separator="\n\n\n\n")
PROMPTS = WORDS.sample(4, shots=2, seed=0, template=NEVER)
SUBSTITUTES = WORDS.substitutes(PROMPTS, 2, seed=0)
OPTIONS: dict[str, Any] = {"progress": False, "retries": 1, "in_flight": 8}
TASKS = [WORDS, tv.Task("copy", WORDS.inputs, str)]
SMALL: dict[str, Any] = {"shots": 1, "n_dev": 2, "n_test": 2, "max_new_tokens": 2, "substitutes": 1}


class Pair(NamedTuple):
    """One model: on a server, locally, and in plain Hugging Face."""

    url: str
    local: tv.LocalEngine
    twins: Twins

    def engine(self, **options: Any) -> VLLMEngine:
        engine = tv.vllm_engine(self.url, **{**OPTIONS, **options})
        assert isinstance(engine, VLLMEngine)
        return engine


def saved(folder: Path) -> Twins:
    twins = make_twins("llama", hidden_size=128, vocab_size=320)
    twins.plain.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return twins


def local_of(folder: Path) -> tv.LocalEngine:
    return tv.LocalEngine(TransformerBridge.boot_transformers(str(folder), device="cpu"), progress=False)


@contextmanager
def vllm_serve(folder: Path, *options: str) -> Iterator[str]:
    """A real server, if there is one."""
    command = os.environ.get("TV_LENS_VLLM")
    if command is None:
        pytest.skip("needs vLLM with vllm-lens: TV_LENS_VLLM=/path/to/bin/vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [command, "serve", str(folder), "--port", str(port), "--dtype", "float32", "--max-model-len", "128"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [*arguments, "--max-logprobs", "-1", *options], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": ""}
        )
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                if process.poll() is not None:
                    raise RuntimeError((folder / "server.log").read_text()[-3000:])
                try:
                    httpx.get(f"{url}/health").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved") / "tiny-llama"


@pytest.fixture(scope="module")
def model(folder: Path) -> tuple[Twins, tv.LocalEngine]:
    twins = saved(folder)
    return twins, local_of(folder)


@pytest.fixture(scope="module", params=["fake", "vllm"])
def pair(request: pytest.FixtureRequest, folder: Path, model: Any) -> Iterator[Pair]:
    twins, local = model
    server = LensServer(twins.plain, twins.blocks, make_tokenizer(), str(folder))
    with server.running() if request.param == "fake" else vllm_serve(folder) as url:
        yield Pair(url, local, twins)


@pytest.fixture
def fake(folder: Path, model: Any) -> Iterator[tuple[LensServer, Pair]]:
    twins, local = model
    server = LensServer(twins.plain, twins.blocks, make_tokenizer(), str(folder))
    with server.running() as url:
        yield server, Pair(url, local, twins)


def test_every_verb_gives_what_a_local_model_gives(pair: Pair) -> None:
    served, local = pair.engine(), pair.local
    assert served.name == local.name
    assert (served.info.end_ids, served.info.pad_id) == (local.info.end_ids, local.info.pad_id)
    assert (served.info.prepend_bos, served.info.bos, served.info.dtype) == (True, "<s>", "float32")
    vectors, expected = (tv.extract(each, PROMPTS, SUBSTITUTES) for each in (served, local))
    torch.testing.assert_close(vectors.values, expected.values, atol=1e-4, rtol=0)
    for layer in (0, [3, 2, 1, 0]):
        actual, wanted = (tv.patched_logits(each, PROMPTS, expected, layer) for each in (served, local))
        torch.testing.assert_close(actual.log_softmax(-1), wanted.log_softmax(-1), atol=1e-4, rtol=0)
        written, again = (
            tv.patch_generate(each, PROMPTS, expected, layer, max_new_tokens=4) for each in (served, local)
        )
        assert torch.equal(written.tokens, again.tokens)
    assert torch.equal(tv.generate(served, PROMPTS).tokens, tv.generate(local, PROMPTS).tokens)
    sampler = tv.sample(temperature=2.0, seed=1)
    drawn, wanted_draw = (tv.generate(each, PROMPTS, sampler=sampler, max_new_tokens=2) for each in (served, local))
    assert drawn.texts == wanted_draw.texts
    swept, wanted_sweep = (
        tv.sweep_layers(each, WORDS, PROMPTS, expected, max_new_tokens=3) for each in (served, local)
    )
    assert swept == wanted_sweep
    assert len({score.texts for score in swept.scores}) > 1  # layers differ
    seen, wanted_seen = (tv.evaluate(each, WORDS, PROMPTS, expected, 1, max_new_tokens=3) for each in (served, local))
    assert seen == wanted_seen


@pytest.fixture(scope="module")
def expected(model: tuple[Twins, tv.LocalEngine]) -> tv.Experiment:
    return tv.run_experiment(model[1], TASKS, **SMALL)


def test_a_whole_experiment_is_the_same(pair: Pair, expected: tv.Experiment) -> None:
    served = tv.run_experiment(pair.engine(), TASKS, **SMALL)
    assert served.settings["engine"] == "VLLMEngine"
    assert [each.sweep for each in served.results] == [each.sweep for each in expected.results]
    assert [each.evaluation for each in served.results] == [each.evaluation for each in expected.results]


@pytest.mark.parametrize(
    "how", [tv.add(2.0), tv.add(3.0, keep_norm=True), tv.rotate(0.5), tv.add(0.5, every_step=True)], ids=str
)
def test_other_ways_to_write_give_what_a_local_model_gives(pair: Pair, how: tv.Write) -> None:
    served, local = pair.engine(), pair.local
    vectors = tv.extract(local, PROMPTS, SUBSTITUTES)
    for options in ({"layer": 2}, {"layer": tv.layers(0, 2), "positions": [-3, -1]}):
        actual, expected = (
            tv.patch_generate(each, PROMPTS, vectors, how=how, max_new_tokens=3, **options) for each in (served, local)
        )
        assert torch.equal(actual.tokens, expected.tokens)


def test_several_layers_and_positions_are_set_at_once(pair: Pair) -> None:
    """What is added to an upper layer depends on the writes below it."""
    served, local = pair.engine(), pair.local
    vectors = tv.extract(local, PROMPTS, SUBSTITUTES)
    options: dict[str, Any] = {"layer": tv.layers(0, 1, 3), "positions": "all", "keep_demonstrations": True}
    actual, expected = (tv.patched_logits(each, PROMPTS, vectors, **options) for each in (served, local))
    torch.testing.assert_close(actual.log_softmax(-1), expected.log_softmax(-1), atol=1e-3, rtol=0)


def test_mixed_lengths_and_layers_in_one_call_equal_plain_hooks_one_by_one(pair: Pair) -> None:
    engine, twins = pair.engine(in_flight=32), pair.twins
    texts = ["a ->", "hot", "wet fox -> WET FOX\nbig ->", "small -> SMALL\n" * 4 + "cold ->"] * 8
    ids = engine.text.encode(texts, new_tokens=4)
    vectors = torch.randn(len(texts), 128, generator=torch.Generator().manual_seed(0))
    layers = torch.arange(len(texts)) // 4 % 4
    edits = tv.Edits.per_row(vectors, layers)
    answers = engine.answers(ids, edits, max_new_tokens=4, stops=[Stop()] * len(texts))
    for i, answer in enumerate(answers):
        write = (int(layers[i]), len(ids[i]) - 1, vectors[i])
        expected = plain_generate(twins, torch.tensor([ids[i]]), 4, write)
        assert answer == until_end(torch.tensor(expected))


def test_an_edit_of_a_row_of_one_token_is_made_once(pair: Pair) -> None:
    engine = pair.engine(prepend_bos=False)
    vector = torch.full((1, 128), 2.0)
    [answer] = engine.answers([[7]], tv.Edits.per_row(vector, torch.tensor([1])), max_new_tokens=4, stops=[Stop()])
    expected = plain_generate(pair.twins, torch.tensor([[7]]), 4, (1, 0, vector[0]))
    assert answer == until_end(torch.tensor(expected))


def test_a_patched_row_leaves_nothing_in_the_prefix_cache(pair: Pair) -> None:
    """Long rows that begin alike, plain, patched and plain again."""
    engine, local = pair.engine(), pair.local
    text = "hot -> cold\nbig -> small\ntall -> short\nwet -> dry\n" * 2 + "a ->"
    prompts = [text] * 2
    vectors = tv.TaskVectors(torch.full((1, 4, 128), 3.0), local.name, "t")
    plain = tv.generate(local, prompts, max_new_tokens=4)
    for _ in range(2):
        assert torch.equal(tv.generate(engine, prompts, max_new_tokens=4).tokens, plain.tokens)
        written = tv.patch_generate(engine, prompts, vectors, 1, positions=[-20, -1], max_new_tokens=4)
        wanted = tv.patch_generate(local, prompts, vectors, 1, positions=[-20, -1], max_new_tokens=4)
        assert torch.equal(written.tokens, wanted.tokens)
        assert not torch.equal(written.tokens, plain.tokens)


def test_answers_end_where_they_should(pair: Pair) -> None:
    """At a stop text, at an id of the caller's, or at the end of text."""
    engine = pair.engine()
    [ids] = engine.text.encode(["a ->"], new_tokens=20)
    [whole] = engine.answers([ids], tv.Edits(), max_new_tokens=20, stops=[Stop()])
    [by_id] = engine.answers([ids], tv.Edits(), max_new_tokens=20, stops=[Stop(ids=frozenset({whole[2]}))])
    assert by_id == whole[: whole.index(whole[2]) + 1]
    text = engine.text.decode(whole[:3])[-1]
    [by_text] = engine.answers([ids], tv.Edits(), max_new_tokens=20, stops=[Stop(text)])
    assert text in engine.text.decode(by_text)
    assert text not in engine.text.decode(by_text[:-1])


def test_a_read_sees_the_edits_before_it(pair: Pair) -> None:
    engine = pair.engine()
    tokens = tokens_of(engine, ["hot"])
    at, vector = tokens.ids.shape[1] - 1, torch.full((1, 128), 2.0)
    past = engine.forward(tokens, edits=tv.Edits.per_row(vector, torch.tensor([1]))).past
    then = tokens.then(torch.tensor([7]))
    actual = engine.forward(then, read=[tv.RESID_POST], past=engine.fork(past)).reads[tv.RESID_POST]
    ids = torch.cat([tokens.ids, torch.tensor([[7]])], dim=1)
    torch.testing.assert_close(actual[0], plain_run(pair.twins, ids, (1, at, vector[0]))[0], atol=1e-4, rtol=0)


def test_separators_and_log_probabilities(pair: Pair) -> None:
    served, local = pair.engine(), pair.local
    actual, expected = (tv.separator_vectors(each, PROMPTS, SUBSTITUTES, own=True) for each in (served, local))
    torch.testing.assert_close(actual.values, expected.values, atol=1e-4, rtol=0)
    vectors = tv.extract(local, PROMPTS, SUBSTITUTES)
    for measure in (tv.divergence, tv.answer_logprobs):
        options: dict[str, Any] = {"vectors": vectors, "layer": 1}
        served_values, local_values = (measure(each, PROMPTS, **options) for each in (served, local))
        torch.testing.assert_close(served_values, local_values, atol=2e-3, rtol=0)


# What goes wrong. Only the fake server can be made to.


def test_rows_are_sent_together_and_unpatched_ones_once(fake: tuple[LensServer, Pair]) -> None:
    server, pair = fake
    engine = pair.engine(in_flight=8)
    vectors = tv.extract(pair.local, PROMPTS, SUBSTITUTES)
    server.bodies.clear()
    tv.sweep_layers(engine, WORDS, PROMPTS, vectors, max_new_tokens=2)
    assert 1 < server.most_at_once <= 8
    queries = {tuple(body["prompt"]) for body in server.bodies}
    assert len(server.bodies) == len(queries) + 4 * len(PROMPTS)
    salts = [body["cache_salt"] for body in server.bodies if "apply_steering_vectors" in body["vllm_xargs"]]
    others = {body["cache_salt"] for body in server.bodies} - set(salts)
    assert len(set(salts)) == len(salts) == 4 * len(PROMPTS)
    assert len(others) == 1
    sent = "".join(map(str, server.bodies))
    assert "pickle" not in sent
    assert "apply_hooks" not in sent


def test_an_edit_that_was_not_made_is_tried_again_and_then_an_error(fake: tuple[LensServer, Pair]) -> None:
    server, pair = fake
    engine = pair.engine()
    vectors = tv.extract(pair.local, PROMPTS, SUBSTITUTES)
    expected = tv.patch_generate(pair.local, PROMPTS, vectors, 1)
    for fault in ("lost", "moved"):
        setattr(server.faults, fault, 2)
        assert tv.patch_generate(engine, PROMPTS, vectors, 1).texts == expected.texts
        setattr(server.faults, fault, 10**6)
        with pytest.raises(tv.EngineError, match="a write into layer 1 of a row of . tokens was not made .*chunked"):
            tv.patch_generate(engine, PROMPTS, vectors, 1)
        with pytest.raises(tv.EngineError, match="was not made"):
            tv.patched_logits(engine, PROMPTS, vectors, 1, how=tv.add(0.01))
        setattr(server.faults, fault, 0)


def test_rows_without_an_answer_are_sent_again(fake: tuple[LensServer, Pair]) -> None:
    server, pair = fake
    engine = pair.engine(retries=2)
    server.faults.unanswered = 1
    assert tv.generate(engine, PROMPTS).texts == tv.generate(pair.local, PROMPTS).texts


def test_a_server_that_dies_in_a_run_is_an_error_and_the_run_resumes(
    fake: tuple[LensServer, Pair], expected: tv.Experiment, tmp_path: Path
) -> None:
    server, pair = fake
    finished = tmp_path / "run" / "task-upper.json"
    server.faults.is_down = finished.exists
    engine = pair.engine(retries=0)
    with pytest.raises(tv.EngineError, match="does not answer .*start it again and repeat the call"):
        tv.run_experiment(engine, TASKS, folder=tmp_path / "run", **SMALL)
    written = finished.stat().st_mtime_ns
    server.faults.is_down = lambda: False
    again = tv.run_experiment(engine, TASKS, folder=tmp_path / "run", **SMALL)
    assert [each.evaluation for each in again.results] == [each.evaluation for each in expected.results]
    assert finished.stat().st_mtime_ns == written


def test_servers_that_cannot_be_used_say_why(fake: tuple[LensServer, Pair], tmp_path: Path) -> None:
    server, pair = fake
    engine = pair.engine()
    server.faults.few_logprobs = True
    assert len(tv.generate(engine, PROMPTS)) == len(PROMPTS)  # which needs none
    with pytest.raises(tv.UnsupportedError, match=r"greater than max allowed: 20.*--max-logprobs -1"):
        tv.answer_logprobs(engine, PROMPTS)
    with pytest.raises(tv.TvLensError, match="prompt 0 has .* tokens, with 1 more to come, and the context .* is 127"):
        tv.generate(engine, [tv.Prompt((), "b " * 63)], max_new_tokens=2)
    server.faults.without_plugin = True
    with pytest.raises(tv.UnsupportedError, match="returns no activations; install vllm-lens"):
        pair.engine()
    server.faults.without_plugin = False
    with pytest.raises(tv.TvLensError, match="cannot load the configuration and tokenizer of .*pass model="):
        pair.engine(model=str(tmp_path))
    other = tmp_path / "other"
    make_twins("llama", hidden_size=64, vocab_size=320).plain.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(tv.EngineError, match="runs a model of width 128, and other has 64; pass model="):
        pair.engine(model=str(other))
    with pytest.raises(tv.TvLensError, match="runs no model called 'huge'; it runs tiny"):
        pair.engine(served_as="huge")
    with pytest.raises(tv.EngineError, match="does not answer"):
        tv.vllm_engine("http://127.0.0.1:9", retries=0)
    with pytest.raises(tv.TvLensError, match="in_flight is 0"):
        pair.engine(in_flight=0)


def test_what_a_server_cannot_do_is_refused_before_anything_runs(fake: tuple[LensServer, Pair]) -> None:
    server, pair = fake
    engine = pair.engine()
    server.bodies.clear()
    for capability in (Capability.GRADIENTS, Capability.LOGITS, Capability.READOUT, Capability.PROJECT):
        assert capability not in engine.capabilities
    vectors = tv.TaskVectors(torch.zeros(1, 4, 128), engine.name, "t")
    with pytest.raises(tv.UnsupportedError, match="its unembedding cannot be reached"):
        tv.top_tokens(engine, vectors, 1)
    with pytest.raises(tv.UnsupportedError, match="gives no access to heads; it has resid_post"):
        tv.read_heads(engine, PROMPTS)
    edits = tv.Edits.per_row(torch.zeros(2, 128), torch.tensor([0, 0]), position=-2)
    with pytest.raises(tv.TvLensError, match="row 1 has 1 tokens, so there is none at position -2"):
        engine.answers([[1, 2], [3]], edits, max_new_tokens=1, stops=[Stop(), Stop()])
    assert not server.bodies
    with pytest.raises(tv.UnsupportedError, match="cannot answer many rows in one call"):
        pair.local.answers([[1]], tv.Edits(), max_new_tokens=1, stops=[Stop()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_survive_the_wire(dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 3, 5).to(dtype)
    assert torch.equal(decode_tensor(serialized(tensor)), tensor)
    assert torch.equal(decode_tensor(encode_tensor(tensor)), tensor.float())
    with pytest.raises(tv.EngineError, match="in a form that is not known"):
        decode_tensor({"cloudpickle": "gASVAAAA"})
