from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import Twins, ids_of, make_twins
from oracle import plain_run
from torch import Tensor

import tv_lens as tv
from tv_lens import Example, Prompt, Site, TaskVectors
from tv_lens.engines import Engine, ModelInfo, Pass, TextCodec


class Numbered(TextCodec):
    """Each known text is one token: its number."""

    def __init__(self, info: ModelInfo, texts: Sequence[str]) -> None:
        super().__init__(info)
        self.texts = list(texts)

    def to_ids(self, text: str) -> list[int]:
        return [self.texts.index(text)]

    def decode(self, ids: Sequence[int]) -> str:
        raise AssertionError("nothing to decode")


class Canned(Engine):
    """A minimal engine whose reads are given, by text."""

    def __init__(self, reads: dict[str, Tensor]) -> None:
        self.info = ModelInfo("Canned", n_layers=3, d_model=4)
        self.text = Numbered(self.info, list(reads))
        self.texts = list(reads)
        self.reads = reads

    def forward(self, tokens: tv.Tokens, *, read: Sequence[Site] = (), logits: Any = True, **options: Any) -> Pass:
        assert not logits, "extraction needs no logits"
        texts = [self.texts[i] for i in tokens.ids[:, -1].tolist()]
        return Pass(reads={site: torch.stack([self.reads[text] for text in texts]) for site in read})


def test_the_worked_example() -> None:
    first = Prompt((Example("a", "A"),), "q")
    second = Prompt((Example("b", "B"),), "q")
    layer_0 = [[1.2, 0.8, 0.5, 0.3], [1.3, 0.7, 0.6, 0.4], [2.1, 1.5, 1.8, 1.2], [2.2, 1.4, 1.9, 1.1]]
    texts = [first.asking("x").text, first.asking("y").text, second.asking("x").text, second.asking("y").text]
    reads = {
        text: torch.tensor([row, [10 * x for x in row], [float(i)] * 4])
        for i, (text, row) in enumerate(zip(texts, layer_0, strict=True))
    }
    vectors = tv.extract(Canned(reads), [first, second], [("x", "y"), ("x", "y")])
    assert vectors.values.shape == (2, 3, 4)
    expected = torch.tensor([[1.25, 0.75, 0.55, 0.35], [2.15, 1.45, 1.85, 1.15]])
    torch.testing.assert_close(vectors.at(0), expected)
    torch.testing.assert_close(vectors.at(1), 10 * expected)
    torch.testing.assert_close(vectors.at(2), torch.tensor([[0.5] * 4, [2.5] * 4]))


def test_across_averages_the_prompts_that_do_not_contain_the_query() -> None:
    prompts = [
        Prompt((Example("a", "A"),), "q"),
        Prompt((Example("b", "B"),), "r"),
        Prompt((Example("q", "Q"),), "s"),  # shows the first one's query
        Prompt((Example("c", "C"),), "q"),  # also asks the first one's query
    ]
    reads = {prompt.text: torch.full((3, 4), 10.0**i) for i, prompt in enumerate(prompts)}
    vectors = tv.extract_across(Canned(reads), prompts)
    expected = [10.0, (1 + 100 + 1000) / 3, (1 + 10 + 1000) / 3, 10.0]
    torch.testing.assert_close(vectors.values[:, 0, 0], torch.tensor(expected))
    assert vectors.method == "extract_across"


def test_nothing_left_to_average_says_how_to_get_more() -> None:
    prompts = [Prompt((Example("a", "A"),), "q"), Prompt((Example("q", "Q"),), "r")]
    reads = {prompt.text: torch.zeros(3, 4) for prompt in prompts}
    with pytest.raises(ValueError, match="prompt 0: every other prompt shows or asks 'q'.*sample more prompts"):
        tv.extract_across(Canned(reads), prompts)


