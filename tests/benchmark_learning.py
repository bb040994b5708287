"""How fast are vectors learned? Run it by hand:

python tests/benchmark_learning.py [--model NAME] [--prompts 8] [--epochs 5] [--layers 30] [--threads 2]

Three ways: all layers side by side; tv_lens one layer after another; and a notebook loop, which trains one layer after
another on whole rows, padded on the left with a mask, through `run_with_hooks`. They agree, up to components with a
gradient near zero: Adam divides each by its own size, so rounding decides their sign. (On tiny models the tests compare
to 1e-4.) Times depend on the machine; only ratios matter.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv

LR, BATCH, SEED = 0.5, 4, 0


def batches(n: int, epochs: int) -> list[list[int]]:
    """The prompts of each step of all epochs: batches stay, and their order changes."""
    order = random.Random(f"batches:{SEED}").sample(range(n), n)
    fixed = [order[i : i + BATCH] for i in range(0, n, BATCH)]
    return [
        batch
        for epoch in range(1, epochs + 1)
        for batch in random.Random(f"epoch:{SEED}:{epoch}").sample(fixed, len(fixed))
    ]


def loop(bridge: TransformerBridge, prompts: Sequence[tv.Prompt], layer: int, epochs: int) -> Tensor:
    """One vector, trained as a notebook would."""
    for parameter in bridge.parameters():
        parameter.requires_grad_(False)
    theta = torch.zeros(bridge.cfg.d_model, requires_grad=True)
    optimizer = torch.optim.AdamW([theta], lr=LR, weight_decay=0.01)
    queries = [bridge.to_tokens(prompt.zero_shot().text)[0].tolist() for prompt in prompts]
    wholes = [bridge.to_tokens(prompt.zero_shot().text + str(prompt.answer))[0].tolist() for prompt in prompts]
    for batch in batches(len(prompts), epochs):
        longest = max(len(wholes[i]) for i in batch)
        ids = torch.tensor([[0] * (longest - len(wholes[i])) + wholes[i] for i in batch])
        mask = torch.tensor([[0] * (longest - len(wholes[i])) + [1] * len(wholes[i]) for i in batch])
        lasts = [longest - len(wholes[i]) + len(queries[i]) - 1 for i in batch]

        def write(resid: Tensor, hook: Any, lasts: list[int] = lasts) -> Tensor:
            resid = resid.clone()
            for row, last in enumerate(lasts):
                resid[row, last] = resid[row, last] + theta
            return resid

        logits = bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", write)], attention_mask=mask)
        losses = [cross_entropy(logits[row, last:-1], ids[row, last + 1 :]) for row, last in enumerate(lasts)]
        [theta.grad] = torch.autograd.grad(torch.stack(losses).mean(), [theta])
        optimizer.step()
    return theta.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description="learning vectors, beside a notebook loop")
    parser.add_argument("--model", help="a model's name or folder; the demo model by default")
    parser.add_argument("--task", default="antonyms")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30, help="how many layers, from 0")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    bridge = tv.demo_model() if given.model is None else TransformerBridge.boot_transformers(given.model)
    engine, positions = tv.LocalEngine(bridge, progress=False), [0]
    forward = engine.forward

    def counted(tokens: tv.Tokens, **options: Any) -> Any:
        positions[0] += tokens.ids.numel()
        return forward(tokens, **options)

    engine.forward = counted  # type: ignore[method-assign]
    prompts = tv.library()[given.task].sample(given.prompts, shots=1, seed=0)
    layers = range(given.layers)
    options: dict[str, Any] = {"epochs": given.epochs, "lr": LR, "batch_size": BATCH, "validation": 0.0, "seed": SEED}

    def learned(chosen: int | Sequence[int]) -> Tensor:
        return tv.learn(engine, prompts, layers=chosen, **options).vectors.values[0]

    ways: dict[str, Callable[[], Tensor]] = {
        "side by side": lambda: learned(list(layers)),
        "one by one": lambda: torch.cat([learned(layer) for layer in layers]),
        "notebook loop": lambda: torch.stack([loop(bridge, prompts, layer, given.epochs) for layer in layers]),
    }
    print(f"{given.layers} layers of {engine.name}, {given.prompts} prompts, {given.epochs} epochs")
    vectors, first = dict[str, Tensor](), 0.0
    for name, way in ways.items():
        positions[0], begun = 0, time.perf_counter()
        vectors[name] = way()
        seconds = time.perf_counter() - begun
        first = first or seconds
        counted_positions = f"{positions[0]:,}" if positions[0] else ""
        print(f"{name:<14} {seconds:8.1f} s   {seconds / first:5.1f} times   {counted_positions:>8} positions")
    expected = vectors["notebook loop"]
    for name in ("side by side", "one by one"):
        for other in ("one by one", "notebook loop"):
            if name != other:
                errors = (vectors[name] - vectors[other]).norm(dim=-1) / expected.norm(dim=-1)
                print(f"{name} and {other} differ by {float(errors.median()):.1e} (most: {float(errors.max()):.1e})")
                assert float(errors.median()) < 1e-2


if __name__ == "__main__":
    main()
