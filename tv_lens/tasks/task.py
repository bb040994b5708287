"""A task: finite inputs, a function on them, and a rule for accepting answers."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tv_lens.errors import TvLensError, warn
from tv_lens.prompts import PAPER, Example, Prompt, PromptFormat, Template
from tv_lens.tasks.cleaning import clean
from tv_lens.tasks.describe import check_characters, short, some
from tv_lens.tasks.layout import Choice, Column, lay_out
from tv_lens.tasks.readers import Content, read_content
from tv_lens.tasks.records import Records, content_of
from tv_lens.tasks.rules import Accepts, Rule, starts_with

if TYPE_CHECKING:
    from tv_lens.engines import Model


def _no_answer(text: str) -> str:
    """The answer of a task without a function; no such task can be made."""
    raise TvLensError(f"there is no answer to {text!r}")


@dataclass(frozen=True, repr=False)
class Task:
    """A finite list of different inputs, the function that answers them, and what counts as correct. For pairs use
    `Task.from_mapping`, `Task.from_file` or `Task.from_records`.

    Attributes:
        name: the task's name.
        inputs: different texts.
        answer: a function from an input to its answer.
        accepts: the rule: a function of prediction and answer, or a named `Rule`.
        accepted: maps an answer to its accepted alternatives, whatever the input.
        category: what kind of task it is.
        accepted_for: maps an input to the alternatives of its answer, if the same answer has others elsewhere.

    Raises:
        TvLensError: a duplicate input, so that demonstrations could give the answer away, or a text that no model or
            file could take.

    Examples:
        >>> task = Task("upper", ("a", "b", "c", "d"), str.upper)
        >>> [prompt] = task.sample(1, shots=2, seed=0)
        >>> prompt.shots, prompt.answer == prompt.query.upper()
        (2, True)
    """

    name: str
    inputs: tuple[str, ...]
    answer: Callable[[str], str] = _no_answer
    accepts: Accepts | Rule = starts_with
    accepted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    category: str = ""
    accepted_for: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.answer is _no_answer or isinstance(self.inputs, (str, Mapping)) or not callable(self.answer):
            raise TvLensError(
                f"task {self.name!r} is made of texts and a function that answers them, Task({self.name!r}, texts, "
                f"function); for a table of pairs write Task.from_mapping({self.name!r}, {{'hot': 'cold', ...}})"
            )
        object.__setattr__(self, "inputs", tuple(self.inputs))
        check_characters(self.name, (self.name, *self.inputs))
        repeated = [text for text, count in Counter(self.inputs).items() if count > 1]
        if repeated:
            raise TvLensError(
                f"task {self.name!r}: {len(repeated)} duplicate inputs ({some(repeated)}); "
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

    def answers(self, answer: str, query: str | None = None) -> tuple[str, ...]:
        """The answer, and the alternatives that count as well, for the input `query`.

        Args:
            answer: an answer.
            query: the input that was asked; needed if the answer has different alternatives for different inputs.

        Returns:
            The answer, and the alternatives that count as well.

        Raises:
            TvLensError: the alternatives depend on the input, and none is given.
        """
        if query is None:
            differing = [text for text in self.accepted_for if self.answer(text) == answer]
            if differing:
                raise TvLensError(
                    f"task {self.name!r}: which alternatives of {short(answer)} count depends on the input "
                    f"({some(differing)}); pass query=..."
                )
        elif query in self.accepted_for and self.answer(query) == answer:
            return (answer, *self.accepted_for[query])
        return (answer, *self.accepted.get(answer, ()))

    def right(
        self, prediction: str, answer: str, ids: Sequence[int] | None = None, *, query: str | None = None
    ) -> bool:
        """Whether the rule accepts the prediction for the answer or for one of its alternatives.

        Args:
            prediction: a generated answer.
            answer: the expected answer.
            ids: the prediction's token ids, for a rule that compares those.
            query: the input that was asked; needed if the answer has different alternatives for different inputs.

        Returns:
            True if it does.

        Raises:
            TvLensError: the alternatives depend on the input, and none is given.
        """
        rule, answers = self.rule, self.answers(answer, query)
        by_ids = ids is not None and rule.accepts_ids is not None and any(rule.accepts_ids(ids, a) for a in answers)
        return by_ids or any(rule(prediction, each) for each in answers)

    def decided(self, beginning: str, answer: str, *, query: str | None = None) -> bool | None:
        """The verdict of `right` on every prediction that starts with `beginning`, itself included; None if they
        differ, or if the rule cannot say.

        Args:
            beginning: the beginning of a generated answer.
            answer: the expected answer.
            query: as in `right`.

        Returns:
            The verdict of `right` on every prediction with that beginning, or None.

        Raises:
            TvLensError: the alternatives depend on the input, and none is given.

        Examples:
            >>> task = Task.from_mapping("antonyms", {"big": ["small", "little"]})
            >>> task.decided("li", "small"), task.decided("little by", "small"), task.decided("la", "small")
            (None, True, False)
        """
        rule = self.rule
        if rule.decide is None or not rule.can_decide:
            return None
        verdicts = [rule.decide(beginning, each) for each in self.answers(answer, query)]
        if any(verdicts):
            return True
        return None if None in verdicts else False

    @classmethod
    def from_mapping(
        cls,
        name: str,
        mapping: Mapping[str, str | Sequence[str]],
        *,
        accepts: Accepts | Rule = starts_with,
        category: str = "",
    ) -> Task:
        """A task that looks its answers up.

        Args:
            name: the task's name.
            mapping: answers by input. Of several answers in a list the first is shown in demonstrations and all are
                accepted.
            accepts: the rule for answers.
            category: what kind of task it is.

        Returns:
            The task.

        Raises:
            TvLensError: an input or an answer is not a text.

        Examples:
            >>> task = Task.from_mapping("antonyms", {"hot": "cold", "big": ["small", "little"]})
            >>> task.answer("big"), task.right("little", "small"), task.right("cold", "small")
            ('small', True, False)

            >>> task = Task.from_mapping("opposites", {"light": ["dark", "heavy"], "bright": "dark"})
            >>> task.right("heavy", "dark", query="light"), task.right("heavy", "dark", query="bright")
            (True, False)
        """
        if not isinstance(mapping, Mapping):
            raise TvLensError(
                f"task {name!r}: a mapping is a dictionary from input to output, not a {type(mapping).__name__}; write "
                f"Task.from_mapping({name!r}, dict(pairs)) for a list of pairs, or Task.from_records for dictionaries"
            )
        table: dict[str, tuple[str, ...]] = {}
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
            table[text] = tuple(answers)
        first = {text: answers[0] for text, answers in table.items()}
        alternatives: dict[str, set[tuple[str, ...]]] = {}
        for answer, *others in table.values():
            alternatives.setdefault(answer, set()).add(tuple(others))
        accepted = {answer: next(iter(each)) for answer, each in alternatives.items() if len(each) == 1}
        return cls(
            name,
            tuple(table),
            first.__getitem__,
            accepts,
            {answer: others for answer, others in accepted.items() if others},
            category,
            {text: answers[1:] for text, answers in table.items() if answers[0] not in accepted},
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        input: Column | None = None,
        output: Column | None = None,
        under: str | None = None,
        header: bool | None = None,
        accepts: Accepts | Rule = starts_with,
    ) -> Task:
        """The task in a file, named after it.

        `.json` is an object of inputs and outputs, a list of pairs or records, or an object that holds one of these;
        `.jsonl` has a pair or record on each line; `.csv` and `.tsv` are tables. UTF-8, with or without a byte order
        mark. A list of outputs holds alternatives: the first is shown, all are accepted. Other kinds of file can be
        registered with `tv_lens.tasks.readers.reader`.

        White space around a table's cells is dropped. A repeated input has all its outputs accepted. One warning says
        what was changed: repeats, numbers read as text, and a first row that may be a header.

        Args:
            path: the file.
            input: the column or key of the inputs: its name, or its number, counted from 0.
            output: the same for the outputs.
            under: the key of the part to read, or several keys joined by dots.
            header: whether the first row of a table names its columns.
            accepts: the rule for answers.

        Returns:
            The task, named after the file.

        Raises:
            OSError: the file cannot be read.
            TvLensError: another kind of file, text that cannot be read, columns or parts that are not clear (the
                message lists them), or rows that are not pairs of non-empty texts. All problems are in one message,
                with the file and the line or entry.
        """
        path = Path(path)
        content = read_content(path)
        return cls._of(path.stem, content, Choice(input, output, under, header), str(path), accepts)

    @classmethod
    def from_records(
        cls,
        name: str,
        records: Records,
        *,
        input: Column | None = None,
        output: Column | None = None,
        accepts: Accepts | Rule = starts_with,
        category: str = "",
    ) -> Task:
        """A task from records in memory. Repeated inputs and numbers are treated as in `from_file`, with one warning.

        Args:
            name: the task's name.
            records: a list of dictionaries or pairs, a dictionary of columns, a `datasets.Dataset`, a pandas data
                frame, or a pandas series (inputs in its index, outputs in its values).
            input: the column of the inputs, as in `from_file`.
            output: the column of the outputs, as in `from_file`.
            accepts: the rule for answers.
            category: what kind of task it is.

        Returns:
            The task.

        Raises:
            TvLensError: columns that are not clear (the message lists them), or records that are not pairs of non-empty
                texts.

        Examples:
            >>> records = [{"thing": "kettle", "where": "kitchen"}]
            >>> task = Task.from_records("rooms", records, input="thing", output="where")
            >>> task.answer("kettle")
            'kitchen'
        """
        source = f"task {name!r}"
        try:
            content = content_of(records)
        except TvLensError as error:
            raise TvLensError(f"{source}: {error}") from error
        return replace(cls._of(name, content, Choice(input, output), source, accepts), category=category)

    @classmethod
    def _of(cls, name: str, content: Content, choice: Choice, source: str, accepts: Accepts | Rule) -> Task:
        """The task in `content`, with one warning about all that was changed."""
        try:
            layout = lay_out(content, choice)
        except TvLensError as error:
            raise TvLensError(f"{source}: {error}") from error
        pairs = clean(source, layout.pairs)
        try:
            task = cls.from_mapping(name, pairs.outputs, accepts=accepts)
        except TvLensError as error:
            raise TvLensError(f"{source}: {error}") from error
        notes = [*layout.notes, *pairs.notes()]
        if notes:
            warn(f"{source}: {'; '.join(notes)}")
        return task

    def sample(self, n: int, *, shots: int, seed: int, template: PromptFormat = PAPER) -> list[Prompt]:
        """Prompts with different queries, each after different demonstrations, none of them the query.

        The same seed gives the same prompts in every process, and fewer of them are the first of more.

        Args:
            n: how many prompts.
            shots: how many demonstrations each shows.
            seed: the same seed gives the same result.
            template: how they are written.

        Returns:
            The prompts, with their answers.

        Raises:
            TvLensError: the task has too few inputs, or an answer contains the text at which `template` ends answers.
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
        self._check_separator(template)
        draw = self._draw("sample", seed)
        queries = draw.sample(self.inputs, len(self.inputs))[:n]
        prompts = []
        for query in queries:
            shown = draw.sample([other for other in self.inputs if other != query], shots)
            examples = tuple(Example(text, self.answer(text)) for text in shown)
            prompts.append(Prompt(examples, query, answer=self.answer(query), template=template, task=self.name))
        return prompts

    def substitutes(self, prompts: Sequence[Prompt], k: int, *, seed: int) -> list[tuple[str, ...]]:
        """Different substitute queries for each prompt: never its query, never one of its demonstrations (the paper's
        section 3.2 asks for another query than the one tested; its code can draw a demonstration).

        Args:
            prompts: few-shot prompts.
            k: how many for each prompt.
            seed: the same seed gives the same result.

        Returns:
            The queries of each prompt, for `extract`.

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
        """Two tasks with no input in common.

        Args:
            fraction: the share of the inputs in the first, rounded.
            seed: the same seed gives the same result.

        Returns:
            The two tasks.

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

    def _check_separator(self, template: PromptFormat) -> None:
        """Raise TvLensError if an answer contains the text at which answers end, so that it could never be right."""
        stop = template.stop
        if not stop:
            return
        answers = {text: self.answer(text).strip() for text in self.inputs}
        cut = [text for text, answer in answers.items() if stop in answer]
        if not cut:
            return
        advice = "use a format that ends answers otherwise, or change the answer"
        if isinstance(template, Template):
            texts = [*answers, *answers.values()]
            line_ends = ("\n" * n for n in itertools.count(1))
            working = next(each for each in line_ends if not any(each in text for text in texts))
            advice = f"use Template({template.example!r}, separator={working!r}), or change the answer"
        raise TvLensError(
            f"task {self.name!r}: the answer {short(answers[cut[0]])} of {short(cut[0])} contains {stop!r}, "
            f"where answers end, so it could never be right ({len(cut)} of {len(answers)} answers do); {advice}"
        )

    def known(
        self, model: Model, *, shots: int, seed: int, template: PromptFormat = PAPER, max_new_tokens: int = 8
    ) -> Task:
        """The part of the task that the model can do: the inputs that it answers correctly after demonstrations. Each
        input is asked once (Todd et al. 2024, section 2.1, evaluate on such a part).

        The name of the result holds the share, as in `antonyms (known: 51 of 94)`, and so does the provenance of
        vectors and experiments that come from it. Accuracies on it depend on this choice: few-shot accuracy is high
        because of it.

        Args:
            model: a bridge, or an engine to control batch size and BOS.
            shots: how many demonstrations each query is asked after.
            seed: of the demonstrations.
            template: how they are written.
            max_new_tokens: how many tokens an answer may have.

        Returns:
            A task of these inputs.

        Raises:
            TvLensError: too few inputs, or none that the model answers correctly.
        """
        from tv_lens.evidence.known import known_part

        return known_part(model, self, shots=shots, seed=seed, template=template, max_new_tokens=max_new_tokens)

    def _draw(self, purpose: str, seed: int) -> random.Random:
        # Keyed by text, which `random` hashes with SHA-512: one seed for everything draws independently
        # for each purpose, whatever PYTHONHASHSEED is.
        return random.Random(f"{purpose}:{self.name}:{seed}")


def fingerprint(task: Task) -> str:
    """A digest of the task's pairs and alternatives, in their order."""
    pairs = [(text, *task.answers(task.answer(text), text)) for text in task.inputs]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
