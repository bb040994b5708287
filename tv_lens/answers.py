"""The tokens of an answer after its query: the first-token rule, log P(answer), and the distance from few-shot.

answer_logprobs    log P(answer | prompt) = sum over its tokens of log P(token | prompt, tokens before)
divergence         KL(p_few-shot || p_patched) at the next token   (d_NTP in arXiv 2605.20730)
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import Edits, Positions, Write
from tv_lens.engines import Capability, Engine, Model, Past, Tokens, engine_for, map_rows
from tv_lens.errors import TvLensError
from tv_lens.generation import encode, finite_logits, narrowed, next_logits
from tv_lens.patching import LayerChoice, Placement, checked, edits_for
from tv_lens.prompts import PAPER, Prompt, PromptFormat, as_prompts
from tv_lens.tasks import Rule, Task, starts_with
from tv_lens.vectors import TaskVectors


def first_token(model: Model, template: PromptFormat = PAPER, task: Task | None = None) -> Rule:
    """A rule for the paper's protocol: was the answer's first token generated, as `model` writes the answer after
    `template`'s query? What `starts_with` accepts is correct as well.

    Some tokenizers begin most answers of a task with the same token (a bare space before a digit). With `task` given,
    the rule then judges the first token that tells answers apart, and its name says so.

    Token ids are compared where there are any (`Completions`), else their text. A text that is only a part of a
    character is not accepted. If answers begin with a piece of their input (gerunds: "sing" of "singing"), this accepts
    a mere repetition.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        template: how the prompts are written.
        task: the task whose answers are to be distinguished; None judges the first token.

    Returns:
        The rule. Its `tokens` are how many tokens must be generated.

    Examples:
        >>> rule = tv.first_token(model, tv.PAPER, task)
        >>> rule.name, rule.tokens
        ('first_token', 1)
    """
    codec = engine_for(model).text
    query = template.write((), "x")

    @functools.cache
    def ids_of(answer: str) -> tuple[int, ...]:
        return tuple(_after(codec.to_ids(query), codec.to_ids(query + template.continuation("x", answer))))

    n_tokens = 1 if task is None else _tokens_to_tell_apart([ids_of(task.answer(text)) for text in task.inputs])

    def accepts(prediction: str, answer: str) -> bool:
        begins = codec.decode(ids_of(answer)[:n_tokens]).strip()
        # Part of any character decodes to U+FFFD, so the text cannot show whether it is right.
        is_readable = bool(begins) and "\ufffd" not in begins
        return starts_with(prediction, answer) or (is_readable and prediction.strip() == begins)

    def accepts_ids(ids: Sequence[int], answer: str) -> bool:
        expected = ids_of(answer)[:n_tokens]
        return tuple(ids[: len(expected)]) == expected

    name = "first_token" if n_tokens == 1 else f"first_token (of {n_tokens})"
    return Rule(name, accepts, tokens=n_tokens, accepts_ids=accepts_ids)


def _tokens_to_tell_apart(answers: Sequence[tuple[int, ...]]) -> int:
    """How many tokens are needed until most answers no longer begin alike."""
    distinct = set(answers)
    n_tokens, longest = 1, max(map(len, distinct))
    while n_tokens < longest and len(distinct) > 1:
        [(_, most)] = Counter(ids[:n_tokens] for ids in distinct).most_common(1)
        if 2 * most <= len(distinct):
            break
        n_tokens += 1
    return n_tokens


def _after(prefix: Sequence[int], whole: Sequence[int]) -> list[int]:
    """What differs in `whole`, which begins like `prefix`; at least its last token."""
    same = next((i for i, token in enumerate(whole) if prefix[i : i + 1] != [token]), len(whole) - 1)
    return list(whole[same:])


def answer_logprobs(  # noqa: PLR0913 - its options are keywords
    model: Model,
    prompts: Sequence[Prompt | str],
    answers: Sequence[str] | None = None,
    *,
    vectors: TaskVectors | Tensor | None = None,
    layer: LayerChoice | None = None,
    how: Write | None = None,
    positions: Positions | None = None,
    keep_demonstrations: bool | None = None,
) -> Float[Tensor, " prompt"]:
    """The log-probability of each prompt's answer: the sum over all of its tokens.

    Without `vectors` the prompts are run as they are. With them the queries alone are run, patched as in
    `patch_generate`. An answer is tokenized together with its prompt, as the model would generate it; after a plain
    string it is appended literally, so write its leading space.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: prompts, or plain strings with `answers`.
        answers: one for each prompt; None takes the prompts' own.
        vectors: what is written; None leaves the model as it is.
        layer: needed with `vectors`, as in `patch_generate`.
        how: as in `patch_generate`.
        positions: as in `patch_generate`.
        keep_demonstrations: as in `patch_generate`.

    Returns:
        Natural logarithms, one for each prompt; float32, on the CPU.

    Raises:
        TvLensError: a prompt without an answer, vectors without a layer, or as `patch_generate`.
        EngineError: the model's logits are NaN or infinite.

    Examples:
        >>> tv.answer_logprobs(model, prompts).shape
        torch.Size([4])
        >>> patched = tv.answer_logprobs(model, prompts, vectors=vector, layer=2)
        >>> bool((patched < 0).all())
        True
    """
    engine, given = engine_for(model), as_prompts(prompts)
    expected = expected_answers(given, answers)
    write: Callable[[Sequence[Sequence[int]]], Edits] | None = None
    if vectors is not None:
        if layer is None:
            raise TvLensError("vectors are given without a layer; pass layer=..., for instance sweep.best")
        placement = Placement(how, positions, keep_demonstrations)
        task_vectors, placed = checked(engine, given, vectors, layer, placement)
        given = placed.prompts(given)
        write = functools.partial(edits_for, engine, given, vectors=task_vectors, layer=layer, placed=placed)
    ids = encode(engine, given, 1)
    targets = [
        answer_ids(engine, prompt, own, answer, i)
        for i, (prompt, own, answer) in enumerate(zip(given, ids, expected, strict=True))
    ]
    new_tokens = max(map(len, targets)) - 1
    if new_tokens:
        engine.require(Capability.CONTINUE)
        encode(engine, given, new_tokens + 1)
    edits = Edits() if write is None else write(ids)
    logprobs = torch.zeros(len(given), dtype=torch.float32, device="cpu")

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        logprobs[rows] = _forced(engine, tokens, past, edits, [targets[row] for row in rows], rows)

    map_rows(engine, [[own] for own in ids], work, edits=edits, new_tokens=new_tokens)
    return logprobs


def expected_answers(prompts: Sequence[Prompt], answers: Sequence[str] | None) -> list[str]:
    """The answers given, or the prompts' own; an error if a prompt has none."""
    if isinstance(answers, str) or (answers is not None and len(answers) != len(prompts)):
        raise TvLensError(f"answers are {answers!r:.80} for {len(prompts)} prompts; give a list with one for each")
    expected = [prompt.answer for prompt in prompts] if answers is None else list(answers)
    known = []
    for i, answer in enumerate(expected):
        if answer is None:
            raise TvLensError(f"prompt {i} has no answer; pass answers=[...], one for each prompt")
        known.append(answer)
    return known


