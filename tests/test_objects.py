"""Results in a notebook: short reprs, tables in print, vectors as sequences and tensors, errors that say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import Twins

import tv_lens as tv

WORDS = tuple(f"{a}{b}" for a in "abcdefgh" for b in "uvwxyz")
UPPER = tv.Task("upper", WORDS, str.upper)
DOUBLE = tv.Task("double", WORDS, lambda text: text * 2)


def vectors_of(values: torch.Tensor, **options: object) -> tv.TaskVectors:
    return tv.TaskVectors(values, "tiny", "upper", **options)  # type: ignore[arg-type]


def read(model: tv.Engine, task: tv.Task, n: int, seed: int) -> tv.TaskVectors:
    prompts = task.sample(n, shots=2, seed=seed)
    return tv.extract(model, prompts, task.substitutes(prompts, 1, seed=seed))


@pytest.fixture(scope="module")
def results(llama: Twins) -> dict[str, object]:
    """One of each kind of result, with many prompts and tokens."""
    model = tv.LocalEngine(llama.bridge, progress=False)
    prompts = UPPER.sample(40, shots=3, seed=0)
    vectors = tv.extract(model, prompts, UPPER.substitutes(prompts, 1, seed=0))
    mean = vectors.mean()
    others = read(model, DOUBLE, 40, seed=0)
    experiment = tv.run_experiment(model, [UPPER, DOUBLE], n_dev=12, n_test=12, shots=2, max_new_tokens=1)
    return {
        "vectors": vectors,
        "provenance": vectors.provenance,
        "completions": tv.generate(model, prompts, max_new_tokens=1),
        "sweep": tv.sweep_layers(model, UPPER, prompts, mean, max_new_tokens=1),
        "evaluation": tv.evaluate(model, UPPER, prompts, mean, 1, max_new_tokens=1),
        "conflict": tv.conflict(model, UPPER, DOUBLE, prompts, mean, 1, max_new_tokens=1),
        "experiment": experiment,
        "settings": experiment.settings,
        "result": experiment.results[0],
        "score": experiment.results[0].evaluation.patched,
        "tokens": tv.top_tokens(model, vectors, 1, k=50),
        "similarities": tv.compare_tasks([vectors, others], 1),
        "map": tv.map_vectors([vectors, others], 1),
        "table": tv.show_tokens(model, prompts[0]),
        "prompt": prompts[0],
    }


def test_every_repr_fits_in_a_screen(results: dict[str, object]) -> None:
    lengths = {name: len(repr(each)) for name, each in results.items()}
    assert max(lengths.values()) <= 24 * 80, lengths
    assert all(type(each).__name__ in repr(each) for each in results.values())


def test_printing_an_experiment_shows_its_table(results: dict[str, object]) -> None:
    experiment = results["experiment"]
    assert isinstance(experiment, tv.Experiment)
    header, *rows = str(experiment).splitlines()
    assert header.split() == " ".join(experiment.summary().columns).split()
    assert [row.split()[0] for row in rows] == ["upper", "double"]


def test_printing_a_sweep_shows_its_layers() -> None:
    """Of 4 answers 1, 4 and 4 are right; 40 characters are an accuracy of 1."""
    scores = [tv.Score(("a",) * 4, ("a",) * 4, tuple(i < n for i in range(4))) for n in (1, 4, 4)]
    assert str(tv.Sweep((3, 5, 12), tuple(scores))).splitlines() == [
        "layer  accuracy",
        f"    3  0.25  {'#' * 10}",
        f"    5  1.00  {'#' * 40} <- best",
        f"   12  1.00  {'#' * 40}",
    ]


def test_printing_an_evaluation_shows_a_row_for_each_condition(results: dict[str, object]) -> None:
    rows = str(results["evaluation"]).splitlines()
    assert [row.split()[0] for row in rows] == ["condition", "zero-shot", "few-shot", "patched", "random", "shuffled"]


@pytest.mark.parametrize(
    ("chosen", "rows"),
    [
        (1, [1]),
        (-1, [3]),
        (np.int64(2), [2]),
        (slice(1, 3), [1, 2]),
        ([3, 0], [3, 0]),
        (torch.tensor([True, False, False, True]), [0, 3]),
    ],
)
def test_vectors_are_chosen_with_their_prompts(chosen: int, rows: list[int]) -> None:
    values = torch.arange(24.0).reshape(4, 2, 3)
    vectors = vectors_of(values, prompts=("p0", "p1", "p2", "p3"), substitutes=(("s0",), ("s1",), ("s2",), ("s3",)))
    actual = vectors[chosen]
    assert torch.equal(actual.values, values[rows])
    assert actual.prompts == tuple(f"p{row}" for row in rows)
    assert actual.substitutes == tuple((f"s{row}",) for row in rows)
    assert (actual.model, actual.task, actual.layers) == ("tiny", "upper", (0, 1))


def test_a_mean_keeps_the_prompts_it_is_from() -> None:
    mean = vectors_of(torch.ones(2, 1, 3), prompts=("p0", "p1")).mean()
    assert mean[0].prompts == ("p0", "p1")


def test_vectors_are_iterated_one_by_one() -> None:
    values = torch.arange(24.0).reshape(4, 2, 3)
    assert [each.values[0, 0, 0].item() for each in vectors_of(values)] == [0, 6, 12, 18]
    assert all(len(each) == 1 for each in vectors_of(values))


@pytest.mark.parametrize("chosen", [4, -5, [0, 4]])
def test_a_vector_that_is_not_there_is_an_index_error(chosen: int) -> None:
    with pytest.raises(IndexError):
        vectors_of(torch.ones(4, 2, 3))[chosen]


def test_no_vectors_are_an_error() -> None:
    with pytest.raises(tv.TvLensError, match="no vector of .* is left"):
        vectors_of(torch.ones(4, 2, 3))[4:]


def test_vectors_can_be_divided() -> None:
    actual = vectors_of(torch.full((1, 1, 2), 3.0)) / 2
    assert actual.values.tolist() == [[[1.5, 1.5]]]
    assert actual.task == "0.5 * upper"
    for divisor in (0, float("nan"), float("inf")):
        with pytest.raises(tv.TvLensError, match="divide by a finite number"):
            vectors_of(torch.ones(1, 1, 2)) / divisor


def test_vectors_are_tensors_and_arrays_and_stay_unchanged() -> None:
    values = torch.arange(6.0).reshape(1, 2, 3)
    vectors = vectors_of(values)
    tensor, array = torch.as_tensor(vectors), np.asarray(vectors)
    assert torch.equal(tensor, values)
    assert np.array_equal(array, values.numpy())
    tensor += 1
    array += 1
    assert torch.equal(vectors.values, values)
    assert np.asarray(vectors, dtype=np.float64).dtype == np.float64


def test_a_plain_tensor_is_written_as_task_vectors_are(llama: Twins) -> None:
    model = tv.LocalEngine(llama.bridge, progress=False)
    prompts = [UPPER.sample(1, shots=shots, seed=shots)[0] for shots in (1, 2, 4)]
    vectors = read(model, UPPER, 3, seed=9)
    expected = tv.patched_logits(model, prompts, vectors, 2)
    assert torch.equal(tv.patched_logits(model, prompts, vectors.at(2), 2), expected)
    mean = vectors.mean()
    expected = tv.patched_logits(model, prompts, mean, 2)
    assert torch.equal(tv.patched_logits(model, prompts, mean.at(2)[0], 2), expected)
    texts = tv.patch_generate(model, prompts, mean, 2, max_new_tokens=2).texts
    assert tv.patch_generate(model, prompts, mean.at(2)[0], 2, max_new_tokens=2).texts == texts
    logprobs = tv.answer_logprobs(model, prompts, vectors=mean, layer=2)
    assert torch.equal(tv.answer_logprobs(model, prompts, vectors=mean.at(2)[0], layer=2), logprobs)
    assert torch.equal(tv.divergence(model, prompts, mean.at(2)[0], 2), tv.divergence(model, prompts, mean, 2))


def test_a_plain_tensor_is_written_at_several_layers(llama: Twins) -> None:
    model = tv.LocalEngine(llama.bridge, progress=False)
    prompts = UPPER.sample(2, shots=2, seed=0)
    vector = read(model, UPPER, 1, seed=5).at(1)[0]
    both = tv.TaskVectors(
        torch.stack([vector, vector])[None], llama.bridge.cfg.model_name, "x", layers=(1, 3), n_layers=4
    )
    for layer in (tv.layers(1, 3), tv.by_prompt(3, 1)):
        actual = tv.patched_logits(model, prompts, vector, layer)
        assert torch.equal(actual, tv.patched_logits(model, prompts, both, layer))


@pytest.mark.parametrize("shape", [(3,), (5, 32), (1, 1, 32), (2, 4, 32), ()])
def test_a_tensor_of_another_shape_is_refused(llama: Twins, shape: tuple[int, ...], as_users_run_it: None) -> None:
    prompts = UPPER.sample(2, shots=2, seed=0)
    assert tv.LocalEngine(llama.bridge).d_model == 32
    with pytest.raises(tv.TvLensError, match=r"give one of shape \(32,\), or \(2, 32\)"):
        tv.patch_generate(llama.bridge, prompts, torch.zeros(shape), 1)


def test_a_list_of_layers_is_asked_about(llama: Twins) -> None:
    model = tv.LocalEngine(llama.bridge, progress=False)
    prompts = UPPER.sample(2, shots=2, seed=0)
    mean = read(model, UPPER, 2, seed=7).mean()
    with pytest.warns(tv.TvLensWarning, match=r"write by_prompt\(1, 2\) .* or layers\(1, 2\)"):
        listed = tv.patched_logits(model, prompts, mean, [1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(tv.patched_logits(model, prompts, mean, tv.by_prompt(1, 2)), listed)
        tv.patched_logits(model, prompts, mean, [1, 1])
    assert not torch.equal(tv.patched_logits(model, prompts, mean, tv.layers(1, 2)), listed)


def test_another_template_is_a_warning(llama: Twins) -> None:
    model = tv.LocalEngine(llama.bridge, progress=False)
    mean = read(model, UPPER, 2, seed=7).mean()
    other = UPPER.sample(2, shots=2, seed=0, template=tv.Template("{input} = {output}"))
    with pytest.warns(tv.TvLensWarning, match="may do less in another template"):
        tv.patched_logits(model, other, mean, 1)


def test_another_bos_is_a_warning(llama: Twins) -> None:
    prompts = UPPER.sample(2, shots=2, seed=0)
    first, second = (tv.LocalEngine(llama.bridge, prepend_bos=bos, progress=False) for bos in (True, False))
    mean = read(first, UPPER, 2, seed=7).mean()
    with pytest.warns(tv.TvLensWarning, match="with a BOS token in front .* without one"):
        tv.patched_logits(second, prompts, mean, 1)


def test_vectors_read_at_the_same_query_are_a_warning(llama: Twins) -> None:
    model = tv.LocalEngine(llama.bridge, progress=False)
    prompts = UPPER.sample(2, shots=2, seed=0)
    with pytest.warns(tv.TvLensWarning, match="they may hold its answer"):
        tv.patched_logits(model, prompts, tv.extract_across(model, prompts).mean(), 1)


def test_what_is_usual_does_not_warn(llama: Twins) -> None:
    model = tv.LocalEngine(llama.bridge, progress=False)
    dev, test = UPPER.split(0.5, seed=0)
    prompts = dev.sample(3, shots=2, seed=0)
    vectors = tv.extract(model, prompts, dev.substitutes(prompts, 1, seed=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tv.patched_logits(model, prompts, vectors, 1)  # as in the paper: read at substitute queries
        tv.patched_logits(model, test.sample(3, shots=0, seed=1), vectors.mean(), 1)
        tv.patched_logits(model, ["plain text"], vectors.mean(), 1)
        steering = tv.mean_difference(model, ["good", "fine"], ["bad", "poor"])
        tv.patched_logits(model, prompts, steering, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: tv.Task("x", {"hot": "cold"}), r"Task.from_mapping\('x', "),  # type: ignore[arg-type]
        (lambda model: tv.Task("x", ["hot"]), r"Task\('x', texts, function\)"),  # type: ignore[arg-type]
        (lambda model: tv.Task.from_mapping("x", [("hot", "cold")]), r"Task.from_mapping\('x', dict\(pairs\)\)"),  # type: ignore[arg-type]
        (lambda model: tv.run_experiment(model, UPPER), r"give a list"),  # type: ignore[arg-type]
        (lambda model: tv.run_experiment(model, ["upper"]), r"library\(\)\[name\]"),  # type: ignore[list-item]
        (lambda model: tv.compare(model, UPPER, [tv.Extraction()]), r"give a list"),  # type: ignore[arg-type]
        (
            lambda model: tv.top_tokens(model, UPPER.sample(1, shots=1, seed=0)[0], 1),  # type: ignore[arg-type]
            r"extract\(model, prompts, substitutes\)",
        ),
    ],
)
def test_errors_say_what_to_write(
    llama: Twins, call: Callable[[object], object], message: str, as_users_run_it: None
) -> None:
    with pytest.raises(tv.TvLensError, match=message):
        call(llama.bridge)


def test_vectors_of_positions_cannot_be_chosen_from() -> None:
    vectors = vectors_of(torch.ones(2, 1, 3), usage=tv.Usage(positions="separators", per_position=True))
    with pytest.raises(tv.TvLensError, match="used together"):
        vectors[0]
    assert replace(vectors, usage=tv.Usage())[0].values.shape == (1, 1, 3)
