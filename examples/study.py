"""Five claims of the literature on task vectors, tested on one model: for each a table, and what its numbers say.

python examples/study.py [folder] [full or small] [a model's name or folder]

Interrupted, it resumes from the folder. P-values of a table are adjusted by Holm's method for all of its tests.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, ClassVar, TypeAlias

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv
from tv_lens.evidence.statistics import (
    accuracy_interval,
    better_p_value,
    difference_interval,
    different_p_value,
    holm,
)

TASKS = ("present_to_gerund", "antonyms", "next_letter", "person_to_language")
# A mapping mixed with its inverse, and the two.
BIJECTIONS = {
    "swap_upper_lower": ("to_upper", "to_lower"),
    "swap_singular_plural": ("singular_to_plural", "plural_to_singular"),
}

# Layers as shares of the model's depth: those that are tried, and those that vectors are learned for.
TRIED = (0.3, 0.43, 0.57, 0.7, 0.83)
LEARNED = (0.3, 0.57, 0.7)
SIZES: dict[str, dict[str, Any]] = {
    "full": {"n_train": 20, "n_dev": 12, "n_test": 30, "strengths": (1.0, 2.0)},
    "small": {"n_train": 10, "n_dev": 6, "n_test": 10, "strengths": (1.0,)},
}
TEMPLATE = tv.other_template(tv.Template("Q: {input}\nA: {output}", separator="\n\n"))


@dataclass(frozen=True)
class ExtractionInContext(tv.Method):
    """The vector of `Extraction`, written into prompts that keep their demonstrations, as separator vectors are."""

    name: ClassVar[str] = "extract_in_context"
    substitutes: int = 2

    def __call__(self, engine: tv.Engine, task: tv.Task, prompts: Sequence[tv.Prompt], seed: int) -> tv.TaskVectors:
        """One vector per prompt and layer."""
        vectors = tv.Extraction(self.substitutes)(engine, task, prompts, seed)
        return replace(vectors, method=self.name, usage=replace(vectors.usage, keep_demonstrations=True))


def layers_at(shares: Sequence[float], n_layers: int) -> tuple[int, ...]:
    """Layers at these shares of the depth."""
    return tuple(sorted({round(share * n_layers) for share in shares}))


def methods(n_layers: int) -> dict[str, tv.Method]:
    """What claims 2 to 5 compare."""
    layers = layers_at(LEARNED, n_layers)
    return {
        "extract": tv.Extraction(),
        # The mean difference between few-shot and zero-shot states, which Yang et al. add as the extracted vector.
        "extract, added": tv.LearnedVector(start="shift", epochs=0, keep=None),
        "learn": tv.LearnedVector(layers=layers),
        "learn, overwritten": tv.LearnedVector(layers=layers, how=tv.overwrite),
        "function_vector": tv.FunctionVector(heads=40, preselect=60, n_corrupted=8),
        "state_vectors": tv.StateVectors(),
    }


def both_ways(n_layers: int) -> dict[str, tv.Method]:
    """What claim 1 compares."""
    return {
        "extract": tv.Extraction(),
        "learn": tv.LearnedVector(layers=layers_at(LEARNED, n_layers)),
        "extract_in_context": ExtractionInContext(),
        "separator_vectors": tv.SeparatorVectors(),
    }


@dataclass(frozen=True)
class Finding:
    """A published claim, the numbers, and what they say about it."""

    claim: str
    table: pd.DataFrame
    verdict: str

    def __str__(self) -> str:
        return f"{self.claim}\n\n{self.table.to_string(index=False)}\n\n{self.verdict}\n"

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{escape(line)}</p>" for line in self.verdict.splitlines())
        return f"<p><b>{escape(self.claim)}</b></p>{self.table.to_html(index=False)}{lines}"


# Two methods, the first compared with the second.
Pair: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Answers:
    """Which answers were right, and to which queries, by seed."""

    correct: list[list[bool]]
    queries: list[list[str]]

    def __str__(self) -> str:
        return with_interval(self.accuracy, self.low, self.high)

    @property
    def n(self) -> int:
        """The number of answers."""
        return sum(map(len, self.correct))

    @property
    def accuracy(self) -> float:
        """The mean of the seeds' accuracies."""
        return sum(sum(own) / len(own) for own in self.correct) / len(self.correct)

    @property
    def low(self) -> float:
        """The lower end of the 95% interval of the accuracy."""
        return accuracy_interval(self.correct, queries=self.queries).low

    @property
    def high(self) -> float:
        """The upper end."""
        return accuracy_interval(self.correct, queries=self.queries).high

    def to(self, queries: set[str]) -> "Answers":
        """The answers to some of the queries."""
        rows = [[i for i, query in enumerate(own) if query in queries] for own in self.queries]
        return Answers(
            [[own[i] for i in kept] for own, kept in zip(self.correct, rows, strict=True)],
            [[own[i] for i in kept] for own, kept in zip(self.queries, rows, strict=True)],
        )


