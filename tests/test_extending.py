"""What a third party can add in a few lines, without changing the package: an engine, a method, a control, a
rule, a prompt format, a file reader and a figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import plotly.graph_objects as go
import pytest
import torch
from models import Twins

import tv_lens as tv
from tv_lens import Example, Prompt, PromptFormat, Task, TaskVectors
from tv_lens.engines import Capability, Engine, ModelInfo, Pass, StatelessEngine, TextCodec, Tokens, engine_for
from tv_lens.evidence.controls import Control, Treatment
from tv_lens.methods import Method
from tv_lens.prompts import Segment
from tv_lens.tasks import reader
from tv_lens.views.plots import plot

LETTERS = Task("upper", tuple("abcdefgh"), str.upper)
SMALL: dict[str, Any] = {"shots": 2, "n_dev": 4, "n_test": 4, "max_new_tokens": 2, "substitutes": 1}

# --- docs: engine
# A custom model: each layer holds the last letter's number, and the model answers with that letter in upper case.


class Letters(TextCodec):
    def to_ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Shouting:
    """A model that is not a neural network."""


class ShoutingEngine(StatelessEngine):
    def __init__(self, model: Shouting) -> None:
        self.info = ModelInfo("shouting", n_layers=2, d_model=1, d_vocab=200)
        self.text = Letters(self.info)
        self.capabilities = frozenset({Capability.PATCH, Capability.CONTINUE})

    def run(self, tokens: Tokens, *, edits: Any, read: Any, logits: Any, **options: Any) -> Pass:
        letters = [int(ids[seen.bool()][-1]) for ids, seen in zip(tokens.ids, tokens.mask, strict=True)]
        states = torch.tensor(letters, dtype=torch.float32).repeat(2, 1)  # layer row
        for edit in edits:
            if edit.position == -1:
                states[edit.layer :, edit.rows] = edit.value[:, 0]
        chosen = [ord(chr(int(number) % 128).upper()) for number in states[-1].tolist()]
        reads = dict.fromkeys(read, states.T[:, :, None])
        return Pass(torch.nn.functional.one_hot(torch.tensor(chosen), 200).float() if logits else None, reads)


@engine_for.register
def _(model: Shouting) -> Engine:
    return ShoutingEngine(model)


# --- docs: end


def test_a_custom_engine_runs_the_whole_experiment(as_users_run_it: None) -> None:
    model: Any = Shouting()
    plain = tv.PlainText()
    assert isinstance(tv.engine_for(model), ShoutingEngine)
    assert list(tv.generate(model, ["ab", "c"], max_new_tokens=2)) == ["BB", "CC"]
    vectors = TaskVectors(torch.full((1, 2, 1), 120.0), "shouting", "x")
    assert list(tv.patch_generate(model, ["ab", "c"], vectors, 1, max_new_tokens=2)) == ["XX", "XX"]
    read = tv.extract(model, [Prompt((), "a", template=plain)], [["b", "c"]])
    assert read.values.flatten().tolist() == [98.5, 98.5]
    one = 1 - math.log(199 + math.e)  # the letter's logit is 1, those of the 199 others are 0
    assert tv.answer_logprobs(model, ["ab"], ["BB"]).item() == pytest.approx(2 * one, abs=1e-5)
    small = {**SMALL, "template": tv.Template("{input}{output}"), "max_new_tokens": 1}
    experiment = tv.run_experiment(model, [LETTERS], **small)
    assert experiment.settings["engine"] == "ShoutingEngine"
    assert experiment.results[0].evaluation.zero_shot.accuracy == 1.0
    with pytest.raises(tv.UnsupportedError, match="shouting cannot add a vector .* this engine has PATCH, CONTINUE"):
        tv.patch_generate(model, ["a"], vectors, 1, how=tv.add())


# --- docs: method
@dataclass(frozen=True)
class ScaledExtraction(Method):
    """Task vectors, scaled."""

    name: ClassVar[str] = "scaled"
    factor: float = 2.0

    def __call__(self, engine: Engine, task: Task, prompts: Sequence[Prompt], seed: int) -> TaskVectors:
        vectors = tv.extract(engine, prompts, task.substitutes(prompts, 1, seed=seed))
        return replace(self.factor * vectors, task=task.name)


# --- docs: end


def test_a_custom_method_goes_through_an_experiment(llama: Twins, tmp_path: Path) -> None:
    methods = [tv.Extraction(substitutes=1), ScaledExtraction(factor=3.0)]
    actual = tv.run_experiment(llama.bridge, [LETTERS], methods=methods, folder=tmp_path / "run", **SMALL)
    assert [result.method for result in actual.results] == ["extract", "scaled"]
    one, other = (actual.vectors[f"upper, {name}"] for name in ("extract", "scaled"))
    torch.testing.assert_close(other.values, 3 * one.values)
    assert actual.summary()["method"].tolist() == ["extract", "scaled"]
    assert set(actual.to_pandas()["method"]) == {"extract", "scaled"}
    assert actual.settings["methods"]["scaled"] == {"factor": 3.0}
    again = tv.run_experiment(llama.bridge, [LETTERS], methods=methods, folder=tmp_path / "run", **SMALL)
    assert again == actual
    actual.save(tmp_path / "e.json")
    assert tv.Experiment.load(tmp_path / "e.json") == actual
    actual.report(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "upper, scaled" in text
    assert "own[&#39;scaled&#39;],  # a custom method, {&#39;factor&#39;: 3.0}" in text
    methods[1] = ScaledExtraction(factor=4.0)
    with pytest.raises(tv.TvLensError, match="other settings .*methods was"):
        tv.run_experiment(llama.bridge, [LETTERS], methods=methods, folder=tmp_path / "run", **SMALL)


def test_a_method_must_return_vectors_of_the_task(llama: Twins) -> None:
    @dataclass(frozen=True)
    class Misnamed(tv.Extraction):
        name: ClassVar[str] = "misnamed"

        def __call__(self, *args: Any) -> TaskVectors:
            return 3.0 * super().__call__(*args)

    with pytest.raises(tv.TvLensError, match="misnamed returned vectors of '3.0 . upper' for the task 'upper'"):
        tv.run_experiment(llama.bridge, [LETTERS], methods=[Misnamed(substitutes=1)], **SMALL)


# --- docs: control
@dataclass(frozen=True)
class Reversed(Control):
    """The task's own vector, turned around."""

    name: ClassVar[str] = "reversed"

    def __call__(self, treatment: Treatment) -> TaskVectors:
        return -treatment.vectors


