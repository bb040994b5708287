"""How fast is tv_lens, compared with a notebook loop and with the floor? Run it by hand:

python tests/benchmark.py [--model NAME] [--prompts 20] [--shots 5] [--substitutes 4] [--runs 3] [--no-growth]

The *loop* runs whole prompts, left padded with a mask: `run_with_cache` to read everything, `run_with_hooks` once per
layer to sweep, and the whole text again for each new token. The *floor* is plain Hugging Face on only the positions
that the work needs, with only the last position's logits. All three take turns in one process and must agree: reads to
1e-4 of their size, answers and verdicts exactly. Effects of heads are in `benchmark_heads.py`. Seconds are medians (in
the growth table the faster of two runs). Memory is the peak of tensors beyond what was allocated before, in a separate
run. Times depend on the machine; only ratios matter.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from benchmark_heads import head_effects
from einops import reduce
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv

NEW = 8


@dataclass(frozen=True)
class Bench:
    """A model, twice, and the work: `bridge` is what tv_lens (by `engine`) and the loop run, `plain` the floor's."""

    bridge: TransformerBridge
    engine: tv.LocalEngine
    plain: Any
    task: tv.Task
    prompts: list[tv.Prompt]
    substitutes: list[tuple[str, ...]]
    layers: Sequence[int]

    @property
    def asked(self) -> list[list[str]]:
        pairs = zip(self.prompts, self.substitutes, strict=True)
        return [[prompt.asking(query).text for query in queries] for prompt, queries in pairs]

    @property
    def queries(self) -> list[str]:
        return [prompt.zero_shot().text for prompt in self.prompts]

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.bridge.to_tokens(text)[0].tolist() for text in texts]


class Way(NamedTuple):
    """One way to do the work, and what came out in a form that can be compared. `part` is a part of it that takes as
    much memory, if the profiler could not follow all of it.
    """

    name: str
    run: Callable[[], Any]
    part: Callable[[], Any] | None = None


# The notebook loop


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def loop_extract(bench: Bench, groups: Sequence[Sequence[str]], at_once: int = 8) -> Tensor:
    rows = bench.rows([text for group in groups for text in group])
    actual = []
    for first in range(0, len(rows), at_once):
        ids, mask = padded(rows[first : first + at_once])
        _, cache = bench.bridge.run_with_cache(ids, attention_mask=mask)
        names = [f"blocks.{layer}.hook_resid_post" for layer in range(bench.bridge.cfg.n_layers)]
        actual.append(torch.stack([cache[name][:, -1] for name in names], dim=1))
    return reduce(torch.cat(actual), "(p k) layer d_model -> p layer d_model", "mean", k=len(groups[0]))


@torch.no_grad()
def loop_answers(
    bench: Bench, texts: Sequence[str], new: int, layer: int | None = None, vectors: Tensor | None = None
) -> list[str]:
    """Greedy, with the whole text again for each token and the write at the same position."""
    ids, mask = padded(bench.rows(texts))
    at = ids.shape[1] - 1

    def write(residual: Tensor, hook: Any) -> Tensor:
        residual = residual.clone()
        residual[:, at] = vectors if vectors is not None else residual[:, at]
        return residual

    hooks: Any = [] if layer is None else [(f"blocks.{layer}.hook_resid_post", write)]
    for _ in range(new):
        logits = bench.bridge.run_with_hooks(ids, fwd_hooks=hooks, attention_mask=mask)
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    cut = bench.prompts[0].template.cut
    ends = bench.engine.info.end_ids
    texts = []
    for row in ids[:, at + 1 :].tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(cut(bench.bridge.tokenizer.decode(row[:stop], skip_special_tokens=True)))
    return texts


def loop_sweep(bench: Bench, vector: Tensor, new: int = 1, queries: Sequence[str] | None = None) -> list[list[str]]:
    return [loop_answers(bench, queries or bench.queries, new, layer, vector[:, layer]) for layer in bench.layers]


# The floor


