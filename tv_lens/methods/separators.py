"""Several vectors for the separators of a few-shot prompt: TaskV-M and TaskV-MS (Dong et al., arXiv 2506.09048).

h[layer] at separator j of the prompt := vector j,    for all N + 1 separators of a prompt with N demonstrations
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import RESID_POST, Edits, Site, Usage
from tv_lens.engines import Capability, Engine, Model, Past, Tokens, engine_for, map_rows
from tv_lens.errors import TvLensError
from tv_lens.methods.base import Method, Read
from tv_lens.methods.extraction import check_substitutes, extract, read_site, substitute_reads, vectors_of
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors


def separator_vectors(
    model: Model, prompts: Sequence[Prompt], substitutes: Sequence[Sequence[str]], *, own: bool = False
) -> TaskVectors:
    """N + 1 vectors from prompts with N demonstrations, to be written over the N + 1 separators of a few-shot prompt at
    once. A separator is the last token between an input and its output, the query's included (Dong et al., arXiv
    2506.09048, TaskV-M).

    Each vector is that of another prompt, as `extract` reads it: at the last token, mean over the prompt's substitute
    queries. If there are more than N + 1 prompts, prompt i belongs to separator i % (N + 1), and the vectors of each
    separator are averaged.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: prompts with N demonstrations each, N + 1 of them or more.
        substitutes: the queries asked instead of each prompt's own, as `Task.substitutes` draws them.
        own: whether the vectors of a prompt are read at its own separators instead, the last of them with the
            substitute queries, and each is averaged over the prompts (TaskV-MS).

    Returns:
        vectors of shape (separator, layer, d_model). They are meant to be written into prompts with N demonstrations,
        which are kept. A prompt with another number of separators is refused.

    Raises:
        TvLensError: prompts with different numbers of demonstrations, fewer than N + 1 of them (unless `own`), or
            substitutes that `extract` refuses.

    Examples:
        >>> several = tv.separator_vectors(model, prompts, task.substitutes(prompts, 1, seed=0))
        >>> several.values.shape
        torch.Size([4, 4, 32])
    """
    engine = engine_for(model)
    check_prompts(prompts)
    n = _separators_of(prompts)
    if own:
        vectors = _own(engine, prompts, substitutes, n)
    elif len(prompts) < n:
        raise TvLensError(
            f"{len(prompts)} prompts for {n} separators; each separator needs the vector of another prompt, so give "
            f"{n} prompts or more, or use own=True"
        )
    else:
        vectors = extract(engine, prompts, substitutes)
        by_separator = [vectors.values[i::n].mean(dim=0) for i in range(n)]
        vectors = replace(vectors, values=torch.stack(by_separator), terms=())
    return replace(
        vectors,
        method=SeparatorVectors.name,
        options={"substitutes": len(substitutes[0]), "own": own},
        usage=Usage(positions="separators", keep_demonstrations=True, per_position=True),
        terms=(),
    )


def _own(engine: Engine, prompts: Sequence[Prompt], substitutes: Sequence[Sequence[str]], n: int) -> TaskVectors:
    """Every prompt's own separators, averaged over the prompts."""
    k = check_substitutes(prompts, substitutes)
    # Only the last separator depends on the query, so one substitute is enough for the others.
    first = [prompt.asking(queries[0]) for prompt, queries in zip(prompts, substitutes, strict=True)]
    read = read_separators(engine, first, RESID_POST, n)
    if k > 1:
        asked = [
            [prompt.asking(query) for query in queries[1:]]
            for prompt, queries in zip(prompts, substitutes, strict=True)
        ]
        rest = read_site(engine, asked, RESID_POST, "last")
        rest = reduce(rest, "(prompt query) layer width -> prompt layer width", "sum", query=k - 1)
        read[:, -1] = (read[:, -1] + rest) / k
    means = reduce(read, "prompt separator layer width -> separator layer width", "mean")
    return vectors_of(
        engine, means, prompts, tuple(map(tuple, substitutes)), RESID_POST, SeparatorVectors.name, options={}
    )


def read_separators(
    engine: Engine, prompts: Sequence[Prompt], site: Site, last: int
) -> Float[Tensor, "prompt separator layer width"]:
    """The site at the last `last` separators of every prompt, at every layer that has it; each prompt is run once.

    Raises:
        TvLensError: a prompt with fewer separators.
    """
    engine.require_site(site)
    engine.require(Capability.POSITIONS)
    ids = engine.text.encode([prompt.text for prompt in prompts])
    offsets: list[list[int]] = []
    for i, (prompt, own) in enumerate(zip(prompts, ids, strict=True)):
        positions = engine.text.positions(prompt, own, "separators", i)
        if len(positions) < last:
            raise TvLensError(
                f"prompt {i} has {len(positions)} separators and {last} are read; use prompts with {last - 1} "
                "demonstrations or more"
            )
        offsets.append(positions[-last:])
    shape = (len(prompts), last, len(engine.layers_of(site)), engine.info.width(site))
    read = torch.empty(shape, dtype=torch.float32, device="cpu")

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        weights = _one_each([offsets[row] for row in rows])
        output = engine.forward(tokens, read=[site], weights=weights, past=past, logits=False, keep_past=False)
        read[rows] = output.reads[site].transpose(1, 2)

    map_rows(engine, [[own] for own in ids], work, reach=max(-min(own) for own in offsets))
    return read


def _one_each(offsets: Sequence[Sequence[int]]) -> Float[Tensor, "row separator window"]:
    """For each row, a sum for each of its positions that is this position alone."""
    window = max(-min(own) for own in offsets)
    weights = torch.zeros(len(offsets), len(offsets[0]), window, dtype=torch.float32, device="cpu")
    for row, own in enumerate(offsets):
        weights[row, range(len(own)), list(own)] = 1
    return weights


def _separators_of(prompts: Sequence[Prompt]) -> int:
    """The number of separators of every prompt."""
    shots = sorted({prompt.shots for prompt in prompts})
    if len(shots) > 1:
        raise TvLensError(
            f"prompts with {shots} demonstrations; give all of them the same number, so that they have equally many "
            "separators"
        )
    return shots[0] + 1


@dataclass(frozen=True)
class SeparatorVectors(Method):
    """`separator_vectors` as a method.

    Attributes:
        substitutes: how many substitute queries there are for each prompt.
        own: as in `separator_vectors`.

    Examples:
        >>> str(SeparatorVectors(substitutes=1, own=True))
        'separator_vectors(substitutes=1, own=True)'
    """

    name: ClassVar[str] = "separator_vectors"
    substitutes: int = 2
    own: bool = False

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector per separator and layer."""
        chosen = task.substitutes(prompts, self.substitutes, seed=seed)
        return replace(separator_vectors(engine, prompts, chosen, own=self.own), task=task.name)

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """The prompts with their substitute queries, unless each prompt's own separators are read."""
        return [] if self.own else substitute_reads(task, prompts, self.substitutes, seed, RESID_POST)

    def shuffled(self, prompts: Sequence[Prompt], seed: int) -> list[Prompt] | None:
        """The prompts with permuted outputs; None if there are too few prompts for their separators."""
        too_few = not self.own and len(prompts) < prompts[0].shots + 1
        return None if too_few else super().shuffled(prompts, seed)
