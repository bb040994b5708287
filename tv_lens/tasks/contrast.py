"""Contrastive pairs: texts that show a property, each with a text that shows its opposite.

They have no inputs and outputs, so they are not a `Task`. A direction is read from them as the mean difference of their
activations, mean(h(positive) - h(negative)).
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tv_lens.errors import TvLensError
from tv_lens.prompts import has_lone_surrogate
from tv_lens.tasks.cleaning import raise_problems
from tv_lens.tasks.describe import check_characters, short, surrogate_fault
from tv_lens.tasks.layout import Choice, part_of, record_names
from tv_lens.tasks.names import contrast_columns
from tv_lens.tasks.readers import Located, Number, Object, Table, read_content


@dataclass(frozen=True, repr=False)
class ContrastivePairs:
    """Pairs of texts, one with a property and one without it.

    Attributes:
        name: the property.
        positive: texts with it.
        negative: texts without it; `positive[i]` and `negative[i]` are a pair.

    Raises:
        TvLensError: no pairs, lists of different lengths, an empty text, or two equal texts in a pair.

    Examples:
        >>> pairs = ContrastivePairs("mood", ("What a fine day.",), ("What a dull day.",))
        >>> len(pairs), pairs.positive[0]
        (1, 'What a fine day.')
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "positive", tuple(self.positive))
        object.__setattr__(self, "negative", tuple(self.negative))
        if not len(self.positive) == len(self.negative) > 0:
            raise TvLensError(
                f"contrastive pairs {self.name!r}: {len(self.positive)} positive and {len(self.negative)} negative "
                "texts; give as many of either, at least one"
            )
        check_characters(self.name, (self.name,))
        problems = [
            (f"pair {i}", fault)
            for i, pair in enumerate(zip(self.positive, self.negative, strict=True), start=1)
            if (fault := _fault(*pair))
        ]
        raise_problems(f"contrastive pairs {self.name!r}", problems)

    def __repr__(self) -> str:
        return f"ContrastivePairs({self.name!r}, {len(self)} pairs)"

    def __len__(self) -> int:
        return len(self.positive)

    def split(self, fraction: float, *, seed: int) -> tuple[ContrastivePairs, ContrastivePairs]:
        """Two sets with no pair in common.

        Args:
            fraction: the share of the pairs in the first, rounded.
            seed: the same seed gives the same result.

        Returns:
            The two sets.

        Raises:
            TvLensError: one of the two would be empty.
        """
        first = round(fraction * len(self))
        if not 0 < first < len(self):
            raise TvLensError(
                f"contrastive pairs {self.name!r}: {fraction} of {len(self)} pairs leaves {first} and "
                f"{len(self) - first}; both parts need at least one"
            )
        order = random.Random(f"split:{self.name}:{seed}").sample(range(len(self)), len(self))
        return self._of(order[:first]), self._of(order[first:])

    def _of(self, chosen: Sequence[int]) -> ContrastivePairs:
        positive = tuple(self.positive[i] for i in chosen)
        negative = tuple(self.negative[i] for i in chosen)
        return ContrastivePairs(self.name, positive, negative)

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        positive: str | None = None,
        negative: str | None = None,
        prompt: str | None = None,
        under: str | None = None,
    ) -> ContrastivePairs:
        """The pairs in a file of records (the kinds of file that `Task.from_file` reads), named after it.

        Columns are known by their usual names: `answer_matching_behavior` and `answer_not_matching_behavior` after a
        `question` (Rimsky et al. 2024, arXiv 2312.06681), `positive` and `negative`, or `chosen` and `rejected` after a
        `prompt`. A prompt is put before both texts, with a space if neither has white space there.

        Args:
            path: the file.
            positive: the column of the texts that show the property.
            negative: the column of those that show its opposite.
            prompt: the column of what comes before both, if there is one.
            under: the key of the part to read, or several keys joined by dots.

        Returns:
            The pairs, named after the file.

        Raises:
            OSError: the file cannot be read.
            TvLensError: as `Task.from_file`, or columns that are not clear; the message lists them.
        """
        path = Path(path)
        content = read_content(path)
        try:
            records = _records(part_of(content, Choice(positive, negative, under))[0])
            columns = _columns(record_names(records), positive, negative, prompt)
        except TvLensError as error:
            raise TvLensError(f"{path}: {error}") from error
        texts, problems = list[tuple[str, str]](), list[tuple[str, str]]()
        for location, record in records:
            pair = _texts(record, *columns)
            fault = _fault(*pair)
            if fault:
                problems.append((location, fault))
            texts.append(pair)
        raise_problems(str(path), problems)
        return cls(path.stem, tuple(one for one, _ in texts), tuple(other for _, other in texts))


def _fault(positive: str, negative: str) -> str:
    """What is wrong with a pair, if something is."""
    for text in (positive, negative):
        if not isinstance(text, str) or not text.strip():
            return f"{short((positive, negative))} is not a pair of non-empty texts"
        if has_lone_surrogate(text):
            return surrogate_fault(text)
    return f"both texts are {short(positive)}, so there is no contrast" if positive == negative else ""


def _records(part: Table | Sequence[Located]) -> list[Located]:
    if not isinstance(part, Table):
        return list(part)
    if not part.rows:
        raise TvLensError("no pairs in it")
    (_, names), *rows = part.rows if part.names is None else [("", part.names), *part.rows]
    return [(location, dict(zip(names, cells, strict=False))) for location, cells in rows]


def _columns(
    names: Sequence[Any], positive: str | None, negative: str | None, prompt: str | None
) -> tuple[str, str, str | None]:
    listed = ", ".join(map(short, names[:20]))
    usual = contrast_columns(names)
    if usual is not None:
        positive, negative, prompt = positive or usual[0], negative or usual[1], prompt or usual[2]
    if positive is None or negative is None:
        raise TvLensError(f"the columns are {listed or 'not named'}; say positive=..., negative=... and prompt=...")
    unknown = [name for name in (positive, negative, prompt) if name is not None and name not in names]
    if unknown:
        raise TvLensError(f"there is no column {unknown[0]!r}; the columns are {listed}")
    return positive, negative, prompt


def _texts(record: object, positive: str, negative: str, prompt: str | None) -> tuple[str, str]:
    """Both texts after the prompt; one that is missing or not a text is empty."""
    values = dict(record) if isinstance(record, (Object, Mapping)) else {}
    before = "" if prompt is None else values.get(prompt)
    return _joined(before, values.get(positive)), _joined(before, values.get(negative))


def _joined(before: object, text: object) -> str:
    for each in (before, text):
        if not isinstance(each, str) or isinstance(each, Number):
            return ""
    before, text = str(before), str(text)
    if not text.strip():
        return ""
    needs_space = before and not before[-1].isspace() and not text[0].isspace()
    return before + (" " if needs_space else "") + text


def contrastive_library() -> dict[str, ContrastivePairs]:
    """The built-in contrastive pairs, 24 to 30 short sentences each: the first of a pair is polite, certain or formal,
    the second says the same without.

    Returns:
        Pairs by name.

    Examples:
        >>> contrastive_library()["certainty"]
        ContrastivePairs('certainty', 30 pairs)
    """
    return {name: _listed(name) for name in ("politeness", "certainty", "formality")}


def _listed(name: str) -> ContrastivePairs:
    text = (files("tv_lens.tasks") / "data" / "contrasts" / f"{name}.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text)))
    return ContrastivePairs(name, tuple(row["positive"] for row in rows), tuple(row["negative"] for row in rows))
