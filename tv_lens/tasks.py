"""A task: finite inputs, a function on them, and a rule for accepting answers; and a library of tasks."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import random
import reprlib
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from tv_lens.prompts import Example, Prompt, Template, half_character

Accepts = Callable[[str, str], bool]


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the texts are equal, white space around them apart: "cold" and " cold" are equal, though
    their token ids differ. Case counts.

    >>> exact_match(" cold", "cold"), exact_match("Cold", "cold"), exact_match("col", "cold")
    (True, False, False)
    """
    return prediction.strip() == answer.strip()


def starts_with(prediction: str, answer: str) -> bool:
    """Whether the prediction begins with the whole answer, or is the whole first word of it. A longer word or
    number ("colder", "30") does not begin with the answer "cold" or "3".

    The second half lets a completion cut short (`max_new_tokens=1`) score on an answer of several words.
    A fragment of a word is never enough; `first_token(model)` also accepts a first *token* that is less
    than a word.

    >>> starts_with("cold and wet", "cold"), starts_with("New", "New York"), starts_with("T", "Taipei")
    (True, True, False)
    >>> starts_with("cold_water()", "cold"), starts_with("colder", "cold"), starts_with("30", "3")
    (True, False, False)
    """
    prediction, answer = prediction.strip(), answer.strip()
    if not answer:
        return not prediction
    begins = prediction.startswith(answer) and not _goes_on(answer[-1], prediction[len(answer) :])
    return begins or prediction == answer.split()[0]


def _goes_on(last: str, rest: str) -> bool:
    """Whether `rest` goes on with the word or number that `last` ends, in scripts that put spaces between words."""
    return all(unicodedata.category(char) in ("Lu", "Ll", "Lt", "Nd") for char in (last, rest[:1] or " "))


def first_token(model: Any, template: Template = Template()) -> Accepts:
    """A rule for `max_new_tokens=1`: whether the prediction is the whole first token of the answer, as `model`
    writes that behind `template`'s query, or right by `starts_with`. So "Tai" may stand for "Taipei", where that
    is its first token, and "T" may not.

    A first token that is only part of a character is not accepted. Where answers begin with a piece of their
    input (gerunds: "sing" of "singing"), this accepts a mere repetition.
    """
    import torch  # here, as tasks can be listed without either

    from tv_lens.engines import engine_for

    engine = engine_for(model)

    def ids(text: str) -> list[int]:
        [tokens] = engine.batches([text])
        return [int(token) for token in tokens.ids[0]]

    @functools.cache
    def first(answer: str) -> str:
        asked, shown = ids(template.ask("x")), ids(template.show(Example("x", answer)))
        same = next((i for i, token in enumerate(shown) if asked[i : i + 1] != [token]), len(shown) - 1)
        return engine.decode(torch.tensor([shown[same : same + 1]]))[0].strip()

    def accepts(prediction: str, answer: str) -> bool:
        token = first(answer)
        # Part of a character reads as U+FFFD whichever it is, so it cannot be told right from wrong.
        told = token and "\ufffd" not in token
        return starts_with(prediction, answer) or bool(told and prediction.strip() == token)

    return accepts


