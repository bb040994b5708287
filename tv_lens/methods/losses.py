"""The losses of learned vectors and their gradients, for many prompts and layers side by side.

A row is one prompt with one layer's vector. Each vector gets gradients from its own rows alone, so training layers
together is the same as training them one by one. What comes before the first token that is written to never changes:
it is run once and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from tv_lens.answers import answer_ids, expected_answers
from tv_lens.edits import Edit, Edits, Positions, Write
from tv_lens.engines import Engine, Past, Prefixes, Tokens, gradient, map_rows
from tv_lens.errors import EngineError, TvLensError
from tv_lens.generation import encode, finite_logits, next_logits, required_logits
from tv_lens.prompts import Prompt

Objective = Literal["answer", "few-shot"]

# A pass that keeps its graph has at most so many positions, and so many logits.
GRAPH_POSITIONS = 512
GRAPH_LOGITS = 2**25

_IGNORED = -100


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts as they are trained on.

    `rows` are token ids: the query, and the answer without its last token. `positions[i]` are those that are written
    to, `last[i]` is that of the query's last token, both counted from the end of the row. `targets` are the answers'
    tokens, aligned to the right; `teacher` are the few-shot log-probabilities of the next token. One of them is None.
    `numbers` are the prompts' numbers in messages.
    """

    rows: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]
    last: tuple[int, ...]
    targets: Int[Tensor, "prompt target"] | None
    teacher: Float[Tensor, "prompt d_vocab"] | None
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_logits(self) -> int:
        """After how many of the last positions logits are needed."""
        return 1 if self.targets is None else self.targets.shape[1]

    @property
    def reach(self) -> int:
        """How many tokens at the end of a row may depend on the vectors."""
        return max(-min(own) for own in self.positions)

    @staticmethod
    def of(engine: Engine, prompts: Sequence[Prompt], objective: Objective, positions: Positions) -> Examples:
        """The queries of the prompts, with what they are trained to; the model does not run.

        With the objective "few-shot" a teacher must be added, by `taught`.

        Raises:
            TvLensError: a prompt that lacks what the objective or the positions need.
        """
        queries = [prompt.zero_shot() for prompt in prompts]
        ids = encode(engine, queries, 1)
        written = [
            tuple(engine.text.positions(query, own, positions, i))
            for i, (query, own) in enumerate(zip(queries, ids, strict=True))
        ]
        numbers = tuple(range(len(prompts)))
        if objective == "few-shot":
            encode(engine, prompts, 1)
            rows = tuple(map(tuple, ids))
            return Examples(rows, tuple(written), (-1,) * len(ids), targets=None, teacher=None, numbers=numbers)
        for i, prompt in enumerate(prompts):
            if prompt.answer is None:
                raise TvLensError(f"prompt {i} has no answer to learn; give it one, or use objective='few-shot'")
        known = zip(queries, ids, expected_answers(prompts, None), strict=True)
        answers = [answer_ids(engine, query, own, answer, i) for i, (query, own, answer) in enumerate(known)]
        longest = max(map(len, answers))
        encode(engine, queries, longest)  # an error if the context is too short
        before = [len(answer) - 1 for answer in answers]
        return Examples(
            rows=tuple((*own, *answer[:-1]) for own, answer in zip(ids, answers, strict=True)),
            positions=tuple(tuple(each - n for each in own) for own, n in zip(written, before, strict=True)),
            last=tuple(-1 - n for n in before),
            targets=torch.tensor([[_IGNORED] * (longest - len(each)) + each for each in answers], device="cpu"),
            teacher=None,
            numbers=numbers,
        )

    def keep(self, chosen: Sequence[int]) -> Examples:
        """Only some of the prompts."""
        index = torch.tensor(list(chosen), dtype=torch.long, device="cpu")
        return Examples(
            rows=tuple(self.rows[i] for i in chosen),
            positions=tuple(self.positions[i] for i in chosen),
            last=tuple(self.last[i] for i in chosen),
            targets=None if self.targets is None else self.targets[index],
            teacher=None if self.teacher is None else self.teacher[index],
            numbers=tuple(self.numbers[i] for i in chosen),
        )

    def taught(self, engine: Engine, prompts: Sequence[Prompt]) -> Examples:
        """The same, with the model's next-token distribution after the whole prompts to imitate."""
        logits = next_logits(engine, encode(engine, prompts, 1), Edits())
        return replace(self, teacher=finite_logits(engine, logits, self.numbers).log_softmax(dim=-1))

    def judge(
        self, logits: Float[Tensor, "row pos d_vocab"], prompts: Sequence[int]
    ) -> tuple[Float[Tensor, " row"], Bool[Tensor, " row"]]:
        """The loss of each row, in nats, and whether the right tokens are the most likely ones."""
        chosen = torch.tensor(list(prompts), dtype=torch.long, device="cpu")
        if self.targets is None:
            assert self.teacher is not None
            teacher = self.teacher[chosen].to(logits.device)
            last = logits[:, -1].log_softmax(dim=-1)
            losses = kl_div(last, teacher, reduction="none", log_target=True).sum(dim=-1)
            return losses, last.argmax(dim=-1) == teacher.argmax(dim=-1)
        targets = self.targets[chosen][:, -logits.shape[1] :].to(logits.device)
        counted = targets != _IGNORED
        by_token = cross_entropy(logits.mT, targets, ignore_index=_IGNORED, reduction="none")
        losses = by_token.sum(dim=1) / counted.sum(dim=1)
        return losses, ((logits.argmax(dim=-1) == targets) | ~counted).all(dim=1)


