"""Laws that hold for any texts, lengths, batch sizes, orders and seeds.

The expected numbers are those of plain Hugging Face, one unpadded text at a time, on ids of the tokenizer alone.
`TV_LENS_EXAMPLES=3000` tries that many of each, drawn anew; without it the same ones come every time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import Twins, make_tokenizer, make_twins, original
from oracle import plain_generate, plain_run, refuse
from passes import logits_of, read_texts
from torch import Tensor

import tv_lens as tv

MANY = int(os.environ.get("TV_LENS_EXAMPLES", "0"))


def tried(times: int) -> Callable[[Any], Any]:
    """The given number of examples, the same in every run."""
    return settings(
        max_examples=MANY or times,
        derandomize=not MANY,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Arbitrary texts: any script and direction, emoji of several code points, all kinds of line ends, braces, control
# characters, special tokens written out, and the empty text. Lone surrogates are not valid; see below.
PIECES = (
    *("{input}", "{output}", "{", "}", "{}", "{0}", "%s", "\\n", "->", " -> ", "<s>", "</s>", "<pad>", "Ġ", "\ufeff"),
    *("\n", "\r\n", "\r", "\t", " ", "\0", "\x1b[2J", "\u2028", "\u00a0", "\u200d", "\u202e", "e\u0301", "\ufffd"),
    *(
        "hot",
        "cold",
        " big",
        "small",
        "größe",
        "北京",
        "שלום",
        "مرحبا",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "🦊",
        "ß",
        "İ",
        "ﬁ",
        "\U0001d518",
        "\u0966",
    ),
)
CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
TEXT = st.lists(st.sampled_from(PIECES) | CHARACTERS, max_size=5).map("".join)
ASKED = TEXT.filter(lambda text: len(text.encode()) < 60)  # with its demonstrations it stays within the context
BATCH = st.integers(1, 7)

ARCHITECTURES = ("gpt2", "llama", "mistral", "bloom")


@functools.cache
def twins_of(name: str) -> Twins:
    return make_twins(name)


@functools.cache
def tokenizer() -> Any:
    return make_tokenizer()


def ids(text: str) -> Tensor:
    """As Hugging Face's tokenizer gives them, but a text that begins with a BOS does not get a second one."""
    actual = tokenizer()(text).input_ids
    return torch.tensor([actual[1:] if text.startswith("<s>") else actual])


# Models


@pytest.mark.parametrize("name", ARCHITECTURES)
@tried(12)
@given(texts=st.lists(ASKED, min_size=1, max_size=6), batch_size=BATCH)
@example(texts=["", "<s>", "</s>", "<pad>", "\n", "🏳️‍🌈 -> "], batch_size=6)
def test_reads_and_logits_are_those_of_each_text_alone(name: str, texts: list[str], batch_size: int) -> None:
    twins = twins_of(name)
    engine = tv.LocalEngine(twins.bridge, batch_size=batch_size, prepend_bos=True, progress=False)
    expected = [plain_run(twins, ids(text)) for text in texts]
    reads = read_texts(engine, texts)
    torch.testing.assert_close(reads, torch.stack([each[0] for each in expected]), atol=2e-4, rtol=1e-4)
    logits = logits_of(engine, texts)
    torch.testing.assert_close(logits, torch.stack([each[1] for each in expected]), atol=2e-4, rtol=1e-4)


SHORT = st.lists(st.sampled_from(PIECES) | CHARACTERS, max_size=2).map("".join).filter(lambda t: len(t.encode()) < 20)
SHOTS = st.lists(st.tuples(SHORT, SHORT), max_size=2).map(tuple)


def clear_steps(twins: Twins, start: Tensor, chosen: list[int], write: Any = None) -> bool:
    """Whether each step's two best tokens differ by more than rounding; if not, either is correct."""
    for step in range(len(chosen)):
        seen = torch.cat([start, torch.tensor([chosen[:step]], dtype=torch.long)], dim=1)
        first, second = plain_run(twins, seen, write)[1].topk(2).values.tolist()
        if first - second < 1e-3:
            return False
    return True


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@tried(12)
@given(
    drawn=st.lists(st.tuples(SHOTS, SHORT), min_size=1, max_size=5),
    batch_size=BATCH,
    seed=st.integers(0, 2**32),
    layer=st.integers(0, 3),
)
def test_tokens_are_those_of_each_prompt_alone(
    name: str, drawn: list[tuple[Any, str]], batch_size: int, seed: int, layer: int
) -> None:
    """Greedy, plain and patched, three tokens unless the prompt's separator or an end of text comes before."""
    twins = twins_of(name)
    prompts = [tv.Prompt(tuple(tv.Example(*pair) for pair in shots), query) for shots, query in drawn]
    engine = tv.LocalEngine(twins.bridge, batch_size=batch_size, progress=False)
    noise = torch.randn(len(prompts), 4, 32, generator=torch.Generator().manual_seed(seed)) * 2
    vectors = tv.TaskVectors(noise, f"tiny-{name}", "noise")
    plain = tv.generate(engine, prompts, max_new_tokens=3)
    patched = tv.patch_generate(engine, prompts, vectors, layer, max_new_tokens=3)
    for row, prompt in enumerate(prompts):
        asked = ids(prompt.zero_shot().text)
        write = (layer, asked.shape[1] - 1, noise[row, layer])
        for actual, start, change in ((plain, ids(prompt.text), None), (patched, asked, write)):
            expected = plain_generate(twins, start, 3, change)
            if clear_steps(twins, start, expected, change):
                chosen = until_the_end(expected, tv.PAPER.separator)
                assert actual.tokens[row, : len(chosen)].tolist() == chosen
                assert (actual.tokens[row, len(chosen) :] == 2).all()  # the tokenizer's padding
                written = tokenizer().decode(chosen, skip_special_tokens=True)
                assert actual[row] == written.split(tv.PAPER.separator)[0].strip()


