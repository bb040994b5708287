"""State vectors against plain Hugging Face hooks before the output projections of the layers 0 to m."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Twins, ids_of, make_twins
from oracle import refuse
from oracle_edits import PlainEdit, hooked_run, separators
from torch import Tensor

import tv_lens as tv
from tv_lens import StateVectors, Usage, state_vectors
from tv_lens.edits import HEADS
from tv_lens.methods.base import method_of

# Inputs of one to four tokens, so that rows are of unequal length.
TASK = tv.Task("upper", tuple(a * n for a in "bdfgjkmpqvxyz" for n in (1, 2, 3, 4)), str.upper)
PROMPTS = TASK.sample(3, shots=3, seed=0)
SMALL: dict[str, Any] = {"shots": 2, "n_dev": 4, "n_test": 3, "max_new_tokens": 1}


def plain_states(twins: Twins, prompt: tv.Prompt) -> Tensor:
    """The outputs of all heads at every separator, by plain Hugging Face: separator layer width."""
    ids, positions = separators(twins, prompt.text)
    seen, _ = hooked_run(twins, ids)
    layers = [layer for site, layer in seen if site == "heads"]
    return torch.stack([seen["heads", layer][0, positions] for layer in sorted(layers)], dim=1)


def plain_logits(twins: Twins, text: str, vector: Tensor | None = None, layers: tuple[int, ...] = ()) -> Tensor:
    """Next-token logits; `vector` (layer width) is written over the heads of all of `layers` at the last token."""
    ids = ids_of(twins.bridge, text)
    edits = []
    if vector is not None:
        edits = [PlainEdit("heads", layer, -1, each) for layer, each in zip(layers, vector, strict=True)]
    return hooked_run(twins, ids, edits)[1][-1]


# gpt2 has an output bias; the heads of this qwen3 are wider than d_model; lfm2 has heads in some layers only.
@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("gpt2", {}), ("qwen3", {"head_dim": 16}), ("lfm2", {})])
def test_states_are_read_and_written_as_plain_hooks_do(name: str, changes: dict[str, Any]) -> None:
    twins = make_twins(name, **changes)
    vectors = state_vectors(twins.bridge, PROMPTS)
    expected = torch.stack([plain_states(twins, prompt)[-1] for prompt in PROMPTS])
    torch.testing.assert_close(vectors.values, expected, atol=1e-4, rtol=1e-4)
    assert (vectors.op, vectors.site, vectors.n_heads, vectors.usage) == ("set", HEADS, 4, Usage(span="up to"))
    if name == "lfm2":
        assert vectors.layers == (1, 3)
    for i, m in enumerate(vectors.layers):
        own = tv.patched_logits(twins.bridge, PROMPTS, vectors, m, keep_demonstrations=True)
        into_queries = tv.patched_logits(twins.bridge, PROMPTS, vectors, m)
        for row, prompt in enumerate(PROMPTS):
            # A prompt's own state changes nothing.
            torch.testing.assert_close(own[row], plain_logits(twins, prompt.text), atol=2e-4, rtol=1e-3)
            query, written = prompt.zero_shot().text, vectors.layers[: i + 1]
            wanted = plain_logits(twins, query, expected[row, : i + 1], written)
            torch.testing.assert_close(into_queries[row], wanted, atol=5e-4, rtol=1e-3)
            assert (wanted - plain_logits(twins, query)).abs().max() > 0.01


def test_the_mean_and_the_momentum_are_those_by_hand(llama: Twins) -> None:
    """Four separators a prompt, the last three of them read."""
    states = [plain_states(llama, prompt)[-3:] for prompt in PROMPTS]
    expected: list[tuple[dict[str, Any], list[Tensor]]] = [
        ({"last": 3}, [(s[0] + s[1] + s[2]) / 3 for s in states]),
        ({"last": 3, "momentum": 0.5}, [s[2] + ((s[2] - s[1]) + 0.5 * (s[1] - s[0])) / 1.5 for s in states]),
        ({"last": 3, "momentum": 1.0}, [s[2] + (s[2] - s[0]) / 2 for s in states]),
        ({"last": 3, "momentum": 0.0}, [s[2] + (s[2] - s[1]) for s in states]),
        ({"last": 2, "momentum": 0.9}, [s[2] + (s[2] - s[1]) for s in states]),
    ]
    for options, by_hand in expected:
        vectors = state_vectors(llama.bridge, PROMPTS, **options)
        torch.testing.assert_close(vectors.values, torch.stack(by_hand), atol=1e-4, rtol=1e-4)
        assert vectors.options == {"momentum": None, **options}
    together = state_vectors(llama.bridge, PROMPTS, last=3, momentum=0.5)
    for i, prompt in enumerate(PROMPTS):
        alone = state_vectors(llama.bridge, [prompt], last=3, momentum=0.5)
        torch.testing.assert_close(alone.values[0], together.values[i], atol=1e-5, rtol=1e-4)


def test_an_experiment_chooses_how_many_layers(llama: Twins, tmp_path: Path) -> None:
    """The sweep is over m; the layers 0 to m are written to in each case."""
    methods = [StateVectors(last=3, momentum=0.5)]
    actual = tv.run_experiment(llama.bridge, [TASK], methods=methods, folder=tmp_path / "run", **SMALL)
    [result] = actual.results
    best = result.sweep.best
    assert result.sweep.layers == (0, 1, 2, 3)
    assert result.evaluation.layer == (tuple(range(best + 1)) if best else 0)
    assert list(result.evaluation.controls) == ["random", "shuffled"]
    vectors = actual.vectors["upper"]
    dev, _ = TASK.split(4 / 7, seed=0)
    prompts = dev.sample(4, shots=2, seed=0)
    for m, score in zip(result.sweep.layers, result.sweep.scores, strict=True):
        for i, prompt in enumerate(prompts):
            query, written = prompt.zero_shot().text, tuple(range(m + 1))
            logits = plain_logits(llama, query, vectors.values[0, : m + 1], written)
            text = llama.bridge.tokenizer.decode([int(logits.argmax())], skip_special_tokens=True)
            assert score.texts[i] == prompt.template.cut(text)
    evaluated = tv.evaluate(llama.bridge, TASK, PROMPTS, vectors, 2, max_new_tokens=1)
    assert evaluated.layer == (0, 1, 2)
    assert list(evaluated.controls) == ["random", "shuffled"]
    one_shot = TASK.sample(3, shots=1, seed=0)  # too few separators for the control
    assert list(tv.evaluate(llama.bridge, TASK, one_shot, vectors, 2, max_new_tokens=1).controls) == ["random"]


def test_a_file_holds_how_they_are_written(llama: Twins, tmp_path: Path) -> None:
    vectors = StateVectors(last=2, momentum=0.5)(tv.LocalEngine(llama.bridge), TASK, PROMPTS, 0)
    vectors.save(tmp_path / "v.safetensors")
    loaded = tv.TaskVectors.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.values, vectors.values)
    assert torch.equal(loaded.by_head, vectors.by_head)
    assert (loaded.usage, loaded.site, loaded.provenance) == (Usage(span="up to"), HEADS, vectors.provenance)
    assert method_of(loaded.mean()) == StateVectors(last=2, momentum=0.5)


def test_bad_input_is_refused_before_the_model_runs(llama: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    mamba = make_twins("mamba").bridge
    monkeypatch.setattr(tv.LocalEngine, "forward", refuse)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"last": 0}, "last is 0; use 1"),
        ({"last": 3, "momentum": 1.5}, "momentum is 1.5; use a number from 0 to 1"),
        ({"last": 3, "momentum": float("nan")}, "momentum is nan"),
        ({"last": 1, "momentum": 0.5}, "momentum needs the difference of two states"),
    ]
    for options, message in refused:
        with pytest.raises(tv.TvLensError, match=message):
            state_vectors(llama.bridge, PROMPTS, **options)
        with pytest.raises(tv.TvLensError, match=message):
            StateVectors(**options)
    with pytest.raises(tv.TvLensError, match="prompt 0 has 4 separators and 5 are read; use prompts with 4"):
        state_vectors(llama.bridge, PROMPTS, last=5)
    with pytest.raises(tv.UnsupportedError, match="tiny-mamba gives no access to heads"):
        state_vectors(mamba, PROMPTS)
