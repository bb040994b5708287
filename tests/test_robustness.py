"""What users do to a model, and what models do to a batch: threads, global defaults, hooks, overflow, odd positions."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import CONFIGS, LENGTH_DEPENDENT, Twins, ids_of, make_tokenizer, make_twins, original
from oracle import plain_generate, plain_run, until_end
from passes import read_groups, read_texts
from test_no_trace import assert_same, state_of
from torch import Tensor

import tv_lens as tv
from tv_lens import Example, Prompt, Template

NEVER = Template("{input} -> {output}", separator="\n\n\n\n")
TASK = tv.Task("upper", ("a", "bb", "cold", "dog", "quick brown", "fox", "wet", "x"), str.upper)
PROMPTS = TASK.sample(5, shots=2, seed=0, template=NEVER)
SUBSTITUTES = TASK.substitutes(PROMPTS, 2, seed=0)


def vectors_for(model: Any, n: int = 5) -> tv.TaskVectors:
    values = torch.randn(n, model.cfg.n_layers, 32, generator=torch.Generator().manual_seed(3)) * 2
    return tv.TaskVectors(values, model.cfg.model_name, "t")


# Threads


def test_threads_take_turns() -> None:
    """24 jobs on one model, through one engine and through engines made separately; the model is left as it was."""
    twins = make_twins("gpt2")
    bridge, vectors = twins.bridge, vectors_for(twins.bridge)
    bridge(bridge.to_tokens("a"))
    original(bridge).train()
    shared = tv.LocalEngine(bridge, progress=False)
    jobs: list[Callable[[Any], Any]] = [
        lambda model: tv.extract(model, PROMPTS, SUBSTITUTES).values.tolist(),
        lambda model: tv.generate(model, PROMPTS, max_new_tokens=4).texts,
        lambda model: tv.generate(model, PROMPTS, max_new_tokens=4, sampler=tv.sample(seed=2)).texts,
        lambda model: tv.patch_generate(model, PROMPTS, vectors, 1, max_new_tokens=4).texts,
        lambda model: tv.patched_logits(model, PROMPTS, vectors, 2).tolist(),
        lambda model: tv.sweep_layers(model, TASK, PROMPTS, vectors, max_new_tokens=2).scores,
    ]
    expected = [job(bridge) for job in jobs]
    before = state_of(twins)
    start = threading.Barrier(8)

    def run(number: int) -> Any:
        if number < 8:
            start.wait()
        model = (shared, tv.LocalEngine(bridge, progress=False, batch_size=3), bridge)[number % 3]
        return jobs[number % len(jobs)](model)

    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("error")
        actual = list(pool.map(run, range(24)))
    for number, result in enumerate(actual):
        wanted = expected[number % len(jobs)]
        if isinstance(result, list):
            torch.testing.assert_close(torch.tensor(result), torch.tensor(wanted), atol=1e-5, rtol=0)
        else:
            assert result == wanted
    after = state_of(twins)
    for changing in ("random", "torch random"):  # other threads of the test run may draw
        before.pop(changing), after.pop(changing)
    assert_same(before, after)


def test_a_thread_that_fails_does_not_stop_the_others() -> None:
    bridge = make_twins("gpt2").bridge

    def fail(logits: Tensor, keys: Any) -> Tensor:
        raise RuntimeError("in the sampler")

    with pytest.raises(RuntimeError, match="in the sampler"):
        tv.generate(bridge, PROMPTS, sampler=fail)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(tv.generate, bridge, PROMPTS, max_new_tokens=1).result(timeout=60)


# Global defaults


@contextmanager
def default(kind: str) -> Iterator[None]:
    if kind == "meta":
        torch.set_default_device("meta")
    elif kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        return
    else:
        torch.set_default_dtype(getattr(torch, kind))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "meta", "autocast"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "falcon 40b"])
def test_results_do_not_depend_on_global_defaults(name: str, kind: str) -> None:
    """Bit for bit."""
    bridge = make_twins(name).bridge
    vectors = vectors_for(bridge)

    def everything() -> list[Tensor]:
        engine = tv.LocalEngine(bridge, progress=False)
        read = tv.extract(engine, PROMPTS, SUBSTITUTES, positions=[-1, -2]).values
        logits = tv.patched_logits(engine, PROMPTS, vectors, 1, how=tv.add(0.5))
        return [read, logits, tv.patch_generate(engine, PROMPTS, vectors, 1, max_new_tokens=2).tokens]

    expected = everything()
    with default(kind):
        actual = everything()
    for mine, wanted in zip(actual, expected, strict=True):
        assert (mine.dtype, mine.device) == (wanted.dtype, wanted.device)
        assert torch.equal(mine, wanted)


def test_controls_sampling_and_logprobs_do_not_depend_on_them_either(gpt2: Twins) -> None:
    vectors = vectors_for(gpt2.bridge, 1)

    def everything() -> list[Any]:
        drawn = tv.generate(gpt2.bridge, PROMPTS, max_new_tokens=3, sampler=tv.sample(seed=1))
        evaluation = tv.evaluate(gpt2.bridge, TASK, PROMPTS, vectors, 1, max_new_tokens=2)
        logprobs = tv.answer_logprobs(gpt2.bridge, PROMPTS, vectors=vectors, layer=1)
        distance = tv.divergence(gpt2.bridge, PROMPTS, vectors, 1)
        return [drawn.texts, evaluation, logprobs.tolist(), distance.tolist()]

    expected = everything()
    for kind in ("float64", "bfloat16", "autocast"):
        with default(kind):
            assert everything() == expected


# Overflow


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_token_is_chosen_from_nan(gpt2: Twins, value: float) -> None:
    """The second and the fifth prompt overflow, in batches of two."""
    engine = tv.LocalEngine(gpt2.bridge, batch_size=2, progress=False)
    broken = engine.text.encode([PROMPTS[i].text for i in (1, 4)])

    def overflow(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        for row, own in enumerate(ids.tolist()):
            if any(own[-len(each) :] == each for each in broken):
                output.logits[row] = value
        return output

    handle = original(gpt2.bridge).register_forward_hook(overflow, with_kwargs=True)
    try:
        for call in (
            lambda: tv.generate(engine, PROMPTS, max_new_tokens=2),
            lambda: tv.generate(engine, PROMPTS, max_new_tokens=2, sampler=tv.sample()),
            lambda: tv.score(TASK, PROMPTS, tv.generate(engine, PROMPTS)),
            lambda: tv.answer_logprobs(engine, PROMPTS),
        ):
            with pytest.raises(tv.EngineError, match=r"tiny-gpt2: the logits after prompt [14] are NaN or infinite"):
                call()
    finally:
        handle.remove()
    assert len(tv.generate(engine, PROMPTS, max_new_tokens=2)) == 5


# Positions that depend on the padded row

LONG = ("b " * 20 + "hot ->", "a b", "x y z " * 9, "the quick brown fox", "a " * 30, "b " * 17, "b " * 18, "b " * 19)


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_reads_beyond_the_length_are_those_of_single_rows(name: str) -> None:
    twins = make_twins(name)
    engine = tv.LocalEngine(twins.bridge, progress=False)
    expected = torch.stack([plain_run(twins, ids_of(twins.bridge, text))[0] for text in LONG])
    torch.testing.assert_close(read_texts(engine, LONG), expected, atol=1e-4, rtol=1e-4)
    # A short prefix with long rows after it.
    groups = [["b " * 15 + tail for tail in ("a", "b " * 10, "hot", "x y " * 12)], ["a b x", "a b y", "a b " * 14]]
    texts = [text for group in groups for text in group]
    expected = torch.stack([plain_run(twins, ids_of(twins.bridge, text))[0] for text in texts])
    torch.testing.assert_close(read_groups(engine, groups), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", LENGTH_DEPENDENT)
def test_answers_that_grow_beyond_the_length_are_those_of_the_whole_text(name: str) -> None:
    """Rows of 35 to 60 tokens get 6 more, plain and patched."""
    twins = make_twins(name)
    vectors = vectors_for(twins.bridge, 1)
    actual = tv.generate(twins.bridge, list(LONG), max_new_tokens=6).tokens
    patched = tv.patch_generate(twins.bridge, list(LONG), vectors, 1, max_new_tokens=6).tokens
    # A rule that cannot decide early, so that the answers are whole.
    task = replace(TASK, accepts=tv.Rule("whole answers", lambda prediction, answer: prediction == answer))
    swept = tv.sweep_layers(
        twins.bridge, task, [Prompt((), text, "A", NEVER) for text in LONG], vectors, max_new_tokens=3
    )
    for row, text in enumerate(LONG):
        ids = ids_of(twins.bridge, text)
        assert until_end(actual[row]) == until_end(torch.tensor(plain_generate(twins, ids, 6)))
        write = (1, ids.shape[1] - 1, vectors.values[0, 1])
        assert until_end(patched[row]) == until_end(torch.tensor(plain_generate(twins, ids, 6, write)))
        asked = ids_of(twins.bridge, Prompt((), text, template=NEVER).text)
        for layer in range(3):
            write = (layer, asked.shape[1] - 1, vectors.values[0, layer])
            chosen = until_end(torch.tensor(plain_generate(twins, asked, 3, write)))
            text = twins.bridge.tokenizer.decode(chosen, skip_special_tokens=True)
            assert swept.at(layer).texts[row] == NEVER.cut(text)


def test_a_model_that_counts_pads_is_detected_and_run_without_them() -> None:
    """Its configuration says nothing: a hook adds a value that depends on the position in the padded row."""
    twins = make_twins("llama")

    def count_pads(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        places = torch.arange(hidden.shape[1])[:, None] * torch.linspace(-1, 1, 32)
        changed = hidden + 0.2 * places
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    block = original(twins.bridge).model.layers[0]
    block.register_forward_pre_hook(count_pads, with_kwargs=True)
    twins.blocks[0].register_forward_pre_hook(count_pads, with_kwargs=True)
    texts = ("a", "hot -> cold", "the quick brown fox", "b")
    expected = torch.stack([plain_run(twins, ids_of(twins.bridge, text))[0] for text in texts])
    with pytest.warns(tv.TvLensWarning, match=r"padded to \d+ is off by .*% from the same row alone") as warned:
        actual, again = [read_texts(tv.LocalEngine(twins.bridge, progress=False), texts) for _ in range(2)]
    assert len(warned) == 1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


# The user's own hooks


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "mpt"])
def test_a_torch_hook_on_a_block_is_respected(name: str) -> None:
    """A read sees the hook's output, and a vector is written after the hook."""
    twins = make_twins(name)

    def double(module: Any, args: Any, output: Any) -> Any:
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    blocks = next(m for m in original(twins.bridge).modules() if isinstance(m, torch.nn.ModuleList))
    blocks[1].register_forward_hook(double)
    twins.blocks[1].register_forward_hook(double)
    texts = [prompt.text for prompt in PROMPTS]
    expected = torch.stack([plain_run(twins, ids_of(twins.bridge, text))[0] for text in texts])
    torch.testing.assert_close(read_texts(tv.LocalEngine(twins.bridge), texts), expected, atol=1e-4, rtol=1e-4)
    vectors = vectors_for(twins.bridge)
    for layer in (0, 1, 2):
        actual = tv.patched_logits(twins.bridge, PROMPTS, vectors, layer)
        for i, prompt in enumerate(PROMPTS):
            ids = ids_of(twins.bridge, prompt.zero_shot().text)
            wanted = plain_run(twins, ids, (layer, ids.shape[1] - 1, vectors.values[i, layer]))[1]
            torch.testing.assert_close(actual[i], wanted, atol=1e-4, rtol=1e-4)
    assert len(blocks[1]._forward_hooks) == 1


