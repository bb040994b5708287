"""Let the model answer, with or without a task vector written into the prompt's last position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.utilities.logits_utils import sample_logits
from transformer_lens.utilities.statistics import derive_generator

from tv_lens.engines import Engine, Past, Patch, Tokens, engine_for, engine_name, run_all
from tv_lens.prompts import Prompt, check_prompts
from tv_lens.vectors import TaskVectors, check_layer

# Next-token logits, and for each row a key that names its prompt and step, to the ids chosen. A sampler that
# draws does so by the key, so that a row's draw does not hang on the rows it shares a batch with.
Sampler = Callable[[Float[Tensor, "batch d_vocab"], Sequence[str]], Int[Tensor, " batch"]]


def greedy(logits: Float[Tensor, "batch d_vocab"], keys: Sequence[str]) -> Int[Tensor, " batch"]:
    """The likeliest token of each row."""
    return logits.argmax(dim=-1)


def sample(*, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None, seed: int = 0) -> Sampler:
    """A sampler: draws at `temperature`, from the `top_k` likeliest tokens or the likeliest of total
    probability `top_p`. The draw depends on the seed, the prompt and the step alone: not on the batch, nor on
    the caller's random state, which stays as it is. Of equal prompts each draws for itself.

    Raises:
        ValueError: a value out of range, or both `top_k` and `top_p`.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; use a number above 0, or sampler=greedy")
    if top_k is not None and top_p is not None:
        raise ValueError("top_k and top_p are both given and only one of them can be used; leave one out")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; use 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; use a probability above 0, up to 1")

    def draw(logits: Float[Tensor, "batch d_vocab"], keys: Sequence[str]) -> Int[Tensor, " batch"]:
        chosen = []
        # TransformerLens draws from torch's global generator; on the CPU, so no other device's is touched.
        with torch.random.fork_rng(devices=[]):
            for row, key in zip(logits.cpu(), keys, strict=True):
                torch.default_generator.manual_seed(derive_generator(seed, key).initial_seed())
                chosen.append(sample_logits(row[None], top_k=top_k, top_p=top_p, temperature=temperature))
        return torch.cat(chosen)

    return draw


@dataclass(frozen=True, eq=False)
class Completions(Sequence[str]):
    """The answers, as a sequence of texts: each up to its prompt's separator, stripped of white space.

    `tokens[i]` are the ids that prompt `i` chose, the separator or end of text among them; rows that ended
    earlier than the longest are filled up with the tokenizer's padding id.
    """

    texts: tuple[str, ...]
    tokens: Int[Tensor, "prompt new"] = field(repr=False)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.texts[index]

    def __len__(self) -> int:
        return len(self.texts)


def generate(
    model: Any, prompts: Sequence[Prompt], *, max_new_tokens: int = 8, sampler: Sampler = greedy
) -> Completions:
    """The model's own answers to the prompts as they are, demonstrations included.

    Raises:
        ValueError: no prompts, or a prompt that leaves no room for the new tokens.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    return answer_all(engine, prompts, None, max_new_tokens, sampler)


def patch_generate(
    model: Any,
    prompts: Sequence[Prompt],
    vectors: TaskVectors,
    layer: int | Sequence[int],
    *,
    max_new_tokens: int = 8,
    sampler: Sampler = greedy,
) -> Completions:
    """The answers to the queries alone, with task vectors written in (Hendel et al. 2023, section 3).

    Each prompt is cut to its query. At its last position the output of block `layer` (one for all, or one a
    prompt) is overwritten with that prompt's vector, or with the only one, as `vectors.mean()` gives it. The
    patch is written once; later tokens see it through the cached keys and values, or, in models that keep no such cache
    (mamba) and remote ones, the whole row is run again with the patch at the same position. `max_new_tokens=1` is the
    paper's first-token protocol.

    Raises:
        ValueError: no prompts, vectors of other sizes than the model's or another number, a layer out of range, a
            prompt that leaves no room for the new tokens, or a remote model booted without what patching needs.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    patch = patch_for(engine, len(prompts), vectors, layer)
    return answer_all(engine, [prompt.zero_shot() for prompt in prompts], patch, max_new_tokens, sampler)


def patched_logits(
    model: Any, prompts: Sequence[Prompt], vectors: TaskVectors, layer: int | Sequence[int]
) -> Float[Tensor, "prompt d_vocab"]:
    """Next-token logits after the queries alone with task vectors written in, as in `patch_generate`;
    float32, on the CPU.

    Raises:
        ValueError: as `patch_generate`.
    """
    engine = engine_for(model)
    check_prompts(prompts)
    patch = patch_for(engine, len(prompts), vectors, layer)
    logits: list[Tensor] = [torch.empty(0)] * len(prompts)

    def work(rows: list[int], tokens: Tokens, past: Past) -> None:
        for row, result in zip(rows, engine.step(tokens, patch.keep(rows), past)[0].float().cpu(), strict=True):
            logits[row] = result

    run_all(engine, [[prompt.zero_shot().text] for prompt in prompts], work)
    return torch.stack(logits)


def patch_for(engine: Engine, n: int, vectors: TaskVectors, layer: int | Sequence[int]) -> Patch:
    """What to write into each of `n` rows, checked against the model.

    Raises:
        ValueError: vectors of other sizes than the model's or another number, a layer out of range, or an engine that
            cannot write.
    """
    name = engine_name(engine)
    check_patching(engine)
    if not isinstance(vectors, TaskVectors):
        raise ValueError(
            f"vectors are a {type(vectors).__name__}; pass the TaskVectors themselves, the layer is chosen by `layer`"
        )
    vectors.check_fits(name, engine.n_layers, engine.d_model)
    if len(vectors) not in (1, n):
        raise ValueError(
            f"{len(vectors)} vectors for {n} prompts; give one for each prompt, or one for all with vectors.mean()"
        )
    try:
        layers = torch.as_tensor(layer).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"layer is {layer!r}; give one int, or one int for each prompt") from error
    if layers.is_floating_point() or layers.dtype == torch.bool or layers.shape not in ((), (n,)):
        raise ValueError(f"layer is {layer!r}; give one int, or one int for each of the {n} prompts")
    for number in set(layers.flatten().tolist()):
        check_layer(number, engine.n_layers, name)
    layers = layers.expand(n)
    values = vectors.values.expand(n, -1, -1)
    return Patch(values[torch.arange(n), layers], layers)