def test_vectors_are_the_mean_of_plain_hooks(twins: Twins) -> None:
    task = tv.Task("upper", ("a", "bb", "cold", "dog", "quick brown", "fox", "wet", "x"), str.upper)
    prompts = task.sample(3, shots=3, seed=0)
    substitutes = task.substitutes(prompts, 3, seed=0)
    expected = torch.stack(
        [
            torch.stack(
                [plain_run(twins, ids_of(twins.bridge, prompt.asking(query).text))[0] for query in queries]
            ).mean(0)
            for prompt, queries in zip(prompts, substitutes, strict=True)
        ]
    )
    vectors = tv.extract(twins.bridge, prompts, substitutes)
    torch.testing.assert_close(vectors.values, expected, atol=1e-4, rtol=0)
    alone = [tv.extract(twins.bridge, [p], [s]).values for p, s in zip(prompts, substitutes, strict=True)]
    torch.testing.assert_close(torch.cat(alone), vectors.values, atol=1e-5, rtol=0)


def test_provenance_says_where_the_numbers_come_from() -> None:
    bridge = make_twins("llama").bridge
    task = tv.Task("upper", tuple("abcdefgh"), str.upper)
    prompts = task.sample(2, shots=2, seed=0, template=tv.Template())
    substitutes = task.substitutes(prompts, 2, seed=0)
    vectors = tv.extract(tv.LocalEngine(bridge, prepend_bos=False), prompts, substitutes)
    assert (vectors.model, vectors.task, vectors.template) == ("tiny-llama", "upper", tv.Template())
    assert vectors.prompts == tuple(prompt.text for prompt in prompts)
    assert vectors.substitutes == tuple(substitutes)
    assert (vectors.method, vectors.prepend_bos) == ("extract", False)
    assert vectors.versions["torch"] == torch.__version__
    mean = vectors.mean()
    assert (len(mean), mean.method, mean.prompts) == (1, "mean of extract", vectors.prompts)
    torch.testing.assert_close(mean.values[0], (vectors.values[0] + vectors.values[1]) / 2)
    assert vectors.options == {"substitutes": 2, "site": "resid_post", "positions": "last"}
    assert (vectors.bos, vectors.site, vectors.op, vectors.layers) == ("", tv.RESID_POST, "set", (0, 1, 2, 3))
    assert repr(vectors) == "TaskVectors('upper' of tiny-llama: 2 prompts, 4 layers, d_model 32, extract)"


PROMPTS = [Prompt((Example("a", "A"),), "q"), Prompt((Example("b", "B"),), "r")]


@pytest.mark.parametrize(
    ("prompts", "substitutes", "message"),
    [
        ([], [], "a list of at least one Prompt"),
        (PROMPTS[0], [["x"]], "a list of at least one Prompt"),
        (["text"], [["x"]], "prompt 0 is a str; write it as Prompt"),
        (PROMPTS, [["x"]], "2 prompts and substitutes for 1"),
        (PROMPTS, [["x", "y"], ["x"]], r"the same number of substitutes, 1 or more; got \[2, 1\]"),
        (PROMPTS, [[], []], r"the same number of substitutes, 1 or more; got \[0, 0\]"),
        (PROMPTS, ["xy", "zw"], "substitutes of prompt 0 are the text 'xy'"),
        (PROMPTS, [["x"], ["b"]], "prompt 1: substitute 'b' is its query or one of its demonstrations"),
        (PROMPTS, [["q"], ["x"]], "prompt 0: substitute 'q' is its query"),
    ],
)
def test_wrong_use_of_extract_says_what_to_do(  # type: ignore[no-untyped-def]
    as_users_run_it: None, prompts, substitutes, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tv.extract(Canned({}), prompts, substitutes)


def test_layers_do_not_count_from_the_end(as_users_run_it: None) -> None:
    vectors = TaskVectors(torch.zeros(1, 3, 4), "m", "t")
    wrong: list[Any] = [-1, 3, 1.0, True, "0"]
    for layer in wrong:
        with pytest.raises(ValueError, match=f"layer {layer} is not one of m: layer l .* 0 to 2"):
            vectors.at(layer)


def test_vectors_are_copied_and_hold_no_nan() -> None:
    mine = torch.ones(2, 3, 4)
    vectors = TaskVectors(mine, "m", "t")
    mine.zero_()
    vectors.at(1).zero_()
    assert (vectors.values == 1).all()
    with pytest.raises(ValueError, match="vector of prompt 0 at layer 2 of m holds NaN"):
        TaskVectors(torch.tensor([[[0.0], [1.0], [float("nan")]]]), "m", "t")


def test_values_of_another_shape_are_refused(as_users_run_it: None) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 4\) are not task vectors"):
        TaskVectors(torch.zeros(3, 4), "m", "t")
