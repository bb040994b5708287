"""The engine's laws: it reads and writes what a plain forward hook does, and a row does not depend on its batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from models import TEXTS, Twins, ids_of, make_tokenizer, make_twins, original
from oracle import count_positions, plain_generate, plain_run, refuse
from passes import logits_of, logits_of_groups, read_groups, read_texts, tokens_of
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv
from tv_lens.edits import RESID_POST, Edits
from tv_lens.engines import Past, map_rows


def per_row(vectors: Tensor, layers: Sequence[int]) -> Edits:
    return Edits.per_row(vectors, torch.tensor(layers))


def test_reads_are_those_of_plain_forward_hooks(twins: Twins) -> None:
    expected = torch.stack([plain_run(twins, ids_of(twins.bridge, text))[0] for text in TEXTS])
    torch.testing.assert_close(read_texts(tv.LocalEngine(twins.bridge), TEXTS), expected, atol=1e-4, rtol=0)


def test_a_patched_row_is_a_plain_hook_that_overwrites(twins: Twins) -> None:
    engine = tv.LocalEngine(twins.bridge)
    vectors = torch.randn(len(TEXTS), engine.d_model, generator=torch.Generator().manual_seed(1)) * 3
    layers = [0, 3, 1, 3]
    actual = logits_of(engine, TEXTS, per_row(vectors, layers))
    for row, text in enumerate(TEXTS):
        ids = ids_of(twins.bridge, text)
        write = (layers[row], ids.shape[1] - 1, vectors[row])
        torch.testing.assert_close(actual[row], plain_run(twins, ids, write)[1], atol=1e-4, rtol=0)
        assert (actual[row] - plain_run(twins, ids)[1]).abs().max() > 0.05  # the patch had an effect


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_writing_back_what_was_read_changes_nothing(twins: Twins, layer: int) -> None:
    engine = tv.LocalEngine(twins.bridge)
    edits = per_row(read_texts(engine, TEXTS)[:, layer], [layer] * len(TEXTS))
    torch.testing.assert_close(logits_of(engine, TEXTS, edits), logits_of(engine, TEXTS), atol=1e-5, rtol=0)


def batch_sizes(engine: tv.Engine) -> list[int]:
    """How many rows each pass over the texts has."""
    sizes: list[int] = []
    map_rows(engine, [[ids] for ids in engine.text.encode(TEXTS)], lambda rows, *_: sizes.append(len(rows)))
    return sizes


@pytest.mark.parametrize("batch_size", [1, 3])
def test_results_do_not_depend_on_the_batch(twins: Twins, batch_size: int) -> None:
    engine, other = tv.LocalEngine(twins.bridge), tv.LocalEngine(twins.bridge, batch_size=batch_size)
    assert max(batch_sizes(engine)) == len(TEXTS)
    assert max(batch_sizes(other)) == batch_size
    torch.testing.assert_close(read_texts(other, TEXTS), read_texts(engine, TEXTS), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits_of(other, TEXTS), logits_of(engine, TEXTS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("bos", "pad", "side"),
    [(True, "<pad>", "right"), (True, "<pad>", "left"), (True, "</s>", "right"), (True, None, "right")]
    + [(False, "<pad>", "right"), (False, "</s>", "right"), (False, None, "left")],
)
def test_the_tokenizers_padding_settings_are_ignored(architecture: str, bos: bool, pad: str | None, side: str) -> None:
    tokenizer = make_tokenizer(bos, pad, side)
    twins = make_twins(architecture, tokenizer)
    for prepend_bos in (None, False):
        engine = tv.LocalEngine(twins.bridge, prepend_bos=prepend_bos)
        oracle = [plain_run(twins, ids_of(twins.bridge, text, prepend_bos)) for text in TEXTS]
        torch.testing.assert_close(
            read_texts(engine, TEXTS), torch.stack([each[0] for each in oracle]), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            logits_of(engine, TEXTS), torch.stack([each[1] for each in oracle]), atol=1e-4, rtol=0
        )
        prompts = [tv.Prompt((), text, template=tv.Template("{input}{output}", "\n\n\n")) for text in TEXTS]
        actual = tv.generate(engine, prompts, max_new_tokens=3)
        for text, ids in zip(TEXTS, actual.tokens.tolist(), strict=True):
            expected = plain_generate(twins, ids_of(twins.bridge, text, prepend_bos), 3)
            assert ids == expected or (
                1 in expected and ids[: expected.index(1) + 1] == expected[: expected.index(1) + 1]
            )


def test_a_patch_does_not_write_into_the_models_own_tensor() -> None:
    bridge = make_twins("llama").bridge
    seen: list[Tensor] = []
    bridge.add_hook("blocks.1.hook_resid_post", lambda residual, hook: seen.append(residual))
    logits_of(tv.LocalEngine(bridge), TEXTS, per_row(torch.full((4, 32), 7.0), [1] * 4))
    assert not (seen[0][:, -1] == 7.0).any()


def test_bos_is_prepended_once_or_not_at_all() -> None:
    bridge = make_twins("llama").bridge
    for prepend_bos, text, count in ((None, "a", 1), (True, "a", 1), (False, "a", 0), (True, "<s>a", 1)):
        [ids] = tv.LocalEngine(bridge, prepend_bos=prepend_bos).text.encode([text])
        assert ids.count(0) == count
    bridge = make_twins("gpt_neox", make_tokenizer(bos=False, pad=None)).bridge
    bridge.tokenizer.bos_token = None  # TransformerLens had put the end of text there
    with pytest.raises(ValueError, match="prepend_bos=True, but the tokenizer of tiny-gpt_neox has no BOS"):
        tv.LocalEngine(bridge, prepend_bos=True)


@pytest.mark.parametrize("layer", [0, 3])
def test_shared_prefix_equals_a_fresh_run(twins: Twins, layer: int) -> None:
    """Rows of unequal length, a group without a shared prefix, and more rows than fit one pass."""
    shots = "hot -> cold\nbig -> small\n"
    groups = [
        [shots + "wet ->", shots + "a quick brown fox ->", shots + "tall ->"],
        ["hot -> cold\na ->", "hot -> cold\nb ->", "hot -> cold\nthe fox ->"],
        ["x", "a ->", "the quick ->"],
    ]
    texts = [text for group in groups for text in group]
    vectors = torch.randn(len(texts), twins.bridge.cfg.d_model, generator=torch.Generator().manual_seed(2))
    edits = per_row(vectors, [layer] * len(texts))
    for prepend_bos, batch_size in ((None, None), (False, 4)):
        engine = tv.LocalEngine(twins.bridge, prepend_bos=prepend_bos, batch_size=batch_size)
        actual, written = read_groups(engine, groups), logits_of_groups(engine, groups, edits)
        for row, text in enumerate(texts):
            ids = ids_of(twins.bridge, text, prepend_bos)
            torch.testing.assert_close(actual[row], plain_run(twins, ids)[0], atol=1e-4, rtol=0)
            write = (layer, ids.shape[1] - 1, vectors[row])
            torch.testing.assert_close(written[row], plain_run(twins, ids, write)[1], atol=1e-4, rtol=0)
    if twins.bridge.cfg.architecture == "LlamaForCausalLM":
        shortest = min(tails(engine, groups))
        assert shortest < ids_of(twins.bridge, texts[0]).shape[1]  # something was shared at all


def tails(engine: tv.Engine, groups: Sequence[Sequence[str]]) -> list[int]:
    """How many positions of each part are run after a shared prefix."""
    widths: list[int] = []
    ids = [engine.text.encode(group) for group in groups]
    map_rows(engine, ids, lambda rows, tokens, *_: widths.append(tokens.ids.shape[1]))
    return widths


def test_pads_in_the_middle_stay_within_the_context(twins: Twins) -> None:
    """Each row fits into the context of 128, the longest prefix and the longest tail together do not."""
    engine = tv.LocalEngine(twins.bridge, prepend_bos=False)
    groups = [["x " * 25 + "a " * 20, "x " * 25 + "b"], ["y " * 48 + "a", "y " * 48 + "b c"]]
    texts = [text for group in groups for text in group]
    for actual, text in zip(read_groups(engine, groups), texts, strict=True):
        expected = plain_run(twins, ids_of(twins.bridge, text, False))[0]
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# Pads between a prefix and its rows would change results here: alibi, windows and chunks of each kind, and the end
# of the context.
EDGES = {
    "bloom": 1,
    "mpt": 1,
    "mistral": 6,
    "gemma2": 6,
    "gemma3": 6,
    "olmo3": 6,
    "gpt_oss": 6,
    "cohere2": 6,
    "gpt_neo": 8,
    "chunked attention": 6,
    "a window of 2": 2,
    "gpt2": 128,
    "llama": 128,
    "opt": 128,
    "codegen": 128,
    "gptj": 128,
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("beyond", [-1, 0, 1, 3])
def test_pads_in_the_middle_do_no_harm_at_any_edge(name: str, beyond: int) -> None:
    """The longest prefix and the longest tail together are as long as the window, one less, and more; each row by
    itself fits. Each read is that of plain Hugging Face.
    """
    twins, edge = make_twins(name), EDGES[name]
    engine = tv.LocalEngine(twins.bridge, prepend_bos=False, progress=False)
    seen = max(6, edge + beyond)
    tail = seen // 2
    prefix = " cold" * (seen - tail)
    groups = [[prefix + "x", prefix + "y"], ["y" + " cold" * tail, "yx"]]
    texts = [text for group in groups for text in group]
    assert [len(ids) for ids in engine.text.encode(texts)] == [seen - tail + 1, seen - tail + 1, tail + 1, 2]
    actual = read_groups(engine, groups)
    for row, text in enumerate(texts):
        expected = plain_run(twins, ids_of(twins.bridge, text, False))[0]
        torch.testing.assert_close(actual[row], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EDGES)
def test_pads_are_put_in_the_middle_only_up_to_the_edge(name: str) -> None:
    """The context is an edge, too: some versions of transformers keep buffers of that length."""
    edge = EDGES[name]
    assert tv.LocalEngine(make_twins(name).bridge).limits.gaps_up_to == (edge if edge > 1 else 0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("new", [1, 5])
def test_the_last_length_that_fits_is_run_and_the_next_is_refused(name: str, new: int) -> None:
    twins = make_twins(name)
    engine = tv.LocalEngine(twins.bridge, prepend_bos=False)
    longest = 128 - new + 1
    text = " cold" * longest
    [ids] = engine.text.encode([text])
    assert len(ids) == longest
    actual = tv.generate(engine, [text], max_new_tokens=new).tokens[0]
    assert actual.tolist() == plain_generate(twins, torch.tensor([ids]), new)[: len(actual)]
    with pytest.raises(ValueError, match=f"prompt 0 has {longest + 1} tokens.* the context of tiny-{name} is 128"):
        tv.generate(engine, [text + " cold"], max_new_tokens=new)


@pytest.mark.parametrize("substitutes", [2, 4])
def test_a_shared_prefix_is_run_once(substitutes: int) -> None:
    """P prompts with n shared tokens and k rests of t tokens cost P * (n + k * t) positions."""
    bridge = make_twins("llama").bridge
    engine = tv.LocalEngine(bridge)
    tails = ["a", "b", "c", "d"][:substitutes]
    groups = [[f"{first} -> cold\n{tail} ->" for tail in tails] for first in ("x", "y", "z")]
    n_whole = ids_of(bridge, groups[0][0]).shape[1]
    tail = ids_of(bridge, "a ->", prepend_bos=False).shape[1]
    run = count_positions(bridge, lambda: read_groups(engine, groups))
    assert run == 3 * ((n_whole - tail) + substitutes * tail)


def step(engine: tv.Engine, tokens: tv.Tokens, past: Past) -> Tensor:
    """Next-token logits after a past."""
    logits = engine.forward(tokens, past=past).logits
    assert logits is not None
    return logits


def test_a_fork_leaves_the_past_as_it_was(twins: Twins) -> None:
    engine = tv.LocalEngine(twins.bridge)
    tokens = tokens_of(engine, TEXTS)
    past = engine.forward(tokens).past
    chosen = torch.tensor([5, 6, 7, 8])
    widened = engine.fork(past, 2)
    step(engine, tokens.then(chosen), engine.fork(past))
    first = step(engine, tokens.then(chosen), past)
    wide = tv.Tokens(tokens.ids.repeat_interleave(2, 0), tokens.mask.repeat_interleave(2, 0))
    both = step(engine, wide.then(chosen.repeat_interleave(2)), widened)
    torch.testing.assert_close(both, first.repeat_interleave(2, 0), atol=1e-5, rtol=0)


def test_no_logits_that_nobody_reads() -> None:
    twins = make_twins("llama")
    engine = tv.LocalEngine(twins.bridge)
    shapes = []
    head = original(twins.bridge).lm_head
    handle = head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    tokens = tokens_of(engine, TEXTS)
    engine.forward(tokens, read=[RESID_POST], logits=False)
    engine.forward(tokens)
    handle.remove()
    assert shapes == [(4, 0, 300), (4, 1, 300)]


def test_a_half_precision_model_gives_float32() -> None:
    twins = make_twins("llama")
    original(twins.bridge).to(torch.float16)
    engine = tv.LocalEngine(twins.bridge)
    edits = per_row(torch.ones(4, 32), [0, 1, 2, 3])
    assert read_texts(engine, TEXTS).dtype == logits_of(engine, TEXTS, edits).dtype == torch.float32


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
    original(bridge).register_forward_pre_hook(refuse)
    with pytest.raises(ValueError, match=message):
        engine.text.encode(texts)


def test_anything_but_a_decoder_only_language_model_is_refused(as_users_run_it: None) -> None:
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    config = transformers.T5Config(vocab_size=300, d_model=32, d_ff=32, d_kv=8, num_layers=2, num_heads=4, **start)
    model = transformers.T5ForConditionalGeneration(config)
    model.config.architectures = ["T5ForConditionalGeneration"]
    bridge = TransformerBridge.boot_transformers("tiny-t5", hf_model=model, tokenizer=make_tokenizer(), device="cpu")
    with pytest.raises(ValueError, match="tiny-t5 is not a decoder-only language model"):
        tv.engine_for(bridge)
    bert_config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    encoder = transformers.BertForMaskedLM(bert_config)
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


def test_a_custom_engine_is_used_as_is() -> None:
    engine = tv.LocalEngine(make_twins("gpt2").bridge)
    assert tv.engine_for(engine) is engine
    assert isinstance(engine, tv.Engine)


def test_a_past_without_copies_is_still_independent() -> None:
    engine = tv.LocalEngine(make_twins("gpt2").bridge)
    tokens = tokens_of(engine, TEXTS)
    past = engine.forward(tokens).past
    before = copy.deepcopy(past)
    step(engine, tokens.then(torch.tensor([5, 6, 7, 8])), engine.fork(past))
    assert torch.equal(past.layers[0].keys, before.layers[0].keys)


def test_a_recurrent_model_continues_from_whole_rows() -> None:
    """Unequal rows, patched at their second-to-last position, forked, one dropped: equal to a plain hook there."""
    twins = make_twins("mamba")
    engine = tv.LocalEngine(twins.bridge)
    tokens = tokens_of(engine, TEXTS)
    vectors = torch.randn(4, engine.d_model, generator=torch.Generator().manual_seed(5)) * 3
    past = engine.forward(tokens, edits=per_row(vectors, [0, 1, 2, 0])).past
    wide = engine.fork(past, 2)
    fewer = engine.select(wide, [1, 6])  # the second copy of the first row, the first of the fourth
    then = tokens.repeat(2).keep([1, 6]).then(torch.tensor([5, 9]))
    actual = engine.forward(then, past=engine.fork(fewer), read=[RESID_POST]).reads[RESID_POST]
    again = step(engine, then, fewer)
    for slot, (row, layer, token) in enumerate([(0, 0, 5), (3, 0, 9)]):
        ids = ids_of(twins.bridge, TEXTS[row])
        write = (layer, ids.shape[1] - 1, vectors[row])
        plain = plain_run(twins, torch.cat([ids, torch.tensor([[token]])], dim=1), write)
        torch.testing.assert_close(actual[slot], plain[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(again[slot], plain[1], atol=1e-4, rtol=0)


def small_memory(bridge: TransformerBridge, most_rows: int) -> torch.utils.hooks.RemovableHandle:
    """Makes every pass of more rows fail half way up the model, as it does when a GPU's memory is full."""

    def full(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > most_rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    block: torch.nn.Module = original(bridge).model.layers[2]
    return block.register_forward_pre_hook(full)


@pytest.mark.parametrize("most_rows", [1, 2, 7])
def test_smaller_passes_continue_when_memory_runs_out(most_rows: int) -> None:
    """Also if the shared prefix is what is too large; it has a row for each prompt."""
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
    with pytest.warns(
        UserWarning, match="tiny-llama: no memory for .* rows in a pass; continuing with fewer"
    ) as warned:
        actual = everything()
    handle.remove()
    assert len(warned) == 1
    torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=0)
    assert actual[1] == expected[1]
    assert actual[2].texts == expected[2].texts
    torch.testing.assert_close(actual[3], expected[3], atol=1e-5, rtol=0)


def test_memory_too_small_for_one_row_is_an_error() -> None:
    bridge = make_twins("llama").bridge
    handle = small_memory(bridge, 0)
    with pytest.warns(UserWarning, match="no memory for 3 rows"), pytest.raises(torch.cuda.OutOfMemoryError):
        tv.generate(bridge, [tv.Prompt((), text) for text in ("a", "hot", "x")])
    handle.remove()


def test_a_cache_that_was_not_filled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with transformers 5.24 under TransformerLens 4.3: the next token would see nothing before it."""
    bridge = make_twins("llama").bridge
    run = bridge.run_with_hooks
    empty = transformers.DynamicCache()
    monkeypatch.setattr(bridge, "run_with_hooks", lambda *args, **kwargs: (run(*args, **kwargs)[0], empty))
    with pytest.raises(
        RuntimeError, match=r"tiny-llama: the KV cache holds 0 of \d+ positions, .*transformers>=5.9,<5.24"
    ):
        tv.generate(bridge, [tv.Prompt((), "a ->")])
