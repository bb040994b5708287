"""The sentences of `examples/study.py` follow from its numbers, on comparisons made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import study
from models import Twins
from results import make_settings

import tv_lens as tv
from tv_lens import Comparison, Conditions, Evaluation, Experiment, Score, Sweep, TaskResult

QUERIES = tuple(f"q{i}" for i in range(30))
TASKS = ("present_to_gerund", "next_letter")
METHODS = tuple(study.methods(30))
NOTHING = {"patched": 0, "zero-shot": 0, "few-shot": 30, "shuffled": 0, "elsewhere": 0, "plain elsewhere": 0}


def score_of(right: Sequence[bool]) -> Score:
    return Score(("x",) * len(right), ("y",) * len(right), tuple(right))


def result_of(task: str, method: str, right: Mapping[str, Sequence[bool]], queries: Sequence[str]) -> TaskResult:
    """A result with these answers as `NOTHING` names them; "elsewhere" is in another template."""
    scores = {name: score_of(own) for name, own in right.items()}
    shown = (scores["zero-shot"], scores["few-shot"], scores["patched"])
    other = {"no vector": scores["plain elsewhere"], "patched": scores["elsewhere"]}
    return TaskResult(
        task=task,
        category="",
        sweep=Sweep((0,), (score_of([True, False]),)),
        evaluation=Evaluation(0, *shown, {"shuffled": scores["shuffled"]}),
        other_task=None,
        dev_prompts=("a", "b"),
        test_prompts=tuple(queries),
        queries=tuple(queries),
        method=method,
        conditions=Conditions({study.TEMPLATE.name: other}),
    )


def comparison_of(results: Sequence[TaskResult]) -> Comparison:
    names = tuple(dict.fromkeys(result.task for result in results))
    methods: dict[str, dict[str, object]] = {result.method: {} for result in results}
    return Comparison((Experiment(make_settings(tasks=names, methods=methods), tuple(results)),))


def comparison_with(rights: Mapping[str, Mapping[str, int]]) -> Comparison:
    """In both tasks, the first of 30 answers of the study's methods are right, as many as given."""
    results = []
    for task in TASKS:
        for name in METHODS:
            counts = {**NOTHING, **rights.get(name, {})}
            right = {key: [i < count for i in range(30)] for key, count in counts.items()}
            results.append(result_of(task, name, right, QUERIES))
    return comparison_of(results)


def patched(**rights: int) -> Comparison:
    """How many of 30 answers are right with the vectors of a method, whose comma is written as two underscores."""
    return comparison_with({name.replace("__", ", "): {"patched": count} for name, count in rights.items()})


def test_a_difference_is_tested_and_adjusted() -> None:
    """Two pairs, by hand: 6 of 6 changed answers are better, p = 2 / 64; 1 of 1, p = 1. Holm: 2 * 2 / 64 and 1."""
    ones, others = [[True] * 7 + [False] * 3], [[True] + [False] * 9]
    queries = [[f"q{i}" for i in range(10)]]
    none_right = study.Answers([[False] * 10], queries)
    pairs = {
        "six": (study.Answers(ones, queries), study.Answers(others, queries)),
        "one": (study.Answers(others, queries), none_right),
    }
    actual = study.differences(pairs)
    assert [actual[name].value for name in ("six", "one")] == pytest.approx([0.6, 0.1])
    assert [actual[name].p for name in ("six", "one")] == pytest.approx([1 / 16, 1.0])
    one_sided = study.differences(pairs, one_sided=True)
    assert [one_sided[name].p for name in ("six", "one")] == pytest.approx([1 / 32, 0.5])


@pytest.mark.parametrize(
    ("difference", "outcome"),
    [
        (study.Difference(0.5, 0.2, 0.7, 0.001), "better"),
        (study.Difference(-0.5, -0.7, -0.2, 0.001), "worse"),
        (study.Difference(0.5, 0.2, 0.7, 0.06), "not shown to be better or worse"),
        (study.Difference(0.5, -0.1, 0.7, 0.01), "not shown to be better or worse"),
    ],
)
def test_a_difference_is_clear_by_test_and_interval(difference: study.Difference, outcome: str) -> None:
    assert difference.words.startswith(f"{outcome} (")


