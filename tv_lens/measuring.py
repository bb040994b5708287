"""Answers with what accuracy does not show: how likely the right answer is, and how far the model is from few-shot.

All of it comes from one run: after the last token of a prompt, each row continues twice, once with the tokens that the
model chooses and once with those of the right answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from tv_lens.answers import answer_ids, expected_answers
from tv_lens.edits import Edits
from tv_lens.engines import Capability, Engine, Past, Prefixes, Tokens, map_rows
from tv_lens.generation import Answer, encode, finite_logits, greedy, narrowed
from tv_lens.progress import estimate
from tv_lens.prompts import Prompt

# A token that the model rules out has this log-probability, so that 0 times it is 0.
_LEAST = -1e30

# So many rows at once are compared with a distribution, which needs several copies of their logits.
_COMPARED = 32


@dataclass(frozen=True, eq=False)
class Measured:
    """The answers to some prompts under one condition.

    `logprobs` are those of the prompts' answers, all tokens, in nats. `divergences` are KL(p_teacher || p) of the next
    token, in nats; None without a teacher. `next_logprobs` are the next token's, if they were asked for.
    """

    answers: tuple[Answer, ...]
    logprobs: Float[Tensor, " prompt"]
    divergences: Float[Tensor, " prompt"] | None
    next_logprobs: Float[Tensor, "prompt d_vocab"] | None


def measure(  # noqa: PLR0913 - its options are keywords
    engine: Engine,
    prompts: Sequence[Prompt],
    ids: Sequence[Sequence[int]],
    conditions: Sequence[Edits],
    max_new_tokens: int,
    *,
    teacher: Float[Tensor, "prompt d_vocab"] | None = None,
    keep_next: bool = False,
    kept: Prefixes | None = None,
) -> list[Measured]:
    """Greedy answers to every prompt under each condition, with the log-probability of the right answer and the
    divergence from `teacher`, the next token's log-probabilities after the few-shot prompts.

    Raises:
        TvLensError: a prompt without an answer.
        EngineError: the model's logits are NaN or infinite.
    """
    k, n = len(conditions), len(prompts)
    targets = check_answers_fit(engine, prompts, ids)
    new_tokens = max(max_new_tokens, *map(len, targets)) - 1
    stops = {prompt.template: engine.text.stop_of(prompt) for prompt in prompts}
    begun = [Answer(prompts[i], stops[prompts[i].template], "", i) for i in range(n) for _ in range(k)]
    logprobs, divergences = torch.zeros(2, n * k, dtype=torch.float32, device="cpu")
    following: list[Float[Tensor, "row d_vocab"]] = []  # one tensor, as wide as what the model gives

    def observe(rows: list[int], logits: Float[Tensor, "row d_vocab"]) -> None:
        chosen = logits.log_softmax(dim=-1).clamp_min(_LEAST)
        if teacher is not None:
            expected_next = teacher[[row // k for row in rows]].to(chosen.device)
            divergences[rows] = kl_div(chosen, expected_next, reduction="none", log_target=True).sum(dim=-1).cpu()
        if keep_next:
            if not following:
                following.append(torch.empty(n * k, chosen.shape[1], dtype=chosen.dtype, device="cpu"))
            following[0][rows] = chosen.cpu()

    # An engine that cannot fork a past runs each row twice from the beginning.
    splits = engine.limits.shares_prefixes
    copies = 1 if splits else 2

    def work(numbers: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        lanes = [_Lane(number // copies, bool(number % copies)) for number in numbers]
        for row in {lane.row for lane in lanes if not lane.forced}:  # run again if memory ran out
            begun[row] = Answer(begun[row].prompt, begun[row].stop, "", begun[row].number)
        for row in {lane.row for lane in lanes if lane.forced or splits}:
            logprobs[row] = 0
        pair = _Pair(engine, begun, [targets[row // k] for row in range(n * k)], logprobs, max_new_tokens, observe)
        pair.decode(tokens, past, edits, lanes, splits=splits)

    edits = conditions[0] if k == 1 else Edits.interleave(conditions)
    map_rows(
        engine,
        [[row] * k * copies for row in ids],
        work,
        edits=edits if splits else edits.repeat(copies),
        new_tokens=new_tokens,
        kept=kept,
        # After the first step there are two rows for each.
        max_rows=max(1, engine.limits.rows(max(map(len, ids)) + new_tokens) // 2) if splits else None,
    )
    return [
        Measured(
            answers=tuple(begun[j::k]),
            logprobs=logprobs[j::k],
            divergences=None if teacher is None else divergences[j::k],
            next_logprobs=following[0][j::k] if keep_next else None,
        )
        for j in range(k)
    ]


def check_answers_fit(engine: Engine, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """The tokens of each prompt's answer.

    Raises:
        TvLensError: a prompt without an answer, or too long for it.
        UnsupportedError: an answer of several tokens, and an engine that cannot continue.
    """
    expected = expected_answers(prompts, None)
    targets = [
        answer_ids(engine, prompt, own, answer, i)
        for i, (prompt, own, answer) in enumerate(zip(prompts, ids, expected, strict=True))
    ]
    longest = max(map(len, targets))
    if longest > 1:
        engine.require(Capability.CONTINUE)
        encode(engine, prompts, longest)
    return targets


class _Lane(NamedTuple):
    """A row of a batch: which answer it belongs to, and whether its tokens are those of the right answer."""

    row: int
    forced: bool


@dataclass(frozen=True, eq=False)
class _Pair:
    """Both continuations of rows, while they are run. `answers`, `targets` and `logprobs` are those of all rows."""

    engine: Engine
    answers: Sequence[Answer]
    targets: Sequence[Sequence[int]]
    logprobs: Float[Tensor, " row"]
    max_new_tokens: int
    observe: Callable[[list[int], Float[Tensor, "row d_vocab"]], None]

    def decode(self, tokens: Tokens, past: Past, edits: Edits, lanes: list[_Lane], *, splits: bool) -> None:
        """Extend the lanes token by token until each has ended. With `splits` there is one lane for each row, which
        becomes two after the first step.
        """
        step = 0
        while True:
            estimate(min(1.0, step / self.max_new_tokens))
            output = self.engine.forward(tokens, edits=edits, past=past, keep_past=self._continues(lanes, step))
            logits = finite_logits(self.engine, output.logits, [self.answers[lane.row].number for lane in lanes])
            chosen = greedy(logits, ()).tolist()
            if step == 0:
                self._observe(logits, lanes)
            first = splits and step == 0
            self._add(logits, lanes, step, every=first)
            for lane, token in zip(lanes, chosen, strict=True):
                if not lane.forced and step < self.max_new_tokens and not self.answers[lane.row].ended:
                    self.answers[lane.row].append(self.engine, token)
            past = output.past
            if first:
                lanes = [_Lane(lane.row, forced) for lane in lanes for forced in (False, True)]
                chosen = [token for token in chosen for _ in range(2)]
            remaining = [slot for slot, lane in enumerate(lanes) if self._is_alive(lane, step)]
            if not remaining:
                return
            if first:
                past, tokens, edits = self.engine.fork(past, 2), tokens.repeat(2), edits.repeat(2)
            past, tokens, edits, kept = narrowed(self.engine, past, tokens, edits, remaining, len(lanes))
            lanes, chosen = [lanes[slot] for slot in kept], [chosen[slot] for slot in kept]
            following = [self._next(lane, token, step) for lane, token in zip(lanes, chosen, strict=True)]
            tokens, edits = tokens.then(torch.tensor(following, device="cpu")), edits.next_step()
            step += 1

    def _observe(self, logits: Float[Tensor, "row d_vocab"], lanes: Sequence[_Lane]) -> None:
        own = [slot for slot, lane in enumerate(lanes) if not lane.forced]
        at_once = max(1, min(_COMPARED, self.engine.limits.logit_rows() // 2))
        for first in range(0, len(own), at_once):
            some = own[first : first + at_once]
            self.observe([lanes[slot].row for slot in some], logits[some])

    def _add(self, logits: Float[Tensor, "row d_vocab"], lanes: Sequence[_Lane], step: int, *, every: bool) -> None:
        """Add this step's log-probability of the right answer's tokens."""
        slots = [
            slot for slot, lane in enumerate(lanes) if (lane.forced or every) and step < len(self.targets[lane.row])
        ]
        if slots:
            chosen = [self.targets[lanes[slot].row][step] for slot in slots]
            likely = logits[slots, chosen] - logits.logsumexp(dim=-1)[slots]
            self.logprobs[[lanes[slot].row for slot in slots]] += likely.cpu()

    def _is_alive(self, lane: _Lane, step: int) -> bool:
        if lane.forced:
            return step + 1 < len(self.targets[lane.row])
        return step + 1 < self.max_new_tokens and not self.answers[lane.row].ended

    def _continues(self, lanes: Sequence[_Lane], step: int) -> bool:
        """Whether another step can follow this one."""
        longest = max(self.max_new_tokens, *(len(self.targets[lane.row]) for lane in lanes))
        return step + 1 < longest

    def _next(self, lane: _Lane, token: int, step: int) -> int:
        # A lane that is done but could not leave the batch is fed its last token again.
        targets = self.targets[lane.row]
        return targets[min(step, len(targets) - 1)] if lane.forced else token