@dataclass(frozen=True)
class Difference:
    """An accuracy minus another on the same queries, with its 95% interval, and the adjusted p of an exact test."""

    value: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return with_interval(self.value, self.low, self.high, sign="+")

    @property
    def better(self) -> bool:
        """Whether the first is better: by the test, and by the interval."""
        return self.p < 0.05 and self.low > 0

    @property
    def worse(self) -> bool:
        """Whether the first is worse."""
        return self.p < 0.05 and self.high < 0

    @property
    def words(self) -> str:
        """The outcome, the difference and p."""
        outcome = "better" if self.better else "worse" if self.worse else "not shown to be better or worse"
        return f"{outcome} ({self}, p = {self.p:.1g})"


def with_interval(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{value:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def answers(comparison: tv.Comparison, tasks: Sequence[str], method: str, condition: str = "patched") -> Answers:
    """The answers to the test prompts of all `tasks`."""
    cells = {task: comparison.at(task, method) for task in tasks}
    seeds = range(len(comparison.seeds))
    correct = [[right for cell in cells.values() for right in cell.correct(condition)[i]] for i in seeds]
    queries = [[f"{task}: {query}" for task, cell in cells.items() for query in cell.queries[i]] for i in seeds]
    return Answers(correct, queries)


def elsewhere(comparison: tv.Comparison, tasks: Sequence[str], method: str, vector: str = "patched") -> Answers:
    """The answers in another template; `vector` is "patched" or "no vector"."""
    results = [comparison.at(task, method).results for task in tasks]
    correct = []
    for i in range(len(comparison.seeds)):
        scores = [own[i].conditions for own in results]
        correct.append([right for each in scores if each for right in each.scores[TEMPLATE.name][vector].correct])
    return Answers(correct, answers(comparison, tasks, method).queries)


def differences(pairs: Mapping[Any, tuple[Answers, Answers]], *, one_sided: bool = False) -> dict[Any, Difference]:
    """First minus second for each pair, tested for being better (`one_sided`) or different; all p-values adjusted."""
    test = better_p_value if one_sided else different_p_value
    adjusted = holm([test(one.correct, other.correct, one.queries) for one, other in pairs.values()])
    return {
        name: Difference(
            one.accuracy - other.accuracy, *difference_interval(one.correct, other.correct, queries=one.queries), p
        )
        for (name, (one, other)), p in zip(pairs.items(), adjusted, strict=True)
    }


def each_and_all(tasks: Sequence[str]) -> dict[str, Sequence[str]]:
    """Every task, and all of them together."""
    return {**{task: (task,) for task in tasks}, "all": tasks}


# Claim 1


def bijections(comparison: tv.Comparison) -> Finding:
    """One vector against several where a mapping is mixed with its inverse, and what each does in both directions."""
    rows, verdicts = [], []
    several = differences(
        {
            task: (
                answers(comparison, (task,), "separator_vectors"),
                answers(comparison, (task,), "extract_in_context"),
            )
            for task in comparison.tasks
        }
    )
    for task in comparison.tasks:
        scored = {name: answers(comparison, (task,), name) for name in comparison.methods}
        scored = {"few-shot": answers(comparison, (task,), "extract", "few-shot"), **scored}
        directions = {name: by_direction(task, each) for name, each in scored.items()}
        for name, each in scored.items():
            parts = {f"direction {i}": f"{way} {part}" for i, (way, part) in enumerate(directions[name].items(), 1)}
            rows.append({"task": task, "vector": name, "n": each.n, "accuracy": each, **parts})
        verdicts.append(
            f"{task}: {one_extracted(scored, directions['extract'])} {one_learned(scored['learn'])} "
            f"With the demonstrations kept, several vectors are {several[task].words} than one."
        )
    return Finding(
        "1. On a bijection, a mapping mixed with its inverse, one vector caps near one half: it does one of the two. "
        "Several vectors help (Dong et al., arXiv 2506.09048).",
        pd.DataFrame(rows),
        "\n".join(verdicts),
    )


def by_direction(task: str, scored: Answers) -> dict[str, Answers]:
    """The answers to the queries of the mapping, and to those of its inverse."""
    library = tv.library()
    return {name: scored.to({f"{task}: {text}" for text in library[name].inputs}) for name in BIJECTIONS[task]}


def one_extracted(scored: Mapping[str, Answers], directions: Mapping[str, Answers]) -> str:
    """What the extracted vector does, and whether it is capped."""
    extracted, few_shot = scored["extract"], scored["few-shot"]
    (one, first), (other, second) = directions.items()
    if first.low > second.high:
        half = f"does {one} rather than {other}"
    elif second.low > first.high:
        half = f"does {other} rather than {one}"
    else:
        half = "does neither direction clearly better than the other"
    if extracted.low > 0.5:
        cap = "is above one half, so nothing caps it"
    elif few_shot.low > 0.5:
        cap = "is not above one half although few-shot is, as the claim says"
    else:
        cap = f"is not above one half, and neither is few-shot ({few_shot}), so a cap cannot be seen on this model"
    return f"One extracted vector {half}; it {cap}."


def one_learned(learned: Answers) -> str:
    """Whether a learned vector passes one half."""
    if learned.low > 0.5:
        return f"One learned vector is above one half ({learned}): the cap is not a limit of a single vector."
    return f"One learned vector is not shown to be above one half ({learned})."


# Claims 2 and 3


def learned_against_extracted(comparison: tv.Comparison) -> Finding:
    """Learned against extracted vectors, if both overwrite and if both are added."""
    overwrite, add, writes = (
        ("learn, overwritten", "extract"),
        ("learn", "extract, added"),
        ("extract", "extract, added"),
    )
    pairs = present(comparison, [overwrite, add, writes])
    by_key = contrasts(comparison, pairs)
    words = {overwrite: "both overwrite", add: "both are added"}
    supported = [text for pair, text in words.items() if pair in pairs and by_key["all", pair].better]
    outcome = f"Supported if {' and if '.join(supported)}." if supported else "Not on this model."
    return Finding(
        "2. Learned vectors are far better than extracted ones (Yang et al., arXiv 2509.24169, who add both).",
        table_of(comparison, by_key),
        "\n".join([outcome, *(sentence(by_key, pair) for pair in pairs)]),
    )


def heads_against_last_position(comparison: tv.Comparison) -> Finding:
    """Vectors from attention heads against the residual stream at the last position."""
    pairs = present(comparison, [("function_vector", "extract"), ("state_vectors", "extract")])
    by_key = contrasts(comparison, pairs)
    supported = [pair[0] for pair in pairs if by_key["all", pair].better]
    outcome = f"Supported for {' and '.join(supported)}." if supported else "Not on this model."
    return Finding(
        "3. Vectors from attention heads carry a task better than the state of the last position (function vectors: "
        "Todd et al., arXiv 2310.15213, against layer averages that are added; state vectors: Li et al., arXiv "
        "2404.11225).",
        table_of(comparison, by_key),
        "\n".join([outcome, *(sentence(by_key, pair) for pair in pairs)]),
    )


def present(comparison: tv.Comparison, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs of methods that the comparison has."""
    known = [pair for pair in pairs if set(pair) <= set(comparison.methods)]
    if not known:
        raise tv.TvLensError(
            f"{comparison!r} has none of these pairs of methods: {pairs}; compare the methods of a pair"
        )
    return known


def contrasts(comparison: tv.Comparison, pairs: Sequence[Pair]) -> dict[tuple[str, Pair], Difference]:
    """For each pair of methods the difference in each task, and in all of them."""
    return differences(
        {
            (label, pair): (answers(comparison, tasks, pair[0]), answers(comparison, tasks, pair[1]))
            for pair in pairs
            for label, tasks in each_and_all(comparison.tasks).items()
        }
    )


def table_of(comparison: tv.Comparison, by_key: Mapping[tuple[str, Pair], Difference]) -> pd.DataFrame:
    """A row for each difference."""
    tasks = each_and_all(comparison.tasks)
    rows = [
        {
            "task": label,
            "method": one,
            "accuracy": answers(comparison, tasks[label], one),
            "compared with": other,
            "its accuracy": answers(comparison, tasks[label], other),
            "difference": difference,
            "p": f"{difference.p:.1g}",
        }
        for (label, (one, other)), difference in by_key.items()
    ]
    return pd.DataFrame(rows)


def sentence(by_key: Mapping[tuple[str, Pair], Difference], pair: Pair) -> str:
    """How one method compares with another over all tasks, and in which tasks the difference is clear."""
    tasks = {label: each for (label, own), each in by_key.items() if own == pair and label != "all"}
    better = [label for label, each in tasks.items() if each.better]
    worse = [label for label, each in tasks.items() if each.worse]
    return (
        f"{pair[0]!r} is {by_key['all', pair].words} than {pair[1]!r} over all tasks; by task it is better in "
        f"{listed(better)} and worse in {listed(worse)}."
    )


# Claim 4


def template_transfer(comparison: tv.Comparison) -> Finding:
    """What is left of each method's accuracy if the queries are in another template."""
    own = {name: answers(comparison, comparison.tasks, name) for name in comparison.methods}
    other = {name: elsewhere(comparison, comparison.tasks, name) for name in comparison.methods}
    without = {name: elsewhere(comparison, comparison.tasks, name, "no vector") for name in comparison.methods}
    by_key = differences(
        {
            **{(name, "gain"): (other[name], without[name]) for name in comparison.methods},
            **{(name, "loss"): (other[name], own[name]) for name in comparison.methods},
        }
    )
    rows = [
        {
            "method": name,
            "own template": own[name],
            "another": other[name],
            "without a vector": without[name],
            "left": f"{other[name].accuracy / own[name].accuracy:.2f}" if own[name].accuracy else "",
            "another - own": by_key[name, "loss"],
            "p loss": f"{by_key[name, 'loss'].p:.1g}",
            "p gain": f"{by_key[name, 'gain'].p:.1g}",
        }
        for name in comparison.methods
    ]
    gaining = [name for name in comparison.methods if by_key[name, "gain"].better]
    losing = [name for name in gaining if by_key[name, "loss"].worse]
    whole = [name for name in gaining if name not in losing]
    nothing = [name for name in comparison.methods if name not in gaining]
    left = {name: f"{name} ({row['left']} left)" for name, row in zip(comparison.methods, rows, strict=True)}
    return Finding(
        "4. A vector works in other templates than the one it is from (Todd et al., arXiv 2310.15213).",
        pd.DataFrame(rows),
        f"Without a clear loss: {listed(left[name] for name in whole)}. Less than in the own template, but more than "
        f"without a vector: {listed(left[name] for name in losing)}. Not on this model, as they do not clearly help in "
        f"another template: {listed(nothing)}. (Layer and strength are those of the own template.)",
    )


# Claim 5


def shuffled_control(comparison: tv.Comparison) -> Finding:
    """What is left of a vector's effect if the vector of shuffled demonstrations is the baseline, not zero-shot.

    Learned vectors have the same baseline. Their own control, trained on permuted answers, gets wrong answers, and
    does not even show what permuted demonstrations show.
    """
    tasks, names = comparison.tasks, [name for name in ("extract", "learn") if name in comparison.methods]
    vector = {(task, name): answers(comparison, (task,), name) for name in names for task in tasks}
    shuffled, zero_shot, few_shot = (
        {task: answers(comparison, (task,), "extract", condition) for task in tasks}
        for condition in ("shuffled", "zero-shot", "few-shot")
    )
    mapping = differences({key: (each, shuffled[key[0]]) for key, each in vector.items()}, one_sided=True)
    form = differences({task: (shuffled[task], zero_shot[task]) for task in tasks})
    rows = [
        {
            "task": task,
            "method": name,
            "zero-shot": zero_shot[task],
            "few-shot": few_shot[task],
            "shuffled": shuffled[task],
            "p shuffled, zero-shot": f"{form[task].p:.1g}",
            "vector": vector[task, name],
            "vector - shuffled": mapping[task, name],
            "p": f"{mapping[task, name].p:.1g}",
            "own control": answers(comparison, (task,), name, "shuffled"),
        }
        for task, name in vector
    ]
    return Finding(
        "5. A vector that beats zero-shot holds the task's mapping (implied if zero-shot is the only baseline).",
        pd.DataFrame(rows),
        "\n".join(what_is_left(name, {task: mapping[task, name] for task in tasks}, form) for name in names),
    )


def what_is_left(name: str, mapping: Mapping[str, Difference], form: Mapping[str, Difference]) -> str:
    """What it means that the vectors of a method are better than shuffled, or are not."""
    better = [task for task, each in mapping.items() if each.better]
    as_shuffled = [task for task, each in mapping.items() if not each.better and form[task].better]
    unclear = [task for task in mapping if task not in better and task not in as_shuffled]
    sentences = [
        f"{name}: better than the vector of shuffled demonstrations in {listed(better)}."
        + (" There the vector holds more than which answers are possible." if better else "")
    ]
    if as_shuffled:
        sentences.append(
            f"Not shown to be better in {listed(as_shuffled)}, where shuffled is better than zero-shot. Shuffled "
            "demonstrations show which answers are possible and what they look like, but not which one belongs to "
            "which input. So the accuracy over zero-shot is not evidence that the vector holds the mapping there: "
            "the model can choose the answer from the query, once it knows the kind of answer."
        )
    if unclear:
        sentences.append(f"Neither is shown in {listed(unclear)}.")
    return " ".join(sentences)


def run(model: tv.LocalEngine, folder: str, size: Mapping[str, Any], names: Sequence[str] = TASKS) -> list[Finding]:
    """All findings, from two comparisons that are kept in the folder."""
    library = tv.library()
    common = {"seeds": (0,), "layers": layers_at(TRIED, model.n_layers), **size}
    of_tasks = tv.compare(
        model,
        [library[name] for name in names],
        methods(model.n_layers),
        conditions=(TEMPLATE,),
        folder=f"{folder}/tasks",
        **common,
    )
    of_bijections = tv.compare(
        model,
        [library[name] for name in BIJECTIONS],
        both_ways(model.n_layers),
        conditions=(),
        controls=(),
        folder=f"{folder}/bijections",
        **common,
    )
    claims = (learned_against_extracted, heads_against_last_position, template_transfer, shuffled_control)
    return [bijections(of_bijections), *(claim(of_tasks) for claim in claims)]


def main(folder: str = "results/study", size: str = "full", name: str | None = None) -> None:
    model = tv.LocalEngine(tv.demo_model() if name is None else TransformerBridge.boot_transformers(name))
    print(f"{model.name}, 5 shots, seed 0, {SIZES[size]}\n")
    for finding in run(model, folder, SIZES[size]):
        print(finding)


if __name__ == "__main__":
    main(*sys.argv[1:])
