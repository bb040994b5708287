"""Function vectors through everything that takes task vectors: experiments, controls, conditions, files, the command
line.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Twins

import tv_lens as tv
from tv_lens import FunctionVector
from tv_lens.evidence.controls import Treatment
from tv_lens.methods.base import method_of
from tv_lens.methods.function_vectors import chosen_heads

LETTERS = tv.Task("upper", tuple("abcdefgh"), str.upper)
PROMPTS = LETTERS.sample(4, shots=3, seed=0)
SMALL: dict[str, Any] = {"shots": 2, "n_dev": 4, "n_test": 4, "max_new_tokens": 2}


def test_an_experiment_compares_function_vectors_with_others(llama: Twins, tmp_path: Path) -> None:
    methods = [tv.Extraction(substitutes=1), FunctionVector(heads=3), tv.MeanState()]
    controls = [tv.RandomHeads(), tv.ShuffledDemonstrations()]
    options: dict[str, Any] = {"methods": methods, "controls": controls, "folder": tmp_path / "run", **SMALL}
    actual = tv.run_experiment(llama.bridge, [LETTERS], **options)
    assert [result.method for result in actual.results] == ["extract", "function_vector", "mean_state"]
    assert [list(result.evaluation.controls) for result in actual.results] == [
        ["shuffled"],
        ["random heads", "shuffled"],
        ["shuffled"],
    ]
    vector = actual.vectors["upper, function_vector"]
    assert (vector.op, len(chosen_heads(vector)), vector.task) == ("add", 3, "upper")
    assert actual.settings["methods"]["function_vector"]["heads"] == 3
    assert tv.run_experiment(llama.bridge, [LETTERS], **options) == actual  # from its folder
    actual.save(tmp_path / "e.json")
    assert tv.Experiment.load(tmp_path / "e.json") == actual
    actual.report(tmp_path / "page.html")
    assert "upper, function_vector" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert actual.plot().data
    methods[1] = FunctionVector(heads=4)
    with pytest.raises(tv.TvLensError, match="other settings .*methods was"):
        tv.run_experiment(llama.bridge, [LETTERS], **options)


def test_the_method_is_its_steps(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    made = FunctionVector(heads=3, known_only=False)(engine, LETTERS, PROMPTS, 5)
    read = tv.read_heads(engine, PROMPTS)
    effects = tv.head_effects(engine, PROMPTS, read, seeds=[5])
    by_hand = tv.function_vector(engine, read, effects.top(3))
    torch.testing.assert_close(made.values, by_hand.values)
    assert chosen_heads(made) == chosen_heads(by_hand) == effects.top(3)
    assert made.options["diagnosis"] == list(effects.diagnosis)
    assert made.options["n"] == 4
    given = FunctionVector(heads=effects.top(3), known_only=False)(engine, LETTERS, PROMPTS, 5)
    torch.testing.assert_close(given.values, by_hand.values)


def test_preselected_heads_are_scored_exactly(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    read = tv.read_heads(engine, PROMPTS)
    method = FunctionVector(heads=2, preselect=5, corruptions=2, n_corrupted=3, known_only=False)
    actual = method.effects(engine, PROMPTS, read, 0)
    quick = tv.head_effects(engine, PROMPTS[:3], read, how="attribution", seeds=[0, 1])
    exact = tv.head_effects(engine, PROMPTS[:3], read, seeds=[0, 1])
    assert (set(actual.heads), actual.how, len(actual)) == (set(quick.top(5)), "exact", 3)
    for head in actual.heads:
        assert actual.at(head) == pytest.approx(exact.at(head), abs=1e-5)
    assert chosen_heads(method(engine, LETTERS, PROMPTS, 0)) == actual.top(2)


def test_only_known_prompts_are_read(llama: Twins) -> None:
    """Some answers are what the model says, others are not."""
    engine = tv.LocalEngine(llama.bridge, progress=False)
    ids = tv.generate(engine, PROMPTS, max_new_tokens=1).tokens[:, 0].tolist()
    right = [engine.text.piece_ids(engine.text.decode([token]))[:1] == [token] for token in ids]
    assert right[0]
    mixed = [replace(PROMPTS[0], answer=engine.text.decode([ids[0]])), replace(PROMPTS[1], answer="\u00e9\u00e9")]
    read = tv.read_heads(engine, mixed, known_only=True)
    assert (len(read), read.options["kept"], read.options["right"], read.options["n"]) == (1, 0.5, 1, 2)
    assert read.prompts == (mixed[0].text,)
    torch.testing.assert_close(read.values, tv.read_heads(engine, mixed[:1]).values, atol=1e-5, rtol=1e-5)
    with pytest.raises(tv.TvLensError, match="answers none of the 1 prompts right"):
        tv.read_heads(engine, mixed[1:], known_only=True)
    made = FunctionVector(heads=2)(engine, LETTERS, [replace(each, answer="\u00e9\u00e9") for each in PROMPTS], 0)
    assert made.options["kept"] == 0.0
    assert "few-shot accuracy (first token) is 0.00 of 4 prompts" in str(made.options["diagnosis"])


def test_the_method_that_made_a_vector_is_known(llama: Twins, tmp_path: Path) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    method = FunctionVector(heads=3, measure="log-probability", known_only=False, n_corrupted=2)
    made = method(engine, LETTERS, PROMPTS, 0)
    made.save(tmp_path / "v.safetensors")
    assert method_of(tv.TaskVectors.load(tmp_path / "v.safetensors").mean()) == method
    by_hand = tv.function_vector(engine, tv.read_heads(engine, PROMPTS), [(2, 1), (0, 3)])
    assert method_of(by_hand) == FunctionVector(heads=((2, 1), (0, 3)))


@pytest.mark.parametrize("distributed", [False, True])
def test_an_evaluation_has_its_controls(llama: Twins, distributed: bool) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    read = tv.read_heads(engine, PROMPTS)
    vector = tv.function_vector(engine, read, [(2, 1), (0, 3)], distributed=distributed)
    layer: Any = tv.layers(*vector.layers) if distributed else 1
    actual = tv.evaluate(engine, LETTERS, PROMPTS, vector, layer, max_new_tokens=2)
    assert list(actual.controls) == ["random", "shuffled"]
    mixed = tv.shuffle_outputs(PROMPTS, 0)
    shuffled = tv.function_vector(engine, tv.read_heads(engine, mixed), [(2, 1), (0, 3)], distributed=distributed)
    texts = tv.patch_generate(engine, PROMPTS, shuffled, layer, max_new_tokens=2)
    assert actual.controls["shuffled"].texts == tuple(texts)


def test_random_vectors_of_some_heads_are_in_these_heads(llama: Twins) -> None:
    from tv_lens.evidence.controls import random_like

    engine = tv.LocalEngine(llama.bridge, progress=False)
    vector = tv.function_vector(engine, tv.read_heads(engine, PROMPTS), [(2, 1), (0, 3)], distributed=True)
    noise = random_like(vector, 5, 0)
    torch.testing.assert_close(noise.values.norm(dim=-1), vector.values.norm(dim=-1).expand(5, -1))
    assert torch.equal(noise.values != 0, (vector.values != 0).expand(5, -1, -1))


def test_random_heads_are_others_of_equal_norm(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    read = tv.read_heads(engine, PROMPTS)
    vector = tv.function_vector(engine, read, [(2, 1), (0, 3), (1, 1)])
    treatment = Treatment(engine, LETTERS, PROMPTS, vector, FunctionVector(), seed=0, n=4)
    control = tv.RandomHeads()(treatment)
    assert control is not None
    assert control.values.shape == (4, 4, 32)
    torch.testing.assert_close(control.values.norm(dim=-1), vector.values.norm(dim=-1).expand(4, -1))
    sets: Any = control.options["heads"]
    assert len({str(each) for each in sets}) > 1
    for i, heads in enumerate(sets):
        assert len(heads) == 3
        assert not {tuple(head) for head in heads} & {(2, 1), (0, 3), (1, 1)}
        own = tv.function_vector(engine, read, [tuple(head) for head in heads]).values[0, 0]
        cosine = torch.nn.functional.cosine_similarity(own, control.values[i, 0], dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-5)
    assert tv.RandomHeads()(replace(treatment, vectors=tv.MeanState()(engine, LETTERS, PROMPTS, 0))) is None


def test_the_mean_state_is_added(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    made = tv.MeanState()(engine, LETTERS, PROMPTS, 0).mean()
    read = tv.extract(engine, [prompt.asking("z") for prompt in PROMPTS], [[prompt.query] for prompt in PROMPTS])
    torch.testing.assert_close(made.values, read.mean().values, atol=1e-5, rtol=1e-4)
    assert made.op == "add"


def test_what_cannot_be_run_is_refused() -> None:
    for options in ({"heads": 0}, {"heads": ()}, {"n_corrupted": 0}, {"corruptions": 0}, {"preselect": -1}):
        with pytest.raises(tv.TvLensError, match="are 1 or more"):
            FunctionVector(**options)
    with pytest.raises(tv.TvLensError, match="5 preselected heads are fewer than the 10 wanted"):
        FunctionVector(preselect=5)


def test_an_experiment_writes_a_distributed_vector_at_all_its_layers(llama: Twins) -> None:
    # A rule that cannot decide early, so that the answers are whole.
    task = replace(LETTERS, accepts=tv.Rule("whole answers", lambda prediction, answer: prediction == answer))
    methods = [FunctionVector(heads=((2, 1), (0, 3)), distributed=True)]
    actual = tv.run_experiment(llama.bridge, [task], methods=methods, **SMALL)
    [result] = actual.results
    assert (result.sweep.layers, result.evaluation.layer) == ((2,), (0, 2))
    dev, _ = task.split(0.5, seed=0)
    prompts = dev.sample(4, shots=2, seed=0)
    texts = tv.patch_generate(llama.bridge, prompts, actual.vectors["upper"], tv.layers(0, 2), max_new_tokens=2)
    assert result.sweep.scores[0].texts == tuple(texts)
    assert "0, 2" in str(actual.summary()["layer"][0])


# Conditions


def test_conditions_are_their_prompts_with_and_without_a_vector(llama: Twins) -> None:
    engine = tv.LocalEngine(llama.bridge, progress=False)
    read = tv.read_heads(engine, PROMPTS)
    summed = tv.function_vector(engine, read, [(2, 1), (0, 3)])
    spread = tv.function_vector(engine, read, [(2, 1), (0, 3)], distributed=True)
    template = tv.Template("Q: {input}\nA: {output}", separator="\n\n")
    placed: dict[str, tuple[tv.TaskVectors, Any]] = {"summed": (summed, 1), "spread": (spread, tv.layers(0, 2))}
    actual = tv.across_conditions(
        engine,
        LETTERS,
        PROMPTS,
        placed,
        conditions=[
            tv.zero_shot,
            tv.shuffled_few_shot,
            tv.other_template(template),
            tv.free_text("In capitals, {input} is"),
        ],
        max_new_tokens=3,
        seed=2,
    )
    assert actual.vectors == ("no vector", "summed", "spread")
    queries = [prompt.zero_shot() for prompt in PROMPTS]
    asked = {
        "zero-shot": (queries, None),
        "shuffled few-shot": (tv.shuffle_outputs(PROMPTS, 2), None),
        "another template": ([replace(query, template=template) for query in queries], None),
        "free text": ([f"In capitals, {query.query} is" for query in queries], tv.add(every_step=True)),
    }
    assert list(actual.scores) == list(asked)
    for name, (prompts, how) in asked.items():
        plain = [text.strip() for text in tv.generate(engine, prompts, max_new_tokens=3)]  # type: ignore[arg-type]
        assert [text.strip() for text in actual.scores[name]["no vector"].texts] == plain
        texts = tv.patch_generate(
            engine, prompts, summed, 1, how=how, keep_demonstrations=True, max_new_tokens=3  # type: ignore[arg-type]
        )  # fmt: skip
        assert [text.strip() for text in actual.scores[name]["summed"].texts] == [text.strip() for text in texts]
        texts = tv.patch_generate(
            engine, prompts, spread, tv.layers(0, 2), keep_demonstrations=True, max_new_tokens=3  # type: ignore[arg-type]
        )  # fmt: skip
        assert [text.strip() for text in actual.scores[name]["spread"].texts] == [text.strip() for text in texts]
    table = actual.to_pandas()
    assert len(table) == 12
    assert table["p_value"].isna().sum() == 4
    assert "free text" in actual._repr_html_()
    figure = actual.plot()
    assert [bar.name for bar in figure.data] == ["no vector", "summed", "spread"]
    with pytest.raises(tv.TvLensError, match="give different names"):
        tv.across_conditions(engine, LETTERS, PROMPTS, placed, conditions=[tv.zero_shot, tv.zero_shot])
    with pytest.raises(tv.TvLensError, match="give different names"):
        tv.across_conditions(engine, LETTERS, PROMPTS, {"no vector": (summed, 1)})


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("is a cold place", "cold", True),
        ("cold", "cold", True),
        ("(cold)", "cold", True),
        ("is colder", "cold", False),
        ("scold", "cold", False),
        ("scold cold", "cold", True),
        ("it is New", "New York", False),
        ("it is New York.", "New York", True),
        ("13, 3,000", "3", False),
        ("13, 3", "3", True),
        ("\u662f\u51b7\u7684", "\u51b7", True),
        ("anything", "", False),
    ],
)
def test_an_answer_occurs_as_whole_words(prediction: str, answer: str, expected: bool) -> None:
    assert tv.occurs(prediction, answer) is expected


def test_free_text_has_one_query_and_no_demonstrations() -> None:
    text = tv.FreeText("The opposite of {input} is")
    assert tv.Prompt((), "hot", template=text).text == "The opposite of hot is"
    assert text.continuation("hot", "cold") == " cold"
    assert [segment.role for segment in tv.Prompt((), "hot", template=text).segments] == [
        "template",
        "query",
        "separator",
    ]
    with pytest.raises(tv.TvLensError, match="has no demonstrations"):
        text.write([tv.Example("a", "b")], "hot")
    for broken in ("no query", "{input} {input}"):
        with pytest.raises(tv.TvLensError, match="write it once"):
            tv.FreeText(broken)


@pytest.mark.slow
def test_the_page_on_heads_runs(llama: Twins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("top_heads.json").write_text('{"top_heads": [[2, 1], [0, 3]], "top_head_effects": [0.2, 0.1]}')
    page = (Path(__file__).parents[1] / "docs" / "heads.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python (\w+)\n(.*?)^```$", page, re.M | re.S)
    assert [name for name, _ in blocks] == [
        "heads",
        "attribution",
        "distributed",
        "universal",
        "experiment",
        "conditions",
    ]
    task = tv.Task("upper", tuple(f"{a}{b}" for a in "abcdef" for b in "stuvwxyz"), str.upper)
    engine = tv.LocalEngine(llama.bridge, progress=False)
    known: dict[str, Any] = {"model": engine, "task": task}
    for name, code in blocks:
        if name == "heads":  # the tiny model knows no answer
            code = code.replace(", known_only=True", "")
        exec(code, known)
        known["effects_of_another_task"] = known["effects"]
