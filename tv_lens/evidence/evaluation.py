"""Sweep layers, evaluate with controls, and set demonstrations against a vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tv_lens.edits import RESID_POST, Edits, Layers, Positions, Usage, Write
from tv_lens.engines import Engine, Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.evidence.controls import RandomDirection, ShuffledDemonstrations, Treatment, control_vectors, rows_of
from tv_lens.evidence.results import Choice, Conflict, Evaluation, Sweep
from tv_lens.evidence.scoring import decided_scores, judged, patched_scores, tokens_for, unpatched_score
from tv_lens.evidence.tuning import tune
from tv_lens.generation import answer, encode
from tv_lens.methods.base import method_of
from tv_lens.methods.extraction import Extraction
from tv_lens.patching import Placement, check_type, check_vectors, edits_for
from tv_lens.progress import stage
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors, check_layer, check_layers


def sweep_layers(  # noqa: PLR0913 - its options are keywords
    model: Model,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layers: Sequence[int] | None = None,
    *,
    how: Write | None = None,
    positions: Positions | None = None,
    keep_demonstrations: bool | None = None,
    max_new_tokens: int = 8,
) -> Sweep:
    """Score the patched answers to each prompt's query at every layer (Hendel et al. 2023, section 3.2 and figure 4).
    Choose the layer on prompts whose results you do not report.

    The queries are run once, up to where the vectors are written; from there all layers continue side by side.

    An answer stops as soon as the task's rule has decided (see `Rule`), so the texts in the scores are beginnings of
    what `patch_generate` returns. The verdicts are those on the whole answers.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        task: the task, whose rule scores the answers.
        prompts: dev prompts.
        vectors: what is written: one vector for each prompt, or one for all (`vectors.mean()`).
        layers: the layers to try; None for all that have a vector.
        how: as in `patch_generate`.
        positions: as in `patch_generate`.
        keep_demonstrations: as in `patch_generate`.
        max_new_tokens: how many tokens an answer may have.

    Returns:
        A score for each layer; `best` is the lowest of those with the highest accuracy.

    Raises:
        TvLensError: as `patch_generate`, or no layers, or one of them twice.

    Examples:
        >>> sweep = tv.sweep_layers(model, task, prompts, vector, max_new_tokens=2)
        >>> sweep.layers, sweep.best in sweep.ties
        ((0, 1, 2, 3), True)
    """
    engine, placement = engine_for(model), Placement(how, positions, keep_demonstrations)
    check_prompts(prompts)
    check_type(vectors)
    chosen = swept_layers(engine, layers, vectors.tried_layers)
    conditions = [(vectors, layer) for layer in chosen]
    with stage("sweep"):
        scores = decided_scores(engine, task, prompts, conditions, placement, max_new_tokens)
    return Sweep(tuple(chosen), tuple(scores), engine.n_layers)


def swept_layers(engine: Engine, layers: Sequence[int] | None, with_vectors: Sequence[int]) -> list[int]:
    """The layers of a sweep, checked against the model.

    Raises:
        TvLensError: no layers, one of them twice, or one that the model does not have.
    """
    return check_layers(with_vectors if layers is None else layers, engine.n_layers, engine.name)


def evaluate(  # noqa: PLR0913 - its options are keywords
    model: Model,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layer: int | Layers,
    *,
    how: Write | None = None,
    positions: Positions | None = None,
    keep_demonstrations: bool | None = None,
    max_new_tokens: int = 8,
    controls: Mapping[str, TaskVectors] | None = None,
    seed: int = 0,
    dev: Sequence[Prompt] | None = None,
) -> Evaluation:
    """How well the queries of few-shot `prompts` are answered zero-shot, few-shot, and with `vectors` written in at
    `layer`. Use prompts that had no part in extracting the vectors or in choosing the layer.

    The controls are `random`, for each prompt another random direction as long as the vector; `shuffled`, the vector
    that the same method makes of the same prompts with their demonstrations' outputs permuted; and those in `controls`.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        task: the task, whose rule scores the answers.
        prompts: test prompts with demonstrations.
        vectors: what is written: one vector for each prompt, or one for all (`vectors.mean()`).
        layer: as in `patch_generate`.
        how: as in `patch_generate`.
        positions: as in `patch_generate`.
        keep_demonstrations: as in `patch_generate`.
        max_new_tokens: how many tokens an answer may have.
        controls: further vectors by name, such as the vectors of another task.
        seed: of the controls.
        dev: the prompts that the vectors were made from and that chose `layer`. Pass them to give the controls the same
            chance, as `run_experiment` does: `shuffled` is made from them (with substitute queries from the inputs of
            `task`), and each control chooses its own layer on them. Without them `shuffled` is made from `prompts`, and
            all controls are written at `layer`; there is then no `shuffled` for a method that learns from answers,
            which would be trained on test prompts.

    Returns:
        A score for each condition, with tests.

    Raises:
        TvLensError: as `patch_generate`, prompts without demonstrations, or a control named like a condition.

    Examples:
        >>> result = tv.evaluate(model, task, prompts, vector, 2, max_new_tokens=2)
        >>> list(result.conditions)
        ['zero-shot', 'few-shot', 'patched', 'random', 'shuffled']
    """
    engine, placement = engine_for(model), Placement(how, positions, keep_demonstrations)
    check_evaluation(engine, task, prompts, [vectors, *(controls or {}).values()], layer, max_new_tokens)
    taken = {"zero-shot", "few-shot", "patched"} & set(controls or ())
    if taken:
        raise TvLensError(f"controls are named {sorted(taken)}, which are conditions already; name them otherwise")
    if dev is not None:
        check_prompts(dev)
        for name, each in {"patched": vectors, **(controls or {})}.items():
            if len(each) > 1 and not each.usage.per_position:
                raise TvLensError(
                    f"{len(each)} vectors are given for {name!r}, and controls choose their layers on other prompts; "
                    "give one for all prompts, vectors.mean(), or leave dev out"
                )
    treatment = _treatment(engine, task, prompts, vectors, layer, seed, dev)
    made = _control_vectors(treatment, controls or {}, chooses=dev is not None)
    chosen: dict[str, int | Layers] = dict.fromkeys(made, layer)
    if dev is not None and isinstance(layer, int):
        tuned = tune(
            engine,
            task,
            dev,
            {name: rows_of(each, slice(len(dev))) for name, each in made.items()},
            layers=None,
            strengths=(1.0,),
            max_new_tokens=max_new_tokens,
            placement=placement,
            preferred=Choice(layer),
        )
        chosen |= {name: each.choice.layer for name, each in tuned.items()}
    first = 0 if dev is None else len(dev)
    tested = {"patched": vectors, **{name: rows_of(each, slice(first, None)) for name, each in made.items()}}
    conditions = [(each, chosen.get(name, layer)) for name, each in tested.items()]
    with stage("few-shot"):
        few_shot = unpatched_score(engine, task, prompts, max_new_tokens)
    with stage("zero-shot"):
        zero_shot = unpatched_score(engine, task, [prompt.zero_shot() for prompt in prompts], max_new_tokens)
    with stage("patched"):
        scores = patched_scores(engine, task, prompts, conditions, placement, max_new_tokens)
    return Evaluation(
        written_layers(vectors, layer),
        zero_shot=zero_shot,
        few_shot=few_shot,
        patched=scores[0],
        controls=dict(zip(made, scores[1:], strict=True)),
        n_layers=engine.n_layers,
        control_layers={name: written_layers(tested[name], where) for name, where in chosen.items()},
        control_strengths=dict.fromkeys(chosen, 1.0),
    )


def _treatment(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layer: int | Layers,
    seed: int,
    dev: Sequence[Prompt] | None,
) -> Treatment:
    written = written_layers(vectors, layer)
    layers = (written,) if isinstance(written, int) else written
    return Treatment(
        engine=engine,
        task=task,
        prompts=prompts if dev is None else dev,
        vectors=vectors,
        method=method_of(vectors) or Extraction(substitutes=1),
        seed=seed,
        n=len(prompts) + len(dev or ()),
        layers=layers if dev is None else (),
    )


def _control_vectors(
    treatment: Treatment, given: Mapping[str, TaskVectors], *, chooses: bool
) -> dict[str, TaskVectors]:
    """The vectors of the controls: if they choose their layers, for the dev prompts and then for the others."""
    vectors = treatment.vectors
    # Of vectors that were made in another way there is a control only if extracted ones are written as they are.
    like_extracted = (vectors.site, vectors.op, vectors.usage) == (RESID_POST, "set", Usage())
    known = method_of(vectors) is not None or like_extracted
    possible = known and (chooses or not treatment.method.uses_answers)
    before = {} if "random" in given else control_vectors([RandomDirection()], treatment)
    after = {} if "shuffled" in given or not possible else control_vectors([ShuffledDemonstrations()], treatment)
    return {**before, **given, **after}


def written_layers(vectors: TaskVectors, layer: int | Layers) -> int | tuple[int, ...]:
    """The layer or layers that are written to if `layer` is named."""
    written = vectors.written_with(layer) if isinstance(layer, int) else layer.numbers
    return written[0] if isinstance(layer, int) and len(written) == 1 else written


def check_evaluation(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: Sequence[TaskVectors],
    layer: int | Layers,
    max_new_tokens: int,
) -> None:
    """Refuse what cannot be evaluated, before anything is run."""
    check_prompts(prompts)
    for number in layer if isinstance(layer, Layers) else [layer]:
        check_layer(number, engine.n_layers, engine.name)
    if not all(prompt.examples for prompt in prompts):
        raise TvLensError("few-shot accuracy needs demonstrations; sample the prompts with shots=1 or more")
    for each in vectors:
        check_vectors(engine, each, len(prompts))
    encode(engine, prompts, tokens_for(engine, task, max_new_tokens))


def conflict(  # noqa: PLR0913 - its options are keywords
    model: Model,
    task: Task,
    rival: Task,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layer: int | Layers,
    *,
    how: Write | None = None,
    positions: Positions | None = None,
    max_new_tokens: int = 8,
) -> Conflict:
    """Which wins, demonstrations of `task` or the vector of `rival`?

    The few-shot `prompts` keep their demonstrations, and `vectors` of the rival are written into them (Hendel et al.
    2023, section 5, conflicting tasks).

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        task: the task of the demonstrations.
        rival: the task of the vectors, with the same inputs.
        prompts: few-shot prompts.
        vectors: what is written: one vector for each prompt, or one for all (`vectors.mean()`).
        layer: as in `patch_generate`.
        how: as in `patch_generate`.
        positions: as in `patch_generate`.
        max_new_tokens: how many tokens an answer may have.

    Returns:
        The answers without and with the vectors, scored as answers to either task.

    Raises:
        TvLensError: as `patch_generate`, prompts without demonstrations, or a query the rival has no answer to.

    Examples:
        >>> rival = tv.Task("double", task.inputs, lambda text: text * 2)
        >>> clash = tv.conflict(model, task, rival, prompts, vector, 2, max_new_tokens=2)
        >>> len(clash.to_pandas())
        4
    """
    engine, placement = engine_for(model), Placement(how, positions, keep_demonstrations=True)
    check_prompts(prompts)
    for number in layer if isinstance(layer, Layers) else [layer]:
        check_layer(number, engine.n_layers, engine.name)
    check_vectors(engine, vectors, len(prompts))
    if not all(prompt.examples for prompt in prompts):
        raise TvLensError("conflicting demonstrations are needed; sample the prompts with shots=1 or more")
    unanswered = [prompt.query for prompt in prompts if prompt.query not in rival.inputs]
    if unanswered:
        raise TvLensError(
            f"{len(unanswered)} queries are not inputs of the rival {rival.name!r} ({unanswered[0]!r}, ...); "
            "conflicting tasks share their inputs, as present_to_past and present_to_gerund do"
        )
    as_rival = [replace(prompt, answer=rival.answer(prompt.query)) for prompt in prompts]
    n_tokens = max(tokens_for(engine, each, max_new_tokens) for each in (task, rival))
    ids = encode(engine, prompts, n_tokens)
    edits = [Edits(), edits_for(engine, prompts, ids, vectors, layer, placement.of(vectors))]
    with stage("conflict"):
        plain, patched = answer(engine, prompts, ids, edits, n_tokens)
    return Conflict(
        task.name,
        rival.name,
        written_layers(vectors, layer),
        plain_task=judged(task, prompts, plain),
        plain_rival=judged(rival, as_rival, plain),
        patched_task=judged(task, prompts, patched),
        patched_rival=judged(rival, as_rival, patched),
        n_layers=engine.n_layers,
    )
