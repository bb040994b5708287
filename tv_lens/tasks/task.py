"""A task: finite inputs, a function on them, and a rule for accepting answers."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tv_lens.errors import TvLensError
from tv_lens.prompts import PAPER, Example, Prompt, PromptFormat
from tv_lens.tasks.readers import check_characters, read_pairs, short
from tv_lens.tasks.rules import Accepts, Rule, starts_with


@dataclass(frozen=True, repr=False)
class Task:
    """A finite list of different inputs, the function that answers them, and what counts as correct.

    `accepts` is the rule: a function of prediction and answer, or a named `Rule`. `accepted` maps an answer to its
    accepted alternatives. `category` is what kind of task it is.

    Raises:
        TvLensError: a duplicate input, so that demonstrations could give the answer away, or a text that no model or
            file could take.
    """

    name: str
    inputs: tuple[str, ...]
    answer: Callable[[str], str]
    accepts: Accepts | Rule = starts_with
    accepted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    category: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        check_characters(self.name, (self.name, *self.inputs))
        repeated = [text for text, count in Counter(self.inputs).items() if count > 1]
        if repeated:
            raise TvLensError(
                f"task {self.name!r}: {len(repeated)} duplicate inputs ({_some(repeated)}); "
                "keep one of each, or a query could be among its own demonstrations"
            )

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {len(self.inputs)} inputs)"

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def rule(self) -> Rule:
        """The rule under its name."""
        return Rule.of(self.accepts)

    def answers(self, answer: str) -> tuple[str, ...]:
        """The answer, and the alternatives that count as well."""
        return (answer, *self.accepted.get(answer, ()))

    def right(self, prediction: str, answer: str, ids: Sequence[int] | None = None) -> bool:
        """Whether the rule accepts the prediction for the answer or for one of its alternatives; `ids` are the
        prediction's token ids, for a rule that compares those.
        """
        rule, answers = self.rule, self.answers(answer)
        by_ids = ids is not None and rule.accepts_ids is not None and any(rule.accepts_ids(ids, a) for a in answers)
        return by_ids or any(rule(prediction, each) for each in answers)

    @classmethod
    def from_mapping(
        cls,
        name: str,
        mapping: Mapping[str, str | Sequence[str]],
        *,
        accepts: Accepts | Rule = starts_with,
        category: str = "",
    ) -> Task:
        """A task that looks its answers up. Of several answers in a list the first is shown in demonstrations
        and all are accepted.

        >>> task = Task.from_mapping("antonyms", {"hot": "cold", "big": ["small", "little"]})
        >>> task.answer("big"), task.right("little", "small"), task.right("cold", "small")
        ('small', True, False)

        Raises:
            TvLensError: an input or an answer is not a text, or one answer has different alternatives in two places.
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
                raise TvLensError(
                    f"task {name!r}: {short(text)} -> {short(output)} is not a pair of texts; write numbers in quotes"
                )
            check_characters(name, (text, *answers))
            table[text], others = answers[0], tuple(answers[1:])
            if accepted.setdefault(answers[0], others) != others:
                raise TvLensError(
                    f"task {name!r}: the answer {short(answers[0])} of {short(text)} has the alternatives "
                    f"{short(others)}, and elsewhere {short(accepted[answers[0]])}; give it the same "
                    "everywhere, or another first answer"
                )
        with_others = {answer: others for answer, others in accepted.items() if others}
        return cls(name, tuple(table), table.__getitem__, accepts, with_others, category)

    @classmethod
    def from_file(cls, path: str | Path, *, accepts: Accepts | Rule = starts_with) -> Task:
        """The task in a file, named after it.

        `.json` is an object of inputs and outputs or a list of pairs, where a list of outputs holds alternatives, the
        first the one to show. `.csv` has two columns, and a first row `input,output` is taken as a header. UTF-8, with
        or without a byte order mark. Other kinds can be registered with `tv_lens.tasks.readers.reader`.

        Raises:
            OSError: the file cannot be read.
            TvLensError: another kind of file, text that cannot be read, a row that is not a pair of non-empty texts, or
                a duplicate input. The message names the file and the line or entry.
        """
        path = Path(path)
        pairs = read_pairs(path)
        try:
            return cls.from_mapping(path.stem, pairs, accepts=accepts)
        except TvLensError as error:
            raise TvLensError(f"{path}: {error}") from error

    def sample(self, n: int, *, shots: int, seed: int, template: PromptFormat = PAPER) -> list[Prompt]:
        """`n` prompts with different queries, each after `shots` different demonstrations, none of them the query.

        The same seed gives the same prompts in every process, and fewer of them are the first of more.

        Raises:
            TvLensError: the task has too few inputs.
        """
        if n < 1 or shots < 0:
            raise TvLensError(f"task {self.name!r}: cannot sample {n} prompts of {shots} shots")
        if n > len(self.inputs):
            raise TvLensError(
                f"task {self.name!r}: {n} prompts need {n} different queries and there are {len(self.inputs)} "
                "inputs; a repeated query would count twice as evidence. Ask for fewer, or add inputs"
            )
        if shots + 1 > len(self.inputs):
            raise TvLensError(
                f"task {self.name!r}: {shots} shots and a query need {shots + 1} different inputs and there "
                f"are {len(self.inputs)}; use fewer shots, or add inputs"
            )
        draw = self._draw("sample", seed)
        queries = draw.sample(self.inputs, len(self.inputs))[:n]
        prompts = []
        for query in queries:
            shown = draw.sample([other for other in self.inputs if other != query], shots)
            examples = tuple(Example(text, self.answer(text)) for text in shown)
            prompts.append(Prompt(examples, query, answer=self.answer(query), template=template, task=self.name))
        return prompts

    def substitutes(self, prompts: Sequence[Prompt], k: int, *, seed: int) -> list[tuple[str, ...]]:
        """`k` different substitute queries for each prompt: never its query, never one of its demonstrations
        (the paper's section 3.2 asks for another query than the one tested; its code can draw a demonstration).

        Raises:
            TvLensError: a prompt leaves fewer than `k` inputs.
        """
        if k < 1:
            raise TvLensError(f"task {self.name!r}: {k} substitutes give nothing to read; use 1 or more")
        draw = self._draw("substitutes", seed)
        chosen = []
        for i, prompt in enumerate(prompts):
            used = prompt.inputs
            free = [text for text in self.inputs if text not in used]
            if len(free) < k:
                raise TvLensError(
                    f"prompt {i}: {k} substitutes are asked for and {len(free)} of the {len(self.inputs)} inputs of "
                    f"task {self.name!r} are neither its query nor a demonstration; use fewer shots or "
                    "substitutes, or add inputs"
                )
            chosen.append(tuple(draw.sample(free, k)))
        return chosen

    def split(self, fraction: float, *, seed: int) -> tuple[Task, Task]:
        """Two tasks with no input in common; the first has `fraction` of the inputs, rounded.

        Raises:
            TvLensError: one of the two would be empty.
        """
        first = round(fraction * len(self.inputs))
        if not 0 < first < len(self.inputs):
            raise TvLensError(
                f"task {self.name!r}: {fraction} of {len(self.inputs)} inputs leaves {first} and "
                f"{len(self.inputs) - first}; both parts need at least one"
            )
        order = self._draw("split", seed).sample(self.inputs, len(self.inputs))
        return replace(self, inputs=tuple(order[:first])), replace(self, inputs=tuple(order[first:]))

    def _draw(self, purpose: str, seed: int) -> random.Random:
        # Keyed by text, which `random` hashes with SHA-512: one seed for everything draws independently
        # for each purpose, whatever PYTHONHASHSEED is.
        return random.Random(f"{purpose}:{self.name}:{seed}")


def fingerprint(task: Task) -> str:
    """A digest of the task's pairs and alternatives, in their order."""
    pairs = [(text, *task.answers(task.answer(text))) for text in task.inputs]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def _some(texts: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(short, texts[:most])) + (", ..." if len(texts) > most else "")