def complete(
    engine: Engine,
    tokens: Tokens,
    patch: Patch | None,
    past: Past,
    prompts: Sequence[Prompt],
    keys: Sequence[str],
    max_new_tokens: int,
    sampler: Sampler,
) -> tuple[list[str], list[list[int]]]:
    """The decoding loop: answers and chosen ids of one batch, a row for each of `prompts`, from `tokens` on.

    The patch is written in the first step. A row that has reached its separator or an end of text leaves
    the batch, where the engine can take its past apart.
    """
    chosen: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    ends: frozenset[int] = getattr(engine, "ends", frozenset())
    batch = list(range(len(prompts)))  # whose row is where in the batch
    going = batch
    for step in range(max_new_tokens):
        logits, past = engine.step(tokens, patch, past)
        patch = None  # it lives on in the past
        picked = sampler(logits, [f"{step}:{keys[row]}" for row in batch]).cpu()
        for row, token in zip(batch, picked.tolist(), strict=True):
            if row in going:
                chosen[row].append(token)
        for row, text in zip(going, engine.decode(torch.tensor([chosen[row] for row in going])), strict=True):
            texts[row] = text
        going = [
            row for row in going if chosen[row][-1] not in ends and prompts[row].template.separator not in texts[row]
        ]
        if not going or step + 1 == max_new_tokens:
            break
        if len(going) < len(batch) and hasattr(engine, "select"):
            places = [i for i, row in enumerate(batch) if row in going]
            fewer = engine.select(past, places)
            if fewer is not None:
                past, tokens, picked, batch = fewer, tokens.keep(places), picked[places], going
        tokens = tokens.then(picked)
    answers = [prompt.template.cut(text) for prompt, text in zip(prompts, texts, strict=True)]
    return answers, chosen


def check_new_tokens(engine: Engine, max_new_tokens: int) -> None:
    """Raises ValueError where there is nothing to generate, or no way to go on after the first token."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; use 1 or more")
    if max_new_tokens > 1 and not getattr(engine, "continues", True):
        raise ValueError(
            f"{engine_name(engine)} gives nothing to go on from after the first token (`continues` is False); use "
            "max_new_tokens=1 or patched_logits, or another engine"
        )


def check_patching(engine: Engine) -> None:
    """Raises ValueError where the engine says that it cannot write into the model."""
    if hasattr(engine, "check_patching"):
        engine.check_patching()


def answer_all(
    engine: Engine,
    prompts: Sequence[Prompt],
    patch: Patch | None,
    max_new_tokens: int,
    sampler: Sampler = greedy,
) -> Completions:
    """Answers to the prompts as they are, demonstrations included, patched where there is a patch."""
    check_new_tokens(engine, max_new_tokens)
    texts = [prompt.text for prompt in prompts]
    keys = row_keys(texts)
    answers: list[str] = [""] * len(prompts)
    ids: list[list[int]] = [[]] * len(prompts)

    def work(rows: list[int], tokens: Tokens, past: Past) -> None:
        found = complete(
            engine,
            tokens,
            None if patch is None else patch.keep(rows),
            past,
            [prompts[row] for row in rows],
            [keys[row] for row in rows],
            max_new_tokens,
            sampler,
        )
        for row, answer, chosen in zip(rows, *found, strict=True):
            answers[row], ids[row] = answer, chosen

    run_all(engine, [[text] for text in texts], work, room=max_new_tokens - 1)
    longest, pad = max(map(len, ids)), getattr(engine, "pad", 0)
    return Completions(tuple(answers), torch.tensor([row + [pad] * (longest - len(row)) for row in ids]))


def answer_side_by_side(
    engine: Engine, prompts: Sequence[Prompt], patches: Sequence[Patch], max_new_tokens: int
) -> list[list[str]]:
    """For each of `patches` (a row for each prompt) the answers to the queries alone. The queries are run once, up
    to their last token; from there all patches go on in the same batches.
    """
    check_new_tokens(engine, max_new_tokens)
    k = len(patches)
    patch = Patch(
        rearrange([each.vectors for each in patches], "patch prompt d_model -> (prompt patch) d_model"),
        rearrange([each.layers for each in patches], "patch prompt -> (prompt patch)"),
    )
    asked = [prompt.zero_shot() for prompt in prompts]
    answers = [[""] * len(prompts) for _ in patches]

    def work(rows: list[int], tokens: Tokens, past: Past) -> None:
        found, _ = complete(
            engine,
            tokens,
            patch.keep(rows),
            past,
            [asked[row // k] for row in rows],
            [""] * len(rows),  # greedy needs no keys
            max_new_tokens,
            greedy,
        )
        for row, answer in zip(rows, found, strict=True):
            answers[row % k][row // k] = answer

    run_all(engine, [[prompt.text] * k for prompt in asked], work, room=max_new_tokens - 1)
    return answers


def row_keys(texts: Sequence[str]) -> list[str]:
    """A name for each row that does not depend on the others, equal texts numbered."""
    seen: Counter[str] = Counter()
    keys = []
    for text in texts:
        keys.append(f"{seen[text]}:{text}")
        seen[text] += 1
    return keys