def test_learned_vectors_can_be_better_under_either_write() -> None:
    both = patched(extract=3, learn=20, extract__added=3, learn__overwritten=20)
    assert study.learned_against_extracted(both).verdict.startswith(
        "Supported if both overwrite and if both are added."
    )
    added = study.learned_against_extracted(patched(extract=20, learn=20, extract__added=3, learn__overwritten=20))
    assert added.verdict.startswith("Supported if both are added.\n")
    assert "'learn, overwritten' is not shown to be better or worse (+0.00" in added.verdict
    assert "'extract' is better (+0.57" in added.verdict  # than the same vectors, added
    neither = study.learned_against_extracted(patched(extract=20, learn=3, extract__added=20, learn__overwritten=3))
    assert neither.verdict.startswith("Not on this model.")
    assert "'learn' is worse (-0.57" in neither.verdict
    assert "worse in present_to_gerund, next_letter" in neither.verdict


def test_methods_that_were_not_run_are_an_error() -> None:
    only = [each for each in patched().experiments[0].results if each.method in ("learn", "state_vectors")]
    with pytest.raises(tv.TvLensError, match="compare the methods of a pair"):
        study.heads_against_last_position(comparison_of(only))


def test_tasks_are_counted_each_and_together() -> None:
    table = study.learned_against_extracted(patched(extract=3, learn=20)).table
    assert list(table["task"]) == [*TASKS, "all"] * 3
    accuracies = table.loc[table["method"] == "learn", "accuracy"]
    assert [each.n for each in accuracies] == [30, 30, 60]
    assert [each.accuracy for each in accuracies] == pytest.approx([2 / 3] * 3)


def test_heads_are_compared_with_the_last_position() -> None:
    supported = study.heads_against_last_position(patched(extract=3, function_vector=20, state_vectors=3))
    assert supported.verdict.startswith("Supported for function_vector.")
    refused = study.heads_against_last_position(patched(extract=20, function_vector=3, state_vectors=20))
    assert refused.verdict.startswith("Not on this model.")
    assert "'function_vector' is worse" in refused.verdict
    assert "'state_vectors' is not shown" in refused.verdict


def test_vectors_are_sorted_by_what_is_left_in_another_template() -> None:
    finding = study.template_transfer(
        comparison_with(
            {
                "extract": {"patched": 20, "elsewhere": 20},
                "learn": {"patched": 25, "elsewhere": 10},
                "state_vectors": {"patched": 25, "elsewhere": 0},
            }
        )
    )
    assert "Without a clear loss: extract (1.00 left)." in finding.verdict
    assert "more than without a vector: learn (0.40 left)." in finding.verdict
    not_here = finding.verdict.partition("Not on this model")[2]
    assert all(name in not_here for name in METHODS if name not in ("extract", "learn"))
    left = dict(zip(finding.table["method"], finding.table["left"], strict=True))
    assert [left[name] for name in ("extract", "learn", "state_vectors", "function_vector")] == [
        "1.00",
        "0.40",
        "0.00",
        "",
    ]


def test_a_gain_in_another_template_is_counted_from_there() -> None:
    """What the other template does without a vector is not the vector's."""
    plain = {"elsewhere": 20, "plain elsewhere": 20}
    finding = study.template_transfer(comparison_with({name: {"patched": 20, **plain} for name in METHODS}))
    assert "Without a clear loss: none." in finding.verdict


def test_the_shuffled_control_has_three_outcomes() -> None:
    def verdict(vector: int, shuffled: int) -> str:
        rights = {"extract": {"patched": vector, "shuffled": shuffled}, "learn": {"patched": 30}}
        [line, learned] = study.shuffled_control(comparison_with(rights)).verdict.splitlines()
        assert learned.startswith(
            "learn: better than the vector of shuffled demonstrations in present_to_gerund, next_"
        )
        return line

    both = "present_to_gerund, next_letter"
    assert verdict(20, 2).startswith(f"extract: better than the vector of shuffled demonstrations in {both}. There")
    as_shuffled = verdict(20, 20)
    assert as_shuffled.startswith("extract: better than the vector of shuffled demonstrations in none. Not shown")
    assert f"Not shown to be better in {both}, where shuffled is better than zero-shot." in as_shuffled
    assert "is not evidence that the vector holds the mapping" in as_shuffled
    assert verdict(1, 0).endswith(f"in none. Neither is shown in {both}.")


