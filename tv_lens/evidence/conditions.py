"""Does a vector work outside the prompts it is from? The conditions of Todd et al. 2024: zero-shot, few-shot with
permuted outputs, free text, and another template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from tv_lens.edits import Layers
from tv_lens.engines import Engine, Model, Prefixes, engine_for
from tv_lens.errors import TvLensError
from tv_lens.evidence.results import PLAIN, Conditions, Score
from tv_lens.evidence.scoring import patched_scores, unpatched_score
from tv_lens.patching import Placement
from tv_lens.prompts import FreeText, Prompt, PromptFormat, check_prompts
from tv_lens.shuffling import shuffle_outputs, without_demonstrations
from tv_lens.tasks import Rule, Task, starts_with
from tv_lens.vectors import TaskVectors

# Vectors, and the layer or layers that they are written to.
Placed: TypeAlias = tuple[TaskVectors, int | Layers]


@dataclass(frozen=True)
class Condition:
    """A way to ask: few-shot prompts become the prompts that are run, into which a vector is written as they are.

    Attributes:
        name: its name in tables.
        prompts: a function of few-shot prompts and a seed; it returns the prompts that are run.
        rule: replaces the task's own rule, if it is given.
        every_step: whether vectors that are added are added again at each generated token.
        about: tells it from others of the same name in the settings of a run, such as its template.

    Examples:
        >>> zero_shot.prompts(prompts, 0)[0].shots
        0
    """

    name: str
    prompts: Callable[[Sequence[Prompt], int], list[Prompt]]
    rule: Rule | None = None
    every_step: bool = False
    about: str = ""

    @property
    def identity(self) -> str:
        """The name, with what tells the condition from others of this name."""
        return f"{self.name} ({self.about})" if self.about else self.name

    def task(self, task: Task) -> Task:
        """The task under the condition's rule.

        Args:
            task: any task.

        Returns:
            The task under the condition's rule.
        """
        return task if self.rule is None else replace(task, accepts=self.rule)


zero_shot = Condition("zero-shot", without_demonstrations)
"""The query alone."""
shuffled_few_shot = Condition("shuffled few-shot", shuffle_outputs)
"""After demonstrations with permuted outputs."""


def other_template(template: PromptFormat, name: str = "another template") -> Condition:
    """The queries alone in another format than the vectors were made with.

    Args:
        template: that format.
        name: the condition's name in tables.

    Returns:
        A condition for `across_conditions` and `compare`.

    Examples:
        >>> other_template(tv.Template("Q: {input}\\nA: {output}")).name
        'another template'
    """
    return Condition(name, _QueriesIn(template), about=repr(template))


def free_text(text: str, name: str = "free text") -> Condition:
    """The query in a sentence. An answer is correct if it occurs anywhere in what is generated, as whole words; added
    vectors are added at every generated token.

    Args:
        text: the sentence, such as "The opposite of {input} is".
        name: the condition's name in tables.

    Returns:
        A condition for `across_conditions` and `compare`.

    Examples:
        >>> free_text("The opposite of {input} is").name
        'free text'
    """
    return Condition(name, _QueriesIn(FreeText(text)), rule=Rule("occurs", occurs), every_step=True, about=repr(text))


@dataclass(frozen=True)
class _QueriesIn:
    """The queries alone, in this format. A class, and not a closure, so that other processes can be sent it."""

    template: PromptFormat

    def __call__(self, given: Sequence[Prompt], seed: int) -> list[Prompt]:
        return [replace(prompt, examples=(), template=self.template) for prompt in given]


def occurs(prediction: str, answer: str) -> bool:
    """Whether the answer occurs in the prediction, as whole words.

    Args:
        prediction: a generated text.
        answer: the expected answer.

    Returns:
        True if it does.

    Examples:
        >>> occurs("is a large, cold place", "cold"), occurs("is colder", "cold"), occurs("scold", "cold")
        (True, False, False)
    """
    wanted = answer.strip()
    begins = [i for i in range(len(prediction)) if wanted and prediction.startswith(wanted, i)]
    return any(_begins_word(prediction, i) and starts_with(prediction[i:], wanted) for i in begins)


def _begins_word(text: str, i: int) -> bool:
    return i == 0 or text[i - 1].isspace() or starts_with(text[i - 1 :], text[i - 1])


def across_conditions(
    model: Model,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: Mapping[str, Placed],
    *,
    conditions: Sequence[Condition] = (zero_shot, shuffled_few_shot),
    max_new_tokens: int = 8,
    seed: int = 0,
) -> Conditions:
    """Score the answers to the queries of few-shot `prompts` under each condition, without a vector and with each of
    `vectors`.

    Vectors are written the way they are meant. Use prompts that had no part in making them or in choosing the layer.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        task: the task, whose rule scores the answers.
        prompts: few-shot prompts.
        vectors: vectors and their layer by name: `{"function vector": (vector, 9), "mean": (other, 20)}`.
        conditions: ways to ask.
        max_new_tokens: how many tokens an answer may have.
        seed: the same seed gives the same result.

    Returns:
        Scores by condition and vector.

    Raises:
        TvLensError: as `patch_generate`, two conditions of one name, or vectors named "no vector".

    Examples:
        >>> result = tv.across_conditions(model, task, prompts, {"vector": (vector, 2)}, max_new_tokens=2)
        >>> list(result.scores), result.vectors
        (['zero-shot', 'shuffled few-shot'], ('no vector', 'vector'))
    """
    engine = engine_for(model)
    check_prompts(prompts)
    names = [condition.name for condition in conditions]
    if not names or len(set(names)) < len(names) or PLAIN in vectors:
        raise TvLensError(f"conditions are {names}, vectors {list(vectors)}; give different names, none {PLAIN!r}")
    scores: dict[str, dict[str, Score]] = {}
    for condition in conditions:
        asked = condition.prompts(prompts, seed)
        scores[condition.name] = {
            name: condition_score(engine, task, asked, condition, placed, max_new_tokens)
            for name, placed in {PLAIN: None, **vectors}.items()
        }
    return Conditions(scores)


def condition_score(
    engine: Engine,
    task: Task,
    asked: Sequence[Prompt],
    condition: Condition,
    placed: Placed | None,
    max_new_tokens: int,
    *,
    kept: Prefixes | None = None,
) -> Score:
    """The score of the answers to prompts that the condition has made, with vectors or without."""
    judged = condition.task(task)
    if placed is None:
        return unpatched_score(engine, judged, asked, max_new_tokens, kept=kept)
    meant = placed[0].write
    every_step = meant.every_step or (condition.every_step and meant.op != "set")
    placement = Placement(replace(meant, every_step=every_step), keep_demonstrations=True)
    [scored] = patched_scores(engine, judged, asked, [placed], placement, max_new_tokens, kept=kept)
    return scored
