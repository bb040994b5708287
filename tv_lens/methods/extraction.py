"""Read task vectors: the residual stream where a few-shot prompt is about to answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from tv_lens.engines import Engine, Past, Tokens, engine_for, engine_name, run_all
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.vectors import TaskVectors


def extract(model: Any, prompts: Sequence[Prompt], substitutes: Sequence[Sequence[str]]) -> TaskVectors:
    """One vector per prompt and layer: its demonstrations asked for other inputs, averaged over those.

    `substitutes[i]` are the queries asked instead of prompt `i`'s own, as `Task.substitutes` draws them; so
    the vector holds the task and not the query (Hendel et al. 2023, section 3.2 and appendix A). Read
    at the last token, at the output of every block.

    Raises:
        ValueError: no prompts, a different number of substitutes, or a substitute that is its prompt's query
            or demonstration.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    k = _check_substitutes(prompts, substitutes)
    groups = [
        [prompt.asking(query).text for query in queries] for prompt, queries in zip(prompts, substitutes, strict=True)
    ]
    read = torch.empty(len(prompts) * k, engine.n_layers, engine.d_model)
    run_all(engine, groups, _reading_into(read, engine))
    means = reduce(read, "(prompt substitute) layer d_model -> prompt layer d_model", "mean", substitute=k)
    return _vectors(engine, means, prompts, tuple(map(tuple, substitutes)), "extract")


def extract_across(model: Any, prompts: Sequence[Prompt]) -> TaskVectors:
    """The multi-context variant: for each prompt the average over the *other* prompts' own reads, leaving out
    every prompt that shows or asks this prompt's query. No substitutes, one pass over each prompt.

    Raises:
        ValueError: no prompts, or a prompt for which none of the others is left.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    knowing: dict[str, list[int]] = {}  # which prompts show or ask an input, each prompt's own query among them
    for i, prompt in enumerate(prompts):
        for text in prompt.inputs:
            knowing.setdefault(text, []).append(i)
    for i, prompt in enumerate(prompts):
        if len(knowing[prompt.query]) == len(prompts):
            raise ValueError(
                f"prompt {i}: every other prompt shows or asks {prompt.query!r}, so no vector is left to "
                "average; sample more prompts or more inputs"
            )
    read = torch.empty(len(prompts), engine.n_layers, engine.d_model)
    run_all(engine, [[prompt.text] for prompt in prompts], _reading_into(read, engine))
    total, means = read.sum(dim=0, dtype=torch.float64), torch.empty_like(read)
    for i, prompt in enumerate(prompts):
        left_out = knowing[prompt.query]
        rest = total - read[left_out].sum(dim=0, dtype=torch.float64)
        means[i] = rest / (len(prompts) - len(left_out))
    return _vectors(engine, means, prompts, (), "extract_across")


def _reading_into(
    read: Float[Tensor, "row layer d_model"], engine: Engine
) -> Callable[[list[int], Tokens, Past], None]:
    def work(rows: list[int], tokens: Tokens, past: Past) -> None:
        read[rows] = engine.read(tokens, past)

    return work


def _check_substitutes(prompts: Sequence[Prompt], substitutes: Sequence[Sequence[str]]) -> int:
    if len(substitutes) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and substitutes for {len(substitutes)}; give each prompt its own, as "
            "task.substitutes(prompts, k, seed=...) does"
        )
    for i, queries in enumerate(substitutes):
        if isinstance(queries, str):
            raise ValueError(f"substitutes of prompt {i} are the text {queries!r}; give a list of texts")
    counts = [len(queries) for queries in substitutes]
    if len(set(counts)) > 1 or not counts[0]:
        raise ValueError(f"every prompt needs the same number of substitutes, 1 or more; got {counts}")
    for i, (prompt, queries) in enumerate(zip(prompts, substitutes, strict=True)):
        for query in queries:
            if query in prompt.inputs:
                raise ValueError(
                    f"prompt {i}: substitute {query!r} is its query or one of its demonstrations, so the vector "
                    "could hold the answer rather than the task; draw with task.substitutes"
                )
    return counts[0]


def _vectors(
    engine: Engine,
    values: Float[Tensor, "prompt layer d_model"],
    prompts: Sequence[Prompt],
    substitutes: tuple[tuple[str, ...], ...],
    method: str,
) -> TaskVectors:
    templates = {prompt.template for prompt in prompts}
    return TaskVectors(
        values,
        model=engine_name(engine),
        task=" + ".join(sorted({prompt.task for prompt in prompts if prompt.task})),
        template=templates.pop() if len(templates) == 1 else None,
        prompts=tuple(prompt.text for prompt in prompts),
        substitutes=substitutes,
        method=method,
        prepend_bos=getattr(engine, "prepend_bos", None),
    )
