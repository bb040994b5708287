"""Read attention heads, and measure what each of them does for a task (Todd et al. 2024, section 2; `tv_lens.heads`).

All heads are replaced at the last token, so a corrupted prompt is run once up to there. Each head is then a row of one
token that continues it: `layers x heads` rows per prompt, many in a pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import FunctionType
from typing import TypeAlias, get_args

import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Float, Int
from torch import Tensor

from tv_lens.answers import answer_ids, expected_answers
from tv_lens.edits import HEADS, Edit, Edits, Head
from tv_lens.engines import (
    Capability,
    Engine,
    LastTokens,
    Model,
    Past,
    Tokens,
    Wanted,
    engine_for,
    gradient,
    map_rows,
)
from tv_lens.errors import TvLensError
from tv_lens.generation import encode, finite_logits
from tv_lens.heads import FewShot, HeadEffects, How, Measure
from tv_lens.methods.extraction import vectors_of
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.provenance import Option
from tv_lens.shuffling import shuffle_outputs
from tv_lens.vectors import TaskVectors, check_heads

# From prompts and a seed to prompts that no longer show the task.
Corruption: TypeAlias = Callable[[Sequence[Prompt], int], list[Prompt]]


class NoneKnownError(TvLensError):
    """The model answers none of the prompts right."""


def read_heads(model: Model, prompts: Sequence[Prompt], *, known_only: bool = False) -> TaskVectors:
    """The output of every attention head at the last token of each prompt, before the output projection.

    If all prompts have answers, `options` say how the model does: for how many of `n` prompts the first token of the
    answer is the most likely one (`right`), its mean `probability`, and how many have the most frequent answer
    (`majority`).

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: few-shot prompts.
        known_only: whether only the outputs of prompts that are answered right are kept, as in the paper; `options`
            then hold their share, `kept`.

    Returns:
        Vectors of the site `HEADS`. `by_head` has the shape (prompt, layer, head, d_head), and `mean()` is what
        `head_effects` and `function_vector` use.

    Raises:
        TvLensError: no prompts, a model without attention heads, or `known_only` and no prompt that is answered right.

    Examples:
        >>> tv.read_heads(model, prompts).by_head.shape
        torch.Size([4, 4, 4, 8])
    """
    engine = engine_for(model)
    check_prompts(prompts)
    engine.require_site(HEADS)
    ids = encode(engine, prompts, 1)
    has_answers = all(prompt.answer is not None for prompt in prompts)
    if known_only:
        expected_answers(prompts, None)  # an error if one is missing
    targets = _targets(engine, prompts, ids) if has_answers else None
    known = _judged_reads(engine, ids, targets)
    read, logprobs, right = known.values, known.logprobs, known.right
    options: dict[str, Option] = {"site": HEADS.name, "positions": "last"}
    if logprobs is not None and right is not None:
        probability = float(logprobs.exp().mean())
        [(_, majority)] = Counter(prompt.answer for prompt in prompts).most_common(1)
        options |= {"n": len(prompts), "right": int(right.sum()), "probability": probability, "majority": majority}
    kept = list(range(len(prompts)))
    if known_only and right is not None:
        kept = right.nonzero().flatten().tolist()
        options |= {"kept": len(kept) / len(prompts)}
        if not kept:
            raise NoneKnownError(
                f"{engine.name} answers none of the {len(prompts)} prompts right (by the first token), so there is "
                "nothing to read; use more shots or another template, or known_only=False"
            )
    return vectors_of(engine, read[kept], [prompts[i] for i in kept], (), HEADS, "read_heads", options)


def _judged_reads(engine: Engine, ids: Sequence[Sequence[int]], targets: Int[Tensor, " row"] | None) -> LastTokens:
    """The heads' outputs after every row, and how likely the targets are, if there are any."""
    if engine.shared_reads is not None:
        wanted = [Wanted(tuple(own), HEADS, None if targets is None else int(targets[i])) for i, own in enumerate(ids)]
        engine.shared_reads.read(engine, [[each] for each in wanted])
        return engine.shared_reads.use(wanted)
    shape = (len(ids), len(engine.layers_of(HEADS)), engine.info.width(HEADS))
    read = torch.empty(shape, dtype=torch.float32, device="cpu")
    logprobs = torch.zeros(len(ids), dtype=torch.float32, device="cpu")
    right = torch.zeros(len(ids), dtype=torch.bool, device="cpu")

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        output = engine.forward(tokens, read=[HEADS], past=past, logits=targets is not None, keep_past=False)
        read[rows] = output.reads[HEADS]
        if targets is not None:
            logits = finite_logits(engine, output.logits, rows)
            logprobs[rows] = _logprobs(logits, targets[rows]).cpu()
            right[rows] = logits.argmax(dim=-1).cpu() == targets[rows]

    map_rows(engine, [[row] for row in ids], work)
    return LastTokens(read) if targets is None else LastTokens(read, logprobs, right)


