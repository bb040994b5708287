"""Score answers: the model's own, and those with vectors written in."""

from __future__ import annotations

from collections.abc import Sequence

from tv_lens.edits import Edits, Layers
from tv_lens.engines import Engine
from tv_lens.errors import TvLensError
from tv_lens.evidence.results import Score
from tv_lens.generation import Answer, Completions, answer, check_new_tokens, encode
from tv_lens.patching import Placement, check_vectors, edits_for
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors


def score(task: Task, prompts: Sequence[Prompt], texts: Sequence[str]) -> Score:
    """How the answers `texts` to `prompts` score by the task's own rule, against each prompt's answer, or the task's if
    a prompt holds none.

    A rule that compares token ids gets those of `Completions`; other texts are judged as texts.

    Raises:
        TvLensError: no prompts, or another number of texts.
    """
    check_prompts(prompts)
    if len(texts) != len(prompts):
        raise TvLensError(f"{len(texts)} texts for {len(prompts)} prompts; give one for each")
    ids = texts.tokens.tolist() if isinstance(texts, Completions) else [None] * len(texts)
    return _scored(task, prompts, texts, ids)


def _scored(task: Task, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[Sequence[int] | None]) -> Score:
    """The texts, with their token ids if these are known, judged by the task's rule."""
    answers = tuple(task.answer(p.query) if p.answer is None else p.answer for p in prompts)
    judged = [
        task.right(text, each, own, query=prompt.query)
        for prompt, text, each, own in zip(prompts, texts, answers, ids, strict=True)
    ]
    return Score(tuple(texts), answers, tuple(judged))


def unpatched_score(engine: Engine, task: Task, prompts: Sequence[Prompt], max_new_tokens: int) -> Score:
    """The score of the model's own answers to the prompts as they are."""
    n_tokens = tokens_for(engine, task, max_new_tokens)
    [answers] = answer(engine, prompts, encode(engine, prompts, n_tokens), [Edits()], n_tokens)
    return judged(task, prompts, answers)


def patched_scores(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    conditions: Sequence[tuple[TaskVectors, int | Layers]],
    placement: Placement,
    max_new_tokens: int,
) -> list[Score]:
    """The score of the patched answers under each condition, all of them side by side. Whether demonstrations are kept
    is decided by the first condition's vectors, everything else by each condition's own.
    """
    asked = placement.of(conditions[0][0]).prompts(prompts)
    for vectors in {id(each): each for each, _ in conditions}.values():  # a sweep has the same ones at every layer
        check_vectors(engine, vectors, len(asked))
    n_tokens = tokens_for(engine, task, max_new_tokens)
    ids = encode(engine, asked, n_tokens)
    edits = [edits_for(engine, asked, ids, each, layer, placement.of(each)) for each, layer in conditions]
    answers = answer(engine, asked, ids, edits, n_tokens)
    return [judged(task, prompts, each) for each in answers]


def tokens_for(engine: Engine, task: Task, max_new_tokens: int) -> int:
    """How many tokens to generate: at least what the task's rule needs to see."""
    check_new_tokens(engine, max_new_tokens)
    return max(max_new_tokens, task.rule.tokens)


def judged(task: Task, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Score:
    return _scored(task, prompts, [each.answer for each in answers], [each.ids for each in answers])
