"""Every architecture, the same laws, on tiny random models; the README's table of models is made from here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from models import CONFIGS, Twins, ids_of, make_twins
from oracle import plain_generate, plain_run, until_end
from passes import read_texts, tokens_of

import tv_lens as tv
from tv_lens.engines import Replay

# Rows of different lengths, one of a single letter; no separator ends them.
QUERIES = ("big", "a", "the quick brown fox")
PROMPTS = [tv.Prompt((), query, template=tv.Template("{input} -> {output}", separator="\n\n\n\n")) for query in QUERIES]

LAWS = ("read", "patch", "padding", "tokens", "sweep")
# What TransformerLens itself does not run as Hugging Face does, whoever asks: laws that fail, and why.
FAILURES = {
    "falcon 40b": (LAWS, "transformer-lens 4.3.0 cannot boot `new_decoder_architecture` with `multi_query`"),
    "falcon alibi": (
        ("read", "patch", "tokens", "sweep"),
        "the logits of transformer-lens 4.3.0 are not those of Hugging Face (off by 0.08 on the tiny model)",
    ),
}
WHOLE_ROWS = ("mamba", "mamba2", "rwkv")  # no KV cache: run whole for each token


def law(check: Callable[[str], None]) -> Callable[[str], None]:
    """A test of every architecture; of those in `FAILURES` it must fail."""
    broken = {
        name: pytest.mark.xfail(reason=reason, strict=True)
        for name, (laws, reason) in FAILURES.items()
        if check.__name__.removeprefix("test_") in laws
    }
    names = [pytest.param(name, marks=broken.get(name, ())) for name in CONFIGS]
    parametrized: Callable[[str], None] = pytest.mark.parametrize("name", names)(check)
    return parametrized


def table() -> str:
    """The README's table of models: which laws hold for which."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in CONFIGS:
        broken, reason = FAILURES.get(name, ((), "each token runs the whole row" if name in WHOLE_ROWS else ""))
        groups[(*("no" if law in broken else "yes" for law in LAWS), reason)].append(name)
    head = ["| models | read | patch | padding | several tokens | sweep | |", "|---|---|---|---|---|---|---|"]
    return "\n".join(head + [f"| {', '.join(sorted(names))} | {' | '.join(row)} |" for row, names in groups.items()])


def test_the_page_on_models_has_this_table() -> None:
    assert table() in (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")


@cache
def twins_of(name: str) -> Twins:
    return make_twins(name)


def vectors_for(twins: Twins) -> tv.TaskVectors:
    shape = (len(PROMPTS), twins.bridge.cfg.n_layers, twins.bridge.cfg.d_model)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 3
    return tv.TaskVectors(values, twins.bridge.cfg.model_name, "t")


def read_all(engine: tv.Engine) -> torch.Tensor:
    return read_texts(engine, [prompt.text for prompt in PROMPTS])


def writes(twins: Twins, vectors: tv.TaskVectors, layers: list[int]) -> list[tuple[torch.Tensor, tuple]]:  # type: ignore[type-arg]
    """Each prompt's ids and the plain hook's write: layer, position, vector."""
    ids = [ids_of(twins.bridge, prompt.text) for prompt in PROMPTS]
    return [
        (row, (layer, row.shape[1] - 1, vectors.values[i, layer]))
        for i, (row, layer) in enumerate(zip(ids, layers, strict=True))
    ]


@law
def test_read(name: str) -> None:
    """The output of every block at the last position is what a plain forward hook sees."""
    twins = twins_of(name)
    expected = torch.stack([plain_run(twins, ids_of(twins.bridge, prompt.text))[0] for prompt in PROMPTS])
    torch.testing.assert_close(read_all(tv.LocalEngine(twins.bridge)), expected, atol=1e-4, rtol=0)


@law
def test_patch(name: str) -> None:
    """A patched row is a plain forward hook that overwrites."""
    twins, layers = twins_of(name), [2, 0, 1]
    vectors = vectors_for(twins)
    actual = tv.patched_logits(twins.bridge, PROMPTS, vectors, layers)
    for i, (ids, write) in enumerate(writes(twins, vectors, layers)):
        torch.testing.assert_close(actual[i], plain_run(twins, ids, write)[1], atol=1e-4, rtol=0)
        assert (actual[i] - plain_run(twins, ids)[1]).abs().max() > 0.05  # the patch did something


@law
def test_padding(name: str) -> None:
    """A row among longer ones gives what it gives alone."""
    twins = twins_of(name)
    vectors, alone = vectors_for(twins), tv.LocalEngine(twins.bridge, batch_size=1)
    torch.testing.assert_close(read_all(tv.LocalEngine(twins.bridge)), read_all(alone), atol=1e-4, rtol=0)
    together, each = (tv.patched_logits(model, PROMPTS, vectors, 1) for model in (twins.bridge, alone))
    torch.testing.assert_close(together, each, atol=1e-4, rtol=0)


@law
def test_tokens(name: str) -> None:
    """Several patched tokens are those of the whole text run again, with the hook at the same absolute position."""
    twins = twins_of(name)
    vectors, engine = vectors_for(twins), tv.LocalEngine(twins.bridge)
    past = engine.forward(tokens_of(engine, [PROMPTS[0].text])).past
    assert isinstance(past, Replay) == (name in WHOLE_ROWS)
    actual = tv.patch_generate(engine, PROMPTS, vectors, 1, max_new_tokens=3).tokens
    for i, (ids, write) in enumerate(writes(twins, vectors, [1] * 3)):
        assert until_end(actual[i]) == until_end(torch.tensor(plain_generate(twins, ids, 3, write)))


@law
def test_sweep(name: str) -> None:
    """A sweep answers at each layer as a plain hook at that layer does."""
    twins, prompts = twins_of(name), PROMPTS[1:]
    # A rule that cannot decide early, so that the answers are whole.
    whole = tv.Rule("whole answers", lambda prediction, answer: prediction == answer)
    vectors, task = vectors_for(twins), tv.Task("t", QUERIES, str.upper, whole)
    own = replace(vectors, values=vectors.values[1:])
    swept = tv.sweep_layers(twins.bridge, task, prompts, own, max_new_tokens=2)
    assert swept.layers == tuple(range(twins.bridge.cfg.n_layers))
    for layer, score in zip(swept.layers, swept.scores, strict=True):
        for i, (ids, write) in enumerate(writes(twins, vectors, [layer] * 3)[1:]):
            plain = until_end(torch.tensor(plain_generate(twins, ids, 2, write)))
            text = twins.bridge.tokenizer.decode(plain, skip_special_tokens=True)
            assert score.texts[i] == prompts[i].template.cut(text)
