"""Contrastive pairs: their invariants, their files, and those of the library."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tv_lens as tv
from tv_lens import ContrastivePairs

PAIRS = ContrastivePairs("mood", tuple(f"Good {i}" for i in range(10)), tuple(f"Bad {i}" for i in range(10)))


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        ((), (), "0 positive and 0 negative"),
        (("a",), ("b", "c"), "'m': 1 positive and 2 negative texts"),
        (("a", "x"), ("b", "x"), "'m', pair 2: both texts are 'x', so there is no contrast"),
        (("a", " "), ("b", "x"), "'m', pair 2: .' ', 'x'. is not a pair of non-empty texts"),
        (("a", "x"), ("", "x"), "2 problems\n  pair 1: .*non-empty texts\n  pair 2: both texts"),
        (("a\ud800",), ("b",), "half of a surrogate pair"),
    ],
)
def test_what_has_no_contrast_is_refused(positive: tuple[str, ...], negative: tuple[str, ...], message: str) -> None:
    with pytest.raises(tv.TvLensError, match=message):
        ContrastivePairs("m", positive, negative)


def test_split_parts_keep_pairs_together() -> None:
    first, second = PAIRS.split(0.3, seed=1)
    assert (len(first), len(second), first.name) == (3, 7, "mood")
    together = [*zip(first.positive, first.negative, strict=True), *zip(second.positive, second.negative, strict=True)]
    assert sorted(together) == sorted(zip(PAIRS.positive, PAIRS.negative, strict=True))
    assert PAIRS.split(0.3, seed=1)[0] == first != PAIRS.split(0.3, seed=2)[0]
    with pytest.raises(tv.TvLensError, match="0.01 of 10 pairs leaves 0 and 10"):
        PAIRS.split(0.01, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("t.json", [{"positive": "Good day", "negative": "Bad day"}, {"negative": "Bad", "positive": "Good"}], {}),
        ("t.jsonl", '{"positive": "Good day", "negative": "Bad day"}\n{"positive": "Good", "negative": "Bad"}', {}),
        ("t.csv", "id,positive,negative\n1,Good day,Bad day\n2,Good,Bad\n", {}),
        ("t.csv", "up;down\nGood day;Bad day\nGood;Bad\n", {"positive": "up", "negative": "down"}),
        ("t.json", {"a": [{"chosen": "Good day", "rejected": "Bad day"}, {"chosen": "Good", "rejected": "Bad"}],
                    "b": [{"chosen": "x", "rejected": "y"}]}, {"under": "a"}),
    ],
)  # fmt: skip
def test_files_of_pairs(tmp_path: Path, name: str, content: Any, options: dict[str, Any]) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert ContrastivePairs.from_file(path, **options) == ContrastivePairs(
        "t", ("Good day", "Good"), ("Bad day", "Bad")
    )


def test_a_prompt_is_put_before_both_texts(tmp_path: Path) -> None:
    """With a space, unless there is white space already. White space of the file is kept: it is part of the tokens."""
    path = tmp_path / "t.json"
    sides = {"answer_matching_behavior": " (A)", "answer_not_matching_behavior": "(B)"}
    records = [{"question": "Is it?\n (A) Yes\n (B) No", **sides}, {"question": "Was it?\n\nAnswer: ", **sides}]
    path.write_text(json.dumps(records))
    pairs = ContrastivePairs.from_file(path)
    assert pairs.positive == ("Is it?\n (A) Yes\n (B) No (A)", "Was it?\n\nAnswer:  (A)")
    assert pairs.negative == ("Is it?\n (A) Yes\n (B) No (B)", "Was it?\n\nAnswer: (B)")
    columns = {"positive": "answer_not_matching_behavior", "negative": "answer_matching_behavior"}
    swapped = ContrastivePairs.from_file(path, **columns)
    assert (swapped.positive, swapped.negative) == (pairs.negative, pairs.positive)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ([{"a": "x", "b": "y"}], {}, "the columns are 'a', 'b'; say positive=..., negative=..."),
        ([{"a": "x", "b": "y"}], {"positive": "a"}, "say positive=..., negative=..."),
        (
            [{"a": "x", "b": "y"}],
            {"positive": "a", "negative": "c"},
            "there is no column 'c'; the columns are 'a', 'b'",
        ),
        ([["a", "b"]], {}, "the columns are not named"),
        ([{"positive": "x", "negative": "y"}, {"positive": "x"}], {}, "t.json, record 2: .*non-empty texts"),
        ([{"positive": "x", "negative": 1}], {}, "record 1: .*non-empty texts"),
        ([{"prompt": None, "chosen": "x", "rejected": "y"}], {}, "record 1: .*non-empty texts"),
        ({"a": [{"chosen": "x", "rejected": "y"}], "b": [{"chosen": "x", "rejected": "y"}]}, {}, "several parts: 'a'"),
    ],
)
def test_a_file_that_is_not_pairs_says_why(tmp_path: Path, content: Any, options: dict[str, Any], message: str) -> None:
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(tv.TvLensError, match=message) as raised:
        ContrastivePairs.from_file(tmp_path / "t.json", **options)
    assert str(tmp_path / "t.json") in str(raised.value)


def test_the_librarys_pairs_are_different_clean_sentences() -> None:
    library = tv.contrastive_library()
    assert list(library) == ["politeness", "certainty", "formality"]
    for name, pairs in library.items():
        assert pairs.name == name
        assert len(pairs) >= 24
        texts = [*pairs.positive, *pairs.negative]
        assert len(set(texts)) == len(texts)
        for text in texts:
            assert re.fullmatch(r"[A-Z][^|\s]*( [^|\s]+)*[.?!]", text), text
    polite = (
        "please",
        "thank",
        "would",
        "sorry",
        "afraid",
        "may i",
        "pardon",
        "appreciate",
        "grateful",
        "excuse",
        "kindly",
    )
    marked = [any(word in text.lower() for word in polite) for text in library["politeness"].positive]
    assert sum(marked) >= len(marked) - 3
    assert not any("please" in text.lower() or "thank" in text.lower() for text in library["politeness"].negative)
