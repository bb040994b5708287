"""An experiment runs nothing twice: reads, prefixes and runs without vectors are shared by all methods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Twins, make_twins
from oracle import count_positions

import tv_lens as tv
from tv_lens.edits import RESID_POST
from tv_lens.engines import Wanted, sharing_reads
from tv_lens.evidence.controls import CONTROLS
from tv_lens.methods.base import Read
from tv_lens.methods.reading import read_together


def odd(prediction: str, answer: str) -> bool:
    """A rule by which a random model is sometimes right."""
    return len(prediction) % 2 == 1


WORDS = tv.Task("upper", tuple(f"{a}{b}" for a in "abcdefgh" for b in "uvwx"), str.upper, odd, category="letters")
OTHER = replace(WORDS, name="double", answer=lambda text: text * 2, category="words")
SMALL: dict[str, Any] = {"shots": 2, "n_dev": 4, "n_test": 5, "max_new_tokens": 1, "controls": ()}
SHARED: tuple[tv.Method, ...] = (tv.Extraction(substitutes=1), tv.MeanState(), tv.StateVectors(), tv.LinearVector())


def ids_of(engine: tv.LocalEngine, prompts: list[tv.Prompt]) -> list[list[int]]:
    return engine.text.encode([prompt.text for prompt in prompts])


def common(rows: list[list[int]]) -> int:
    """How many tokens the rows begin with in common, if each keeps at least one more."""
    n = 0
    while n < min(map(len, rows)) - 1 and len({row[n] for row in rows}) == 1:
        n += 1
    return n


def parts(task: tv.Task) -> tuple[tv.Task, list[tv.Prompt], list[tv.Prompt]]:
    dev, test = task.split(4 / 9, seed=0)
    return dev, dev.sample(4, shots=2, seed=0), test.sample(5, shots=2, seed=0)


def expected_positions(engine: tv.LocalEngine, n_methods: int) -> int:
    """By hand. Each dev prompt is read with its own query and with a substitute, and its query alone; then the queries
    are run up to their last token, which is run once for each method, and the test prompts few-shot and zero-shot.
    """
    dev, prompts, asked = parts(WORDS)
    total = 0
    for prompt, [substitute] in zip(prompts, dev.substitutes(prompts, 1, seed=0), strict=True):
        own, other, alone = ids_of(engine, [prompt, prompt.asking(substitute), prompt.zero_shot()])
        shared = common([own, other])
        total += shared + len(own) - shared + len(other) - shared + len(alone)
        total += len(alone) - 1 + n_methods
    for few_shot, alone in zip(ids_of(engine, asked), ids_of(engine, [p.zero_shot() for p in asked]), strict=True):
        total += len(few_shot) + len(alone) - 1 + 1 + n_methods
    return total


def test_methods_add_no_positions_but_their_own_patched_tokens() -> None:
    twins = make_twins("llama")
    engine = tv.LocalEngine(twins.bridge, batch_size=1)  # without pads
    actual = count_positions(
        twins.bridge, lambda: tv.run_experiment(engine, [WORDS], methods=SHARED, layers=[1], **SMALL)
    )
    assert actual == expected_positions(engine, len(SHARED))


def test_a_shuffled_control_is_read_once_for_all_methods() -> None:
    """Extraction and mean states of the same shuffled prompts: one more read of each, and two patched tokens more."""
    twins = make_twins("llama")
    engine = tv.LocalEngine(twins.bridge)
    options = {**SMALL, "controls": [tv.ShuffledDemonstrations()], "layers": [1]}

    def run(*methods: tv.Method) -> int:
        return count_positions(twins.bridge, lambda: tv.run_experiment(engine, [WORDS], methods=methods, **options))

    one, both = run(tv.MeanState()), run(tv.MeanState(), tv.StateVectors())
    # The second method patches 4 dev and 5 test queries, with its vector and with its control.
    assert both - one == 2 * (4 + 5)


def test_sharing_changes_no_result(llama: Twins) -> None:
    options = {**SMALL, "max_new_tokens": 3, "controls": CONTROLS}
    together = tv.run_experiment(llama.bridge, [WORDS, OTHER], methods=SHARED, **options)
    for method in SHARED:
        alone = tv.run_experiment(llama.bridge, [WORDS, OTHER], methods=[method], **options)
        for result in alone.results:
            [same] = [each for each in together.results if (each.task, each.method) == (result.task, method.name)]
            assert same.evaluation == result.evaluation
            assert same.sweep == result.sweep
            vectors = together.vectors[f"{result.task}, {method.name}"]
            assert torch.allclose(vectors.values, alone.vectors[result.task].values, atol=1e-5)


def test_reads_inside_and_outside_of_sharing_are_the_same(twins: Twins) -> None:
    engine = tv.LocalEngine(twins.bridge)
    prompts = [*WORDS.sample(3, shots=2, seed=0), *WORDS.sample(2, shots=1, seed=1)]
    substitutes = WORDS.substitutes(prompts, 2, seed=0)
    direct = tv.extract(engine, prompts, substitutes)
    with sharing_reads(engine):
        read_together(engine, [Read(prompt, RESID_POST) for prompt in prompts])
        shared = tv.extract(engine, prompts, substitutes)
        before = engine.positions_run
        again = tv.extract(engine, prompts, substitutes)
        assert engine.positions_run == before
    assert torch.allclose(shared.values, direct.values, atol=1e-5)
    assert torch.equal(again.values, shared.values)
    assert engine.shared_reads is None


def test_a_read_is_charged_to_every_method_that_uses_it(llama: Twins) -> None:
    """The positions of one method alone, whether or not another one has read the same prompts."""
    engine = tv.LocalEngine(llama.bridge)
    options = {**SMALL, "layers": [1]}
    both = tv.run_experiment(engine, [WORDS], methods=[tv.MeanState(), tv.StateVectors()], **options)
    _, prompts, _ = parts(WORDS)
    expected = sum(map(len, ids_of(engine, prompts)))
    for result in both.results:
        assert result.cost is not None
        assert result.cost.positions == pytest.approx(expected)
        assert result.cost.seconds > 0


def test_reads_are_dropped_when_a_method_fails(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge)
    with pytest.raises(RuntimeError, match="no luck"), sharing_reads(engine):
        raise RuntimeError("no luck")
    assert engine.shared_reads is None


def test_missing_reads_alone_are_run(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge)
    first, second = ids_of(engine, WORDS.sample(2, shots=1, seed=0))
    wanted = [Wanted(tuple(first), RESID_POST), Wanted(tuple(second), RESID_POST)]
    with sharing_reads(engine) as reads:
        reads.read(engine, [wanted[:1]])
        before = engine.positions_run
        reads.read(engine, [wanted])
        assert engine.positions_run - before == len(second)
        before = engine.positions_run
        reads.read(engine, [[replace(wanted[0], target=5)]])  # the logits are new
        assert engine.positions_run - before == len(first)
        known = reads.use([replace(wanted[0], target=5)])
    logits = llama.bridge(torch.tensor([first]), return_type="logits")[0, -1].detach()
    assert known.logprobs is not None
    assert known.logprobs.tolist() == pytest.approx([float(logits.log_softmax(dim=-1)[5])], abs=1e-4)