@dataclass(frozen=True, eq=False)
class Losses:
    """Losses and whether answers are right, for each prompt and each vector that was run; and the gradient of the sum
    with respect to all vectors, if asked for: 0 for those that were not run.
    """

    losses: Float[Tensor, "prompt vector"]
    right: Bool[Tensor, "prompt vector"]
    gradient: Float[Tensor, "slot width"] | None


@dataclass(frozen=True, eq=False)
class Trainer:
    """Runs examples with vectors for certain layers written in as `write` says."""

    engine: Engine
    layers: tuple[int, ...]
    write: Write
    kept: Prefixes

    def run(
        self,
        examples: Examples,
        prompts: Sequence[int],
        vectors: Float[Tensor, "slot width"],
        slots: Sequence[int],
        *,
        grad: bool,
    ) -> Losses:
        """The losses of some prompts with some of the vectors, one vector a row."""
        engine, k = self.engine, len(slots)
        # High layers first: the graph of a pass begins at its lowest layer.
        ordered = sorted(range(k), key=lambda j: -self.layers[slots[j]])
        losses = torch.zeros(len(prompts), k, dtype=torch.float32, device="cpu")
        right = torch.zeros(len(prompts), k, dtype=torch.bool, device="cpu")
        total = torch.zeros_like(vectors) if grad else None
        counted: set[int] = set()  # rows come a second time if memory runs out

        def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
            numbers, columns = [row // k for row in rows], [ordered[row % k] for row in rows]
            own = [prompts[i] for i in numbers]
            written = vectors.detach().requires_grad_(grad)
            with torch.set_grad_enabled(grad):  # whatever the caller has turned off
                edits = self.edits(examples, own, [slots[j] for j in columns], written)
            output = engine.forward(
                tokens, edits=edits, past=past, logits=examples.n_logits, keep_past=False, grad=grad
            )
            with torch.set_grad_enabled(grad):
                each, is_right = examples.judge(required_logits(output.logits), own)
                if not bool(each.isfinite().all()):
                    broken = own[int((~each.isfinite()).nonzero()[0])]
                    raise EngineError(
                        f"{engine.name}: the loss of prompt {examples.numbers[broken]} is NaN or infinite; a "
                        "half-precision model may overflow, or the learning rate is too high"
                    )
                if total is not None:
                    new = torch.tensor([row not in counted for row in rows], device=each.device)
                    total.add_(gradient(engine, each[new].sum(), written).to(total))
            counted.update(rows)
            losses[numbers, columns] = each.detach().float().cpu()
            right[numbers, columns] = is_right.cpu()

        width = examples.reach
        longest = max(len(examples.rows[i]) for i in prompts)
        most = min(
            GRAPH_POSITIONS // width,
            GRAPH_LOGITS // (engine.info.d_vocab * examples.n_logits),
            engine.limits.graph_rows(longest, run=width, n_logits=examples.n_logits),
        )
        map_rows(
            engine,
            [[examples.rows[i]] * k for i in prompts],
            work,
            reach=width,
            kept=self.kept,
            max_rows=max(1, most) if grad else None,
        )
        return Losses(losses, right, total)

    def edits(
        self, examples: Examples, prompts: Sequence[int], slots: Sequence[int], vectors: Float[Tensor, "slot width"]
    ) -> Edits:
        """What is written into a batch: vector `slots[i]` into row `i`, which is of `prompts[i]`."""
        rows_at: dict[tuple[int, int], list[int]] = {}
        for row, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
            positions = examples.positions[prompt]
            if self.write.every_step:
                positions = (*positions, *range(examples.last[prompt] + 1, 0))
            for position in positions:
                rows_at.setdefault((slot, position), []).append(row)
        return Edits(
            Edit(
                (vectors[slot] * self.write.strength).expand(len(rows), -1),
                torch.tensor(rows, dtype=torch.long, device="cpu"),
                self.layers[slot],
                position=position,
                op=self.write.op,
                keep_norm=self.write.keep_norm,
            )
            for (slot, position), rows in rows_at.items()
        )
