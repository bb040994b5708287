"""Score answers, sweep layers, evaluate beside controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tv_lens.engines import Engine, engine_for, engine_name
from tv_lens.evidence.controls import random_like, shuffle_outputs
from tv_lens.evidence.results import Conflict, Evaluation, Score, Sweep
from tv_lens.generation import answer_all, answer_side_by_side, patch_for
from tv_lens.methods.extraction import extract
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors, check_layer


def score(task: Task, prompts: Sequence[Prompt], texts: Sequence[str]) -> Score:
    """How the answers `texts` to `prompts` score by the task's own rule, against each prompt's answer, or the
    task's where a prompt holds none.

    Raises:
        ValueError: no prompts, or another number of texts.
    """
    check_prompts(prompts)
    if len(texts) != len(prompts):
        raise ValueError(f"{len(texts)} texts for {len(prompts)} prompts; give one for each")
    answers = tuple(task.answer(p.query) if p.answer is None else p.answer for p in prompts)
    correct = tuple(task.right(text, answer) for text, answer in zip(texts, answers, strict=True))
    return Score(tuple(texts), answers, correct)


def sweep_layers(
    model: Any,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layers: Sequence[int] | None = None,
    *,
    max_new_tokens: int = 8,
) -> Sweep:
    """Score the patched answers to each prompt's query at every layer, or at those given (Hendel et al. 2023,
    section 3.2 and figure 4). Choose a layer so on prompts that you do not report on.

    The queries are run once, up to their last token; from there all layers go on side by side.

    Raises:
        ValueError: as `patch_generate`, or no layers, or one of them twice.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    chosen = chosen_layers(engine, layers)
    patches = [patch_for(engine, len(prompts), vectors, layer) for layer in chosen]
    answers = answer_side_by_side(engine, prompts, patches, max_new_tokens)
    return Sweep(tuple(chosen), tuple(score(task, prompts, texts) for texts in answers), engine.n_layers)


def chosen_layers(engine: Engine, layers: Sequence[int] | None) -> Sequence[int]:
    chosen = range(engine.n_layers) if layers is None else layers
    if not isinstance(chosen, Sequence) or not len(chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers are {chosen!r}; give a list of different ones, at least one, or None for all")
    for layer in chosen:
        check_layer(layer, engine.n_layers, engine_name(engine))
    return [int(layer) for layer in chosen]  # NumPy's own are not JSON's


def evaluate(
    model: Any,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layer: int,
    *,
    max_new_tokens: int = 8,
    controls: Mapping[str, TaskVectors] | None = None,
    seed: int = 0,
) -> Evaluation:
    """How well the queries of few-shot `prompts` are answered zero-shot, few-shot, and zero-shot with `vectors`
    written in at `layer`. Use prompts that had no part in extracting the vectors or in choosing the layer.

    Controls at the same layer: `random`, for each row another random direction of the vector's own length;
    `shuffled`, the vector of these prompts' demonstrations with their outputs exchanged (where they have two or
    more); and what `controls` names, such as the vectors of another task.

    Raises:
        ValueError: as `patch_generate`, prompts without demonstrations, or a control named like a condition.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    check_layer(layer, engine.n_layers, engine_name(engine))
    if not all(prompt.examples for prompt in prompts):
        raise ValueError("few-shot accuracy needs demonstrations; sample the prompts with shots=1 or more")
    taken = {"zero-shot", "few-shot", "patched"} & set(controls or ())
    if taken:
        raise ValueError(f"controls are named {sorted(taken)}, which are conditions already; name them otherwise")
    patch_for(engine, len(prompts), vectors, layer)
    tried = {"random": random_like(vectors, len(prompts), seed), **(controls or {})}
    for each in tried.values():  # refuses what cannot be patched before anything is run
        patch_for(engine, len(prompts), each, layer)

    # The longest texts go first, so that one too long is refused before the model runs.
    few_shot = answer_all(engine, prompts, None, max_new_tokens)
    zero_shot = answer_all(engine, [prompt.zero_shot() for prompt in prompts], None, max_new_tokens)
    if "shuffled" not in tried and min(prompt.shots for prompt in prompts) > 1:
        mixed = extract(engine, shuffle_outputs(prompts, seed), task.substitutes(prompts, 1, seed=seed))
        tried["shuffled"] = mixed.mean() if len(vectors) == 1 else mixed
    patches = [patch_for(engine, len(prompts), each, layer) for each in (vectors, *tried.values())]
    patched, *controlled = answer_side_by_side(engine, prompts, patches, max_new_tokens)
    return Evaluation(
        layer,
        zero_shot=score(task, prompts, zero_shot),
        few_shot=score(task, prompts, few_shot),
        patched=score(task, prompts, patched),
        controls={name: score(task, prompts, texts) for name, texts in zip(tried, controlled, strict=True)},
        n_layers=engine.n_layers,
    )


def conflict(
    model: Any,
    task: Task,
    rival: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layer: int,
    *,
    max_new_tokens: int = 8,
) -> Conflict:
    """Which wins, demonstrations of `task` or the vector of `rival`? The few-shot `prompts` keep their
    demonstrations, and `vectors` of the rival are written at their last position (Hendel et al. 2023,
    section 5, conflicting tasks).

    Raises:
        ValueError: as `patch_generate`, prompts without demonstrations, or a query the rival has no answer to.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    check_layer(layer, engine.n_layers, engine_name(engine))
    patch = patch_for(engine, len(prompts), vectors, layer)
    if not all(prompt.examples for prompt in prompts):
        raise ValueError("conflicting demonstrations are needed; sample the prompts with shots=1 or more")
    unanswered = [prompt.query for prompt in prompts if prompt.query not in rival.inputs]
    if unanswered:
        raise ValueError(
            f"{len(unanswered)} queries are no inputs of the rival {rival.name!r} ({unanswered[0]!r}, ...); "
            "conflicting tasks share their inputs, as present_to_past and present_to_gerund do"
        )
    as_rival = [replace(prompt, answer=rival.answer(prompt.query)) for prompt in prompts]
    plain = answer_all(engine, prompts, None, max_new_tokens)
    patched = answer_all(engine, prompts, patch, max_new_tokens)
    return Conflict(
        task.name,
        rival.name,
        layer,
        plain_task=score(task, prompts, plain),
        plain_rival=score(rival, as_rival, plain),
        patched_task=score(task, prompts, patched),
        patched_rival=score(rival, as_rival, patched),
        n_layers=engine.n_layers,
    )
