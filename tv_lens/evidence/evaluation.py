"""Score answers, sweep layers, evaluate with controls, and set demonstrations against a vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tv_lens.edits import RESID_POST, Edits, Layers, Positions, Usage, Write
from tv_lens.engines import Engine, Model, engine_for
from tv_lens.errors import TvLensError
from tv_lens.evidence.controls import RandomDirection, ShuffledDemonstrations, Treatment, control_vectors
from tv_lens.evidence.results import Conflict, Evaluation, Score, Sweep
from tv_lens.generation import Answer, Completions, Decided, answer, check_new_tokens, encode
from tv_lens.methods.base import method_of
from tv_lens.methods.extraction import Extraction
from tv_lens.patching import Placement, check_type, check_vectors, edits_for
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors, check_layer, check_layers


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
    answers = _expected(task, prompts)
    judged = [
        task.right(text, each, own, query=prompt.query)
        for prompt, text, each, own in zip(prompts, texts, answers, ids, strict=True)
    ]
    return Score(tuple(texts), answers, tuple(judged))


def _expected(task: Task, prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Each prompt's answer, or the task's if the prompt holds none."""
    return tuple(task.answer(p.query) if p.answer is None else p.answer for p in prompts)


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
    """Score the patched answers to each prompt's query at every layer that has a vector, or at those given (Hendel et
    al. 2023, section 3.2 and figure 4). Choose the layer on prompts whose results you do not report.

    The queries are run once, up to where the vectors are written; from there all layers continue side by side. The
    keywords are those of `patch_generate`.

    An answer stops as soon as the task's rule has decided (see `Rule`), so the texts in the scores are beginnings of
    what `patch_generate` returns. The verdicts are those on the whole answers.

    Raises:
        TvLensError: as `patch_generate`, or no layers, or one of them twice.
    """
    engine, placement = engine_for(model), Placement(how, positions, keep_demonstrations)
    check_prompts(prompts)
    check_type(vectors)
    chosen = swept_layers(engine, layers, vectors.tried_layers)
    conditions = [(vectors, layer) for layer in chosen]
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
) -> Evaluation:
    """How well the queries of few-shot `prompts` are answered zero-shot, few-shot, and with `vectors` written in at
    `layer`. Use prompts that had no part in extracting the vectors or in choosing the layer.

    Controls at the same layer: `random`, for each prompt another random direction as long as the vector; `shuffled`,
    the vector that the same method makes of these prompts with their demonstrations' outputs permuted (if they have two
    or more; not for a method that learns from answers, which would be trained on test prompts); and what `controls`
    names, such as the vectors of another task. The other keywords are those of `patch_generate`.

    Raises:
        TvLensError: as `patch_generate`, prompts without demonstrations, or a control named like a condition.
    """
    engine, placement = engine_for(model), Placement(how, positions, keep_demonstrations)
    check_evaluation(engine, task, prompts, [vectors, *(controls or {}).values()], layer, max_new_tokens)
    taken = {"zero-shot", "few-shot", "patched"} & set(controls or ())
    if taken:
        raise TvLensError(f"controls are named {sorted(taken)}, which are conditions already; name them otherwise")
    known = method_of(vectors)
    method = known or Extraction(substitutes=1)
    written = _written_layers(vectors, layer)
    layers = (written,) if isinstance(written, int) else written
    treatment = Treatment(engine, task, prompts, vectors, method, seed, len(prompts), layers=layers)
    given = controls or {}
    # Of vectors that were made in another way there is a control only if extracted ones are written as they are.
    like_extracted = (vectors.site, vectors.op, vectors.usage) == (RESID_POST, "set", Usage())
    shuffled = [] if method.uses_answers or not (known or like_extracted) else [ShuffledDemonstrations()]
    before = {} if "random" in given else control_vectors([RandomDirection()], treatment)
    after = {} if "shuffled" in given else control_vectors(shuffled, treatment)
    compared = {**before, **given, **after}
    return evaluate_with(engine, task, prompts, {"patched": vectors, **compared}, layer, placement, max_new_tokens)


