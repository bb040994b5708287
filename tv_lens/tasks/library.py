"""The library: the paper's tasks (Hendel et al. 2023, table 1) and some more, lists of our own."""

from __future__ import annotations

import csv
import functools
import io
import random
import string
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files

from tv_lens.tasks.rules import starts_with
from tv_lens.tasks.task import Task


@functools.cache
def _table(name: str) -> list[dict[str, list[str]]]:
    """A file of `data/`: a row for each word or name, `|` between alternatives."""
    text = (files("tv_lens.tasks") / "data" / f"{name}.csv").read_text(encoding="utf-8")
    return [{column: cell.split("|") for column, cell in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _listed(table: str, source: str, target: str) -> dict[str, str | Sequence[str]]:
    return {row[source][0]: row[target] for row in _table(table)}


def _computed(inputs: Sequence[str], answer: Callable[[str], str]) -> dict[str, str | Sequence[str]]:
    return {text: answer(text) for text in inputs}


def _lists(items: Sequence[str]) -> list[str]:
    """A hundred different lists of 2 to 6 different items, the same in every process."""
    draw = random.Random(f"lists of {len(items)} items")
    lists = {", ".join(draw.sample(items, draw.randint(2, 6))): None for _ in range(200)}
    return list(lists)[:100]


def _both_ways(
    mapping: Mapping[str, str | Sequence[str]], inverse: Mapping[str, str | Sequence[str]]
) -> dict[str, str | Sequence[str]]:
    """A mapping mixed with its inverse. An input of both would have two answers, so it is left out."""
    both = set(mapping) & set(inverse)
    return {text: answer for text, answer in [*mapping.items(), *inverse.items()] if text not in both}


def library() -> dict[str, Task]:
    """The built-in tasks, all scored by `starts_with`: the paper's four categories, and bijections.

    Algorithmic tasks are generated; the others look up lists of at least 60 pairs. Tasks on single letters have 25 or
    26 inputs (50 or 52 if upper and lower case make different ones). A bijection mixes a mapping with its inverse (Dong
    et al. 2025, arXiv 2506.09048): the input says which of the two is asked for.

    Returns:
        Tasks by name.

    Examples:
        >>> task = library()["antonyms"]
        >>> task.category, task.answer("happy"), task.right("unhappy", "sad")
        ('linguistic', 'sad', True)
    """
    low, both = string.ascii_lowercase, (string.ascii_lowercase, string.ascii_uppercase)
    letters, numbers = _lists(low), _lists([str(i) for i in range(100)])
    ranks = {letter: str(i) for i, letter in enumerate(low, start=1)}
    algorithmic = {
        "next_letter": _computed([c for case in both for c in case[:-1]], lambda c: chr(ord(c) + 1)),
        "previous_letter": _computed([c for case in both for c in case[1:]], lambda c: chr(ord(c) - 1)),
        "list_first": _computed(letters, lambda text: text.split(", ")[0]),
        "list_last": _computed(letters, lambda text: text.split(", ")[-1]),
        "list_min": _computed(numbers, lambda text: min(text.split(", "), key=int)),
        "list_max": _computed(numbers, lambda text: max(text.split(", "), key=int)),
        "list_length": _computed(letters, lambda text: str(len(text.split(", ")))),
        "to_upper": _computed(low, str.upper),
        "to_lower": _computed(low.upper(), str.lower),
        "char_to_int": _computed(low, ranks.__getitem__),
        "int_to_char": _computed(list(ranks.values()), lambda number: low[int(number) - 1]),
    }
    linguistic = {
        "present_to_gerund": _listed("verbs", "present", "gerund"),
        "present_to_past": _listed("verbs", "present", "past"),
        "present_to_past_participle": _listed("verbs", "present", "participle"),
        "singular_to_plural": _listed("nouns", "singular", "plural"),
        "plural_to_singular": _listed("nouns", "plural", "singular"),
        "antonyms": _listed("antonyms", "word", "opposite"),
    }
    translation = {
        f"{short[source]}_{short[target]}": _listed("words", source, target)
        for short in [{"english": "en", "french": "fr", "spanish": "es", "italian": "it"}]
        for foreign in ("french", "spanish", "italian")
        for source, target in (("english", foreign), (foreign, "english"))
    }
    knowledge = {
        "country_to_capital": _listed("countries", "country", "capital"),
        "person_to_language": _listed("people", "person", "language"),
        "place_to_continent": _listed("places", "place", "continent"),
        "place_to_religion": _listed("religions", "place", "religion"),
    }
    bijection = {
        "swap_upper_lower": _both_ways(algorithmic["to_upper"], algorithmic["to_lower"]),
        "swap_singular_plural": _both_ways(linguistic["singular_to_plural"], linguistic["plural_to_singular"]),
    }
    categories = {
        "algorithmic": algorithmic,
        "linguistic": linguistic,
        "translation": translation,
        "knowledge": knowledge,
        "bijection": bijection,
    }
    return {
        name: Task.from_mapping(name, mapping, accepts=starts_with, category=category)
        for category, tasks in categories.items()
        for name, mapping in tasks.items()
    }