def head_effects(  # noqa: PLR0913 - its options are keywords
    model: Model,
    prompts: Sequence[Prompt],
    means: TaskVectors,
    *,
    measure: Measure = "probability",
    how: How = "exact",
    seeds: Sequence[int] = (0,),
    heads: Sequence[tuple[int, int]] | None = None,
    corrupt: Corruption = shuffle_outputs,
) -> HeadEffects:
    """The causal indirect effect of every attention head (Todd et al. 2024, section 2.3).

    Each few-shot prompt is corrupted once for each seed; by default its outputs are permuted so that as few
    demonstrations as possible stay correct (the paper permutes them freely). Then the output of one head at the last
    token is replaced by its mean over clean prompts, and the change in the probability of the answer's first token is
    the effect.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: few-shot prompts with answers.
        means: what `read_heads` gives for clean prompts; their mean is taken.
        measure: "probability", as in the paper, or "log-probability", which also shows heads that raise a small one.
        how: "exact" patches head by head. "attribution" estimates all effects from one gradient per prompt, (mean - z)
            . d measure / d z, which is fast and good enough to choose heads for exact effects.
        seeds: one corruption of each prompt for each seed. Effects are averaged over them before intervals are taken.
        heads: (layer, head) pairs to score, all by default. The effects of others are NaN.
        corrupt: a function of prompts and a seed. `without_demonstrations` gives effects on the queries alone.

    Returns:
        The effect of every head on every prompt.

    Raises:
        TvLensError: prompts without answers or with one demonstration, means of another site or model, no seeds or one
            twice, a head that does not exist, or a model that cannot be patched (or gives no gradients).

    Examples:
        >>> means = tv.read_heads(model, prompts)
        >>> effects = tv.head_effects(model, prompts, means, heads=[(1, 0), (2, 3)])
        >>> effects.mean().shape, len(effects.top(2))
        (torch.Size([4, 4]), 2)
    """
    engine = engine_for(model)
    check_prompts(prompts)
    scored = _check(engine, means, measure, how, seeds, heads)
    corrupted = [prompt for seed in seeds for prompt in corrupt(prompts, seed)]
    answers = expected_answers(corrupted, None)
    if len(corrupted) != len(prompts) * len(seeds):
        raise TvLensError(f"{len(corrupted)} corrupted prompts of {len(prompts)} and {len(seeds)} seeds")
    ids = encode(engine, corrupted, 1)
    targets = _targets(engine, corrupted, ids)
    mean = reduce(means.by_head, "prompt layer head d_head -> layer head d_head", "mean")
    slots = [(means.layers.index(layer), head) for layer, head in scored]
    values = torch.full((len(ids), *mean.shape[:2]), torch.nan, dtype=torch.float32, device="cpu")
    if how == "exact":
        effects, baseline = _exact(engine, ids, targets, mean, slots, measure)
    else:
        effects, baseline = _attribution(engine, ids, targets, mean, slots, measure)
    values[:, [slot for slot, _ in slots], [head for _, head in slots]] = effects
    return HeadEffects(
        values,
        baseline,
        model=engine.name,
        task=" + ".join(sorted({prompt.task for prompt in prompts if prompt.task})),
        layers=means.layers,
        n_layers=engine.n_layers,
        measure=measure,
        how=how,
        seeds=tuple(int(seed) for seed in seeds),
        prompts=tuple(prompt.text for prompt in corrupted),
        answers=tuple(answers),
        first_tokens=len(set(targets.tolist())),
        few_shot=_few_shot(means),
        options={"corruption": _name_of(corrupt), "mean of": len(means.prompts)},
    )