def evaluate_with(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    vectors: Mapping[str, TaskVectors],
    layer: int | Layers,
    placement: Placement,
    max_new_tokens: int,
) -> Evaluation:
    """The evaluation of "patched" with exactly the controls that `vectors` names; the arguments are checked."""
    few_shot = unpatched_score(engine, task, prompts, max_new_tokens)
    zero_shot = unpatched_score(engine, task, [prompt.zero_shot() for prompt in prompts], max_new_tokens)
    conditions = [(each, layer) for each in vectors.values()]
    scores = patched_scores(engine, task, prompts, conditions, placement, max_new_tokens)
    controls = dict(zip(vectors, scores, strict=True))
    patched = controls.pop("patched")
    return Evaluation(
        _written_layers(vectors["patched"], layer),
        zero_shot=zero_shot,
        few_shot=few_shot,
        patched=patched,
        controls=controls,
        n_layers=engine.n_layers,
    )


def _written_layers(vectors: TaskVectors, layer: int | Layers) -> int | tuple[int, ...]:
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
    encode(engine, prompts, _tokens_for(engine, task, max_new_tokens))


def unpatched_score(engine: Engine, task: Task, prompts: Sequence[Prompt], max_new_tokens: int) -> Score:
    """The score of the model's own answers to the prompts as they are."""
    n_tokens = _tokens_for(engine, task, max_new_tokens)
    [answers] = answer(engine, prompts, encode(engine, prompts, n_tokens), [Edits()], n_tokens)
    return _judged(task, prompts, answers)


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
    return _patched_scores(engine, task, prompts, conditions, placement, max_new_tokens, None)


def decided_scores(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    conditions: Sequence[tuple[TaskVectors, int | Layers]],
    placement: Placement,
    max_new_tokens: int,
) -> list[Score]:
    """As `patched_scores`, with the same verdicts, but each answer stops as soon as the task's rule has decided."""
    if not task.rule.can_decide:
        return patched_scores(engine, task, prompts, conditions, placement, max_new_tokens)
    answers = _expected(task, prompts)

    def decided(number: int, beginning: str) -> bool:
        return task.decided(beginning, answers[number], query=prompts[number].query) is not None

    return _patched_scores(engine, task, prompts, conditions, placement, max_new_tokens, decided)


def _patched_scores(
    engine: Engine,
    task: Task,
    prompts: Sequence[Prompt],
    conditions: Sequence[tuple[TaskVectors, int | Layers]],
    placement: Placement,
    max_new_tokens: int,
    decided: Decided | None,
) -> list[Score]:
    asked = placement.of(conditions[0][0]).prompts(prompts)
    for vectors in {id(each): each for each, _ in conditions}.values():  # a sweep has the same ones at every layer
        check_vectors(engine, vectors, len(asked))
    n_tokens = _tokens_for(engine, task, max_new_tokens)
    ids = encode(engine, asked, n_tokens)
    edits = [edits_for(engine, asked, ids, each, layer, placement.of(each)) for each, layer in conditions]
    answers = answer(engine, asked, ids, edits, n_tokens, decided=decided)
    return [_judged(task, prompts, each) for each in answers]


def _tokens_for(engine: Engine, task: Task, max_new_tokens: int) -> int:
    """How many tokens to generate: at least what the task's rule needs to see."""
    check_new_tokens(engine, max_new_tokens)
    return max(max_new_tokens, task.rule.tokens)


def _judged(task: Task, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Score:
    return _scored(task, prompts, [each.answer for each in answers], [each.ids for each in answers])


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
    """Which wins, demonstrations of `task` or the vector of `rival`? The few-shot `prompts` keep their demonstrations,
    and `vectors` of the rival are written into them (Hendel et al. 2023, section 5, conflicting tasks).

    Raises:
        TvLensError: as `patch_generate`, prompts without demonstrations, or a query the rival has no answer to.
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
    n_tokens = max(_tokens_for(engine, each, max_new_tokens) for each in (task, rival))
    ids = encode(engine, prompts, n_tokens)
    edits = [Edits(), edits_for(engine, prompts, ids, vectors, layer, placement.of(vectors))]
    plain, patched = answer(engine, prompts, ids, edits, n_tokens)
    return Conflict(
        task.name,
        rival.name,
        _written_layers(vectors, layer),
        plain_task=_judged(task, prompts, plain),
        plain_rival=_judged(rival, as_rival, plain),
        patched_task=_judged(task, prompts, patched),
        patched_rival=_judged(rival, as_rival, patched),
        n_layers=engine.n_layers,
    )
