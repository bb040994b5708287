"""Several vectors at the separators of a prompt, against plain Hugging Face hooks at the positions of characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Twins, ids_of, make_tokenizer, make_twins
from oracle import count_positions, refuse
from oracle_edits import PlainEdit, hooked_run, separators
from torch import Tensor

import tv_lens as tv
from tv_lens import SeparatorVectors, Usage, separator_vectors
from tv_lens.edits import RESID_POST
from tv_lens.evidence.controls import random_like
from tv_lens.methods.base import method_of
from tv_lens.methods.separators import read_separators

# Inputs of one to four tokens, so that rows are of unequal length.
TASK = tv.Task("upper", tuple(a * n for a in "bdfgjkmpqvxyz" for n in (1, 2, 3, 4)), str.upper)
PROMPTS = TASK.sample(4, shots=2, seed=0)
SUBSTITUTES = TASK.substitutes(PROMPTS, 2, seed=0)
ASKED = TASK.sample(3, shots=2, seed=5)
SPACED = tv.Template("Q: {input} -> {output}", separator="\n\n")
SMALL: dict[str, Any] = {"shots": 2, "n_dev": 5, "n_test": 4, "max_new_tokens": 1}


def plain_states(twins: Twins, prompt: tv.Prompt) -> Tensor:
    """The residual stream after every block at every separator, by plain Hugging Face: separator layer d_model."""
    ids, positions = separators(twins, prompt.text)
    seen, _ = hooked_run(twins, ids)
    return torch.stack([seen["resid_post", layer][0, positions] for layer in range(len(twins.blocks))], dim=1)


def plain_logits(twins: Twins, prompt: tv.Prompt, values: Tensor, layer: int, bos: bool | None = None) -> Tensor:
    """Next-token logits with a vector written over every separator."""
    ids, positions = separators(twins, prompt.text, bos)
    edits = [PlainEdit("resid_post", layer, at, value) for at, value in zip(positions, values[:, layer], strict=True)]
    return hooked_run(twins, ids, edits)[1][-1]


def noise(twins: Twins, n: int) -> tv.TaskVectors:
    """A random vector for each of `n` separators, at every layer."""
    values = torch.randn((n, len(twins.blocks), 32), generator=torch.Generator().manual_seed(0)) * 3
    usage = Usage(positions="separators", keep_demonstrations=True, per_position=True)
    return tv.TaskVectors(values, twins.bridge.cfg.model_name, "noise", usage=usage)


@pytest.mark.parametrize(
    ("name", "bos", "template"), [("gpt2", True, tv.PAPER), ("llama", False, SPACED), ("mistral", True, SPACED)]
)
def test_every_separator_gets_its_vector(name: str, bos: bool, template: tv.Template) -> None:
    """Rows of unequal length together, with a BOS and without, against one text at a time."""
    twins = make_twins(name, make_tokenizer(bos=bos))
    prompts = [replace(prompt, template=template) for prompt in ASKED]
    vectors = noise(twins, 3)
    actual = tv.patched_logits(twins.bridge, prompts, vectors, 1)
    for i, prompt in enumerate(prompts):
        expected = plain_logits(twins, prompt, vectors.values, 1)
        torch.testing.assert_close(actual[i], expected, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(
            tv.patched_logits(twins.bridge, [prompt], vectors, 1)[0], expected, atol=2e-4, rtol=1e-4
        )


def test_without_a_bos_in_front(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge, prepend_bos=False, batch_size=2)
    vectors = noise(llama, 3)
    actual = tv.patched_logits(engine, ASKED, vectors, 2)
    for i, prompt in enumerate(ASKED):
        torch.testing.assert_close(
            actual[i], plain_logits(llama, prompt, vectors.values, 2, bos=False), atol=2e-4, rtol=1e-4
        )


def test_prompts_are_dealt_out_to_separators(llama: Twins) -> None:
    """Four prompts for three separators: the first of them gets the mean of two."""
    vectors = separator_vectors(llama.bridge, PROMPTS, SUBSTITUTES)
    assert (vectors.values.shape, vectors.op, vectors.site) == ((3, 4, 32), "set", RESID_POST)
    read = [
        torch.stack([plain_states(llama, prompt.asking(query))[-1] for query in queries]).mean(dim=0)
        for prompt, queries in zip(PROMPTS, SUBSTITUTES, strict=True)
    ]
    expected = torch.stack([(read[0] + read[3]) / 2, read[1], read[2]])
    torch.testing.assert_close(vectors.values, expected, atol=1e-4, rtol=1e-4)
    assert vectors.prompts == tuple(prompt.text for prompt in PROMPTS)
    assert vectors.substitutes == tuple(map(tuple, SUBSTITUTES))
    logits = tv.patched_logits(llama.bridge, ASKED, vectors, 2)
    for i, prompt in enumerate(ASKED):
        torch.testing.assert_close(logits[i], plain_logits(llama, prompt, expected, 2), atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "k"), [("gpt2", 1), ("gpt2", 2), ("mamba", 1)])
def test_own_separators_are_read_from_their_prompts(name: str, k: int) -> None:
    """Also by a model without a cache."""
    twins = make_twins(name)
    prompts, substitutes = PROMPTS[:2], [queries[:k] for queries in SUBSTITUTES[:2]]
    vectors = separator_vectors(twins.bridge, prompts, substitutes, own=True)
    expected = torch.stack([
        torch.stack([plain_states(twins, prompt.asking(query)) for query in queries]).mean(dim=0)
        for prompt, queries in zip(prompts, substitutes, strict=True)
    ]).mean(dim=0)  # fmt: skip
    torch.testing.assert_close(vectors.values, expected, atol=1e-4, rtol=1e-4)


def test_own_separators_written_back_change_nothing(llama: Twins) -> None:
    [prompt], query = PROMPTS[:1], SUBSTITUTES[0][0]
    vectors = separator_vectors(llama.bridge, [prompt], [[query]], own=True)
    others = separator_vectors(llama.bridge, PROMPTS[1:2], SUBSTITUTES[1:2], own=True)
    [plain] = tv.patched_logits(llama.bridge, [prompt.asking(query)], 0 * vectors, 1, how=tv.add())
    ids, _ = separators(llama, prompt.asking(query).text)
    torch.testing.assert_close(plain, hooked_run(llama, ids)[1][-1], atol=1e-4, rtol=1e-4)
    for layer in (0, 2, 3):
        [patched] = tv.patched_logits(llama.bridge, [prompt.asking(query)], vectors, layer)
        torch.testing.assert_close(patched, plain, atol=1e-4, rtol=1e-4)
        [other] = tv.patched_logits(llama.bridge, [prompt.asking(query)], others, layer)
        assert (other - plain).abs().max() > 0.01


def test_all_separators_are_read_in_one_pass() -> None:
    """One-letter inputs make rows of equal length, so nothing is padded."""
    bridge = make_twins("llama").bridge
    task = tv.Task("letters", tuple("bcdfjkmpvy"), str.upper)
    prompts = task.sample(3, shots=4, seed=0)
    [length] = {ids_of(bridge, prompt.text).shape[1] for prompt in prompts}
    substitutes = task.substitutes(prompts, 1, seed=0)
    run = count_positions(bridge, lambda: separator_vectors(bridge, prompts, substitutes, own=True))
    assert run == 3 * length


def test_without_demonstrations_it_is_the_ordinary_patch(llama: Twins) -> None:
    queries = [prompt.zero_shot() for prompt in PROMPTS]
    vectors = separator_vectors(llama.bridge, queries, SUBSTITUTES)
    ordinary = tv.extract(llama.bridge, queries, SUBSTITUTES).mean()
    assert vectors.values.shape == (1, 4, 32)
    torch.testing.assert_close(vectors.values, ordinary.values)
    asked = [prompt.zero_shot() for prompt in ASKED]
    for layer in (0, 3):
        actual = tv.patched_logits(llama.bridge, asked, vectors, layer)
        torch.testing.assert_close(actual, tv.patched_logits(llama.bridge, asked, ordinary, layer))


def test_a_file_holds_how_they_are_written(llama: Twins, tmp_path: Path) -> None:
    vectors = SeparatorVectors(substitutes=1, own=True)(tv.LocalEngine(llama.bridge), TASK, PROMPTS, 3)
    vectors.mean().save(tmp_path / "v.safetensors")
    loaded = tv.TaskVectors.load(tmp_path / "v.safetensors")
    assert torch.equal(loaded.values, vectors.values)
    assert loaded.usage == Usage(positions="separators", keep_demonstrations=True, per_position=True)
    assert (loaded.provenance, loaded.task) == (vectors.provenance, "upper")
    assert method_of(loaded) == SeparatorVectors(substitutes=1, own=True)


def test_an_experiment_patches_few_shot_prompts(llama: Twins) -> None:
    actual = tv.run_experiment(llama.bridge, [TASK], methods=[SeparatorVectors(substitutes=1)], **SMALL)
    [result] = actual.results
    assert list(result.evaluation.controls) == ["random", "shuffled"]
    vectors, layer = actual.vectors["upper"], result.sweep.best
    assert vectors.values.shape == (3, 4, 32)
    _, test = TASK.split(5 / 9, seed=0)
    prompts = test.sample(4, shots=2, seed=0)
    assert tuple(prompt.text for prompt in prompts) == result.test_prompts
    for i, prompt in enumerate(prompts):
        first = llama.bridge.tokenizer.decode([int(plain_logits(llama, prompt, vectors.values, layer).argmax())])
        assert result.evaluation.patched.texts[i].startswith(prompt.template.cut(first))


def test_an_evaluation_has_its_controls(llama: Twins) -> None:
    vectors = separator_vectors(llama.bridge, PROMPTS, SUBSTITUTES)
    asked = TASK.sample(4, shots=2, seed=5)
    actual = tv.evaluate(llama.bridge, TASK, asked, vectors, 1, max_new_tokens=1)
    noise = random_like(vectors, 4, 0)
    assert noise.values.shape == (3, 4, 32)
    torch.testing.assert_close(noise.values.norm(dim=-1), vectors.values.norm(dim=-1))
    cosines = torch.nn.functional.cosine_similarity(noise.values[:, None], noise.values[None], dim=-1)
    assert cosines[~torch.eye(3, dtype=torch.bool)].abs().max() < 0.9  # a direction for each position
    mixed = tv.shuffle_outputs(asked, 0)
    shuffled = separator_vectors(llama.bridge, mixed, TASK.substitutes(mixed, 2, seed=0))
    for name, written in {"random": noise, "shuffled": shuffled}.items():
        texts = tv.patch_generate(llama.bridge, asked, written, 1, max_new_tokens=1)
        assert actual.controls[name].texts == tuple(texts)
    # Two prompts cannot give three separators their vectors.
    assert list(tv.evaluate(llama.bridge, TASK, asked[:2], vectors, 1, max_new_tokens=1).controls) == ["random"]


def test_another_number_of_separators_is_refused_before_the_model_runs(
    llama: Twins, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tv.LocalEngine(llama.bridge)
    vectors = separator_vectors(engine, PROMPTS, SUBSTITUTES)
    monkeypatch.setattr(tv.LocalEngine, "forward", refuse)
    three = TASK.sample(4, shots=3, seed=0)
    with pytest.raises(tv.TvLensError, match="are for 3 positions and prompt 0 has 4 for 'separators'"):
        tv.patched_logits(engine, three, vectors, 1)
    with pytest.raises(tv.TvLensError, match="are for 3 positions and prompt 0 has 1"):
        tv.patched_logits(engine, ASKED, vectors, 1, keep_demonstrations=False)
    mixed = [PROMPTS[0], three[0], three[1], three[2]]
    with pytest.raises(tv.TvLensError, match=r"prompts with \[2, 3\] demonstrations"):
        separator_vectors(engine, mixed, SUBSTITUTES)
    with pytest.raises(tv.TvLensError, match="2 prompts for 3 separators"):
        separator_vectors(engine, PROMPTS[:2], SUBSTITUTES[:2])
    for own in (False, True):
        with pytest.raises(tv.TvLensError, match="substitute .* is its query or one of its demonstrations"):
            separator_vectors(engine, PROMPTS, [[prompt.query] for prompt in PROMPTS], own=own)
    with pytest.raises(tv.TvLensError, match="prompt 1 has 1 separators and 3 are read; use prompts with 2"):
        read_separators(engine, [PROMPTS[0], PROMPTS[1].zero_shot()], RESID_POST, 3)
    no_separator: Sequence[tv.Prompt] = [replace(p, template=tv.Template("{input}{output}")) for p in PROMPTS]
    with pytest.raises(tv.TvLensError, match="prompt 0 has 0 tokens for positions='separators'"):
        separator_vectors(engine, no_separator, SUBSTITUTES, own=True)


def test_the_pages_on_several_vectors_run(llama: Twins) -> None:
    docs = Path(__file__).parents[1] / "docs"
    pages = ("methods/linear.md", "methods/separators.md", "methods/states.md", "several_vectors.md")
    text = "\n".join((docs / page).read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"^```python (\w+)\n(.*?)^```$", text, re.M | re.S)
    assert [name for name, _ in blocks] == ["linear", "separators", "states", "experiment"]
    known: dict[str, Any] = {"tv": tv, "model": tv.LocalEngine(llama.bridge, progress=False), "task": TASK}
    for _, code in blocks:
        code = re.sub(r"(sample\(|n_dev=|n_test=)\d+", r"\g<1>4", code)  # fewer prompts and tokens, to be quick
        exec(code.replace("n_dev=", "max_new_tokens=1, n_dev="), known)
