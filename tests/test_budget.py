"""A pass needs no more memory than its budget, whatever the vocabulary. Bytes are those that torch's allocator is asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from models import Twins, make_twins
from passes import tokens_of

import tv_lens as tv
from tv_lens.engines.memory import CPU_MEMORY, available_memory
from tv_lens.engines.planning import MAX_LOGITS, MAX_POSITIONS, Costs, Limits, plan_batches
from tv_lens.engines.running import Prefixes, is_out_of_memory
from tv_lens.measuring import measure

MB = 2**20
VOCABULARY = 2**18
TASK = tv.Task("upper", tuple("abcdefghijkl"), str.upper)
PROMPTS = TASK.sample(6, shots=2, seed=0)


@pytest.fixture(scope="module")
def wide() -> Twins:
    """A model whose logits for one row are 1 MB."""
    return make_twins("llama", vocab_size=VOCABULARY, num_hidden_layers=2)


@contextmanager
def allocations() -> Iterator[list[int]]:
    """The most bytes that were allocated at once since the beginning, as its only item afterwards."""
    highest: list[int] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield highest
    results: Any = profile.profiler.kineto_results
    events = sorted((each.start_ns(), each.nbytes()) for each in results.events() if each.name() == "[memory]")
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    highest.append(most)


def vectors_of(count: int = 1, n_layers: int = 2) -> tv.TaskVectors:
    values = torch.randn(count, n_layers, 32, generator=torch.Generator().manual_seed(0))
    return tv.TaskVectors(values, "tiny-llama", "upper")


def sweep(engine: tv.LocalEngine) -> tv.Sweep:
    return tv.sweep_layers(engine, TASK, PROMPTS, vectors_of(), max_new_tokens=2)


def test_a_sweep_over_a_large_vocabulary_stays_within_its_memory(wide: Twins) -> None:
    """12 rows need 12 MB for each copy of their logits."""
    small, ample = 10 * MB, 1000 * MB
    with allocations() as within:
        first = sweep(tv.LocalEngine(wide.bridge, memory=small, progress=False))
    with allocations() as beyond:
        second = sweep(tv.LocalEngine(wide.bridge, memory=ample, progress=False))
    assert within[0] <= small < beyond[0] <= ample
    assert first == second


@pytest.mark.parametrize("call", ["divergence", "top_tokens", "answer_logprobs", "measure", "sample"])
def test_whatever_looks_at_logits_stays_within_its_memory(wide: Twins, call: str) -> None:
    memory = 10 * MB
    engine = tv.LocalEngine(wide.bridge, memory=memory, progress=False)
    vectors = vectors_of(6)
    with allocations() as highest:
        if call == "divergence":
            tv.divergence(engine, PROMPTS, vectors, 1)
        elif call == "top_tokens":
            tv.top_tokens(engine, vectors, 1)
        elif call == "answer_logprobs":
            tv.answer_logprobs(engine, PROMPTS, vectors=vectors, layer=1)
        elif call == "measure":
            ids = engine.text.encode([prompt.text for prompt in PROMPTS], new_tokens=3)
            measure(engine, PROMPTS, ids, [tv.Edits()], 2)
        else:
            tv.generate(engine, PROMPTS, max_new_tokens=2, sampler=tv.sample(top_p=0.9))
    assert highest[0] <= memory


def test_logits_of_many_prompts_are_held_once(wide: Twins) -> None:
    """The result is all that may grow."""
    memory = 10 * MB
    engine = tv.LocalEngine(wide.bridge, memory=memory, progress=False)
    with allocations() as highest:
        logits = tv.patched_logits(engine, PROMPTS, vectors_of(), 1)
    assert highest[0] <= memory + logits.nbytes


def test_divergences_do_not_depend_on_the_memory(llama: Twins) -> None:
    vectors = vectors_of(6, n_layers=4)
    tiny = tv.LocalEngine(llama.bridge, memory=20_000, progress=False)
    assert tiny.limits.logit_rows() < 6
    expected = tv.divergence(tv.LocalEngine(llama.bridge, progress=False), PROMPTS, vectors, 1)
    torch.testing.assert_close(tv.divergence(tiny, PROMPTS, vectors, 1), expected)


def test_keys_and_values_are_counted_at_least_as_large_as_they_are(twins: Twins) -> None:
    engine = tv.LocalEngine(twins.bridge, progress=False)
    tokens = tokens_of(engine, ["hot -> cold", "a ->"])
    past = engine.forward(tokens, logits=False).past
    actual = sum(each.keys.nbytes + each.values.nbytes for each in past.layers)
    counted = engine.limits.costs.cache * tokens.ids.numel()
    assert actual <= counted <= 2 * actual


def test_a_row_costs_what_its_parts_cost() -> None:
    costs = Costs(cache=10, position=100, pair=7, logits=1000, row=3, n_blocks=4)
    assert costs.of_row(5) == 2 * 10 * 5 + 3 + 5 * (100 + 7 * 5) + 1000
    assert costs.of_row(5, run=2, n_logits=3, graph=True) == 2 * 10 * 5 + 3 + 4 * 2 * (100 + 7 * 5) + 2 * 3 * 1000
    assert Costs(logits=1000, picks_logits=False).of_row(5) == 5000


def test_rows_fit_into_three_quarters_of_the_memory() -> None:
    limits = Limits(memory=4000, costs=Costs(row=100), is_capped=False)
    assert limits.rows(10) == 30
    assert Limits(memory=4000, costs=Costs(cache=5), is_capped=False).rows(10, new_tokens=20) == 10
    assert Limits(memory=40, costs=Costs(row=100), is_capped=False).rows(10) == 1  # one row is always run
    assert Limits(memory=4000, costs=Costs(row=100), batch_size=99).rows(10) == 99  # the user's choice wins
    assert Limits(memory=4000, costs=Costs(row=1)).rows(1000) == MAX_POSITIONS // 1000  # the caps of a CPU
    assert Limits(memory=2**60, costs=Costs(row=1), is_capped=False).rows(1) == 2**60 * 3 // 4
    assert limits.graph_rows(10, run=1) == 30
    assert Limits(memory=4000, costs=Costs(logits=100), d_vocab=10).logit_rows() == 30
    assert Limits(d_vocab=2**20).logit_rows() == MAX_LOGITS // 2**20


def test_new_tokens_count_when_batches_are_planned() -> None:
    limits = Limits(memory=400, costs=Costs(cache=1), is_capped=False)
    rows = [[[1] * 10] for _ in range(30)]
    sizes = [len(batch.parts[0].rows) for batch in plan_batches(rows, limits, new_tokens=5)]
    assert sizes == [10, 10, 10]  # 300 bytes, 2 * 15 for each row


def test_kept_prefixes_take_a_quarter_of_the_memory(wide: Twins) -> None:
    limits = Limits(memory=4000, costs=Costs(cache=10))
    kept = Prefixes()
    tokens = tv.Tokens(torch.ones(1, 60, dtype=torch.long), torch.ones(1, 60, dtype=torch.long))
    assert limits.kept_positions() == 100
    assert kept.keep(((1,),), tokens, None, limits)
    assert not kept.keep(((2,),), tokens, None, limits)
    assert Limits().kept_positions() == MAX_POSITIONS


@pytest.mark.parametrize("memory", [0, -1, True, 1.5, "4GB"])
@pytest.mark.usefixtures("as_users_run_it")
def test_a_memory_that_is_not_a_number_of_bytes_is_an_error(llama: Twins, memory: Any) -> None:
    with pytest.raises(tv.TvLensError, match=r"memory is .*; give the bytes that a pass may use, such as 4 \* 2\*\*30"):
        tv.LocalEngine(llama.bridge, memory=memory)


def test_without_a_budget_a_gpu_gives_half_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has least of it; what torch keeps for itself counts as free."""
    free = {0: 8000, 1: 3000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 10_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 500)
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    assert available_memory(gpus) == 2000
    assert available_memory([gpus[0], torch.device("cpu")]) == 4500
    assert available_memory([torch.device("cpu"), torch.device("meta")]) == CPU_MEMORY


def test_every_allocator_says_in_its_way_that_memory_ran_out() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.int8)
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_cpu_without_memory_continues_with_fewer_rows() -> None:
    bridge = make_twins("llama").bridge
    expected = tv.generate(tv.LocalEngine(bridge, progress=False), PROMPTS, max_new_tokens=2).texts

    def full(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > 3:
            torch.empty(2**62, dtype=torch.int8)

    block: torch.nn.Module = bridge.original_model.get_submodule("model.layers.2")
    handle = block.register_forward_pre_hook(full)
    with pytest.warns(tv.TvLensWarning, match="no memory for 6 rows in a pass; continuing with fewer"):
        actual = tv.generate(tv.LocalEngine(bridge, progress=False), PROMPTS, max_new_tokens=2).texts
    handle.remove()
    assert actual == expected