@torch.no_grad()
def floor_extract(bench: Bench) -> None:
    """Each prompt's shared prefix once; then the rest of every row."""
    groups = [bench.rows(group) for group in bench.asked]
    prefixes, tails = [], []
    for group in groups:
        start = 0
        while start < min(map(len, group)) - 1 and len({row[start] for row in group}) == 1:
            start += 1
        prefixes.append(group[0][:start])
        tails += [row[start:] for row in group]
    k = len(groups[0])
    ids, mask = padded(prefixes)
    past = bench.plain(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
    past.batch_repeat_interleave(k)
    ids, after = padded(tails)
    mask = torch.cat([mask.repeat_interleave(k, 0), after], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    bench.plain(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
        logits_to_keep=1,
    )


@torch.no_grad()
def floor_answers(bench: Bench, new: int, copies: int = 1) -> None:
    """The queries up to their last token, once; then a token at a time for each row and copy."""
    rows = bench.rows(bench.queries)
    first = [row if copies == 1 else row[:-1] for row in rows]
    ids, mask = padded(first)
    output = bench.plain(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    past, steps = output.past_key_values, new - 1
    chosen = output.logits[:, -1].argmax(-1, keepdim=True)
    if copies > 1:
        past.batch_repeat_interleave(copies)
        chosen = torch.tensor([[row[-1]] for row in rows]).repeat_interleave(copies, 0)
        mask, steps = mask.repeat_interleave(copies, 0), new
    for _ in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        output = bench.plain(
            input_ids=chosen,
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
        )
        chosen = output.logits[:, -1].argmax(-1, keepdim=True)


# What is compared


def extraction(bench: Bench) -> list[Way]:
    return [
        Way("tv_lens", lambda: tv.extract(bench.engine, bench.prompts, bench.substitutes).values),
        Way("loop", lambda: loop_extract(bench, bench.asked)),
        Way("floor", lambda: floor_extract(bench)),
    ]


def sweep(bench: Bench, vectors: tv.TaskVectors) -> list[Way]:
    def ours() -> list[list[str]]:
        actual = tv.sweep_layers(bench.engine, bench.task, bench.prompts, vectors, bench.layers, max_new_tokens=1)
        return [list(score.texts) for score in actual.scores]

    return [
        Way("tv_lens", ours),
        Way("loop", lambda: loop_sweep(bench, vectors.values)),
        Way("floor", lambda: floor_answers(bench, 1, len(bench.layers))),
    ]


def sweep_of_answers(bench: Bench, vectors: tv.TaskVectors) -> list[Way]:
    """The verdicts on answers of several tokens, which tv_lens stops when the rule has decided."""

    def ours() -> list[tuple[bool, ...]]:
        actual = tv.sweep_layers(bench.engine, bench.task, bench.prompts, vectors, bench.layers, max_new_tokens=NEW)
        return [score.correct for score in actual.scores]

    def loop() -> list[tuple[bool, ...]]:
        swept = loop_sweep(bench, vectors.values, NEW)
        return [tv.score(bench.task, bench.prompts, texts).correct for texts in swept]

    return [
        Way("tv_lens", ours),
        Way("loop", loop),
        Way("floor", lambda: floor_answers(bench, NEW, len(bench.layers))),
    ]


def generation(bench: Bench, vectors: tv.TaskVectors, layer: int) -> list[Way]:
    return [
        Way(
            "tv_lens",
            lambda: list(tv.patch_generate(bench.engine, bench.prompts, vectors, layer, max_new_tokens=NEW)),
        ),
        Way("loop", lambda: loop_answers(bench, bench.queries, NEW, layer, vectors.values[:, layer])),
        Way("floor", lambda: floor_answers(bench, NEW)),
    ]


def experiment(bench: Bench, n: int, shots: int) -> list[Way]:
    """One task, whole: extraction, shuffled extraction, sweep, zero-shot, few-shot, patched and two controls."""

    def ours() -> tuple[list[tuple[bool, ...]], list[list[str]]]:
        [actual] = tv.run_experiment(bench.engine, [bench.task], shots=shots, n_dev=n, n_test=n).results
        test = actual.evaluation
        answers = [list(score.texts) for score in (test.zero_shot, test.few_shot, test.patched)]
        return [score.correct for score in actual.sweep.scores], answers

    def loop() -> tuple[list[tuple[bool, ...]], list[list[str]]]:
        dev, test = bench.task.split(0.5, seed=0)
        asked = dev.sample(n, shots=shots, seed=0, template=tv.PAPER)
        tested = test.sample(n, shots=shots, seed=0, template=tv.PAPER)
        queries, dev_queries = [p.zero_shot().text for p in tested], [p.zero_shot().text for p in asked]
        vectors = []
        for prompts in (asked, tv.shuffle_outputs(asked, 0)):
            pairs = zip(prompts, dev.substitutes(prompts, 2, seed=0), strict=True)
            read = loop_extract(bench, [[p.asking(query).text for query in chosen] for p, chosen in pairs])
            vectors.append(read.mean(0, keepdim=True))
        swept = loop_sweep(bench, vectors[0], NEW, dev_queries)
        scores = tuple(tv.score(dev, asked, texts) for texts in swept)
        best = tv.Sweep(tuple(bench.layers), scores).best
        few, zero = loop_answers(bench, [p.text for p in tested], NEW), loop_answers(bench, queries, NEW)
        noise = torch.randn(n, vectors[0].shape[-1])
        patched, *_ = [
            loop_answers(bench, queries, NEW, best, each) for each in (*(v[:, best] for v in vectors), noise)
        ]
        return [score.correct for score in scores], [zero, few, patched]

    return [Way("tv_lens", ours), Way("loop", loop)]


# Measuring


def compare(title: str, bench: Bench, ways: Sequence[Way], runs: int) -> None:
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    results: dict[str, Any] = {}
    for _ in range(runs):
        for way in ways:
            gc.collect()
            begun = time.perf_counter()
            results[way.name] = way.run()
            seconds[way.name].append(time.perf_counter() - begun)
    check_same(results["tv_lens"], results["loop"])
    ours = statistics.median(seconds["tv_lens"])
    print(f"\n{title}")
    print(f"{'':10}{'seconds':>9}{'tv_lens is':>16}{'positions':>11}{'memory, MB':>12}")
    for way in ways:
        median = statistics.median(seconds[way.name])
        ratio = "" if way.name == "tv_lens" else f"{median / ours:.1f}x faster" if way.name == "loop" else ""
        if way.name == "floor":
            ratio = f"{ours / median:.2f}x its time"
        memory = peak_memory(way.part or way.run)
        print(f"{way.name:10}{median:9.2f}{ratio:>16}{positions(bench, way.run):11,}{memory:12,.0f}")


def check_same(ours: Any, loop: Any) -> None:
    if isinstance(ours, Tensor):
        # Residual streams grow to hundreds in some layers and models: to 1e-4 of the vector's size.
        size = loop.norm(dim=-1).clamp(min=1)
        worst = float(((ours - loop).norm(dim=-1) / size).max())
        assert worst < 1e-4, f"reads differ by {worst:.1e} of their size"
    else:
        assert ours == loop, "answers differ"


def positions(bench: Bench, run: Callable[[], Any]) -> int:
    """How many token positions, including pads, went through the first block of either model."""
    count = 0

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal count
        hidden = args[0] if args else kwargs["hidden_states"]
        count += hidden.shape[0] * hidden.shape[1]

    n = bench.bridge.cfg.n_layers
    firsts = [
        next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == n)[0]
        for model in (bench.bridge.original_model, bench.plain)
    ]
    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in firsts]
    run()
    for handle in handles:
        handle.remove()
    return count


def peak_memory(run: Callable[[], Any]) -> float:
    """The most that tensors took at one time, beyond what was there before; MB. From the profiler's own record."""
    gc.collect()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(f"{folder}/trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    now = highest = 0
    for event in events:
        now += event["args"]["Bytes"]
        highest = max(highest, now)
    return highest / 1e6


def quickest(run: Callable[[], Any], of: int = 2) -> float:
    """Seconds; other processes can only make a run slower."""
    seconds = []
    for _ in range(of):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="tv_lens beside a notebook loop and the floor")
    parser.add_argument("--model", help="a model's name or folder; the demo model by default")
    parser.add_argument("--task", default="antonyms")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--substitutes", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--effect-prompts", type=int, default=2, help="prompts for the effects of heads")
    parser.add_argument("--only-effects", action="store_true", help="leave out everything but the effects of heads")
    parser.add_argument("--no-growth", action="store_true", help="leave out how it grows with each size")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    bridge = tv.demo_model() if options.model is None else TransformerBridge.boot_transformers(options.model)
    original: Any = bridge.original_model
    plain_models: Any = transformers.AutoModelForCausalLM
    source = options.model or original.config._name_or_path
    engine = tv.LocalEngine(bridge, progress=False)
    plain = plain_models.from_pretrained(source, dtype=torch.float32).eval()
    task = tv.library()[options.task]

    def bench_of(
        prompts: int = options.prompts,
        shots: int = options.shots,
        substitutes: int = options.substitutes,
        layers: Sequence[int] = range(bridge.cfg.n_layers),
    ) -> Bench:
        chosen = task.sample(prompts, shots=shots, seed=0, template=tv.PAPER)
        return Bench(bridge, engine, plain, task, chosen, task.substitutes(chosen, substitutes, seed=0), layers)

    bench, middle = bench_of(), 2 * bridge.cfg.n_layers // 3
    vectors = tv.extract(engine, bench.prompts, bench.substitutes)
    print(
        f"{bridge.cfg.model_name}, {task.name}, {options.prompts} prompts of {options.shots} shots, "
        f"{options.threads} threads, torch {torch.__version__}, median of {options.runs} runs"
    )
    if not options.only_effects:
        compare(f"extraction, {options.substitutes} substitutes", bench, extraction(bench), options.runs)
        compare(f"sweep, {len(bench.layers)} layers, first token", bench, sweep(bench, vectors), options.runs)
        compare(f"sweep, {len(bench.layers)} layers, {NEW} tokens", bench, sweep_of_answers(bench, vectors), 1)
        compare(f"patched generation, {NEW} tokens", bench, generation(bench, vectors, middle), options.runs)
        compare("run_experiment, one task, 10 dev and 10 test prompts", bench, experiment(bench, 10, options.shots), 1)
    ten_shots = task.sample(options.effect_prompts, shots=10, seed=0, template=tv.PAPER)
    means = tv.read_heads(engine, ten_shots).mean()
    title = f"effects of all {len(means.layers) * means.n_heads} heads, {len(ten_shots)} prompts of 10 shots"
    compare(title, bench, [Way(*each) for each in head_effects(bridge, engine, plain, ten_shots, means)], 1)
    if options.no_growth or options.only_effects:
        return

    print(f"\nhow it grows{'':18}{'tv_lens s':>10}{'loop s':>8}{'ratio':>7}{'positions':>11}{'loop':>9}")
    for kind, name, values in (
        ("extraction", "shots", (1, 5, 10, 20)),
        ("extraction", "substitutes", (1, 2, 4, 8)),
        ("extraction", "prompts", (10, 20, 40)),
        ("sweep", "layers", (1, 5, 15, bridge.cfg.n_layers)),
        ("sweep", "prompts", (10, 20, 40)),
    ):
        for value in values:
            changed = range(value) if name == "layers" else value
            sized = bench_of(**{name: changed})  # type: ignore[arg-type]
            if kind == "extraction":
                ours, loop, _ = extraction(sized)
            else:
                ours, loop, _ = sweep(sized, vectors.mean())
            a, b = quickest(ours.run), quickest(loop.run)
            at, loop_at = positions(sized, ours.run), positions(sized, loop.run)
            print(f"{kind:12}{name:12}{value:6}{a:10.2f}{b:8.2f}{b / a:6.1f}x{at:11,}{loop_at:9,}")


if __name__ == "__main__":
    main()
