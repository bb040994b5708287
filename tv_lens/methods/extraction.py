"""Read task vectors: hidden states where a few-shot prompt is about to answer.

vector[prompt, layer] = mean over substitute queries of h[layer] at the last token    (Hendel et al. 2023, section 3.2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from tv_lens.edits import RESID_POST, Edits, Positions, Site
from tv_lens.engines import Capability, Engine, Model, Past, Tokens, Wanted, engine_for, map_rows
from tv_lens.errors import TvLensError
from tv_lens.methods.base import Method, Read
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.provenance import Option
from tv_lens.tasks import Task
from tv_lens.vectors import TaskVectors


def extract(
    model: Model,
    prompts: Sequence[Prompt],
    substitutes: Sequence[Sequence[str]],
    *,
    site: Site = RESID_POST,
    positions: Positions = "last",
) -> TaskVectors:
    """One vector per prompt and layer: its demonstrations with other queries, averaged over those, so that the vector
    holds the task and not the query (Hendel et al. 2023, section 3.2 and appendix A).

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: few-shot prompts.
        substitutes: the queries asked instead of each prompt's own, as `Task.substitutes` draws them.
        site: the activation that is read, by default the residual stream after every block.
        positions: where it is read, as in `patch_generate`; with several positions the vector is their mean.

    Returns:
        Vectors that are meant to overwrite; `mean()` is the task's.

    Raises:
        TvLensError: no prompts, a different number of substitutes, a substitute that is its prompt's query or
            demonstration, or a site or position that is not there.

    Examples:
        >>> vectors = tv.extract(model, prompts, task.substitutes(prompts, 2, seed=0))
        >>> vectors.values.shape, vectors.mean().at(2).shape
        (torch.Size([4, 4, 32]), torch.Size([1, 32]))
    """
    engine = engine_for(model)
    check_prompts(prompts)
    k = check_substitutes(prompts, substitutes)
    asked = [[prompt.asking(query) for query in queries] for prompt, queries in zip(prompts, substitutes, strict=True)]
    read = read_site(engine, asked, site, positions)
    means = reduce(read, "(prompt substitute) layer width -> prompt layer width", "mean", substitute=k)
    options: dict[str, Option] = {"substitutes": k, "site": site.name, "positions": _as_option(positions)}
    return vectors_of(engine, means, prompts, tuple(map(tuple, substitutes)), site, "extract", options)


def extract_across(
    model: Model, prompts: Sequence[Prompt], *, site: Site = RESID_POST, positions: Positions = "last"
) -> TaskVectors:
    """The multi-context variant: for each prompt the average over the *other* prompts' own reads, leaving out every
    prompt that shows or asks this prompt's query. No substitutes, one pass over each prompt.

    Args:
        model: a bridge, or an engine to control batch size and BOS.
        prompts: few-shot prompts, which should have few inputs in common.
        site: the activation that is read.
        positions: where it is read, as in `patch_generate`.

    Returns:
        Vectors that are meant to overwrite.

    Raises:
        TvLensError: no prompts, or a prompt for which none of the others is left.

    Examples:
        >>> several = task.sample(8, shots=2, seed=0)
        >>> tv.extract_across(model, several).values.shape
        torch.Size([8, 4, 32])
    """
    engine = engine_for(model)
    check_prompts(prompts)
    shown_in: dict[str, list[int]] = {}  # the prompts that show or ask each input
    for i, prompt in enumerate(prompts):
        for text in prompt.inputs:
            shown_in.setdefault(text, []).append(i)
    for i, prompt in enumerate(prompts):
        if len(shown_in[prompt.query]) == len(prompts):
            raise TvLensError(
                f"prompt {i}: every other prompt shows or asks {prompt.query!r}, so no vector is left to "
                "average; sample more prompts or more inputs"
            )
    read = read_site(engine, [[prompt] for prompt in prompts], site, positions)
    total, means = read.sum(dim=0, dtype=torch.float64), torch.empty_like(read)
    for i, prompt in enumerate(prompts):
        left_out = shown_in[prompt.query]
        rest = total - read[left_out].sum(dim=0, dtype=torch.float64)
        means[i] = rest / (len(prompts) - len(left_out))
    options: dict[str, Option] = {"site": site.name, "positions": _as_option(positions)}
    return vectors_of(engine, means, prompts, (), site, "extract_across", options)


@dataclass(frozen=True)
class Extraction(Method):
    """`extract` as a method. An experiment takes the mean over the prompts.

    Attributes:
        substitutes: how many substitute queries there are for each prompt.
        site: as in `extract`.
        positions: as in `extract`.

    Examples:
        >>> str(Extraction(substitutes=3))
        "extract(substitutes=3, site='resid_post', positions='last')"
    """

    name: ClassVar[str] = "extract"
    substitutes: int = 2
    site: Site = RESID_POST
    positions: Positions = "last"

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector per prompt and layer."""
        chosen = task.substitutes(prompts, self.substitutes, seed=seed)
        return extract(engine, prompts, chosen, site=self.site, positions=self.positions)

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """The prompts with their substitute queries."""
        return substitute_reads(task, prompts, self.substitutes, seed, self.site) if self.positions == "last" else []


