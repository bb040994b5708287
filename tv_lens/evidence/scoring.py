"""Score answers: the model's own, and those with vectors written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import Edits, Layers
from tv_lens.engines import Engine, Prefixes
from tv_lens.errors import TvLensError
from tv_lens.evidence.results import Score
from tv_lens.generation import Answer, Completions, answer, check_new_tokens, encode
from tv_lens.measuring import Measured, measure
from tv_lens.patching import Placement, check_vectors, edits_for
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors

# Vectors, and the layer or layers that they are written to.
Patched: TypeAlias = tuple[TaskVectors, int | Layers]


def score(task: Task, prompts: Sequence[Prompt], texts: Sequence[str]) -> Score:
    """How answers score by the task's own rule, against each prompt's answer, or the task's if a prompt holds none.

    A rule that compares token ids gets those of `Completions`; other texts are judged as texts.

    Args:
        task: the task, whose rule scores the answers.
        prompts: the prompts that were answered.
        texts: the answers, one for each prompt.

    Returns:
        Which answers are correct, with accuracy and interval.

    Raises:
        TvLensError: no prompts, or another number of texts.

    Examples:
        >>> score = tv.score(task, prompts, [prompt.answer for prompt in prompts])
        >>> score.accuracy
        1.0
    """
    check_prompts(prompts)
    if len(texts) != len(prompts):
        raise TvLensError(f"{len(texts)} texts for {len(prompts)} prompts; give one for each")
    ids = texts.tokens.tolist() if isinstance(texts, Completions) else [None] * len(texts)
    return _scored(task, prompts, texts, ids)


def _scored(task: Task, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[Sequence[int] | None]) -> Score:
    """The texts, with their token ids if these are known, judged by the task's rule."""
    answers = _expected(task, prompts)
    verdicts = [
        task.right(text, each, own, query=prompt.query)
        for prompt, text, each, own in zip(prompts, texts, answers, ids, strict=True)
    ]
    return Score(tuple(texts), answers, tuple(verdicts))