def _name_of(corrupt: Corruption) -> str:
    return corrupt.__name__ if isinstance(corrupt, FunctionType) else type(corrupt).__name__


def _check(
    engine: Engine,
    means: TaskVectors,
    measure: Measure,
    how: How,
    seeds: Sequence[int],
    heads: Sequence[tuple[int, int]] | None,
) -> tuple[Head, ...]:
    """The heads to score; an error if they cannot be."""
    if measure not in get_args(Measure) or how not in get_args(How):
        raise TvLensError(f"measure {measure!r}, how {how!r}: use {get_args(Measure)} and {get_args(How)}")
    engine.require_site(HEADS)
    for needed in (Capability.PATCH,) if how == "exact" else (Capability.ADD, Capability.GRADIENTS):
        engine.require(needed)
    check_head_vectors(engine, means)
    if not seeds or len(set(seeds)) < len(seeds):
        raise TvLensError(f"seeds are {list(seeds)}; give at least one, each of them once")
    if heads is None:
        return all_heads(means)
    chosen = tuple(Head(*pair) for pair in heads)
    if not chosen:
        raise TvLensError("heads are empty; give (layer, head) pairs, or None for all")
    check_heads(chosen, means.layers, means.n_heads, engine.name)
    return chosen


def all_heads(vectors: TaskVectors) -> tuple[Head, ...]:
    """Every head whose output the vectors hold."""
    return tuple(Head(layer, head) for layer in vectors.layers for head in range(vectors.n_heads))


def check_head_vectors(engine: Engine, vectors: TaskVectors) -> None:
    """Raise TvLensError unless these are outputs of all heads of the engine's model."""
    if not isinstance(vectors, TaskVectors) or vectors.site != HEADS or vectors.heads:
        raise TvLensError(f"{vectors!r} are not outputs of all heads; read_heads(model, prompts) reads them")
    vectors.check_fits(engine.name, engine.n_layers, engine.info.width(HEADS))
    if vectors.layers != engine.layers_of(HEADS) or vectors.n_heads != engine.info.n_heads:
        raise TvLensError(
            f"{vectors!r} has {vectors.n_heads} heads in the layers {list(vectors.layers)} and {engine.name} has "
            f"{engine.info.n_heads} in {list(engine.layers_of(HEADS))}; read them from the model they are used on"
        )


def _few_shot(means: TaskVectors) -> FewShot | None:
    n, right, majority = (means.options.get(name) for name in ("n", "right", "majority"))
    probability = means.options.get("probability")
    if isinstance(n, int) and isinstance(right, int) and isinstance(majority, int) and isinstance(probability, float):
        return FewShot(n, right, probability, majority)
    return None


