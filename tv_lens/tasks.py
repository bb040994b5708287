"""A task: finite inputs, a function on them, and a rule for accepting answers."""

from __future__ import annotations

import csv
import functools
import io
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tv_lens.engines import engine_for
from tv_lens.prompts import Example, Prompt, Template

Accepts = Callable[[str, str], bool]


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the texts are equal, white space around them apart: "cold" and " cold" are equal, though
    their token ids differ. Case counts.

    >>> exact_match(" cold", "cold"), exact_match("Cold", "cold"), exact_match("col", "cold")
    (True, False, False)
    """
    return prediction.strip() == answer.strip()


def starts_with(prediction: str, answer: str) -> bool:
    """Whether the prediction begins with the whole answer, or is the whole first word of it.

    The second half lets a completion cut short (`max_new_tokens=1`) score on an answer of several words.
    A fragment of a word is never enough; `first_token(model)` also accepts a first *token* that is less
    than a word.

    >>> starts_with("cold and wet", "cold"), starts_with("New", "New York"), starts_with("T", "Taipei")
    (True, True, False)
    """
    prediction, answer = prediction.strip(), answer.strip()
    if not answer:
        return not prediction
    return prediction.startswith(answer) or prediction == answer.split()[0]


def first_token(model: Any, template: Template = Template()) -> Accepts:
    """A rule for `max_new_tokens=1`: whether the prediction is the whole first token of the answer, as `model`
    writes that behind `template`'s query, or right by `starts_with`. So "Tai" may stand for "Taipei", where that
    is its first token, and "T" may not.

    Where answers begin with a piece of their input (gerunds: "sing" of "singing"), this accepts a mere repetition.
    """
    engine = engine_for(model)

    def ids(text: str) -> list[int]:
        [tokens] = engine.batches([text])
        return [int(token) for token in tokens.ids[0]]

    @functools.cache
    def first(answer: str) -> str:
        asked, shown = ids(template.ask("x")), ids(template.show(Example("x", answer)))
        same = next(i for i, token in enumerate(shown) if asked[i : i + 1] != [token])
        return engine.decode(torch.tensor([shown[same : same + 1]]))[0].strip()

    def accepts(prediction: str, answer: str) -> bool:
        return starts_with(prediction, answer) or (prediction.strip() == first(answer) != "")

    return accepts


@dataclass(frozen=True, repr=False)
class Task:
    """A finite list of different inputs, the function that answers them, and what counts as right.

    Raises:
        ValueError: an input stands twice, so that demonstrations could give the answer away.
    """

    name: str
    inputs: tuple[str, ...]
    answer: Callable[[str], str]
    accepts: Accepts = exact_match

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
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

    @classmethod
    def from_mapping(cls, name: str, mapping: Mapping[str, str], *, accepts: Accepts = exact_match) -> Task:
        """A task that looks its answers up.

        >>> Task.from_mapping("antonyms", {"hot": "cold", "big": "small"}).answer("hot")
        'cold'

        Raises:
            ValueError: an input or an output is not a text.
        """
        table = dict(mapping)
        for text, output in table.items():
            if not isinstance(text, str) or not isinstance(output, str):
                raise ValueError(
                    f"task {name!r}: {text!r} -> {output!r} is not a pair of texts; write numbers in quotes"
                )
        return cls(name, tuple(table), table.__getitem__, accepts)

    @classmethod
    def from_file(cls, path: str | Path, *, accepts: Accepts = exact_match) -> Task:
        """The task in a file, named after it.

        `.json` is an object of inputs and outputs or a list of pairs; `.csv` has two columns, and a first
        row `input,output` is taken as a header. UTF-8, with or without a byte order mark.

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

        seen: dict[str, str] = {}
        for where, pair in pairs:
            if not (
                isinstance(pair, (list, tuple))
                and len(pair) == 2
                and all(isinstance(text, str) and text.strip() for text in pair)
            ):
                raise ValueError(f"{path}, {where}: {pair!r} is not a pair of non-empty texts, input and output")
            if pair[0] in seen:
                raise ValueError(f"{path}, {where}: input {pair[0]!r} stands a second time; keep one")
            seen[pair[0]] = pair[1]
        if not seen:
            raise ValueError(f"{path}: no pairs in it")
        return cls.from_mapping(path.stem, seen, accepts=accepts)

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
            used = {prompt.query, *(example.input for example in prompt.examples)}
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


def _some(texts: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(repr, texts[:most])) + (", ..." if len(texts) > most else "")


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
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(f"line {reader.line_num}", row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == ["input", "output"]:
        rows = rows[1:]
    return rows