# --- docs: end


def test_a_custom_control_is_a_column(llama: Twins) -> None:
    controls = [tv.RandomDirection(), Reversed()]
    actual = tv.run_experiment(llama.bridge, [LETTERS], controls=controls, **SMALL)
    [result] = actual.results
    assert list(result.evaluation.controls) == ["random", "reversed"]
    assert actual.settings["controls"] == ("random", "reversed")
    alone = tv.sweep_layers(
        llama.bridge,
        LETTERS.split(0.5, seed=0)[1],
        LETTERS.split(0.5, seed=0)[1].sample(4, shots=2, seed=0),
        -actual.vectors["upper"],
        [result.sweep.best],
        max_new_tokens=2,
    )
    assert result.evaluation.controls["reversed"] == alone.scores[0]


# --- docs: rule
ignore_case = tv.Rule("ignore case", lambda prediction, answer: prediction.lower() == answer.lower())
# --- docs: end


def test_a_custom_rule_scores_and_is_named(llama: Twins, tmp_path: Path) -> None:
    task = Task("upper", LETTERS.inputs, str.upper, accepts=ignore_case)
    assert tv.score(task, [Prompt((), "a", "A"), Prompt((), "b", "B")], ["a", "x"]).correct == (True, False)
    actual = tv.run_experiment(llama.bridge, [task], folder=tmp_path / "run", **SMALL)
    assert actual.settings["rules"] == {"upper": "ignore case"}