def until_the_end(chosen: list[int], separator: str) -> list[int]:
    for step in range(1, len(chosen) + 1):
        if chosen[step - 1] == 1 or separator in tokenizer().decode(chosen[:step], skip_special_tokens=True):
            return chosen[:step]
    return chosen


@pytest.mark.slow
@tried(8)
@given(
    inputs=st.lists(SHORT, min_size=7, max_size=10, unique=True),
    order=st.permutations(range(4)),
    batch_size=BATCH,
    seed=st.integers(),
)
def test_neither_order_nor_batch_size_changes_anything(
    inputs: list[str], order: list[int], batch_size: int, seed: int
) -> None:
    """Vectors, the sweep's texts, and sampled answers, which depend on the prompt and not on its row."""
    bridge = twins_of("llama").bridge
    task = tv.Task("t", tuple(inputs), lambda text: text[::-1])
    prompts = task.sample(4, shots=2, seed=seed)
    substitutes = task.substitutes(prompts, 2, seed=seed)
    whole = tv.LocalEngine(bridge, progress=False)
    other = tv.LocalEngine(bridge, batch_size=batch_size, progress=False)
    mixed = [prompts[i] for i in order]

    vectors = tv.extract(whole, prompts, substitutes)
    again = tv.extract(other, mixed, [substitutes[i] for i in order])
    torch.testing.assert_close(again.values, vectors.values[list(order)], atol=2e-4, rtol=1e-4)

    def same(actual: Any, expected: Any) -> bool:
        return list(actual) == [expected[i] for i in order]

    sweep = tv.sweep_layers(whole, task, prompts, vectors, max_new_tokens=2)
    turned = replace(vectors, values=vectors.values[list(order)], terms=())
    swept = tv.sweep_layers(other, task, mixed, turned, max_new_tokens=2)
    for layer in range(4):
        assert same(swept.at(layer).texts, sweep.at(layer).texts)
        assert same(swept.at(layer).correct, sweep.at(layer).correct)
    drawn = tv.generate(whole, prompts, max_new_tokens=2, sampler=tv.sample(seed=seed))
    assert same(tv.generate(other, mixed, max_new_tokens=2, sampler=tv.sample(seed=seed)), drawn)


@functools.cache  # not a fixture: a failure would print it in full
def guarded() -> Twins:
    """A model that must not run."""
    twins = make_twins("llama")
    original(twins.bridge).register_forward_pre_hook(refuse)
    return twins


@tried(60)
@given(
    before=st.lists(ASKED, max_size=4),
    after=st.lists(ASKED, max_size=4),
    piece=st.sampled_from([piece for piece in PIECES if piece not in ("<s>",)]),
    new_tokens=st.integers(1, 140),
)
def test_a_prompt_too_long_is_refused_before_the_model_runs(
    before: list[str], after: list[str], piece: str, new_tokens: int
) -> None:
    long = piece * 130
    prompts = [tv.Prompt((), text) for text in (*before, long, *after)]
    # With many new tokens another prompt can be too long too: the first one is named.
    lengths = [ids(prompt.text).shape[1] for prompt in prompts]
    first = next(i for i, length in enumerate(lengths) if length + new_tokens - 1 > 128)
    message = rf"^prompt {first} has {lengths[first]} tokens.* and the context of tiny-llama is 128: "
    with pytest.raises(ValueError, match=message) as raised:
        tv.generate(guarded().bridge, prompts, max_new_tokens=new_tokens)
    assert len(str(raised.value)) < 600


@tried(60)
@given(before=TEXT, after=TEXT, half=st.characters(categories=["Cs"]), others=st.lists(SHORT, max_size=3))
def test_a_lone_surrogate_is_refused_before_the_model_runs(
    before: str, after: str, half: str, others: list[str]
) -> None:
    prompts = [tv.Prompt((), text) for text in (*others, before + half + after)]
    with pytest.raises(ValueError, match=f"^prompt {len(others)} holds half of a surrogate pair") as raised:
        tv.generate(guarded().bridge, prompts)
    str(raised.value).encode()
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tv.Task("t", (*dict.fromkeys(others), before + half + after), str.upper)


# Templates


def literal(text: str) -> bool:
    return "{input}" not in text and "{output}" not in text