def test_learned_vectors_are_compared_with_the_vector_of_shuffled_demonstrations() -> None:
    """And not with their own control, which is wrong about everything."""
    rights = {"extract": {"patched": 20, "shuffled": 20}, "learn": {"patched": 20, "shuffled": 0}}
    finding = study.shuffled_control(comparison_with(rights))
    assert "learn: better than the vector of shuffled demonstrations in none." in finding.verdict
    learned = finding.table[finding.table["method"] == "learn"]
    assert [each.value for each in learned["vector - shuffled"]] == [0, 0]
    assert [each.accuracy for each in learned["own control"]] == [0, 0]


def bijection(right: Mapping[str, tuple[int, int]]) -> study.Finding:
    """How many of 12 letters are made upper case and how many of 12 lower case, by each vector."""
    lower, upper = list("abcdefghijkl"), list("MNOPQRSTUVWX")
    results = []
    for name in study.both_ways(30):
        answers = {key: [False] * 24 for key in NOTHING}
        few_shot = right.get("few-shot", (12, 12))
        for key, (first, second) in {"patched": right[name], "few-shot": few_shot}.items():
            answers[key] = [i < first for i in range(12)] + [i < second for i in range(12)]
        results.append(result_of("swap_upper_lower", name, answers, lower + upper))
    return study.bijections(comparison_of(results))


def test_a_bijection_is_judged_by_direction() -> None:
    finding = bijection(
        {"extract": (12, 0), "learn": (12, 12), "extract_in_context": (6, 0), "separator_vectors": (12, 8)}
    )
    [row] = finding.table[finding.table["vector"] == "extract"].to_dict("records")
    # Clopper and Pearson: 12 of 12 is above 0.025^(1/12) = 0.74, 0 of 12 below 0.26.
    assert row["direction 1"] == "to_upper 1.00 [0.74, 1.00]"
    assert row["direction 2"] == "to_lower 0.00 [0.00, 0.26]"
    assert "does to_upper rather than to_lower; it is not above one half although few-shot is" in finding.verdict
    assert "One learned vector is above one half (1.00 [0.86, 1.00])" in finding.verdict
    assert "several vectors are better (+0.58" in finding.verdict


def test_a_cap_needs_a_model_that_can_do_the_bijection() -> None:
    rights = dict.fromkeys(study.both_ways(30), (4, 4))
    finding = bijection({**rights, "few-shot": (4, 4)})
    assert "does neither direction clearly better than the other" in finding.verdict
    assert "neither is few-shot (0.33" in finding.verdict
    assert "not shown to be above one half" in finding.verdict
    assert "several vectors are not shown to be better or worse" in finding.verdict
    assert "is above one half, so nothing caps it" in bijection(dict.fromkeys(rights, (12, 12))).verdict


def test_the_study_runs_and_resumes(llama: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "BIJECTIONS", {"swap_upper_lower": ("to_upper", "to_lower")})
    monkeypatch.setattr(study, "LEARNED", (0.5,))
    monkeypatch.setattr(study, "TRIED", (0.5, 0.7))
    size = {"shots": 2, "n_train": 4, "n_dev": 2, "n_test": 3, "strengths": (1.0,), "max_new_tokens": 1}
    engine = tv.LocalEngine(llama.bridge, progress=False)
    findings = study.run(engine, str(tmp_path), size, ["antonyms"])
    assert [finding.claim[:2] for finding in findings] == ["1.", "2.", "3.", "4.", "5."]
    assert [len(finding.table) for finding in findings] == [5, 3 * 2, 2 * 2, 6, 2]
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    again = study.run(engine, str(tmp_path), size, ["antonyms"])
    assert [str(finding) for finding in again] == [str(finding) for finding in findings]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == made