# --- docs: format
@dataclass(frozen=True)
class Dialogue(PromptFormat):
    """Demonstrations as the turns of a conversation."""

    asks: str = "User: "
    answers: str = "Bot: "

    def segments(self, examples: Sequence[Example], query: str) -> list[Segment]:
        turns = [
            Segment(text, role)  # type: ignore[arg-type]
            for example in examples
            for text, role in (
                (self.asks, "template"),
                (example.input, "input"),
                ("\n" + self.answers, "separator"),
                (example.output, "output"),
                ("\n", "boundary"),
            )
        ]
        last = Segment("\n" + self.answers.rstrip(), "separator")
        return [*turns, Segment(self.asks, "template"), Segment(query, "query"), last]

    def cut(self, text: str) -> str:
        return text.split("\n")[0].strip()

    @property
    def stop(self) -> str:
        return "\n"


# --- docs: end


def test_a_custom_format_is_used_and_saved(llama: Twins, tmp_path: Path) -> None:
    prompts = LETTERS.sample(3, shots=2, seed=0, template=Dialogue())
    assert prompts[0].text.startswith("User: ")
    assert prompts[0].text.endswith("\nBot:")
    assert prompts[0].zero_shot().text == f"User: {prompts[0].query}\nBot:"
    vectors = tv.extract(llama.bridge, prompts, LETTERS.substitutes(prompts, 1, seed=0), positions="separators")
    vectors.save(tmp_path / "v.safetensors")
    assert TaskVectors.load(tmp_path / "v.safetensors").template == Dialogue()
    actual = tv.run_experiment(llama.bridge, [LETTERS], template=Dialogue(asks="Q: "), folder=tmp_path / "run", **SMALL)
    assert actual.settings.format == Dialogue(asks="Q: ")
    assert actual.results[0].test_prompts[0].startswith("Q: ")
    again = tv.run_experiment(llama.bridge, [LETTERS], template=Dialogue(asks="Q: "), folder=tmp_path / "run", **SMALL)
    assert again == actual
    roles = tv.show_tokens(llama.bridge, prompts[0], positions="separators")
    assert sum(roles.edited) == 3


def test_an_unknown_format_says_what_to_import(tmp_path: Path) -> None:
    vectors = TaskVectors(torch.ones(1, 2, 3), "m", "t", template=Dialogue())
    vectors.save(tmp_path / "v.safetensors")
    content = (tmp_path / "v.safetensors").read_bytes()
    (tmp_path / "v.safetensors").write_bytes(content.replace(b"Dialogue", b"Dialogua"))
    with pytest.raises(tv.TvLensError, match="'Dialogua' is not known; import the module that defines it"):
        TaskVectors.load(tmp_path / "v.safetensors")


# --- docs: reader
@reader(".psv")
def pairs_between_bars(text: str) -> list[tuple[str, Any]]:
    return [(f"line {i}", line.split("|")) for i, line in enumerate(text.splitlines(), start=1)]


# --- docs: end


def test_a_custom_reader_reads_its_files(tmp_path: Path) -> None:
    (tmp_path / "t.psv").write_text("hot|cold\nbig|small\n")
    assert Task.from_file(tmp_path / "t.psv").inputs == ("hot", "big")
    (tmp_path / "t.psv").write_text("hot|cold\nbig\n")
    with pytest.raises(tv.TvLensError, match="t.psv, line 2: .'big'. is not a pair"):
        Task.from_file(tmp_path / "t.psv")
    (tmp_path / "t.psv").write_text("1|hot|cold\n2|big|small\n")
    assert Task.from_file(tmp_path / "t.psv", input=1, output=2).inputs == ("hot", "big")


# --- docs: figure
@plot.register
def draw_a_score(score: tv.Score) -> go.Figure:
    return go.Figure(go.Bar(x=["correct"], y=[score.accuracy]))


# --- docs: end


def test_a_custom_figure_is_drawn() -> None:
    assert plot(tv.Score(("a",), ("a",), (True,))).data[0].y == (1.0,)
    with pytest.raises(tv.UnsupportedError, match="no figure for a int; register one"):
        plot(3)