AROUND = TEXT.filter(literal)


@tried(300)
@given(before=AROUND, between=AROUND, after=AROUND, separator=TEXT, pair=st.tuples(TEXT, TEXT))
def test_braces_in_data_and_template_are_data(
    before: str, between: str, after: str, separator: str, pair: tuple[str, str]
) -> None:
    pattern = before + "{input}" + between + "{output}" + after
    if pattern.count("{input}") != 1 or pattern.count("{output}") != 1 or not separator:
        # Pieces that form a field when joined.
        with pytest.raises(ValueError, match=r"template"):
            tv.Template(pattern, separator)
        return
    template, example_ = tv.Template(pattern, separator), tv.Example(*pair)
    assert template.show(example_) == before + example_.input + between + example_.output + after
    asked = template.ask(example_.input)
    assert template.show(example_).startswith(asked)
    shown_answer = example_.output + after
    spaces = len(template.show(example_)) - len(asked) - len(shown_answer)  # they belong to the answer's token
    assert template.show(example_) == asked + " " * spaces + shown_answer
    if between:
        assert not asked.endswith(" ")
    prompt = tv.Prompt((example_, example_), example_.input, template=template)
    assert prompt.text == separator.join([template.show(example_)] * 2 + [asked])
    assert prompt.zero_shot().text == asked


@tried(300)
@given(output=TEXT, between=AROUND, separator=TEXT.filter(bool), more=TEXT)
def test_an_answer_is_cut_out_as_it_was_shown(output: str, between: str, separator: str, more: str) -> None:
    pattern = "{input}" + between + "{output}"
    if pattern.count("{input}") != 1 or pattern.count("{output}") != 1:
        return
    template = tv.Template(pattern, separator)
    if (output + separator).find(separator) == len(output):  # the output does not contain the separator
        assert template.cut(output + separator + more) == output.strip()
        assert template.cut(output) == output.strip()
        closed = tv.Template(pattern + ")", separator)
        if (output + ")" + separator).find(separator) == len(output) + 1:
            assert closed.cut(output + ")" + separator + more) == output.strip()


# Tasks

INPUTS = st.lists(TEXT, min_size=2, max_size=12, unique=True)


@tried(150)
@given(inputs=INPUTS, seed=st.integers(), data=st.data())
def test_no_prompt_gives_its_answer_away(inputs: list[str], seed: int, data: st.DataObject) -> None:
    task = tv.Task("t", tuple(inputs), lambda text: text + "!")
    template = tv.Template("{input} -> {output}", separator="no answer has this in it")
    shots = data.draw(st.integers(0, len(inputs) - 1))
    n = data.draw(st.integers(1, len(inputs)))
    prompts = task.sample(n, shots=shots, seed=seed, template=template)
    queries = [prompt.query for prompt in prompts]
    assert len(set(queries)) == n
    for prompt in prompts:
        shown = [each.input for each in prompt.examples]
        assert len({*shown, prompt.query}) == shots + 1
        assert {*shown, prompt.query} <= set(inputs)
        assert [each.output for each in prompt.examples] == [text + "!" for text in shown]
    assert task.sample(n, shots=shots, seed=seed, template=template) == prompts
    fewer = data.draw(st.integers(1, n))
    assert task.sample(fewer, shots=shots, seed=seed, template=template) == prompts[:fewer]

    free = len(inputs) - shots - 1
    if free:
        k = data.draw(st.integers(1, free))
        chosen = task.substitutes(prompts, k, seed=seed)
        assert task.substitutes(prompts, k, seed=seed) == chosen
        for prompt, substitutes in zip(prompts, chosen, strict=True):
            used = {prompt.query, *(each.input for each in prompt.examples)}
            assert len(set(substitutes)) == k
            assert set(substitutes) <= set(inputs) - used
    with pytest.raises(ValueError, match="use fewer shots or substitutes, or add inputs"):
        task.substitutes(prompts, free + 1, seed=seed)


@tried(150)
@given(inputs=INPUTS, fraction=st.floats(0, 1), seed=st.integers())
def test_parts_share_nothing_and_lose_nothing(inputs: list[str], fraction: float, seed: int) -> None:
    task = tv.Task("t", tuple(inputs), str.upper)
    first = round(fraction * len(inputs))
    if first in (0, len(inputs)):
        with pytest.raises(ValueError, match="both parts need at least one"):
            task.split(fraction, seed=seed)
        return
    one, other = task.split(fraction, seed=seed)
    assert len(one) == first
    assert sorted([*one.inputs, *other.inputs]) == sorted(inputs)
    assert task.split(fraction, seed=seed)[0].inputs == one.inputs
    assert (one.answer(inputs[0]), one.name) == (inputs[0].upper(), "t")


@tried(150)
@given(texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6, unique_by=lambda pair: pair[0]))
def test_a_mapping_gives_its_own_answers(texts: list[tuple[str, str]]) -> None:
    task = tv.Task.from_mapping("t", dict(texts))
    assert [(text, task.answer(text)) for text in task.inputs] == texts
    assert all(task.right(answer, answer) for _, answer in texts)
