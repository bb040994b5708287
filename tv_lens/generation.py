"""Let the model answer, with or without task vectors written into the prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.statistics import derive_generator
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tv_lens.edits import Edits, Positions, Write
from tv_lens.engines import Capability, Engine, Model, Past, Prefixes, Stop, Tokens, engine_for, map_rows
from tv_lens.errors import EngineError, TvLensError
from tv_lens.patching import LayerChoice, Placement, checked, edits_for
from tv_lens.progress import estimate
from tv_lens.prompts import Prompt, as_prompts
from tv_lens.vectors import TaskVectors

# From next-token logits, and for each row a key that names its prompt and step, to the ids chosen. A sampler that
# draws uses the key, so that a row's draw does not depend on the rest of its batch.
Sampler: TypeAlias = Callable[[Float[Tensor, "batch d_vocab"], Sequence[str]], Int[Tensor, " batch"]]

# Whether a beginning of the answer to the prompt of this number says all that is asked of the answer.
Decided: TypeAlias = Callable[[int, str], bool]


def greedy(logits: Float[Tensor, "batch d_vocab"], keys: Sequence[str]) -> Int[Tensor, " batch"]:
    """The most likely token of each row.

    Args:
        logits: of the next token.
        keys: not used; samplers get one for each row, which names prompt and step.

    Returns:
        Token ids.

    Examples:
        >>> greedy(torch.tensor([[0.1, 2.0, 0.3]]), ["key"])
        tensor([1])
    """
    return logits.argmax(dim=-1)


def sample(*, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0) -> Sampler:
    """A sampler that draws from the model's distribution.

    The draw depends on the seed, the prompt and the step alone: not on the batch, nor on the caller's random state,
    which is not touched. Identical prompts are sampled independently.

    Args:
        temperature: what logits are divided by.
        top_k: draw from this many most likely tokens.
        top_p: draw from the most likely tokens of this total probability.
        seed: the same seed gives the same result.

    Returns:
        A value for `sampler=`.

    Raises:
        TvLensError: a value out of range, or both `top_k` and `top_p`.

    Examples:
        >>> answers = tv.generate(model, prompts, max_new_tokens=2, sampler=tv.sample(temperature=0.7))
    """
    if temperature <= 0:
        raise TvLensError(f"temperature is {temperature}; use a number above 0, or sampler=greedy")
    if top_k is not None and top_p is not None:
        raise TvLensError("top_k and top_p are both given and only one of them can be used; leave one out")
    if top_k is not None and top_k < 1:
        raise TvLensError(f"top_k is {top_k}; use 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise TvLensError(f"top_p is {top_p}; use a probability above 0, up to 1")
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(float(top_p)))

    def draw(logits: Float[Tensor, "batch d_vocab"], keys: Sequence[str]) -> Int[Tensor, " batch"]:
        chosen = []
        # Row by row, as nucleus sampling needs seven copies of a row.
        for row, key in zip(logits.cpu().split(1), keys, strict=True):  # type: ignore[no-untyped-call]
            scores = row
            for warp in warpers:
                scores = warp(None, scores)
            chosen.append(torch.multinomial(scores[0].softmax(dim=-1), 1, generator=derive_generator(seed, key)))
        return torch.cat(chosen)

    return draw


@dataclass(frozen=True, eq=False, repr=False)
class Completions(Sequence[str]):
    """The answers, as a sequence of texts. What `generate` and `patch_generate` return.

    An answer to a `Prompt` is cut at the prompt's separator and stripped of white space; the continuation of a plain
    string is kept as it is.

    Attributes:
        texts: the answers.
        tokens: the ids that were chosen for each prompt, including the separator or the end of text; rows that ended
            earlier than the longest are filled with the tokenizer's padding id.

    Examples:
        >>> answers = tv.generate(model, prompts, max_new_tokens=2)
        >>> len(answers), answers[0] == answers.texts[0], answers.tokens.shape
        (4, True, torch.Size([4, 2]))
    """

    texts: tuple[str, ...]
    tokens: Int[Tensor, "prompt new"]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.texts[index]

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        shown = [text if len(text) <= 60 else f"{text[:57]}..." for text in self.texts[:12]]
        more = f", and {len(self) - 12} more" if len(self) > 12 else ""
        return f"Completions({', '.join(map(repr, shown))}{more})"


def generate(
    model: Model, prompts: Sequence[Prompt | str], *, max_new_tokens: int = 8, sampler: Sampler = greedy
) -> Completions:
    """The model's own answers to the prompts as they are, including their demonstrations.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: prompts, or plain strings.
        max_new_tokens: how many tokens an answer may have.
        sampler: how tokens are chosen: `greedy`, or what `sample` returns.

    Returns:
        The answers, as a sequence of texts.

    Raises:
        TvLensError: no prompts, or a prompt that leaves no room for the new tokens.
        EngineError: the model's logits are NaN or infinite.

    Examples:
        >>> len(tv.generate(model, prompts, max_new_tokens=2))
        4
    """
    engine, inputs = engine_for(model), as_prompts(prompts)
    check_new_tokens(engine, max_new_tokens)
    ids = encode(engine, inputs, max_new_tokens)
    [answers] = answer(engine, inputs, ids, [Edits()], max_new_tokens, sampler)
    return completions(engine, answers)


def patch_generate(  # noqa: PLR0913 - its options are keywords
    model: Model,
    prompts: Sequence[Prompt | str],
    vectors: TaskVectors | Tensor,
    layer: LayerChoice,
    *,
    how: Write | None = None,
    positions: Positions | None = None,
    keep_demonstrations: bool | None = None,
    max_new_tokens: int = 8,
    sampler: Sampler = greedy,
) -> Completions:
    """The answers to the queries alone, with task vectors written into them (Hendel et al. 2023, section 3).

    Each prompt is cut to its query (unless `keep_demonstrations`) and run once with its own vector, or with the only
    one, as `vectors.mean()` gives it. Later tokens see what was written through the cached keys and values; models that
    keep no such cache (mamba) and remote ones run the whole row again, with the vector at the same position.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: prompts, of which the queries are asked, or plain strings.
        vectors: task vectors, or a plain tensor that overwrites the residual stream: of shape (d_model,), or (prompt,
            d_model) for one vector per prompt.
        layer: the block whose output is written to: one for all prompts, `by_prompt(3, 7)` for one for each prompt, or
            `layers(3, 7, 12)` for several at once. Vectors that are meant for several layers (`usage.span`) are
            written at all of them up to the one given, or at all they have.
        how: `overwrite`, `add(strength, every_step=, keep_norm=)` or `rotate(strength)`; None writes the vectors the
            way they are meant.
        positions: where in the prompt: "last", "separators", "outputs", "query", "all", or negative numbers that count
            from its end. `show_tokens` shows what each of these touches. None: where the vectors are meant to be
            written, for most of them "last".
        keep_demonstrations: whether to run the whole prompts. None: False, unless the vectors are meant for them.
        max_new_tokens: how many tokens an answer may have; 1 is the paper's first-token protocol.
        sampler: how tokens are chosen: `greedy`, or what `sample` returns.

    Returns:
        The answers, as a sequence of texts.

    Raises:
        TvLensError: no prompts, vectors of other sizes than the model's or another number, a layer or position out of
            range, a prompt that leaves no room for the new tokens, or a model that cannot be patched.
        EngineError: the model's logits are NaN or infinite.

    Examples:
        >>> answers = tv.patch_generate(model, prompts, vector, 2, max_new_tokens=2)
        >>> steered = tv.patch_generate(model, ["hot ->"], vector, 2, how=tv.add(4.0, every_step=True))
        >>> answers = tv.patch_generate(model, prompts, vector, tv.layers(1, 2), positions=[-1], max_new_tokens=2)
    """
    engine, given = engine_for(model), as_prompts(prompts)
    placement = Placement(how, positions, keep_demonstrations)
    task_vectors, placed = checked(engine, given, vectors, layer, placement)
    inputs = placed.prompts(given)
    check_new_tokens(engine, max_new_tokens)
    ids = encode(engine, inputs, max_new_tokens)
    edits = edits_for(engine, inputs, ids, task_vectors, layer, placed)
    [answers] = answer(engine, inputs, ids, [edits], max_new_tokens, sampler)
    return completions(engine, answers)


def patched_logits(
    model: Model,
    prompts: Sequence[Prompt | str],
    vectors: TaskVectors | Tensor,
    layer: LayerChoice,
    *,
    how: Write | None = None,
    positions: Positions | None = None,
    keep_demonstrations: bool | None = None,
) -> Float[Tensor, "prompt d_vocab"]:
    """Next-token logits after the queries alone with task vectors written in, as in `patch_generate`.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: prompts, of which the queries are asked, or plain strings.
        vectors: what is written: one vector for each prompt, or one for all (`vectors.mean()`).
        layer: as in `patch_generate`.
        how: as in `patch_generate`.
        positions: as in `patch_generate`.
        keep_demonstrations: as in `patch_generate`.

    Returns:
        Logits in float32 on the CPU.

    Raises:
        TvLensError: as `patch_generate`.

    Examples:
        >>> tv.patched_logits(model, prompts, vector, 2).shape
        torch.Size([4, 300])
    """
    engine, given = engine_for(model), as_prompts(prompts)
    placement = Placement(how, positions, keep_demonstrations)
    task_vectors, placed = checked(engine, given, vectors, layer, placement)
    inputs = placed.prompts(given)
    ids = encode(engine, inputs, 1)
    return next_logits(engine, ids, edits_for(engine, inputs, ids, task_vectors, layer, placed))


def encode(engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """The token ids of the prompts, checked to leave room for the new tokens."""
    return engine.text.encode([prompt.text for prompt in prompts], new_tokens=max_new_tokens - 1)


def next_logits(engine: Engine, ids: Sequence[Sequence[int]], edits: Edits) -> Float[Tensor, "row d_vocab"]:
    """Next-token logits of every row; float32, on the CPU."""
    logits: list[Float[Tensor, "row d_vocab"]] = []  # one tensor, as wide as what the model gives

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        some = required_logits(engine.forward(tokens, edits=edits, past=past, keep_past=False).logits)
        if not logits:
            logits.append(torch.empty(len(ids), some.shape[1], dtype=some.dtype, device="cpu"))
        logits[0][rows] = some.cpu()

    map_rows(engine, [[row] for row in ids], work, edits=edits)
    return logits[0]


def check_new_tokens(engine: Engine, max_new_tokens: int) -> None:
    """Raise TvLensError if there is nothing to generate, or no way to continue after the first token."""
    if max_new_tokens < 1:
        raise TvLensError(f"max_new_tokens is {max_new_tokens}; use 1 or more")
    if max_new_tokens > 1:
        engine.require(Capability.CONTINUE)


@dataclass
class Answer:
    """A row while it is being generated, and what it came to. If `decided` is true of a beginning that no further
    token can change, the row ends, and this beginning is its answer.
    """

    prompt: Prompt
    stop: Stop
    key: str
    number: int
    decided: Decided | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    ended: bool = False
    beginning: str | None = None

    def append(self, engine: Engine, token: int) -> None:
        """Add the next token, and see whether it ends the answer."""
        self.ids.append(token)
        at_special = token in self.stop.ids
        self.text = engine.text.decode(self.ids[:-1] if at_special else self.ids)
        at_text = self.stop.text is not None and self.stop.text in self.text
        self.ended = at_special or at_text or token in engine.info.end_ids
        if not self.ended and self.decided is not None:
            beginning = self.prompt.template.settled(engine.text.settled(self.ids))
            if self.decided(self.number, beginning):
                self.beginning, self.ended = beginning, True

    @property
    def answer(self) -> str:
        """The answer, cut out of the text."""
        return self.prompt.template.cut(self.text) if self.beginning is None else self.beginning


def answer(  # noqa: PLR0913 - its options are keywords
    engine: Engine,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    conditions: Sequence[Edits],
    max_new_tokens: int,
    sampler: Sampler = greedy,
    *,
    decided: Decided | None = None,
    kept: Prefixes | None = None,
) -> list[list[Answer]]:
    """The answers to every prompt under each of several conditions. With `decided`, an answer stops as soon as
    `decided(prompt number, beginning)` is true of a beginning that no further token can change.

    The prompts are run once, up to where the edits begin; from there all conditions continue in the same batches. With
    `kept` that beginning is kept for other calls with the same prompts.
    """
    k = len(conditions)
    stops = {prompt.template: engine.text.stop_of(prompt) for prompt in prompts}
    keys = row_keys([prompt.text for prompt in prompts])
    answers: dict[int, Answer] = {}
    edits = conditions[0] if k == 1 else Edits.interleave(conditions)

    if takes_all_rows(engine, edits, sampler):
        begun = [
            Answer(each, stops[each.template], keys[i], i, decided) for i, each in enumerate(prompts) for _ in range(k)
        ]
        answer_at_once(engine, begun, [row for row in ids for _ in range(k)], edits, max_new_tokens)
        return [begun[j::k] for j in range(k)]

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        numbers = [row // k for row in rows]
        begun = [Answer(prompts[i], stops[prompts[i].template], keys[i], i, decided) for i in numbers]
        decode(engine, tokens, past, edits, begun, max_new_tokens, sampler)
        answers.update(zip(rows, begun, strict=True))

    map_rows(engine, [[row] * k for row in ids], work, edits=edits, new_tokens=max_new_tokens - 1, kept=kept)
    return [[answers[i * k + j] for i in range(len(prompts))] for j in range(k)]


def takes_all_rows(engine: Engine, edits: Edits, sampler: Sampler) -> bool:
    """Whether the engine can answer all rows in one call."""
    is_able = Capability.BATCHED_ANSWERS in engine.capabilities
    return is_able and sampler is greedy and not any(edit.every_step for edit in edits)


def answer_at_once(
    engine: Engine, begun: Sequence[Answer], ids: Sequence[Sequence[int]], edits: Edits, max_new_tokens: int
) -> None:
    """Let the engine answer all rows in one call.

    Raises:
        EngineError: an answer that stops too early.
    """
    chosen = engine.answers(ids, edits, max_new_tokens=max_new_tokens, stops=[row.stop for row in begun])
    for row, tokens in zip(begun, chosen, strict=True):
        for token in tokens:
            if not row.ended:
                row.append(engine, token)
        if not row.ended and len(row.ids) != max_new_tokens:
            raise EngineError(
                f"{engine.name}: the answer to prompt {row.number} has {len(row.ids)} of {max_new_tokens} tokens and "
                f"does not end there: {row.text!r:.60}"
            )


def decode(
    engine: Engine,
    tokens: Tokens,
    past: Past,
    edits: Edits,
    rows: Sequence[Answer],
    max_new_tokens: int,
    sampler: Sampler,
) -> None:
    """The decoding loop: extend the rows of one batch token by token until each has ended.

    The edits are made in the first step; those with `every_step` again in each later one. A row that has ended leaves
    the batch, if the engine can take its past apart.
    """
    batch = list(range(len(rows)))
    for step in range(max_new_tokens):
        is_last = step + 1 == max_new_tokens
        estimate(step / max_new_tokens)
        output = engine.forward(tokens, edits=edits, past=past, keep_past=not is_last)
        logits = finite_logits(engine, output.logits, [rows[i].number for i in batch])
        chosen = sampler(logits, [f"{step}:{rows[i].key}" for i in batch]).cpu()
        for i, token in zip(batch, chosen.tolist(), strict=True):
            if not rows[i].ended:
                rows[i].append(engine, token)
        remaining = [slot for slot, i in enumerate(batch) if not rows[i].ended]
        if not remaining or is_last:
            return
        past, tokens, edits, kept = narrowed(engine, output.past, tokens, edits, remaining, len(batch))
        batch = [batch[slot] for slot in kept]
        tokens, edits = tokens.then(chosen[kept]), edits.next_step()


def narrowed(
    engine: Engine, past: Past, tokens: Tokens, edits: Edits, slots: Sequence[int], n_rows: int
) -> tuple[Past, Tokens, Edits, list[int]]:
    """A batch of only the rows at `slots`, and these slots; all rows if the engine cannot take its past apart."""
    if len(slots) == n_rows:
        return past, tokens, edits, list(slots)
    fewer = engine.select(past, slots)
    if fewer is None:
        return past, tokens, edits, list(range(n_rows))
    return fewer, tokens.keep(slots), edits.keep(slots), list(slots)


def required_logits(logits: Float[Tensor, "batch *pos d_vocab"] | None) -> Float[Tensor, "batch *pos d_vocab"]:
    """The logits of a pass that was asked for them."""
    if logits is None:
        raise EngineError("the engine returned no logits, although they were asked for")
    return logits


def finite_logits(
    engine: Engine, logits: Float[Tensor, "batch d_vocab"] | None, prompts: Sequence[int]
) -> Float[Tensor, "batch d_vocab"]:
    """The logits, if a token can be chosen from every row; `prompts` are the numbers of the rows' prompts.

    Raises:
        EngineError: NaN or infinity, or nothing but minus infinity; the message names the prompts.
    """
    given = required_logits(logits)
    broken = (~given.amax(dim=-1).isfinite()).nonzero().flatten().tolist()
    if broken:
        numbers = list(dict.fromkeys(prompts[i] for i in broken))
        some = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
        raise EngineError(
            f"{engine.name}: the logits after prompt {some} are NaN or infinite, so no token can be chosen; a "
            "half-precision model may overflow, run it in float32 or bfloat16"
        )
    return given


def completions(engine: Engine, answers: Sequence[Answer]) -> Completions:
    """The answers as a result."""
    longest, pad = max(len(each.ids) for each in answers), engine.info.pad_id
    rows = [each.ids + [pad] * (longest - len(each.ids)) for each in answers]
    return Completions(tuple(each.answer for each in answers), torch.tensor(rows, dtype=torch.long, device="cpu"))


def row_keys(texts: Sequence[str]) -> list[str]:
    """A name for each row that does not depend on the others; equal texts are numbered."""
    seen: Counter[str] = Counter()
    keys = []
    for text in texts:
        keys.append(f"{seen[text]}:{text}")
        seen[text] += 1
    return keys