@dataclass(frozen=True)
class AcrossPrompts(Method):
    """`extract_across` as a method.

    Attributes:
        site: as in `extract`.
        positions: as in `extract`.

    Examples:
        >>> AcrossPrompts().name
        'extract_across'
    """

    name: ClassVar[str] = "extract_across"
    site: Site = RESID_POST
    positions: Positions = "last"

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        """One vector per prompt and layer."""
        return extract_across(engine, prompts, site=self.site, positions=self.positions)

    def reads(self, task: Task, prompts: Sequence[Prompt], seed: int) -> list[Read]:
        """The prompts."""
        return [Read(prompt, self.site) for prompt in prompts] if self.positions == "last" else []


def substitute_reads(task: Task, prompts: Sequence[Prompt], k: int, seed: int, site: Site) -> list[Read]:
    """Every prompt with each of its `k` substitute queries."""
    chosen = task.substitutes(prompts, k, seed=seed)
    return [
        Read(prompt.asking(query), site) for prompt, queries in zip(prompts, chosen, strict=True) for query in queries
    ]


def read_site(
    engine: Engine, groups: Sequence[Sequence[Prompt]], site: Site, positions: Positions
) -> Float[Tensor, "row layer width"]:
    """The site at every layer that has it, for all prompts of all groups. Rows that were read before are not run again
    (see `sharing_reads`), if only their last tokens are read.
    """
    engine.require_site(site)
    prompts = [prompt for group in groups for prompt in group]
    ids = engine.text.encode([prompt.text for prompt in prompts], per_prompt=len(groups[0]))
    if positions == "last" and engine.shared_reads is not None:
        wanted = iter([Wanted(tuple(own), site) for own in ids])
        grouped = [[next(wanted) for _ in group] for group in groups]
        engine.shared_reads.read(engine, grouped)
        return engine.shared_reads.use([each for group in grouped for each in group]).values
    offsets: list[list[int]] | None = None
    if positions != "last":
        engine.require(Capability.POSITIONS)
        offsets = [
            engine.text.positions(prompt, own, positions, i // len(groups[0]))
            for i, (prompt, own) in enumerate(zip(prompts, ids, strict=True))
        ]
    shape = (len(prompts), len(engine.layers_of(site)), engine.info.width(site))
    read = torch.empty(shape, dtype=torch.float32, device="cpu")

    def work(rows: list[int], tokens: Tokens, past: Past, edits: Edits) -> None:
        weights = None if offsets is None else _weights([offsets[row] for row in rows])
        output = engine.forward(tokens, read=[site], weights=weights, past=past, logits=False, keep_past=False)
        read[rows] = output.reads[site]

    numbered, first = [], 0
    for group in groups:
        numbered.append(ids[first : first + len(group)])
        first += len(group)
    map_rows(engine, numbered, work, reach=1 if offsets is None else max(-min(own) for own in offsets))
    return read


def _weights(offsets: Sequence[Sequence[int]]) -> Float[Tensor, "row window"]:
    """For each row the same weight at each of its positions, 0 elsewhere."""
    window = max(-min(own) for own in offsets)
    weights = torch.zeros(len(offsets), window, dtype=torch.float32, device="cpu")
    for row, own in enumerate(offsets):
        weights[row, list(own)] = 1 / len(own)
    return weights


def check_substitutes(prompts: Sequence[Prompt], substitutes: Sequence[Sequence[str]]) -> int:
    """How many substitutes each prompt has; an error if these do not fit the prompts."""
    if len(substitutes) != len(prompts):
        raise TvLensError(
            f"{len(prompts)} prompts and substitutes for {len(substitutes)}; give each prompt its own, as "
            "task.substitutes(prompts, k, seed=...) does"
        )
    for i, queries in enumerate(substitutes):
        if isinstance(queries, str):
            raise TvLensError(f"substitutes of prompt {i} are the text {queries!r}; give a list of texts")
    counts = [len(queries) for queries in substitutes]
    if len(set(counts)) > 1 or not counts[0]:
        raise TvLensError(f"every prompt needs the same number of substitutes, 1 or more; got {counts}")
    for i, (prompt, queries) in enumerate(zip(prompts, substitutes, strict=True)):
        for query in queries:
            if query in prompt.inputs:
                raise TvLensError(
                    f"prompt {i}: substitute {query!r} is its query or one of its demonstrations, so the vector "
                    "could hold the answer instead of the task; draw with task.substitutes"
                )
    return counts[0]


def _as_option(positions: Positions) -> Option:
    return positions if isinstance(positions, str) else list(positions)


def vectors_of(  # noqa: PLR0913 - the fields of the vectors
    engine: Engine,
    values: Float[Tensor, "prompt layer width"],
    prompts: Sequence[Prompt],
    substitutes: tuple[tuple[str, ...], ...],
    site: Site,
    method: str,
    options: Mapping[str, Option],
    *,
    layers: Sequence[int] | None = None,
) -> TaskVectors:
    """The values with their provenance; `layers` are all that have the site if none are given."""
    templates = {prompt.template for prompt in prompts}
    return TaskVectors(
        values,
        model=engine.name,
        task=" + ".join(sorted({prompt.task for prompt in prompts if prompt.task})),
        template=templates.pop() if len(templates) == 1 else None,
        prompts=tuple(prompt.text for prompt in prompts),
        substitutes=substitutes,
        method=method,
        prepend_bos=engine.info.prepend_bos,
        site=site,
        layers=engine.layers_of(site) if layers is None else tuple(layers),
        n_layers=engine.n_layers,
        n_heads=engine.info.n_heads if site.per_head else 0,
        options=options,
        bos=engine.info.bos,
    )