def _expected(task: Task, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Each prompt's answer, or the task's if the prompt holds none."""
    return tuple(task.answer(p.query) if p.answer is None else p.answer for p in prompts)


def unpatched_score(
    engine: Engine, task: Task, prompts: Sequence[Prompt], max_new_tokens: int, *, kept: Prefixes | None = None
) -> Score:
    """The score of the model's own answers to the prompts as they are."""
    n_tokens = tokens_for(engine, task, max_new_tokens)
    [answers] = answer(engine, prompts, encode(engine, prompts, n_tokens), [Edits()], n_tokens, kept=kept)
    return judged(task, prompts, answers)


def patched_scores(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    conditions: Sequence[Patched],
    placement: Placement,
    max_new_tokens: int,
    *,
    kept: Prefixes | None = None,
) -> list[Score]:
    """The score of the patched answers under each condition, all of them side by side. Whether demonstrations are kept
    is decided by the first condition's vectors, everything else by each condition's own.

    With `kept`, what comes before the edits is kept for other calls with the same prompts.
    """
    run = _Prepared.of(engine, task, prompts, conditions, placement, max_new_tokens)
    answers = answer(engine, run.prompts, run.ids, run.edits, run.n_tokens, kept=kept)
    return [judged(task, prompts, each) for each in answers]


def decided_scores(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    conditions: Sequence[Patched],
    placement: Placement,
    max_new_tokens: int,
    *,
    kept: Prefixes | None = None,
) -> list[Score]:
    """As `patched_scores`, with the same verdicts, but each answer stops as soon as the task's rule has decided."""
    if not task.rule.can_decide:
        return patched_scores(engine, task, prompts, conditions, placement, max_new_tokens, kept=kept)
    expected = _expected(task, prompts)

    def decided(number: int, beginning: str) -> bool:
        return task.decided(beginning, expected[number], query=prompts[number].query) is not None

    run = _Prepared.of(engine, task, prompts, conditions, placement, max_new_tokens)
    answers = answer(engine, run.prompts, run.ids, run.edits, run.n_tokens, decided=decided, kept=kept)
    return [judged(task, prompts, each) for each in answers]


def measured_scores(  # noqa: PLR0913 - its options are keywords
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    conditions: Sequence[Patched],
    placement: Placement,
    max_new_tokens: int,
    *,
    few_shot: FewShotRun,
    kept: Prefixes | None = None,
) -> list[Score]:
    """As `patched_scores`, with the log-probability of each prompt's answer and the divergence from few-shot."""
    run = _Prepared.of(engine, task, prompts, conditions, placement, max_new_tokens)
    asked = _answered(task, run.prompts)
    results = measure(engine, asked, run.ids, run.edits, run.n_tokens, teacher=few_shot.next_logprobs, kept=kept)
    return [_measured(task, prompts, each) for each in results]


@dataclass(frozen=True, eq=False)
class FewShotRun:
    """The few-shot answers, and the distribution of the next token after each few-shot prompt."""

    score: Score
    next_logprobs: Float[Tensor, "prompt d_vocab"]


def few_shot_run(engine: Engine, task: Task, prompts: Sequence[Prompt], max_new_tokens: int) -> FewShotRun:
    """The model's own answers to few-shot prompts, and what patched runs are compared with."""
    n_tokens = tokens_for(engine, task, max_new_tokens)
    ids = encode(engine, prompts, n_tokens)
    [result] = measure(engine, _answered(task, prompts), ids, [Edits()], n_tokens, keep_next=True)
    assert result.next_logprobs is not None
    return FewShotRun(_measured(task, prompts, result), result.next_logprobs)


def unpatched_measured(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    few_shot: FewShotRun,
    kept: Prefixes | None = None,
) -> Score:
    """As `unpatched_score`, with log-probabilities and divergences."""
    n_tokens = tokens_for(engine, task, max_new_tokens)
    ids = encode(engine, prompts, n_tokens)
    asked, teacher = _answered(task, prompts), few_shot.next_logprobs
    [result] = measure(engine, asked, ids, [Edits()], n_tokens, teacher=teacher, kept=kept)
    return _measured(task, prompts, result)


def _answered(task: Task, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts, each with its answer."""
    return [replace(prompt, answer=own) for prompt, own in zip(prompts, _expected(task, prompts), strict=True)]


def _measured(task: Task, prompts: Sequence[Prompt], result: Measured) -> Score:
    scored = judged(task, prompts, result.answers)
    divergences = None if result.divergences is None else tuple(result.divergences.tolist())
    return replace(scored, logprobs=tuple(result.logprobs.tolist()), divergences=divergences)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """Patched prompts as they are run: checked, encoded, and with the edits of each condition."""

    prompts: Sequence[Prompt]
    ids: Sequence[Sequence[int]]
    edits: Sequence[Edits]
    n_tokens: int

    @staticmethod
    def of(
        engine: Engine,
        task: Task,
        prompts: Sequence[Prompt],
        conditions: Sequence[Patched],
        placement: Placement,
        max_new_tokens: int,
    ) -> _Prepared:
        asked = placement.of(conditions[0][0]).prompts(prompts)
        for vectors in {id(each): each for each, _ in conditions}.values():  # a sweep has the same ones at every layer
            check_vectors(engine, vectors, len(asked))
        n_tokens = tokens_for(engine, task, max_new_tokens)
        ids = encode(engine, asked, n_tokens)
        edits = [edits_for(engine, asked, ids, each, layer, placement.of(each)) for each, layer in conditions]
        return _Prepared(asked, ids, edits, n_tokens)


def tokens_for(engine: Engine, task: Task, max_new_tokens: int) -> int:
    """How many tokens to generate: at least what the task's rule needs to see."""
    check_new_tokens(engine, max_new_tokens)
    return max(max_new_tokens, task.rule.tokens)


def judged(task: Task, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Score:
    return _scored(task, prompts, [each.answer for each in answers], [each.ids for each in answers])