def answer_ids(engine: Engine, prompt: Prompt, ids: Sequence[int], answer: str, number: int) -> list[int]:
    """The answer's tokens after the prompt's, which stay as they are."""
    text = prompt.template.continuation(prompt.query, answer)
    whole = engine.text.to_ids(prompt.text + text)
    # A tokenizer may merge the end of the prompt with the answer, which no generation would do.
    chosen = whole[len(ids) :] if whole[: len(ids)] == list(ids) else engine.text.piece_ids(text)
    if not answer or not chosen:
        raise TvLensError(f"prompt {number}: the answer {answer!r} has no tokens")
    return chosen


def _forced(
    engine: Engine, tokens: Tokens, past: Past, edits: Edits, targets: Sequence[Sequence[int]], rows: Sequence[int]
) -> Float[Tensor, " batch"]:
    """The log-probability of each row's target tokens, one step after another."""
    total = torch.zeros(len(targets), dtype=torch.float32, device="cpu")
    batch = list(range(len(targets)))
    for step in range(max(map(len, targets))):
        is_last = step + 1 == max(len(targets[i]) for i in batch)
        output = engine.forward(tokens, edits=edits, past=past, keep_past=not is_last)
        logits = finite_logits(engine, output.logits, [rows[i] for i in batch])
        # A row that is done but could not leave the batch is fed its last token again.
        chosen = torch.tensor([targets[i][min(step, len(targets[i]) - 1)] for i in batch], device="cpu")
        step_logprobs = logits.log_softmax(dim=-1).cpu().gather(1, chosen[:, None]).squeeze(1)
        for slot, i in enumerate(batch):
            if step < len(targets[i]):
                total[i] += step_logprobs[slot]
        remaining = [slot for slot, i in enumerate(batch) if step + 1 < len(targets[i])]
        if not remaining:
            break
        past, tokens, edits, kept = narrowed(engine, output.past, tokens, edits, remaining, len(batch))
        batch = [batch[slot] for slot in kept]
        tokens, edits = tokens.then(chosen[kept]), edits.next_step()
    return total