def _targets(engine: Engine, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> Int[Tensor, " row"]:
    """The first token of each prompt's answer, as the model would generate it."""
    answers = expected_answers(prompts, None)
    known = zip(prompts, ids, answers, strict=True)
    first = [answer_ids(engine, prompt, own, answer, i)[0] for i, (prompt, own, answer) in enumerate(known)]
    return torch.tensor(first, dtype=torch.long, device="cpu")


def _logprobs(logits: Float[Tensor, "row d_vocab"], targets: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """The log-probability of one token of each row. No second tensor as large as the logits is kept."""
    chosen = logits.gather(1, targets[:, None].to(logits.device)).squeeze(1)
    return chosen - logits.logsumexp(dim=-1)


def _measured(logprobs: Float[Tensor, "*row"], measure: Measure) -> Float[Tensor, "*row"]:
    return logprobs.exp() if measure == "probability" else logprobs


def _exact(
    engine: Engine,
    ids: Sequence[Sequence[int]],
    targets: Int[Tensor, " row"],
    mean: Float[Tensor, "layer head d_head"],
    slots: Sequence[tuple[int, int]],
    measure: Measure,
) -> tuple[Float[Tensor, "row cell"], Float[Tensor, " row"]]:
    """The effect of each head by replacing its output, and the log-probability of the answer without."""
    layers, k = engine.layers_of(HEADS), len(slots) + 1  # the last cell is the prompt as it is
    logprobs = torch.empty(len(ids), k, dtype=torch.float32, device="cpu")

    def edits_of(rows: Sequence[int]) -> Edits:
        """The writes of a batch: row `i * k + j` is prompt `i` with head `j` replaced."""
        by_cell: dict[int, list[int]] = {}
        for slot, row in enumerate(rows):
            by_cell.setdefault(row % k, []).append(slot)
        by_cell.pop(k - 1, None)
        return Edits(
            Edit(
                repeat(mean[slots[cell]], "d_head -> row d_head", row=len(members)),
                torch.tensor(members, dtype=torch.long, device="cpu"),
                layers[slots[cell][0]],
                site=HEADS,
                head=slots[cell][1],
            )
            for cell, members in by_cell.items()
        )

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        numbers, cells = [row // k for row in rows], [row % k for row in rows]
        output = engine.forward(tokens, edits=edits_of(rows), past=past, keep_past=False)
        logits = finite_logits(engine, output.logits, numbers)
        logprobs[numbers, cells] = _logprobs(logits, targets[numbers]).cpu()

    map_rows(engine, [[tuple(row)] * k for row in ids], work)
    measured = _measured(logprobs, measure)
    return measured[:, :-1] - measured[:, -1:], logprobs[:, -1]


def _attribution(
    engine: Engine,
    ids: Sequence[Sequence[int]],
    targets: Int[Tensor, " row"],
    mean: Float[Tensor, "layer head d_head"],
    slots: Sequence[tuple[int, int]],
    measure: Measure,
) -> tuple[Float[Tensor, "row cell"], Float[Tensor, " row"]]:
    """The first-order estimate of the same: (mean - z) . d measure / d z at the last token."""
    layers, n_heads = engine.layers_of(HEADS), mean.shape[1]
    effects = torch.empty(len(ids), len(layers), n_heads, dtype=torch.float32, device="cpu")
    baseline = torch.empty(len(ids), dtype=torch.float32, device="cpu")

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        tokens, past = _last_tokens(engine, tokens, past)
        # Adding zeros changes nothing and has the gradient of the output itself.
        zeros = torch.zeros(len(layers), len(rows), engine.info.width(HEADS), device="cpu").requires_grad_()
        every = torch.arange(len(rows), device="cpu")
        shifts = Edits(Edit(zeros[i], every, layer, site=HEADS, op="add") for i, layer in enumerate(layers))
        output = engine.forward(tokens, edits=shifts, read=[HEADS], past=past, keep_past=False, grad=True)
        with torch.enable_grad():
            logprobs = _logprobs(finite_logits(engine, output.logits, rows), targets[rows])
            total = _measured(logprobs, measure).sum()
        slope = gradient(engine, total, zeros)
        z = rearrange(output.reads[HEADS].detach(), "row layer (head d_head) -> row layer head d_head", head=n_heads)
        slope = rearrange(slope, "layer row (head d_head) -> row layer head d_head", head=n_heads)
        effects[rows] = ((mean - z) * slope).sum(dim=-1)
        baseline[rows] = logprobs.detach().cpu()

    longest = max(map(len, ids))
    # Without a past to continue, the graph is that of whole rows.
    run = 1 if engine.limits.shares_prefixes else longest
    map_rows(engine, [[row] for row in ids], work, max_rows=engine.limits.graph_rows(longest, run=run))
    return effects[:, [slot for slot, _ in slots], [head for _, head in slots]], baseline


def _last_tokens(engine: Engine, tokens: Tokens, past: Past) -> tuple[Tokens, Past]:
    """The last token of every row, after a pass over the others: only that token's computation needs a graph."""
    before = Tokens(tokens.ids[:, :-1], tokens.mask[:, :-1])
    # A recurrent state is updated in place, which has no gradient; and a row may have one token.
    if not engine.limits.shares_prefixes or not bool(before.mask.any(dim=1).all()):
        return tokens, past
    return replace(tokens, ids=tokens.ids[:, -1:]), engine.forward(before, past=past, logits=False).past
