"""The part of a task that a model can do."""

from __future__ import annotations

from dataclasses import replace

from tv_lens.engines import Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.evidence.scoring import unpatched_score
from tv_lens.prompts import PromptFormat
from tv_lens.tasks import Task


def known_part(model: Model, task: Task, *, shots: int, seed: int, template: PromptFormat, max_new_tokens: int) -> Task:
    """What `Task.known` returns."""
    prompts = task.sample(len(task), shots=shots, seed=seed, template=template)
    score = unpatched_score(engine_for(model), task, prompts, max_new_tokens)
    right = {prompt.query for prompt, correct in zip(prompts, score.correct, strict=True) if correct}
    if not right:
        raise TvLensError(
            f"task {task.name!r}: the model answers none of its {len(task)} inputs correctly after {shots} "
            f"demonstrations (it gives {score.texts[0]!r} for {prompts[0].query!r}, not {score.answers[0]!r}); use "
            "more shots, another template, or a larger model"
        )
    name = f"{task.name} (known: {len(right)} of {len(task)})"
    return replace(task, name=name, inputs=tuple(text for text in task.inputs if text in right))
