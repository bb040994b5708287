"""A task: finite inputs, a function on them, and a rule for accepting answers."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tv_lens.prompts import Example, Prompt, Template
from tv_lens.tasks.readers import are_texts, check_characters, csv_pairs, is_text, json_pairs, short
from tv_lens.tasks.rules import Accepts, exact_match


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
        check_characters(self.name, (self.name, *self.inputs))
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
                    f"task {name!r}: {short(text)} -> {short(output)} is not a pair of texts; write numbers in quotes"
                )
            check_characters(name, (text, *answers))
            table[text], others = answers[0], tuple(answers[1:])
            if accepted.setdefault(answers[0], others) != others:
                raise ValueError(
                    f"task {name!r}: the answer {short(answers[0])} of {short(text)} has the alternatives "
                    f"{short(others)}, and elsewhere {short(accepted[answers[0]])}; give it the same "
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
        readers = {".json": json_pairs, ".csv": csv_pairs}
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
            if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and is_text(pair[0]) and are_texts(pair[1])):
                raise ValueError(f"{path}, {where}: {short(pair)} is not a pair of non-empty texts, input and output")
            if pair[0] in seen:
                raise ValueError(f"{path}, {where}: input {short(pair[0])} stands a second time; keep one")
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


def _some(texts: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(short, texts[:most])) + (", ..." if len(texts) > most else "")
