"""The engine's laws: it reads and writes what a plain forward hook does, and a batch is nothing but its rows."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import (
    TEXTS,
    Twins,
    count_positions,
    ids_of,
    make_tokenizer,
    make_twins,
    plain_generate,
    plain_run,
    refuse,
)
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv


def whole(engine: tv.LocalEngine, texts: tuple[str, ...] = TEXTS) -> list[tuple[list[int], tv.Tokens]]:
    return [(list(tokens.rows), tokens) for tokens in engine.batches(texts)]


def reads(engine: tv.LocalEngine, texts: tuple[str, ...] = TEXTS) -> Tensor:
    found = torch.empty(len(texts), engine.n_layers, engine.d_model)
    for rows, tokens in whole(engine, texts):
        found[rows] = engine.read(tokens)
    return found


def logits(engine: tv.LocalEngine, texts: tuple[str, ...] = TEXTS, patch: tv.Patch | None = None) -> Tensor:
    found = torch.empty(len(texts), engine.bridge.cfg.d_vocab)
    for rows, tokens in whole(engine, texts):
        found[rows] = engine.step(tokens, patch and patch.keep(rows))[0]
    return found


def test_reads_are_those_of_plain_forward_hooks(twins: Twins) -> None:
    expected = torch.stack([plain_run(twins, ids_of(twins.bridge, text))[0] for text in TEXTS])
    torch.testing.assert_close(reads(tv.LocalEngine(twins.bridge)), expected, atol=1e-4, rtol=0)


def test_a_patched_row_is_a_plain_hook_that_overwrites(twins: Twins) -> None:
    engine = tv.LocalEngine(twins.bridge)
    vectors = torch.randn(len(TEXTS), engine.d_model, generator=torch.Generator().manual_seed(1)) * 3
    layers = torch.tensor([0, 3, 1, 3])
    found = logits(engine, patch=tv.Patch(vectors, layers))
    for row, text in enumerate(TEXTS):
        ids = ids_of(twins.bridge, text)
        write = (int(layers[row]), ids.shape[1] - 1, vectors[row])
        torch.testing.assert_close(found[row], plain_run(twins, ids, write)[1], atol=1e-4, rtol=0)
        assert (found[row] - plain_run(twins, ids)[1]).abs().max() > 0.05  # the patch did something


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_writing_back_what_was_read_changes_nothing(twins: Twins, layer: int) -> None:
    engine = tv.LocalEngine(twins.bridge)
    patch = tv.Patch(reads(engine)[:, layer], torch.full((len(TEXTS),), layer))
    torch.testing.assert_close(logits(engine, patch=patch), logits(engine), atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_do_not_hang_on_the_batch(twins: Twins, batch_size: int) -> None:
    engine, other = tv.LocalEngine(twins.bridge), tv.LocalEngine(twins.bridge, batch_size=batch_size)
    assert max(len(tokens.ids) for _, tokens in whole(engine)) == len(TEXTS)
    assert max(len(tokens.ids) for _, tokens in whole(other)) == batch_size
    torch.testing.assert_close(reads(other), reads(engine), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(other), logits(engine), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("bos", "pad", "side"),
    [(True, "<pad>", "right"), (True, "<pad>", "left"), (True, "</s>", "right"), (True, None, "right")]
    + [(False, "<pad>", "right"), (False, "</s>", "right"), (False, None, "left")],
)
def test_the_tokenizers_own_padding_has_no_say(architecture: str, bos: bool, pad: str | None, side: str) -> None:
    tokenizer = make_tokenizer(bos, pad, side)
    twins = make_twins(architecture, tokenizer)
    for prepend_bos in (None, False):
        engine = tv.LocalEngine(twins.bridge, prepend_bos=prepend_bos)
        oracle = [plain_run(twins, ids_of(twins.bridge, text, prepend_bos)) for text in TEXTS]
        torch.testing.assert_close(reads(engine), torch.stack([each[0] for each in oracle]), atol=1e-4, rtol=0)
        torch.testing.assert_close(logits(engine), torch.stack([each[1] for each in oracle]), atol=1e-4, rtol=0)
        prompts = [tv.Prompt((), text, template=tv.Template("{input}{output}", "\n\n\n")) for text in TEXTS]
        found = tv.generate(engine, prompts, max_new_tokens=3)
        for text, ids in zip(TEXTS, found.tokens.tolist(), strict=True):
            expected = plain_generate(twins, ids_of(twins.bridge, text, prepend_bos), 3)
            assert ids == expected or (
                1 in expected and ids[: expected.index(1) + 1] == expected[: expected.index(1) + 1]
            )


def test_a_patch_does_not_write_into_the_models_own_tensor() -> None:
    bridge = make_twins("llama").bridge
    seen: list[Tensor] = []
    bridge.add_hook("blocks.1.hook_resid_post", lambda residual, hook: seen.append(residual))
    logits(tv.LocalEngine(bridge), patch=tv.Patch(torch.full((4, 32), 7.0), torch.ones(4, dtype=torch.long)))
    assert not (seen[0][:, -1] == 7.0).any()


def test_bos_is_prepended_once_or_not_at_all() -> None:
    bridge = make_twins("llama").bridge
    for prepend_bos, text, count in ((None, "a", 1), (True, "a", 1), (False, "a", 0), (True, "<s>a", 1)):
        [tokens] = tv.LocalEngine(bridge, prepend_bos=prepend_bos).batches([text])
        assert tokens.ids[0].tolist().count(0) == count
    bridge = make_twins("gpt_neox", make_tokenizer(bos=False, pad=None)).bridge
    bridge.tokenizer.bos_token = None  # TransformerLens had put the end of text there
    with pytest.raises(ValueError, match="prepend_bos=True, but the tokenizer of tiny-gpt_neox has no BOS"):
        tv.LocalEngine(bridge, prepend_bos=True)


@pytest.mark.parametrize("layer", [0, 3])
def test_shared_prefix_equals_a_fresh_run(twins: Twins, layer: int) -> None:
    """Tails of unequal length, one group that begins alike in nothing, and more rows than fit one pass."""
    shots = "hot -> cold\nbig -> small\n"
    groups = [
        [shots + "wet ->", shots + "a quick brown fox ->", shots + "tall ->"],
        ["hot -> cold\na ->", "hot -> cold\nb ->", "hot -> cold\nthe fox ->"],
        ["x", "a ->", "the quick ->"],
    ]
    texts = [text for group in groups for text in group]
    vectors = torch.randn(len(texts), twins.bridge.cfg.d_model, generator=torch.Generator().manual_seed(2))
    patch = tv.Patch(vectors, torch.full((len(texts),), layer))
    for prepend_bos, batch_size in ((None, None), (False, 4)):
        engine = tv.LocalEngine(twins.bridge, prepend_bos=prepend_bos, batch_size=batch_size)
        shortest = min(tokens.ids.shape[1] for tokens, _ in engine.shared(groups))
        seen = []
        for tokens, past in engine.shared(groups):
            rows, again = tokens.rows, engine.fork(past)
            found, written = engine.read(tokens, past), engine.step(tokens, patch.keep(rows), again)[0]
            for place, row in enumerate(rows):
                ids = ids_of(twins.bridge, texts[row], prepend_bos)
                torch.testing.assert_close(found[place], plain_run(twins, ids)[0], atol=1e-4, rtol=0)
                write = (layer, ids.shape[1] - 1, vectors[row])
                torch.testing.assert_close(written[place], plain_run(twins, ids, write)[1], atol=1e-4, rtol=0)
            seen += rows
        assert sorted(seen) == list(range(len(texts)))
    if twins.bridge.cfg.architecture == "LlamaForCausalLM":
        assert shortest < ids_of(twins.bridge, texts[0]).shape[1]  # something was shared at all


def test_pads_in_the_middle_may_not_pass_the_context(twins: Twins) -> None:
    """Each row fits into the context of 128, the longest prefix and the longest tail together do not."""
    engine = tv.LocalEngine(twins.bridge, prepend_bos=False)
    groups = [["x " * 25 + "a " * 20, "x " * 25 + "b"], ["y " * 48 + "a", "y " * 48 + "b c"]]
    texts = [text for group in groups for text in group]
    for tokens, past in engine.shared(groups):
        found = engine.read(tokens, past)
        for place, row in enumerate(tokens.rows):
            expected = plain_run(twins, ids_of(twins.bridge, texts[row], False))[0]
            torch.testing.assert_close(found[place], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("substitutes", [2, 4])
def test_a_shared_prefix_is_run_once(substitutes: int) -> None:
    """P prompts of prefix n and k tails of t tokens cost P * (n + k * t) positions: here lengths are equal."""
    bridge = make_twins("llama").bridge
    engine = tv.LocalEngine(bridge)
    tails = ["a", "b", "c", "d"][:substitutes]
    groups = [[f"{first} -> cold\n{tail} ->" for tail in tails] for first in ("x", "y", "z")]
    n_whole = ids_of(bridge, groups[0][0]).shape[1]
    tail = ids_of(bridge, "a ->", prepend_bos=False).shape[1]
    run = count_positions(bridge, lambda: [engine.read(t, past) for t, past in engine.shared(groups)])
    assert run == 3 * ((n_whole - tail) + substitutes * tail)


def test_a_fork_leaves_the_past_as_it_was(twins: Twins) -> None:
    engine = tv.LocalEngine(twins.bridge)
    [(_, tokens)] = whole(engine)
    _, past = engine.step(tokens)
    chosen = torch.tensor([5, 6, 7, 8])
    widened = engine.fork(past, 2)
    engine.step(tokens.then(chosen), past=engine.fork(past))
    first, _ = engine.step(tokens.then(chosen), past=past)
    wide = tv.Tokens(tokens.ids.repeat_interleave(2, 0), tokens.mask.repeat_interleave(2, 0))
    both, _ = engine.step(wide.then(chosen.repeat_interleave(2)), past=widened)
    torch.testing.assert_close(both, first.repeat_interleave(2, 0), atol=1e-5, rtol=0)


def test_no_logits_that_nobody_reads() -> None:
    twins = make_twins("llama")
    engine = tv.LocalEngine(twins.bridge)
    shapes = []
    head = twins.bridge.original_model.lm_head
    handle = head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    [(_, tokens)] = whole(engine)
    engine.read(tokens)
    engine.step(tokens)
    handle.remove()
    assert shapes == [(4, 0, 300), (4, 1, 300)]


def test_a_half_precision_model_gives_float32() -> None:
    twins = make_twins("llama")
    twins.bridge.original_model.to(torch.float16)
    engine = tv.LocalEngine(twins.bridge)
    patch = tv.Patch(torch.ones(4, 32), torch.tensor([0, 1, 2, 3]))
    assert reads(engine).dtype == logits(engine, patch=patch).dtype == torch.float32


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "at least one text"),
        ("hot ->", "a list of at least one text"),
        (["a", ""], "prompt 1 is '', which has no tokens"),
        (["a", "b " * 100], "prompt 1 has [0-9]+ tokens and the context of tiny-gpt_neox is 128: 'b b"),
    ],
)
def test_bad_texts_are_refused_before_the_model_runs(texts: list[str], message: str) -> None:
    bridge = make_twins("gpt_neox", make_tokenizer(bos=False)).bridge
    engine = tv.LocalEngine(bridge)
    bridge.original_model.register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=message):
        engine.batches(texts)


def test_what_is_no_decoder_only_language_model_is_refused(as_users_run_it: None) -> None:
    config = transformers.T5Config(
        vocab_size=300, d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    model.config.architectures = ["T5ForConditionalGeneration"]
    bridge = TransformerBridge.boot_transformers("tiny-t5", hf_model=model, tokenizer=make_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="tiny-t5 is not a decoder-only language model"):
        tv.engine_for(bridge)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    encoder = transformers.BertForMaskedLM(config)
    encoder.config.architectures = ["BertForMaskedLM"]
    bridge = TransformerBridge.boot_transformers(
        "tiny-bert", hf_model=encoder, tokenizer=make_tokenizer(), device="cpu"
    )
    with pytest.raises(ValueError, match="tiny-bert is not a decoder-only language model"):
        tv.engine_for(bridge)
    plain = make_twins("gpt2").plain
    with pytest.raises(TypeError, match="cannot run a GPT2LMHeadModel; pass a TransformerBridge.*hf_model="):
        tv.engine_for(plain)
    with pytest.raises(TypeError, match="LocalEngine runs a TransformerBridge"):
        tv.LocalEngine(plain)
    with pytest.raises(ValueError, match="batch_size is 0"):
        tv.LocalEngine(make_twins("gpt2").bridge, batch_size=0)


def test_an_engine_of_ones_own_is_taken_as_it_is() -> None:
    engine = tv.LocalEngine(make_twins("gpt2").bridge)
    assert tv.engine_for(engine) is engine
    assert isinstance(engine, tv.Engine)


def test_a_past_without_copies_is_still_independent() -> None:
    engine = tv.LocalEngine(make_twins("gpt2").bridge)
    [(_, tokens)] = whole(engine)
    _, past = engine.step(tokens)
    before = copy.deepcopy(past)
    engine.step(tokens.then(torch.tensor([5, 6, 7, 8])), past=engine.fork(past))
    assert torch.equal(past.layers[0].keys, before.layers[0].keys)


def test_a_recurrent_model_goes_on_from_whole_rows() -> None:
    """Rows of unequal length, patched at their second last position, forked and one left out: a plain hook there."""
    twins = make_twins("mamba")
    engine = tv.LocalEngine(twins.bridge)
    [(rows, tokens)] = whole(engine)
    vectors = torch.randn(4, engine.d_model, generator=torch.Generator().manual_seed(5)) * 3
    _, past = engine.step(tokens, tv.Patch(vectors, torch.tensor([0, 1, 2, 0])))
    wide = engine.fork(past, 2)
    fewer = engine.select(wide, [1, 6])  # the second copy of the first row, the first of the fourth
    then = tokens.copies(2).keep([1, 6]).then(torch.tensor([5, 9]))
    found, again = engine.read(then, engine.fork(fewer)), engine.step(then, past=fewer)[0]
    for place, (row, layer, token) in enumerate([(0, 0, 5), (3, 0, 9)]):
        ids = ids_of(twins.bridge, TEXTS[rows[row]])
        write = (layer, ids.shape[1] - 1, vectors[row])
        plain = plain_run(twins, torch.cat([ids, torch.tensor([[token]])], dim=1), write)
        torch.testing.assert_close(found[place], plain[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(again[place], plain[1], atol=1e-4, rtol=0)


def small_memory(bridge: TransformerBridge, most_rows: int) -> torch.utils.hooks.RemovableHandle:
    """Makes every pass of more rows fail as it does where a GPU is full, half way up the model."""

    def full(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > most_rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    return bridge.original_model.model.layers[2].register_forward_pre_hook(full)


@pytest.mark.parametrize("most_rows", [1, 2, 7])
def test_where_memory_runs_out_smaller_passes_go_on(most_rows: int) -> None:
    """Also where it is the shared prefix that is too large, which has a row for each prompt."""
    bridge = make_twins("llama").bridge
    task = tv.Task.from_mapping(
        "t", {a: a.upper() for a in ("hot", "cold", "big", "small", "tall", "x", "a quick fox")}
    )
    prompts = task.sample(5, shots=2, seed=0)
    substitutes = task.substitutes(prompts, 2, seed=0)

    def everything() -> tuple[Tensor, tv.Sweep, tv.Completions, Tensor]:
        engine = tv.LocalEngine(bridge)
        vectors = tv.extract(engine, prompts, substitutes)
        sweep = tv.sweep_layers(engine, task, prompts, vectors, max_new_tokens=3)
        return vectors.values, sweep, tv.generate(engine, prompts), tv.patched_logits(engine, prompts, vectors, 1)

    expected = everything()
    handle = small_memory(bridge, most_rows)
    with pytest.warns(UserWarning, match="tiny-llama: no memory for .* rows in a pass; going on with fewer") as warned:
        found = everything()
    handle.remove()
    assert len(warned) == 1
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert found[1] == expected[1]
    assert found[2].texts == expected[2].texts
    torch.testing.assert_close(found[3], expected[3], atol=1e-5, rtol=0)


def test_memory_too_small_for_one_row_is_an_error() -> None:
    bridge = make_twins("llama").bridge
    handle = small_memory(bridge, 0)
    with pytest.warns(UserWarning, match="no memory for 3 rows"), pytest.raises(torch.cuda.OutOfMemoryError):
        tv.generate(bridge, [tv.Prompt((), text) for text in ("a", "hot", "x")])
    handle.remove()


def test_a_cache_that_was_not_filled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.24 gives one under TransformerLens 4.3: the next token would come from nowhere."""
    bridge = make_twins("llama").bridge
    run = bridge.run_with_hooks
    empty = transformers.DynamicCache()
    monkeypatch.setattr(bridge, "run_with_hooks", lambda *args, **kwargs: (run(*args, **kwargs)[0], empty))
    with pytest.raises(
        RuntimeError, match=r"tiny-llama: the KV cache holds 0 of \d+ positions, .*transformers>=5.9,<5.24"
    ):
        tv.generate(bridge, [tv.Prompt((), "a ->")])