@pytest.mark.parametrize("kind", ["permanent", "context"])
def test_transformer_lenss_hooks_are_respected(kind: str) -> None:
    twins = make_twins("llama")

    def double(residual: Tensor, hook: Any) -> Tensor:
        return residual * 2

    def check() -> None:
        texts = [prompt.text for prompt in PROMPTS]
        twins.blocks[1].register_forward_hook(lambda module, args, output: output * 2)
        expected = torch.stack([plain_run(twins, ids_of(twins.bridge, text))[0] for text in texts])
        torch.testing.assert_close(read_texts(tv.LocalEngine(twins.bridge), texts), expected, atol=1e-4, rtol=1e-4)

    if kind == "permanent":
        twins.bridge.add_hook("blocks.1.hook_resid_post", double, is_permanent=True)
        check()
        return
    with twins.bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_post", double)]):
        check()


# Ends of an answer

SPECIAL = Template("{input} -> {output}", separator="<pad>")


def test_a_special_token_in_the_separator_ends_an_answer() -> None:
    """The tiny model is made to say: cold, then the separator's special token, then big."""
    twins = make_twins("gpt2", make_tokenizer(pad="<pad>"))
    tokenizer = twins.bridge.tokenizer
    cold, big = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" cold", "big"))
    said = [*cold, 2, *big]
    prompts = [Prompt((Example("hot", "cold"),), "big", template=SPECIAL)] * 2

    def scripted(logits: Tensor, keys: Any) -> Tensor:
        return torch.tensor([said[int(key.split(":")[0])] for key in keys])

    actual = tv.generate(twins.bridge, prompts, max_new_tokens=len(said), sampler=scripted)
    assert list(actual) == ["cold", "cold"]
    assert actual.tokens[0].tolist() == said[: said.index(2) + 1]
    mixed = Template("{input} -> {output}", separator="\n<pad>big")
    actual = tv.generate(twins.bridge, [Prompt((), "a", template=mixed)], max_new_tokens=len(said), sampler=scripted)
    assert list(actual) == ["cold"]


# What is remembered about a model


def test_engines_of_one_model_share_what_was_learned() -> None:
    """A bridge passed again and again does not run out of memory again and again."""
    bridge = make_twins("llama").bridge

    def full(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    handle = original(bridge).model.layers[2].register_forward_pre_hook(full)
    with pytest.warns(tv.TvLensWarning, match="no memory for 5 rows in a pass; continuing with fewer"):
        tv.generate(bridge, PROMPTS, max_new_tokens=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tv.generate(bridge, PROMPTS, max_new_tokens=1)
        tv.extract(tv.LocalEngine(bridge), PROMPTS, SUBSTITUTES)
    handle.remove()


def test_what_cannot_be_run_is_named() -> None:
    class PeftModelForCausalLM:
        pass

    with pytest.raises(TypeError, match="cannot run a PeftModelForCausalLM; merge its adapter .*merge_and_unload"):
        tv.engine_for(PeftModelForCausalLM())
