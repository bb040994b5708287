"""Rules that decide before an answer is complete, and sweeps that then stop. The oracle is always the rule on whole
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import Twins, make_tokenizer, make_twins
from oracle import count_positions
from tokenizers import Tokenizer, decoders, models

import tv_lens as tv
from tv_lens import Example, Prompt, PromptFormat, Rule, Task, Template
from tv_lens.engines import Engine
from tv_lens.generation import Answer
from tv_lens.prompts import PAPER, ChatTemplate, FreeText, PlainText, Segment

RULES = [tv.exact_match, tv.starts_with]

# Rules

# Letters, digits and marks of many scripts, what joins or separates them, white space, parts of emoji and syllables.
CHARACTERS = (
    "aZ03_-.,'’ \t\n\u00a0\u202f\u3000\u2009#!日本กข한가ꥠ각각אבعر٣٫٬कि्षä\u0301\u0308\u200d\u200b\ufe0f"
    "\u0600\u06dd👩👨🏽🇩🇪\U0001f680\x00\ufffd\r"
)
texts = st.text(st.sampled_from(CHARACTERS), max_size=6)
answers = st.one_of(texts, st.lists(texts, min_size=1, max_size=3).map(" ".join))


@st.composite
def predictions(draw: Any, answer: str) -> str:
    """Texts, many of which begin with the answer or a part of it."""
    part = answer.strip()[: draw(st.integers(0, len(answer)))]
    begins = draw(st.sampled_from([answer, answer.strip(), part, *answer.split()[:1], ""]))
    return str(draw(st.sampled_from(["", " ", "\n"])) + begins + draw(texts))


pairs = answers.flatmap(lambda answer: st.tuples(st.just(answer), predictions(answer)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@settings(max_examples=800, deadline=None)
@given(pairs, texts)
@example(("\u0600", "\u0600 "), "a")  # a sign that the next character belongs to, unless it is left out
@example(("3", "3\u00a0"), "000")
@example(("New York", "New \n"), "")
@example(("", " "), "a")
def test_what_is_decided_never_changes(rule: Any, pair: tuple[str, str], more: str) -> None:
    answer, prediction = pair
    decide = Rule.of(rule).decide
    assert decide is not None
    for end in range(len(prediction) + 1):
        verdict = decide(prediction[:end], answer)
        if verdict is not None:
            assert verdict == rule(prediction[:end], answer)
            assert verdict == rule(prediction, answer)
            assert verdict == rule(prediction[:end] + more, answer)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@settings(max_examples=400, deadline=None)
@given(
    st.text(st.sampled_from("aZ03_.,'’ \u00a0日本กب٣ä\u0301👩"), max_size=5).flatmap(
        lambda answer: st.tuples(st.just(answer), predictions(answer))
    )
)
def test_what_is_not_decided_can_still_turn_out_both_ways(rule: Any, pair: tuple[str, str]) -> None:
    answer, prediction = pair
    decide = Rule.of(rule).decide
    assert decide is not None
    for end in range(len(prediction) + 1):
        begun = prediction[:end]
        if decide(begun, answer) is None:
            rest = answer.strip().removeprefix(begun.lstrip())
            ends = ["", "x", "0", "\u0301", rest]
            assert {rule(begun + more, answer) for more in ends} == {True, False}


@pytest.mark.parametrize(
    ("beginning", "answer", "expected"),
    [
        ("", "cold", None),
        (" ", "cold", None),
        (" col", "cold", None),
        ("cold", "cold", None),  # colder
        ("cold ", "cold", True),
        ("cold.", "cold", True),
        ("cold'", "cold", None),  # cold's
        ("cold' ", "cold", True),
        ("cold's", "cold", False),
        ("colder", "cold", False),
        ("hot", "cold", False),
        ("3", "3", None),
        ("3.", "3", None),  # 3.5
        ("3\u00a0", "3", None),  # 3 000, with a space that does not break
        ("3. ", "3", True),
        ("3.5", "3", False),
        ("3's", "3", True),
        ("New", "New York", None),  # the whole first word, if nothing follows
        ("New ", "New York", None),
        ("New  ", "New York", None),
        ("New  Y", "New York", False),
        ("New Y", "New York", None),
        ("New J", "New York", False),
        ("New York,", "New York", True),
        ("日", "日", None),  # a mark may follow
        ("日本", "日", True),
        ("本", "日", False),
        ("a", "", False),
    ],
)
def test_when_starts_with_decides(beginning: str, answer: str, expected: bool | None) -> None:
    rule = Rule.of(tv.starts_with)
    assert rule.decide is not None
    assert rule.decide(beginning, answer) is expected


@pytest.mark.parametrize(
    ("beginning", "expected"), [("", None), (" co", None), ("cold", None), ("cold ", None), ("cold,", False)]
)
def test_exact_match_decides_only_that_an_answer_is_wrong(beginning: str, expected: bool | None) -> None:
    rule = Rule.of(tv.exact_match)
    assert rule.decide is not None
    assert rule.decide(beginning, " cold ") is expected


# Tasks

BIG = Task.from_mapping("opposites", {"big": ["small", "little"], "light": ["dark", "heavy"], "bright": "dark"})


def test_a_task_decides_over_all_accepted_answers() -> None:
    assert BIG.decided("small,", "small") is True
    assert BIG.decided("little,", "small") is True
    assert BIG.decided("li", "small") is None
    assert BIG.decided("x", "small") is False
    assert BIG.decided("heavy,", "dark", query="light") is True
    assert BIG.decided("heavy,", "dark", query="bright") is False
    with pytest.raises(tv.TvLensError, match="pass query="):
        BIG.decided("heavy,", "dark")


def always(prediction: str, answer: str) -> bool:
    return True


@pytest.mark.parametrize(
    "rule",
    [
        always,
        lambda prediction, answer: True,
        Rule("mine", tv.starts_with),
        replace(Rule.of(tv.starts_with), accepts_ids=lambda ids, answer: True),
    ],
    ids=["function", "lambda", "named", "by ids"],
)
def test_other_rules_decide_nothing(rule: Any) -> None:
    task = replace(BIG, accepts=rule)
    assert task.decided("small,", "small") is None
    assert task.decided("x", "small") is None


# Formats


@dataclass(frozen=True)
class Shouted(Template):
    """A format that cuts in another way than the one it derives from."""

    def cut(self, text: str) -> str:
        return super().cut(text).upper()


class LastLine(PromptFormat):
    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        return [Segment(query, "query")]

    def cut(self, text: str) -> str:
        return text.split("\n")[-1]


FORMATS: list[PromptFormat] = [
    PAPER,
    Template("{input} -> {output}", separator="\n\n"),
    Template("{input} -> {output}", separator="#\n#"),
    Template("{input} -> {output} ##", separator="\n\n"),
    Template("{input} -> {output}\n# .", separator=".\n#"),
    Template("({input}) = [{output}]", separator="ab aab"),
    ChatTemplate("", "U", "A", after="#\n#a", ask="A"),
    ChatTemplate("", before="#", between="A", after=" \n", ask="A"),
    PlainText(),
    FreeText("{input} is"),
    Shouted(),
    LastLine(),
]


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: type(form).__name__)
@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab#.] \n"), max_size=14))
def test_a_settled_beginning_is_in_every_answer(form: PromptFormat, completion: str) -> None:
    for end in range(len(completion) + 1):
        assert form.cut(completion).startswith(form.settled(completion[:end]))


@pytest.mark.parametrize("form", FORMATS[:-2], ids=lambda form: type(form).__name__)
def test_all_is_settled_that_can_not_end_an_answer(form: PromptFormat) -> None:
    assert form.settled("cold") == form.settled("cold! it")[:4] == "cold"
    assert form.settled("cold! it") == "cold! it"


def test_of_a_format_that_cuts_differently_nothing_is_known() -> None:
    assert Shouted().cut("cold") == "COLD"
    assert Shouted().settled("cold") == LastLine().settled("cold") == ""


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (Template(separator="\n\n"), " cold\n", "cold"),
        (Template(separator="##"), " cold #", "cold"),
        (Template(separator="##"), " cold # a", "cold # a"),
        (Template(separator="aab"), "caa", "c"),
        (Template("{input} -> {output}.", separator="\n\n"), "cold.", "cold"),
        (Template("{input} -> {output}.", separator="\n\n"), "cold. a", "cold. a"),
        (Template("{input} -> {output} ##"), " cold #", "cold"),
        (ChatTemplate("", "U", "A", after="<|end|>", ask="A"), "cold<|en", "cold"),
    ],
)
def test_what_may_end_an_answer_is_held_back(form: PromptFormat, text: str, expected: str) -> None:
    assert form.settled(text) == expected


# Tokenizers


def sentencepiece_like() -> Any:
    """A tokenizer that writes characters outside its vocabulary as bytes, as those of Llama 2 and Gemma do."""
    pieces = ["<s>", "</s>", "<pad>", "<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)] + list("▁abcdehlort.'3")
    inner = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    kind: Any = transformers.PreTrainedTokenizerFast
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = kind(tokenizer_object=inner, **names)
    tokenizer.init_kwargs.update({"name_or_path": "tiny", "add_bos_token": True})
    return tokenizer


TOKENIZERS = {"bytes": make_tokenizer, "sentencepiece": sentencepiece_like}


@pytest.fixture(scope="module", params=TOKENIZERS)
def engine(request: pytest.FixtureRequest) -> Engine:
    return tv.LocalEngine(make_twins("gpt2", TOKENIZERS[request.param]()).bridge)


def draw_row(data: st.DataObject, engine: Engine, text: str) -> list[int]:
    """The tokens of a text, perhaps cut short within a character, perhaps with any other tokens after them."""
    ids = engine.text.piece_ids(text)
    kept = data.draw(st.sampled_from([len(ids), data.draw(st.integers(0, len(ids)))]))
    return ids[:kept] + data.draw(st.lists(st.integers(0, 270), max_size=3))


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_settled_text_is_in_every_longer_row(engine: Engine, data: st.DataObject) -> None:
    pieces = [draw_row(data, engine, text) for text in data.draw(st.lists(texts, max_size=4))]
    ids = [token for piece in pieces for token in piece]
    for end in range(len(ids) + 1):
        settled = engine.text.settled(ids[:end])
        assert engine.text.decode(ids).startswith(settled)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ("bytes", ["", "", "", "日", "日a"]),
        # "日" and then a part of another character would decode to U+FFFD four times.
        ("sentencepiece", ["", "", "", "", "日a"]),
    ],
)
def test_a_character_is_settled_when_it_is_complete(tokenizer: str, expected: list[str]) -> None:
    codec = tv.LocalEngine(make_twins("gpt2", TOKENIZERS[tokenizer]()).bridge).text
    ids = codec.piece_ids("日a")[-4:]
    assert [codec.settled(ids[:n]) for n in range(5)] == expected
    special = 0  # it has no text, so that bytes before and after it are in a row
    assert codec.settled([*ids[:3], special]) == expected[3]


def test_nothing_is_settled_by_a_tokenizer_that_joins_pieces_anew(gpt2: Twins, tmp_path: Path) -> None:
    """Those written in Python may do so; this one marks pieces of words with "@@ "."""
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "col@@": 1, "d": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    kind: Any = transformers.CTRLTokenizer
    gpt2.bridge.tokenizer = kind(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    codec = tv.LocalEngine(gpt2.bridge).text
    assert [codec.decode(ids) for ids in ([1], [1, 2])] == ["col@@", "cold"]
    assert codec.settled([1]) == ""


# Rows


def run_row(engine: Engine, task: Task, prompt: Prompt, ids: Sequence[int], *, whole: bool) -> Answer:
    """A row that is given these tokens, as long as it has not ended."""

    def decided(number: int, beginning: str) -> bool:
        return task.decided(beginning, task.answer("q"), query="q") is not None

    row = Answer(prompt, engine.text.stop_of(prompt), key="k", number=0, decided=None if whole else decided)
    for token in ids:
        if not row.ended:
            row.append(engine, token)
    return row


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@settings(max_examples=400, deadline=None)
@given(data=st.data(), form=st.sampled_from([each for each in FORMATS if not isinstance(each, LastLine)]))
def test_a_row_that_stops_has_the_verdict_of_the_whole_one(
    engine: Engine, rule: Any, data: st.DataObject, form: PromptFormat
) -> None:
    answer, other = data.draw(answers), data.draw(answers)
    task = Task("t", ("q",), lambda query: answer, rule, {answer: (other,)})
    prompt = Prompt((), "q", answer, form)
    ends = st.sampled_from(["", form.stop or "", (form.stop or "")[:1], "#", " #", "\n#", "."])
    text = data.draw(predictions(data.draw(st.sampled_from([answer, other])))) + data.draw(ends) + data.draw(texts)
    ids = draw_row(data, engine, text)
    whole, stopped = (run_row(engine, task, prompt, ids, whole=each) for each in (True, False))
    assert stopped.ids == whole.ids[: len(stopped.ids)]
    assert whole.answer.startswith(stopped.answer)
    assert task.right(stopped.answer, answer, query="q") == task.right(whole.answer, answer, query="q")


@pytest.mark.parametrize(
    ("text", "read"),
    [("cold and wet", "cold a"), ("hot", "h"), ("cold\nbig", "cold\n"), ("colder", "colde"), ("coa", "coa")],
)
def test_a_row_stops_at_the_token_that_decides(text: str, read: str) -> None:
    """With a tokenizer that has a token for each of these characters."""
    letters = tv.LocalEngine(make_twins("gpt2", sentencepiece_like()).bridge)
    task = Task("t", ("q",), lambda query: "cold")
    ids = [letters.text.piece_ids(character)[-1] for character in text.replace(" ", "▁")]
    row = run_row(letters, task, Prompt((), "q", "cold"), ids, whole=False)
    assert letters.text.decode(row.ids) == read


# Sweeps

NEVER = Template("{input} -> {output}", separator="never written")
QUERIES = ("a", "hot", "the quick brown fox", "big and tall", "x y")  # rows of unequal length
KINDS = ("gpt2", "llama", "mistral", "gemma3", "lfm2", "mamba")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Twins:
    return make_twins(request.param)


def vectors_for(twins: Twins, n: int) -> tv.TaskVectors:
    cfg = twins.bridge.cfg
    values = torch.randn(n, cfg.n_layers, cfg.d_model, generator=torch.Generator().manual_seed(1))
    return tv.TaskVectors(values, str(cfg.model_name), "t")


def on_whole_answers(task: Task) -> Task:
    """The task by the same rule, which now sees whole answers."""
    return replace(task, accepts=Rule("whole answers", task.rule.accepts))


def task_of(texts_by_layer: Sequence[Sequence[str]], rule: Any) -> Task:
    """A task that each prompt does at some layers: its answer is a beginning of what is generated at one of them, if
    the rule accepts one, else all of it.
    """
    expected = {}
    for i, query in enumerate(QUERIES):
        text = texts_by_layer[i % len(texts_by_layer)][i]
        accepted = [text[:n] for n in range(1, len(text)) if rule(text, text[:n])]
        expected[query] = accepted[0] if accepted else text
    return Task("t", QUERIES, expected.__getitem__, rule)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_sweep_that_stops_has_the_verdicts_of_whole_answers(kind: Twins, batch_size: int | None) -> None:
    engine = tv.LocalEngine(kind.bridge, batch_size=batch_size)
    prompts = [Prompt((), query, template=NEVER) for query in QUERIES]
    vectors = vectors_for(kind, len(prompts))
    layers = range(engine.n_layers)
    alone = [tv.patch_generate(engine, prompts, vectors, layer, max_new_tokens=4) for layer in layers]
    for rule in RULES:
        task = task_of(alone, rule)
        sweep = tv.sweep_layers(engine, task, prompts, vectors, max_new_tokens=4)
        for score, completions in zip(sweep.scores, alone, strict=True):
            assert score.correct == tv.score(task, prompts, completions).correct
            assert tv.score(task, prompts, score.texts) == score
            assert all(text.startswith(part) for part, text in zip(score.texts, completions, strict=True))
        assert {True, False} == {verdict for score in sweep.scores for verdict in score.correct}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_sweep_that_stops_takes_fewer_tokens(name: str) -> None:
    twins = make_twins(name)
    prompts = [Prompt((), query, template=NEVER) for query in QUERIES]
    vectors = vectors_for(twins, len(prompts))
    task = Task("t", QUERIES, str.upper)
    stopped, whole = (
        count_positions(twins.bridge, lambda task=each: tv.sweep_layers(twins.bridge, task, prompts, vectors))  # type: ignore[misc]
        for each in (task, on_whole_answers(task))
    )
    assert stopped < 0.6 * whole


@pytest.mark.parametrize(("verdict", "n_tokens"), [(True, 1), (False, 1), (None, 4)])
def test_a_decided_row_costs_no_more_tokens(verdict: bool | None, n_tokens: int) -> None:
    """The queries once, up to their last token; then a token for each query and layer, until the rule has decided."""
    twins = make_twins("llama")
    prompts = [Prompt((), query, "A", NEVER) for query in ("a", "b", "x")]
    rule = Rule("mine", lambda prediction, answer: bool(verdict), decide=lambda beginning, answer: verdict)
    task = Task("t", ("a", "b", "x"), str.upper, rule)
    length = twins.bridge.to_tokens("a ->").shape[1]
    vectors = vectors_for(twins, 1)
    n_positions = count_positions(
        twins.bridge, lambda: tv.sweep_layers(twins.bridge, task, prompts, vectors, max_new_tokens=4)
    )
    assert n_positions == 3 * (length - 1) + 3 * 4 * n_tokens


def test_answers_are_whole_if_nothing_can_be_decided(llama: Twins) -> None:
    """By a rule that compares ids, and in a format that cuts in another way."""
    task = Task("t", QUERIES, str.upper)
    vectors = vectors_for(llama, len(QUERIES))
    by_ids = replace(task, accepts=tv.first_token(llama.bridge, NEVER, task))
    for swept, form in ((by_ids, NEVER), (task, LastLine())):
        prompts = [Prompt((), query, template=form) for query in QUERIES]
        sweep = tv.sweep_layers(llama.bridge, swept, prompts, vectors, max_new_tokens=4)
        for layer, actual in zip(sweep.layers, sweep.scores, strict=True):
            expected = tv.patch_generate(llama.bridge, prompts, vectors, layer, max_new_tokens=4)
            assert actual == tv.score(swept, prompts, expected)


def test_an_evaluation_shows_whole_answers(llama: Twins) -> None:
    task = Task("t", QUERIES, str.upper)
    prompts = task.sample(4, shots=2, seed=0, template=NEVER)
    vectors = vectors_for(llama, 4)
    evaluation = tv.evaluate(llama.bridge, task, prompts, vectors, 1, max_new_tokens=4)
    assert evaluation.patched.texts == tv.patch_generate(llama.bridge, prompts, vectors, 1, max_new_tokens=4).texts
    assert evaluation.few_shot.texts == tv.generate(llama.bridge, prompts, max_new_tokens=4).texts
