"""Memory depends on the batch and the result, not on the number of prompts, and is freed after each call.

Tensors are counted as Python's garbage collector sees them while the model runs, each storage once; other objects as
tracemalloc does.
"""

from __future__ import annotations

import gc
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import Twins, make_twins, original

import tv_lens as tv

WORDS = [f"w{i}" for i in range(2100)]
TASK = tv.Task("upper", tuple(WORDS), str.upper)
MB = 2**20


def live() -> dict[int, int]:
    """Bytes of each storage that any Python object holds."""
    actual: dict[int, int] = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor):
            actual[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return actual


@contextmanager
def peak(twins: Twins) -> Iterator[list[int]]:
    """Bytes alive at the last block of every pass, of tensors made since."""
    seen: list[int] = []
    last = original(twins.bridge).model.layers[-1]
    handle = last.register_forward_hook(lambda module, args, output: seen.append(sum(live().values())))
    gc.collect()
    gc.freeze()  # so that the collector lists only new objects
    try:
        yield seen
    finally:
        gc.unfreeze()
        handle.remove()


@pytest.fixture(scope="module")
def llama() -> Twins:
    return make_twins("llama")


def engine_of(twins: Twins) -> tv.LocalEngine:
    # As many rows for few prompts as for many, so that only what is kept from pass to pass can differ.
    return tv.LocalEngine(twins.bridge, batch_size=50, progress=False)


PROMPTS = TASK.sample(2000, shots=3, seed=0)
SUBSTITUTES = TASK.substitutes(PROMPTS, 1, seed=0)
ONE = tv.TaskVectors(torch.ones(1, 4, 32), "tiny-llama", "t")

CALLS: dict[str, Callable[[Any, int], Any]] = {
    "extract": lambda model, n: tv.extract(model, PROMPTS[:n], SUBSTITUTES[:n]),
    "extract_across": lambda model, n: tv.extract_across(model, PROMPTS[:n]),
    "generate": lambda model, n: tv.generate(model, PROMPTS[:n], max_new_tokens=2),
    "patch_generate": lambda model, n: tv.patch_generate(model, PROMPTS[:n], ONE, 2, max_new_tokens=2),
    "patched_logits": lambda model, n: tv.patched_logits(model, PROMPTS[:n], ONE, 2),
    "sweep_layers": lambda model, n: tv.sweep_layers(model, TASK, PROMPTS[:n], ONE, [1, 2], max_new_tokens=1),
}


def bound(n: int) -> int:
    """What may grow: ids and mask of up to 30 positions, and twice the larger result (reads or logits)."""
    return n * (2 * 30 * 8 + 2 * 4 * max(4 * 32, 300) + 4 * 32 * 4)


@pytest.mark.parametrize("call", CALLS)
def test_ten_times_the_prompts_hold_no_more_than_their_result(llama: Twins, call: str) -> None:
    peaks = []
    for n in (200, 2000):
        with peak(llama) as seen:
            CALLS[call](engine_of(llama), n)
        peaks.append(max(seen))
    assert peaks[1] - peaks[0] <= bound(1800)


class Hoarder(tv.LocalEngine):
    """An engine that keeps every cache."""

    kept: ClassVar[list[Any]] = []

    def forward(self, *args: Any, **options: Any) -> Any:
        made = super().forward(*args, **{**options, "keep_past": True})
        self.kept.append(self.fork(made.past))
        return made


def test_the_measure_sees_a_cache_that_is_kept(llama: Twins) -> None:
    """Otherwise the test above could not fail."""
    hoarder = Hoarder(llama.bridge, batch_size=50, progress=False)
    with peak(llama) as seen:
        tv.generate(hoarder, PROMPTS[:500], max_new_tokens=1)
    assert len(hoarder.kept) == 10
    assert max(seen) > bound(500)


@pytest.mark.parametrize("call", ["extract", "extract_across", "patch_generate"])
def test_python_objects_do_not_grow_quadratically_either(llama: Twins, call: str) -> None:
    """Two thousand lists of two thousand numbers would be 150 MB."""
    tracemalloc.start()
    try:
        CALLS[call](engine_of(llama), 2000)
        highest = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert highest < 30 * MB


def hooks_of(twins: Twins) -> int:
    modules = [*twins.bridge.modules(), *original(twins.bridge).modules()]
    torch_hooks = sum(
        len(hooks)
        for module in modules
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    )
    return torch_hooks + sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in twins.bridge.hook_dict.values())


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_repeated_calls_leave_nothing_behind(llama: Twins) -> None:
    """Two hundred rounds, a raising call in each."""
    task = tv.Task("upper", tuple(WORDS[:10]), str.upper)
    prompts = task.sample(3, shots=2, seed=0)
    substitutes = task.substitutes(prompts, 2, seed=0)

    def fail(logits: torch.Tensor, keys: Any) -> torch.Tensor:
        raise RuntimeError("in the middle")

    def go_round() -> None:
        vectors = tv.extract(llama.bridge, prompts, substitutes)
        tv.patch_generate(llama.bridge, prompts, vectors, 2, max_new_tokens=2)
        tv.sweep_layers(llama.bridge, task, prompts, vectors, [0, 3], max_new_tokens=1)
        with pytest.raises(RuntimeError, match="in the middle"):
            tv.generate(llama.bridge, prompts, sampler=fail)

    def counted() -> tuple[int, int, int]:
        gc.collect()
        return hooks_of(llama), len(live()), sum(live().values())

    for _ in range(50):
        go_round()
    before, linux = counted(), sys.platform == "linux"
    held = resident() if linux else 0
    for _ in range(150):
        go_round()
    assert counted() == before
    if linux:
        assert resident() - held < 16 * MB