@dataclass(frozen=True, repr=False)
class Task:
    """A finite list of different inputs, the function that answers them, and what counts as right.

    `accepted` holds, by answer, what is right as well; `category` is what kind of task it is.

    Raises:
        ValueError: an input stands twice, so that demonstrations could give the answer away; or is no text that a
            model or a file could take.
    """

    name: str
    inputs: tuple[str, ...]
    answer: Callable[[str], str]
    accepts: Accepts = exact_match
    accepted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    category: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        _check_characters(self.name, (self.name, *self.inputs))
        repeated = [text for text, count in Counter(self.inputs).items() if count > 1]
        if repeated:
            raise ValueError(
                f"task {self.name!r}: {len(repeated)} inputs stand more than once ({_some(repeated)}); "
                "keep one of each, or a query could be among its own demonstrations"
            )

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {len(self.inputs)} inputs)"

    def __len__(self) -> int:
        return len(self.inputs)

    def right(self, prediction: str, answer: str) -> bool:
        """Whether the task's rule accepts the prediction for the answer, or for another that is right as well."""
        return any(self.accepts(prediction, each) for each in (answer, *self.accepted.get(answer, ())))

    @classmethod
    def from_mapping(
        cls,
        name: str,
        mapping: Mapping[str, str | Sequence[str]],
        *,
        accepts: Accepts = exact_match,
        category: str = "",
    ) -> Task:
        """A task that looks its answers up. Of several answers in a list the first is shown in demonstrations
        and all are accepted.

        >>> task = Task.from_mapping("antonyms", {"hot": "cold", "big": ["small", "little"]})
        >>> task.answer("big"), task.right("little", "small"), task.right("cold", "small")
        ('small', True, False)

        Raises:
            ValueError: an input or an answer is not a text, or one answer has other alternatives elsewhere.
        """
        table: dict[str, str] = {}
        accepted: dict[str, tuple[str, ...]] = {}
        for text, output in mapping.items():
            answers = [output] if isinstance(output, str) else output
            if not (
                isinstance(answers, (list, tuple))
                and answers
                and all(isinstance(each, str) for each in [text, *answers])
            ):
                raise ValueError(
                    f"task {name!r}: {_short(text)} -> {_short(output)} is not a pair of texts; write numbers in quotes"
                )
            _check_characters(name, (text, *answers))
            table[text], others = answers[0], tuple(answers[1:])
            if accepted.setdefault(answers[0], others) != others:
                raise ValueError(
                    f"task {name!r}: the answer {_short(answers[0])} of {_short(text)} has the alternatives "
                    f"{_short(others)}, and elsewhere {_short(accepted[answers[0]])}; give it the same "
                    "everywhere, or another first answer"
                )
        others_only = {answer: others for answer, others in accepted.items() if others}
        return cls(name, tuple(table), table.__getitem__, accepts, others_only, category)

    @classmethod
    def from_file(cls, path: str | Path, *, accepts: Accepts = exact_match) -> Task:
        """The task in a file, named after it.

        `.json` is an object of inputs and outputs or a list of pairs, where a list of outputs holds
        alternatives, the first the one to show; `.csv` has two columns, and a first row `input,output` is
        taken as a header. UTF-8, with or without a byte order mark.

        Raises:
            ValueError: another kind of file, text that cannot be read, a row that is no pair of non-empty
                texts, or an input that stands twice. The message names the file and the place.
        """
        path = Path(path)
        readers = {".json": _json_pairs, ".csv": _csv_pairs}
        if path.suffix.lower() not in readers:
            raise ValueError(f"{path}: a task is read from .json or .csv, not {path.suffix!r}")
        try:
            # Bytes first: a text-mode read would turn a "\r\n" inside a quoted CSV cell into "\n".
            pairs = readers[path.suffix.lower()](path.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

        seen: dict[str, str | Sequence[str]] = {}
        for where, pair in pairs:
            if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and _is_text(pair[0]) and _are_texts(pair[1])):
                raise ValueError(f"{path}, {where}: {_short(pair)} is not a pair of non-empty texts, input and output")
            if pair[0] in seen:
                raise ValueError(f"{path}, {where}: input {_short(pair[0])} stands a second time; keep one")
            seen[pair[0]] = pair[1]
        if not seen:
            raise ValueError(f"{path}: no pairs in it")
        try:
            return cls.from_mapping(path.stem, seen, accepts=accepts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def sample(self, n: int, *, shots: int, seed: int, template: Template = Template()) -> list[Prompt]:
        """`n` prompts with different queries, each after `shots` different demonstrations, none of them
        the query. The same seed gives the same prompts in every process, and fewer of them are the first
        of more.

        Raises:
            ValueError: the task has too few inputs for it.
        """
        if n < 1 or shots < 0:
            raise ValueError(f"task {self.name!r}: cannot sample {n} prompts of {shots} shots")
        if n > len(self.inputs):
            raise ValueError(
                f"task {self.name!r}: {n} prompts need {n} different queries and there are {len(self.inputs)} "
                "inputs; a repeated query would count twice as evidence. Ask for fewer, or add inputs"
            )
        if shots + 1 > len(self.inputs):
            raise ValueError(
                f"task {self.name!r}: {shots} shots and a query need {shots + 1} different inputs and there "
                f"are {len(self.inputs)}; use fewer shots, or add inputs"
            )
        draw = self._draw("sample", seed)
        queries = draw.sample(self.inputs, len(self.inputs))[:n]
        return [
            Prompt(
                tuple(
                    Example(text, self.answer(text))
                    for text in draw.sample([other for other in self.inputs if other != query], shots)
                ),
                query,
                self.answer(query),
                template,
                self.name,
            )
            for query in queries
        ]

    def substitutes(self, prompts: Sequence[Prompt], k: int, *, seed: int) -> list[tuple[str, ...]]:
        """`k` different substitute queries for each prompt: never its query, never one of its demonstrations
        (the paper's section 3.2 asks for another query than the one tested; its code can draw a demonstration).

        Raises:
            ValueError: a prompt leaves fewer than `k` inputs over.
        """
        if k < 1:
            raise ValueError(f"task {self.name!r}: {k} substitutes give nothing to read; use 1 or more")
        draw = self._draw("substitutes", seed)
        chosen = []
        for i, prompt in enumerate(prompts):
            used = prompt.inputs
            free = [text for text in self.inputs if text not in used]
            if len(free) < k:
                raise ValueError(
                    f"prompt {i}: {k} substitutes are asked for and {len(free)} of the {len(self.inputs)} inputs of "
                    f"task {self.name!r} are neither its query nor a demonstration; use fewer shots or "
                    "substitutes, or add inputs"
                )
            chosen.append(tuple(draw.sample(free, k)))
        return chosen

    def split(self, fraction: float, *, seed: int) -> tuple[Task, Task]:
        """Two tasks with no input in common; the first has `fraction` of the inputs, rounded.

        Raises:
            ValueError: one of the two would be empty.
        """
        first = round(fraction * len(self.inputs))
        if not 0 < first < len(self.inputs):
            raise ValueError(
                f"task {self.name!r}: {fraction} of {len(self.inputs)} inputs leaves {first} and "
                f"{len(self.inputs) - first}; both parts need at least one"
            )
        order = self._draw("split", seed).sample(self.inputs, len(self.inputs))
        return replace(self, inputs=tuple(order[:first])), replace(self, inputs=tuple(order[first:]))

    def _draw(self, purpose: str, seed: int) -> random.Random:
        # Keyed by text, which `random` hashes with SHA-512: one seed for everything draws independently
        # for each purpose, and PYTHONHASHSEED has no say.
        return random.Random(f"{purpose}:{self.name}:{seed}")


def fingerprint(task: Task) -> str:
    """Tells whether two tasks have the same pairs and alternatives, in the same order."""
    pairs = [(text, task.answer(text), *task.accepted.get(task.answer(text), ())) for text in task.inputs]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def rule_name(rule: Accepts) -> str:
    """What a rule is called in settings: its name, and for rules that are not tv_lens's own a digest of their code, as
    two lambdas have one name.
    """
    code = getattr(rule, "__code__", None)
    if code is None:
        return type(rule).__qualname__
    if rule.__module__ == __name__:
        return rule.__name__
    constants = [each for each in code.co_consts if not hasattr(each, "co_code")]
    digest = hashlib.sha256(code.co_code + repr((constants, code.co_names)).encode()).hexdigest()[:8]
    return f"{rule.__qualname__} {digest}"


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _are_texts(value: object) -> bool:
    return _is_text(value) or (isinstance(value, list) and bool(value) and all(map(_is_text, value)))


def _some(texts: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(_short, texts[:most])) + (", ..." if len(texts) > most else "")


# As long as an error can well be, also of a cell of a million characters or a list nested a thousand deep.
_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 80
_short = _brief.repr


def _check_characters(task: str, texts: Iterable[str]) -> None:
    """Raises ValueError where a text holds half of a surrogate pair: no tokenizer and no file takes it."""
    for text in texts:
        if half_character(text):
            raise ValueError(
                f"task {_short(task)}: {_short(text)} holds half of a surrogate pair, which is no character; write the "
                "whole character, or save the data as UTF-8"
            )


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a repeated key is seen rather than overwritten."""


def _json_pairs(text: str) -> list[tuple[str, Any]]:
    try:
        data = json.loads(text, object_pairs_hook=_Object)
    except RecursionError as error:
        raise ValueError("nested too deeply for a task") from error
    if not isinstance(data, list):
        raise ValueError(f"holds a {type(data).__name__}; expected an object of inputs and outputs, or a list of pairs")
    kind = "key" if isinstance(data, _Object) else "pair"
    return [(f"{kind} {i}", pair) for i, pair in enumerate(data, start=1)]


def _csv_pairs(text: str) -> list[tuple[str, Any]]:
    if "\0" in text:
        raise ValueError("holds NUL characters; is it UTF-16? Save it as UTF-8")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(f"line {reader.line_num}", row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["input", "output"]:
        rows = rows[1:]
    return rows


# The library: the paper's tasks (Hendel et al. 2023, table 1) and some more, lists of our own.


@functools.cache
def _table(name: str) -> list[dict[str, list[str]]]:
    """A file of `data/`: a row for each word or name, `|` between alternatives."""
    text = (files("tv_lens") / "data" / f"{name}.csv").read_text(encoding="utf-8")
    return [{column: cell.split("|") for column, cell in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _listed(table: str, source: str, target: str) -> dict[str, str | Sequence[str]]:
    return {row[source][0]: row[target] for row in _table(table)}


def _computed(inputs: Sequence[str], answer: Callable[[str], str]) -> dict[str, str | Sequence[str]]:
    return {text: answer(text) for text in inputs}


def _lists(items: Sequence[str]) -> list[str]:
    """A hundred different lists of 2 to 6 different items, the same in every process."""
    draw = random.Random(f"lists of {len(items)} items")
    found = {", ".join(draw.sample(items, draw.randint(2, 6))): None for _ in range(200)}
    return list(found)[:100]


def library() -> dict[str, Task]:
    """The built-in tasks by name, in the paper's four categories, all scored by `starts_with`.

    Algorithmic tasks are generated; the others look up lists of at least 60 pairs. Tasks on single letters have
    25 or 26 inputs (50 where upper and lower case make different ones).

    >>> task = library()["antonyms"]
    >>> task.category, task.answer("happy"), task.right("unhappy", "sad")
    ('linguistic', 'sad', True)
    """
    low, both = string.ascii_lowercase, (string.ascii_lowercase, string.ascii_uppercase)
    letters, numbers = _lists(low), _lists([str(i) for i in range(100)])
    places = {letter: str(i) for i, letter in enumerate(low, start=1)}
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
        "char_to_int": _computed(low, places.__getitem__),
        "int_to_char": _computed(list(places.values()), lambda number: low[int(number) - 1]),
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
    categories = {
        "algorithmic": algorithmic,
        "linguistic": linguistic,
        "translation": translation,
        "knowledge": knowledge,
    }
    return {
        name: Task.from_mapping(name, mapping, accepts=starts_with, category=category)
        for category, tasks in categories.items()
        for name, mapping in tasks.items()
    }