def divergence(
    model: Model,
    prompts: Sequence[Prompt],
    vectors: TaskVectors | Tensor,
    layer: LayerChoice,
    *,
    how: Write | None = None,
    positions: Positions | None = None,
    keep_demonstrations: bool | None = None,
) -> Float[Tensor, " prompt"]:
    """How far the patched model is from the few-shot one: KL(p_few-shot || p_patched) of the next token.

    0 means that the vector replaces the demonstrations exactly.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: prompts with demonstrations.
        vectors: what is written: one vector for each prompt, or one for all (`vectors.mean()`).
        layer: as in `patch_generate`.
        how: as in `patch_generate`.
        positions: as in `patch_generate`.
        keep_demonstrations: as in `patch_generate`.

    Returns:
        Nats, one number for each prompt; float32, on the CPU.

    Raises:
        TvLensError: prompts without demonstrations, or as `patch_generate`.
        EngineError: the model's logits are NaN or infinite.

    Examples:
        >>> tv.divergence(model, prompts, vectors, 2).shape
        torch.Size([4])
    """
    engine, whole = engine_for(model), as_prompts(prompts)
    if not all(prompt.examples for prompt in whole):
        raise TvLensError("the few-shot distribution needs demonstrations; sample the prompts with shots=1 or more")
    placement = Placement(how, positions, keep_demonstrations)
    task_vectors, placed = checked(engine, whole, vectors, layer, placement)
    patched_prompts = placed.prompts(whole)
    few_shot_ids, ids = encode(engine, whole, 1), encode(engine, patched_prompts, 1)
    edits = edits_for(engine, patched_prompts, ids, task_vectors, layer, placed)
    divergences = []
    at_once = max(1, engine.limits.logit_rows() // 2)  # prompts, each with two distributions over the vocabulary
    for first in range(0, len(whole), at_once):
        numbers = list(range(first, min(first + at_once, len(whole))))
        few_shot = _next_logprobs(engine, few_shot_ids, Edits(), numbers)
        patched = _next_logprobs(engine, ids, edits, numbers)
        divergences.append(torch.nn.functional.kl_div(patched, few_shot, reduction="none", log_target=True).sum(dim=-1))
    return torch.cat(divergences)


def _next_logprobs(
    engine: Engine, ids: Sequence[Sequence[int]], edits: Edits, numbers: Sequence[int]
) -> Float[Tensor, "prompt d_vocab"]:
    """The log-probabilities of the next token after some of the prompts."""
    logits = next_logits(engine, [ids[i] for i in numbers], edits.keep(numbers))
    return finite_logits(engine, logits, numbers).log_softmax(dim=-1)
