"""The command line, in this process, on a tiny model in a folder; in a new process if that matters."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from models import Twins, make_tokenizer, make_twins

import tv_lens as tv
from tv_lens.cli import main

SMALL = ["--shots", "2", "--n-dev", "4", "--n-test", "4", "--max-new-tokens", "2", "--quiet"]


class Tiny(NamedTuple):
    folder: str
    twins: Twins


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A random model, saved as Hugging Face saves one, and a file of pairs."""
    folder, twins = tmp_path_factory.mktemp("tiny"), make_twins("llama")
    twins.plain.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Tiny(str(folder), twins)


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "upper.json"
    path.write_text(json.dumps({f"{a}{b}": f"{a}{b}".upper() for a in "abcdef" for b in "uvwx"}))
    return str(path)


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(args)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def as_json(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    code, out, err = call(capsys, *args, "--json")
    assert code == 0, err
    return json.loads(out)


def test_tasks_lists_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    listed = as_json(capsys, "tasks")
    assert [each["task"] for each in listed] == list(tv.library())
    assert listed[0] == {"task": "next_letter", "category": "algorithmic", "inputs": 50, "example": "a -> b"}
    code, out, _ = call(capsys, "tasks", "--category", "knowledge")
    assert code == 0
    assert out.count("knowledge") == 4
    assert "linguistic" not in out


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"tv-lens {tv.__version__}\n", "")


def test_run_is_run_experiment(capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path) -> None:
    saved, page = str(tmp_path / "out.json"), tmp_path / "out.html"
    options = ["--seed", "3", "--save", saved, "--report", str(page)]
    actual = as_json(capsys, "run", "to_upper", pairs, "--model", tiny.folder, *SMALL, *options)
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    tasks = [tv.library()["to_upper"], tv.Task.from_file(pairs, accepts=tv.starts_with)]
    expected = tv.run_experiment(tiny.twins.bridge, tasks, shots=2, n_dev=4, n_test=4, max_new_tokens=2, seed=3)
    table = expected.to_pandas()
    assert [row["accuracy"] for row in actual["results"]] == table["accuracy"].tolist()
    assert [row["condition"] for row in actual["results"]] == table["condition"].tolist()
    assert actual["settings"]["seed"] == 3
    assert tv.Experiment.load(saved).results == expected.results


def test_run_takes_layers_strengths_and_training_prompts(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path
) -> None:
    saved = str(tmp_path / "out.json")
    methods = ["--method", "extract:substitutes=1", "--method", "extract:substitutes=3", "--method", "mean_state"]
    tried = ["--n-train", "3", "--layers", "0-3:2,1", "--strengths", "0.5,2"]
    actual = as_json(capsys, "run", pairs, "--model", tiny.folder, *SMALL, *methods, *tried, "--save", saved)
    assert list(actual["settings"]["methods"]) == ["extract:substitutes=1", "extract:substitutes=3", "mean_state"]
    expected = tv.run_experiment(
        tiny.twins.bridge,
        [tv.Task.from_file(pairs, accepts=tv.starts_with)],
        shots=2,
        n_train=3,
        n_dev=4,
        n_test=4,
        max_new_tokens=2,
        layers=[0, 2, 1],
        strengths=[0.5, 2.0],
        methods={
            "extract:substitutes=1": tv.Extraction(substitutes=1),
            "extract:substitutes=3": tv.Extraction(substitutes=3),
            "mean_state": tv.MeanState(),
        },
    )
    assert tv.Experiment.load(saved).results == expected.results
    assert actual["settings"]["layers"] == [0, 2, 1]


COMPARED = ["--n-train", "3", "--seeds", "0,2", "--layers", "1,3", "--strengths", "1,3"]


@pytest.mark.slow
def test_compare_is_compare(capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path) -> None:
    saved, page, folder = (str(tmp_path / name) for name in ("c.json", "c.html", "kept"))
    methods = ["--method", "mean_state", "--method", "linear_vector:penalty=2.5"]
    asked = ["compare", pairs, "to_upper", "--model", tiny.folder, *SMALL, *COMPARED, *methods, "--folder", folder]
    actual = as_json(capsys, *asked, "--save", saved, "--report", page)
    expected = tv.compare(
        tiny.twins.bridge,
        [tv.Task.from_file(pairs, accepts=tv.starts_with), tv.library()["to_upper"]],
        [tv.MeanState(), tv.LinearVector(penalty=2.5)],
        shots=2,
        n_train=3,
        n_dev=4,
        n_test=4,
        seeds=(0, 2),
        layers=[1, 3],
        strengths=[1.0, 3.0],
        max_new_tokens=2,
    )
    loaded = tv.Comparison.load(saved)
    assert [each.results for each in loaded.experiments] == [each.results for each in expected.experiments]
    assert actual["seeds"] == [0, 2]
    assert [row["method"] for row in actual["by_method"]] == ["mean_state", "linear_vector"]
    assert [row["accuracy"] for row in actual["estimates"]] == expected.estimates()["accuracy"].tolist()
    assert {each.name for each in Path(folder).iterdir()} == {"seed-0", "seed-2"}

    # The same command reads what is kept, and another one makes the same page from the file.
    kept = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
    code, out, _ = call(capsys, *asked)
    assert code == 0
    assert {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")} == kept
    again = str(tmp_path / "again.html")
    made = as_json(capsys, "report", saved, "--to", again)
    assert (made["file"], made["tasks"], made["methods"]) == (again, 2, 2)
    assert Path(again).read_text(encoding="utf-8") == Path(page).read_text(encoding="utf-8")

    lines = out.splitlines()
    assert "2 shots, full answer by starts_with, seeds 0, 2" in lines[0]
    for wanted in ("difference from mean_state", "better than every control in", "p difference", "p controls", "Holm"):
        assert wanted in out
    for text in expected.summary()["accuracy"]:
        assert text in out
    assert not {"nan", "NaN", "<NA>", "None"} & set(out.split())


def test_compare_has_default_methods(capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str) -> None:
    few = ["--seeds", "0", "--layers", "1", "--strengths", "1", "--n-train", "3"]
    actual = as_json(capsys, "compare", pairs, "--model", tiny.folder, *SMALL, *few)
    methods = actual["settings"]["methods"]
    assert list(methods) == ["extract", "mean_state", "function_vector", "state_vectors", "linear_vector"]
    assert (methods["function_vector"]["heads"], methods["function_vector"]["preselect"]) == (40, 60)


def test_a_comparison_that_needs_plotly_says_so_before_the_work(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    code, _, err = call(capsys, "compare", pairs, "--model", tiny.folder, "--report", "x.html")
    assert (code, 'pip install "tv_lens[plots]"' in err) == (1, True)


def test_a_table_shows_intervals_and_says_what_was_scored(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str
) -> None:
    code, out, _ = call(capsys, "run", pairs, "--model", tiny.folder, *SMALL)
    assert code == 0
    assert "2 shots, full answer by starts_with, seed 0" in out
    assert "0.00 [0.00, 0.60]" in out  # 0 of 4
    for explained in ("p controls: the exact one-sided test", "Holm: the same", "p zero-shot: McNemar's exact test"):
        assert explained in out
    assert all(name in out for name in ("zero-shot", "few-shot", "patched", "random", "shuffled"))
    assert max(map(len, out.splitlines())) > 100  # not broken to fit a narrow window
    code, out, _ = call(capsys, "run", pairs, "--model", tiny.folder, *SMALL, "--rule", "exact_match", "--across")
    assert (code, "full answer by exact_match" in out) == (0, True)
    code, out, _ = call(capsys, "run", pairs, "--model", tiny.folder, *SMALL, "--first-token")
    assert (code, "first token by first_token" in out) == (0, True)


def test_extract_sweep_and_generate_go_through_a_file(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path
) -> None:
    file = str(tmp_path / "v.safetensors")
    drawn = ["--prompts", "5", "--shots", "2", "--seed", "4", "--model", tiny.folder, "--quiet"]
    summary = as_json(capsys, "extract", pairs, "--to", file, *drawn, "--template", "{input} = {output}")
    assert (summary["prompts"], summary["layers"], summary["d_model"]) == (5, 4, 32)

    task = tv.Task.from_file(pairs, accepts=tv.starts_with)
    prompts = task.sample(5, shots=2, seed=4, template=tv.Template("{input} = {output}"))
    vectors = tv.extract(tiny.twins.bridge, prompts, task.substitutes(prompts, 2, seed=4))
    loaded = tv.TaskVectors.load(file)
    assert (loaded.values - vectors.values).abs().max() < 1e-5
    assert loaded.prompts == vectors.prompts

    swept = as_json(capsys, "sweep", pairs, "--vectors", file, *drawn, "--template", "{input} = {output}")
    expected = tv.sweep_layers(tiny.twins.bridge, task, prompts, vectors.mean())
    assert [row["accuracy"] for row in swept["layers"]] == [score.accuracy for score in expected.scores]
    assert (swept["best"], swept["ties"]) == (expected.best, list(expected.ties))
    again = as_json(capsys, "sweep", pairs, *drawn, "--template", "{input} = {output}")
    assert again == swept
    code, out, _ = call(capsys, "sweep", pairs, *drawn, "--first-token")
    assert (code, f"best layer {expected.best}" in out) == (0, True)

    answered = as_json(capsys, "generate", "zz", "[b]", "--vectors", file, "--layer", "2", "--model", tiny.folder)
    asked = [tv.Prompt((), query, template=tv.Template("{input} = {output}")) for query in ("zz", "[b]")]
    patched = tv.patch_generate(tiny.twins.bridge, asked, vectors.mean(), 2)
    plain = tv.generate(tiny.twins.bridge, asked)
    assert answered == [
        {"query": query, "patched": with_vector, "zero-shot": without}
        for query, with_vector, without in zip(("zz", "[b]"), patched, plain, strict=True)
    ]
    code, out, _ = call(capsys, "generate", "[b]", "--vectors", file, "--layer", "2", "--model", tiny.folder)
    assert "[b]" in out  # as text, not as a style


def test_a_mistake_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path
) -> None:
    (tmp_path / "bad.csv").write_text("a,b\nc\n")
    (tmp_path / "v.safetensors").write_bytes(b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    model, file = ["--model", tiny.folder], str(tmp_path / "v.safetensors")
    for args, code, message in (
        (["run", "antonym", *model], 2, "no task 'antonym'; did you mean antonyms?"),
        (["run", "antonyms"], 2, "say which model: --model NAME, or --demo"),
        (["run", "antonyms", "--demo", *model], 2, "say which model"),
        (["run", "antonyms", "--category", "knowledge", *model], 2, "not both"),
        (["run", "antonyms", "--save", "x.xlsx", *model], 2, "must end in .json or .parquet"),
        (["run", "antonyms", "--save", str(tmp_path / "none" / "x.json"), *model], 2, "there is no folder"),
        (["run", "antonyms", "--rule", "fuzzy", *model], 2, "is not starts_with or exact_match"),
        (["run", "antonyms", "--dtype", "int8", *model], 2, "dtype 'int8'"),
        (["run", "antonyms", "--folder", str(tmp_path / "full"), *model], 1, "not empty and holds no experiment"),
        (["run", "antonyms", "--shots", "70", *model], 1, "70 shots and a query need 71"),
        (["run", "antonyms", "--template", "{input}", *model], 1, "{output} 0 times"),
        (["run", str(tmp_path / "bad.csv"), *model], 1, "bad.csv, line 2"),
        (["run", str(tmp_path / "none.csv"), *model], 1, "none.csv"),
        (["tasks", "--category", "x"], 2, "there are algorithmic, bijection, knowledge"),
        (["sweep", "antonyms", "--model", str(tmp_path)], 1, f"cannot load the model '{tmp_path}'"),
        (["extract", "antonyms", "--to", "x.pt", *model], 2, "must end in .safetensors"),
        (["generate", "x", "--vectors", file, "--layer", "2", *model], 1, "not a safetensors file"),
        (["generate", "x", "--vectors", "none", "--layer", "2", *model], 1, "no such file"),
    ):
        actual, out, err = call(capsys, *args)
        assert (actual, out) == (code, ""), (args, err)
        assert message in err
        ours = [line for line in err.splitlines() if line.startswith("tv-lens: ")]
        assert len(ours) == 1
        assert "Traceback" not in err
    for args in (["nonsense"], ["run", "--nonsense"], ["run", "--shots", "many"], ["extract"]):
        assert call(capsys, *args)[0] == 2


def test_a_bug_in_the_package_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AttributeError("ours")

    monkeypatch.setattr(tv, "library", fail, raising=False)
    with pytest.raises(AttributeError):
        main(["tasks"])


def test_a_value_error_of_another_library_is_not_hidden_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ValueError("of some library")

    monkeypatch.setattr(tv, "library", fail, raising=False)
    with pytest.raises(ValueError, match="of some library"):
        main(["tasks"])


def test_models_that_would_change_the_environment_are_refused_before_they_are_booted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens runs pip for a multimodal model; an adapter alone gives an obscure error."""
    from transformer_lens.model_bridge import TransformerBridge

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the model was booted")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", refuse)
    (tmp_path / "vision").mkdir()
    config = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "vision_config": {"hidden_size": 8},
    }
    (tmp_path / "vision" / "config.json").write_text(json.dumps(config))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder, message in (
        (
            "vision",
            "is a multimodal model (it has a vision_config), for which TransformerLens would install torchvision",
        ),
        ("adapter", "holds a PEFT adapter, not a model; merge it with model.merge_and_unload()"),
        ("nothing", "cannot load the model"),
    ):
        code, out, err = call(capsys, "sweep", "antonyms", "--model", str(tmp_path / folder))
        assert (code, out) == (1, "")
        assert message in err


def process(*args: str, **options: Any) -> subprocess.Popen[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **options}
    command = [sys.executable, "-m", "tv_lens", *args]
    return subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell ignores Ctrl-C, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; sys.argv = ['tv-lens', {!r}]\nfrom tv_lens.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    )
    code += "print({{'torch', 'transformer_lens', 'pandas'}} & set(sys.modules), file=sys.stderr)"
    for asked, shown in (("--help", "sweep"), ("tasks", "antonyms")):
        run = subprocess.run([sys.executable, "-c", code.format(asked)], capture_output=True, text=True, check=True)
        assert shown in run.stdout
        assert run.stderr.strip() == ("set()" if asked == "--help" else "{'pandas'}")


BLOCKED = """
import sys
for name in ("torch", "transformers", "transformer_lens"):
    sys.modules[name] = None  # an import of it fails
from tv_lens.cli import main
"""


def test_mistakes_are_reported_without_torch(tmp_path: Path, pairs: str) -> None:
    """In a process in which torch, transformers and transformer_lens cannot be imported."""
    three = tmp_path / "three.csv"
    three.write_text("id,object,room\n1,kettle,kitchen\n")
    (tmp_path / "v.safetensors").write_bytes(b"x")
    (tmp_path / "e.json").write_text("{}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    file = str(tmp_path / "v.safetensors")
    mistakes = [
        (["sweep", "nosuch.csv", "--demo"], 1, "nosuch.csv"),
        (["run", "nosuch.csv", "--demo"], 1, "nosuch.csv"),
        (["extract", "nosuch.csv", "--demo", "--to", file], 1, "nosuch.csv"),
        (["run", "antonym", "--demo"], 2, "did you mean antonyms?"),
        (["run", "antonyms"], 2, "say which model"),
        (["run", "antonyms", "--demo", "--rule", "fuzzy"], 2, "rule 'fuzzy'"),
        (["run", "antonyms", "--demo", "--template", "{input}"], 1, "{output} 0 times"),
        (["run", "antonyms", "--demo", "--shots", "70"], 1, "70 shots and a query need 71"),
        (["run", "antonyms", "antonyms", "--demo"], 2, "two tasks are named 'antonyms'"),
        (["run", "antonyms", "--demo", "--folder", str(tmp_path / "full")], 1, "holds no experiment"),
        (["run", "antonyms", "--demo", "--folder", file], 2, "is not a folder"),
        (["sweep", "antonyms", "--model", "./nosuch"], 1, "there is no such folder"),
        (["sweep", "antonyms", "--model", "x", "--device", "gpu"], 2, "device 'gpu' is not one of cpu, cuda"),
        (["sweep", "antonyms", "--demo", "--device", "cuda"], 2, "the demo model runs in float32 on the CPU"),
        (["sweep", "antonyms", "--demo", "--under", "train"], 2, "name a file, or leave them out"),
        (["sweep", "antonyms", "--demo", "-n", "200"], 1, "200 prompts need 200 different queries"),
        (["sweep", "antonyms", "--demo", "--substitutes", "99"], 1, "99 substitutes are asked for"),
        (["sweep", "antonyms", "--demo", "--vectors", file], 1, "not a safetensors file"),
        (["sweep", "antonyms", "--demo", "--vectors", "nosuch"], 1, "no such file"),
        (["sweep", str(three), "--demo"], 1, "the columns are 0 'id', 1 'object', 2 'room'"),
        (["sweep", str(three), "--demo", "--input", "object", "--output", "place"], 1, "no column 'place'"),
        (["sweep", pairs, "--demo", "--under", "a.b"], 1, "there is no part 'a.b'"),
        (["sweep", pairs, "--demo", "--header"], 1, "header= is for tables"),
        (["generate", "x", "--demo", "--vectors", file, "--layer", "2"], 1, "not a safetensors file"),
        (["generate", "x", "--vectors", file, "--layer", "2"], 2, "say which model"),
        (["report", str(tmp_path / "e.json"), "--to", str(tmp_path / "x.html")], 1, "not a saved experiment"),
        (["compare", "antonym", "--demo"], 2, "did you mean antonyms?"),
        (["compare", "antonyms"], 2, "say which model"),
        (["compare", "antonyms", "--demo", "--method", "extract"], 2, "nothing to be compared with"),
        (["compare", "antonyms", "--demo", *["--method", "extract:substitutes=1"] * 2], 2, "is given twice"),
        (["compare", "antonyms", "--demo", "--method", "lern", "--method", "learn"], 2, "did you mean learn?"),
        (["compare", "antonyms", "--demo", "--seeds", "0,0"], 2, "--seeds 0,0: give each number once"),
        (["compare", "antonyms", "--demo", "--seeds", "-1"], 2, "--seeds -1: give numbers"),
        (["compare", "antonyms", "--demo", "--layers", "9-5"], 2, "such as 3,9,15 or 0-28:2"),
        (["compare", "antonyms", "--demo", "--layers", "0-99999999"], 2, "more than 10000 numbers"),
        (["compare", "antonyms", "--demo", "--strengths", "1,0"], 2, "--strengths 1,0: give positive numbers"),
        (["compare", "antonyms", "--demo", "--strengths", "nan"], 2, "--strengths nan: give positive numbers"),
        (["compare", "antonyms", "--demo", "--report", "x.pdf"], 2, "must end in .html"),
        (["compare", "antonyms", "--demo", "--save", "x.csv"], 2, "must end in .json or .parquet"),
        (["compare", "antonyms", "--demo", "--folder", str(tmp_path / "full")], 1, "holds no comparison"),
        (["compare", "antonyms", "--demo", "--folder", file], 2, "is not a folder"),
        (["compare", "antonyms", "--demo", "--shots", "70"], 1, "70 shots and a query need 71"),
        (["run", "antonyms", "--demo", "--layers", "a"], 2, "--layers a: give numbers"),
        (["run", "antonyms", "--demo", "--strengths", "2,x"], 2, "--strengths 2,x: give positive numbers"),
        (["report", "nosuch.json", "--to", str(tmp_path / "x.html")], 1, "nosuch.json"),
        (["report", str(tmp_path / "full"), "--to", str(tmp_path / "x.html")], 1, "keeps with --folder"),
        (["conflict", "antonyms", "antonym", "--demo"], 2, "did you mean antonyms?"),
        (["conflict", "antonyms", "next_letter", "--demo"], 1, "too few inputs in common"),
        (["conflict", "antonyms", "antonyms", "--demo"], 2, "two tasks are named 'antonyms'"),
        (["conflict", "antonyms", "to_upper", "--demo", "--plot", "x.pdf"], 2, "must end in .html"),
        (["tokens", "nosuch", "--demo", "--layer", "2"], 1, "no such file"),
        (["tokens", file, "--demo", "--layer", "2"], 1, "not a safetensors file"),
        (["tokens", file, "--layer", "2"], 2, "say which model"),
    ]
    code = BLOCKED + (
        f"for args in {[args for args, _, _ in mistakes]!r}:\n"
        "    try: main(args)\n"
        "    except SystemExit as end: print(end.code, file=sys.stderr)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    reported = run.stderr.splitlines()
    assert len(reported) == 2 * len(mistakes), run.stderr
    for (args, expected, message), line, end in zip(mistakes, reported[::2], reported[1::2], strict=True):
        assert line.startswith("tv-lens: "), (args, line)
        assert message in line, (args, line)
        assert int(end) == expected, args
    # A command without a mistake imports torch, and fails here.
    fine = subprocess.run(
        [sys.executable, "-c", BLOCKED + "main(['sweep', 'antonyms', '--demo'])"], capture_output=True, text=True
    )
    assert "torch" in fine.stderr


def test_files_are_read_with_options_and_warnings_are_one_line(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path
) -> None:
    rows = [f"{i},{a}{b},{f'{a}{b}'.upper()}" for i, (a, b) in enumerate((a, b) for a in "abcdef" for b in "uv")]
    (tmp_path / "t.csv").write_text("\n".join(["id,small,large", *rows, rows[0]]) + "\n")
    table = ["--input", "small", "--output", "large"]
    drawn = ["--prompts", "3", "--shots", "2", "--model", tiny.folder, "--quiet"]
    code, out, err = call(capsys, "sweep", str(tmp_path / "t.csv"), *table, *drawn, "--json")
    assert code == 0, err
    assert [line for line in err.splitlines() if "t.csv" in line] == [
        f"tv-lens: warning: {tmp_path / 't.csv'}: 1 exact repeat is dropped"
    ]
    with pytest.warns(tv.TvLensWarning):
        task = tv.Task.from_file(tmp_path / "t.csv", input="small", output="large")
    prompts = task.sample(3, shots=2, seed=0)
    vectors = tv.extract(tiny.twins.bridge, prompts, task.substitutes(prompts, 2, seed=0))
    expected = tv.sweep_layers(tiny.twins.bridge, task, prompts, vectors.mean())
    assert json.loads(out)["ties"] == list(expected.ties)

    parts = {"train": {f"{a}{b}": f"{a}{b}".upper() for a in "abcdef" for b in "uvwx"}, "test": {"x": "X"}}
    (tmp_path / "t.json").write_text(json.dumps(parts))
    (tmp_path / "plain.csv").write_text("".join(f"{text},{answer}\n" for text, answer in parts["train"].items()))
    args = [str(tmp_path / "t.json"), "--under", "train", "--model", tiny.folder, *SMALL]
    assert len(as_json(capsys, "run", *args)["results"]) >= 3
    file = str(tmp_path / "v.safetensors")
    code, _, err = call(capsys, "extract", str(tmp_path / "plain.csv"), "--no-header", *drawn, "--to", file)
    assert (code, "plain.csv" in err) == (0, False)
    assert tv.TaskVectors.load(file).task == "plain"
    code, _, err = call(capsys, "extract", str(tmp_path / "plain.csv"), *drawn, "--to", file)
    assert (code, "the first row ('au', 'AU') is read as data" in err) == (0, True)


@pytest.mark.slow
def test_a_killed_run_resumes_and_hash_seeds_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    names = [name for name, task in tv.library().items() if task.category in ("algorithmic", "translation")]
    args = ["run", *names, "--model", tiny.folder, *SMALL, "--json"]
    killed = process(*args, "--folder", str(folder), PYTHONHASHSEED="1")
    deadline = time.monotonic() + 200
    while killed.poll() is None and len(list(folder.glob("task-*.json"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("task-*.json")}
    assert 2 <= len(kept) < len(names)

    went_on = process(*args, "--folder", str(folder), PYTHONHASHSEED="2")
    fresh = process(*args, PYTHONHASHSEED="3")
    (first, err), (second, _) = went_on.communicate(), fresh.communicate()
    assert (went_on.returncode, fresh.returncode) == (0, 0), err
    assert json.loads(first) == json.loads(second)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not run again
    assert len(list(folder.glob("task-*.json"))) == len(names)


@pytest.mark.slow
def test_an_interrupted_run_exits_with_130_and_resumes(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    names = [name for name, task in tv.library().items() if task.category == "algorithmic"]
    args = ["run", *names, "--model", tiny.folder, *SMALL]
    stopped = process(*args, "--folder", str(folder))
    deadline = time.monotonic() + 200
    while stopped.poll() is None and len(list(folder.glob("task-*.json"))) < 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    stopped.send_signal(signal.SIGINT)
    out, err = stopped.communicate()
    assert (stopped.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    assert f"tv-lens: interrupted; the same command resumes from {folder}" in err
    kept = sorted(folder.iterdir())
    assert {path.suffix for path in kept} == {".json", ".safetensors"}
    for path in kept:
        if path.suffix == ".safetensors":
            tv.TaskVectors.load(path)
        else:
            json.loads(path.read_bytes())
    assert 1 <= len(list(folder.glob("task-*.json"))) < len(names)
    assert as_json(capsys, *args, "--folder", str(folder)) == as_json(capsys, *args)


@pytest.mark.slow
def test_a_folder_is_extended_and_reported(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path
) -> None:
    folder, page = str(tmp_path / "run"), tmp_path / "page.html"
    small = ["--model", tiny.folder, *SMALL, "--layers", "1", "--max-new-tokens", "1"]
    as_json(capsys, "run", pairs, *small, "--folder", folder)
    kept = {path: path.stat().st_mtime_ns for path in Path(folder).glob("*.safetensors")}
    methods = ["--method", "extract", "--method", "mean_state"]
    actual = as_json(capsys, "run", pairs, "to_upper", *small, *methods, "--folder", folder)
    assert [len(actual["settings"][name]) for name in ("tasks", "methods")] == [2, 2]
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in Path(folder).glob("*.safetensors")}.items()
    code, _, err = call(capsys, "run", "to_upper", *small, *methods, "--folder", folder)
    assert (code, "name the existing ones as well" in err) == (1, True)
    code, _, err = call(capsys, "run", pairs, "to_upper", *small, *methods, "--folder", folder, "--seed", "1")
    assert (code, "seed was 0, is 1" in err) == (1, True)

    made = as_json(capsys, "report", folder, "--to", str(page))
    assert (made["tasks"], made["methods"], made["unfinished"]) == (2, 2, [])
    assert "mean_state" in page.read_text(encoding="utf-8")
    for path in Path(folder).glob("*to_upper*.json"):
        path.unlink()
    code, out, err = call(capsys, "report", folder, "--to", str(page))
    assert code == 0, err
    assert "tasks: upper\nnot finished yet: to_upper\n" in out
    code, _, err = call(capsys, "report", str(tmp_path), "--to", str(page))
    assert (code, "not a folder that" in err) == (1, True)


def test_a_conflict_is_conflict(capsys: pytest.CaptureFixture[str], tiny: Tiny, tmp_path: Path) -> None:
    words = [f"{a}{b}" for a in "abcdef" for b in "uvwx"]
    (tmp_path / "upper.json").write_text(json.dumps({word: word.upper() for word in words}))
    (tmp_path / "twice.json").write_text(json.dumps({word: word * 2 for word in words}))
    (tmp_path / "others.json").write_text(json.dumps({word * 3: word for word in words}))
    upper, twice, others = (str(tmp_path / f"{name}.json") for name in ("upper", "twice", "others"))
    plot, file = tmp_path / "p.html", str(tmp_path / "v.safetensors")
    drawn = ["--prompts", "5", "--shots", "2", "--max-new-tokens", "2", "--model", tiny.folder, "--quiet"]
    actual = as_json(capsys, "conflict", upper, twice, *drawn, "--plot", str(plot))
    task, rival = (tv.Task.from_file(path, accepts=tv.starts_with) for path in (upper, twice))
    dev, test = rival.split(0.5, seed=0)
    prompts = dev.sample(5, shots=2, seed=0)
    vectors = tv.extract(tiny.twins.bridge, prompts, dev.substitutes(prompts, 2, seed=0))
    layer = tv.sweep_layers(tiny.twins.bridge, dev, prompts, vectors.mean(), max_new_tokens=2).best
    asked = [each for each in task.sample(len(task), shots=2, seed=0) if each.query in test.inputs][:5]
    clash = tv.conflict(tiny.twins.bridge, task, rival, asked, vectors.mean(), layer, max_new_tokens=2)
    assert (actual["layer"], actual["rival"]) == (layer, "twice")
    assert [row["accuracy"] for row in actual["results"]] == clash.to_pandas()["accuracy"].tolist()
    assert "Plotly" in plot.read_text(encoding="utf-8")
    as_json(capsys, "extract", twice, *drawn[:4], *drawn[6:], "--to", file)
    again = as_json(capsys, "conflict", upper, twice, *drawn, "--vectors", file, "--layer", "3")
    assert again["layer"] == 3
    code, out, _ = call(capsys, "conflict", upper, twice, *drawn, "--vectors", file, "--layer", "1")
    assert (code, "with the vector of twice" in out, "the vector of twice at layer 1" in out) == (0, True, True)
    code, _, err = call(capsys, "conflict", upper, others, *drawn)
    assert (code, "too few inputs in common" in err, err.count("\n")) == (1, True, 1)
    code, _, err = call(capsys, "conflict", upper, twice, *drawn, "--vectors", file, "--method", "learn")
    assert (code, "leave --method out" in err) == (2, True)


def test_tokens_are_top_tokens(capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path) -> None:
    plot, file = tmp_path / "p.html", str(tmp_path / "v.safetensors")
    task = tv.Task.from_file(pairs)
    prompts = task.sample(3, shots=2, seed=0)
    vectors = tv.extract(tiny.twins.bridge, prompts, task.substitutes(prompts, 1, seed=0))
    vectors.save(file)
    asked = ["tokens", file, "--layer", "2", "--top", "4", "--model", tiny.folder, "--quiet"]
    actual = as_json(capsys, *asked, "--plot", str(plot))
    expected = tv.top_tokens(tiny.twins.bridge, vectors.mean(), 2, k=4)
    assert [row["token"] for row in actual["tokens"]] == list(expected.tokens[0])
    assert [row["probability"] for row in actual["tokens"]] == pytest.approx(expected.probabilities[0], abs=1e-6)
    assert "Plotly" in plot.read_text(encoding="utf-8")
    code, out, _ = call(capsys, *asked)
    assert code == 0
    assert all(repr(token) in out for token in expected.tokens[0])
    code, _, err = call(capsys, "tokens", file, "--layer", "9", "--model", tiny.folder, "--quiet")
    assert (code, "layer" in err, err.count("\n")) == (1, True, 1)
    code, _, err = call(capsys, "tokens", "none.safetensors", "--layer", "1", "--demo")
    assert (code, "no such file" in err) == (1, True)


def test_a_narrow_terminal_gets_short_lines(
    capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    drawn = ["--prompts", "4", "--shots", "2", "--max-new-tokens", "1", "--model", tiny.folder, "--quiet"]
    for args, wanted in (
        (["tasks", "--category", "bijection"], "  category  bijection"),
        (["sweep", pairs, *drawn], "best"),
    ):
        code, out, _ = call(capsys, *args)
        lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
        assert (code, max(map(len, lines)) <= 40) == (0, True), out
        assert any(wanted in line for line in lines), out


def test_heads_are_head_effects(capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.{kind}") for name, kind in (("save", "safetensors"), ("plot", "html"))}
    files["vector"] = str(tmp_path / "v.safetensors")
    written = [text for name, path in files.items() for text in (f"--{name}", path)]
    drawn = ["--prompts", "4", "--shots", "3", "--seed", "2", "--model", tiny.folder, "--quiet", "--top", "3"]
    actual = as_json(capsys, "heads", pairs, *drawn, *written)
    task = tv.Task.from_file(pairs)
    prompts = task.sample(4, shots=3, seed=2)
    read = tv.read_heads(tiny.twins.bridge, prompts)
    effects = tv.head_effects(tiny.twins.bridge, prompts, read, seeds=[2])
    assert actual["top_heads"] == [list(head) for head in effects.top(3)]
    assert [row["effect"] for row in actual["heads"]] == pytest.approx([effects.at(head) for head in effects.top(3)])
    assert actual["diagnosis"] == list(effects.diagnosis)
    assert (tv.HeadEffects.load(files["save"]).values - effects.values).abs().max() < 1e-5
    vector = tv.function_vector(tiny.twins.bridge, read, effects.top(3))
    assert (tv.TaskVectors.load(files["vector"]).values - vector.values).abs().max() < 1e-4
    assert "heatmap" in Path(files["plot"]).read_text(encoding="utf-8")
    code, out, _ = call(capsys, "heads", pairs, *drawn, "--attribution", "--log-probability")
    assert (code, "change of log-probability" in out, "attribution" in out, "\nnote: " in out) == (0, True, True, True)
    code, _, err = call(capsys, "heads", pairs, *drawn, "--save", str(tmp_path / "x.json"))
    assert (code, ".safetensors" in err) == (2, True)


def test_learn_is_learn(capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path) -> None:
    file, plot, training = (str(tmp_path / name) for name in ("v.safetensors", "c.html", "t.safetensors"))
    options = ["--model", tiny.folder, "--prompts", "6", "--shots", "1", "--layers", "1,3", "--epochs", "2", "--quiet"]
    actual = as_json(capsys, "learn", pairs, "--to", file, *options, "--plot", plot, "--resume", training)
    task = tv.Task.from_file(pairs)
    expected = tv.learn(tiny.twins.bridge, task.sample(6, shots=1, seed=0), layers=[1, 3], epochs=2)
    assert actual["best_layers"] == list(expected.best_layers)
    assert (tv.TaskVectors.load(file).values - expected.vectors.values).abs().max() < 1e-4
    assert "validation accuracy" in Path(plot).read_text(encoding="utf-8")
    again = as_json(capsys, "learn", pairs, "--to", file, *options, "--resume", training)  # nothing is left to do
    assert again == actual
    code, out, _ = call(capsys, "learn", pairs, "--to", file, *options, "--how", "overwrite", "--start", file)
    assert (code, "best layer" in out, "validation_loss" in out) == (0, True, True)
    assert tv.TaskVectors.load(file).op == "set"


def test_methods_are_chosen_by_name(capsys: pytest.CaptureFixture[str], tiny: Tiny, pairs: str, tmp_path: Path) -> None:
    file = str(tmp_path / "v.safetensors")
    drawn = [pairs, "--model", tiny.folder, "--shots", "2", "--quiet"]
    few = [*drawn, "--prompts", "4"]
    compared = ["--method", "linear_vector:penalty=2.5", "--method", "learn:epochs=1,layers=[1],keep=null"]
    actual = as_json(capsys, "run", *drawn, "--n-dev", "4", "--n-test", "4", "--max-new-tokens", "2", *compared)
    methods = actual["settings"]["methods"]
    assert list(methods) == ["linear_vector", "learn"]
    assert (methods["linear_vector"]["penalty"], methods["learn"]["layers"], methods["learn"]["keep"]) == (
        2.5,
        [1],
        None,
    )
    made = as_json(capsys, "extract", *few, "--to", file, "--method", "extract:site=attn_out")
    assert (made["method"], tv.TaskVectors.load(file).site) == ("extract", tv.ATTN_OUT)
    swept = as_json(capsys, "sweep", *few, "--method", "learn:layers=[0,2],epochs=1,how=overwrite")
    assert {row["layer"] for row in swept["layers"]} < {0, 2}  # the layer with the best validation
    code, out, _ = call(capsys, "extract", *few, "--to", file, "--method", "state_vectors")
    assert (code, "state_vectors" in out) == (0, True)


def test_the_options_of_a_method_are_json_lists_or_text() -> None:
    from tv_lens.cli.checks import chosen_method

    for text, options in (
        ("learn:layers=9,17,21,epochs=2", {"layers": [9, 17, 21], "epochs": 2}),
        ("learn:layers=[9,17],how=overwrite,keep=null", {"layers": [9, 17], "how": "overwrite", "keep": None}),
        ("function_vector:measure=log-probability,heads=40", {"measure": "log-probability", "heads": 40}),
        ("extract:site=a,b", {"site": "a,b"}),
    ):
        assert chosen_method(text, across=False).options == options


def test_every_method_has_a_name_on_the_command_line() -> None:
    from tv_lens.cli.checks import METHODS
    from tv_lens.methods import base

    own = {name for name, kind in base.METHODS.items() if kind.__module__.startswith("tv_lens.")}
    assert set(METHODS) == own
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["sweep", "--method", "lern"], "no method 'lern'; did you mean learn?"),
        (["sweep", "--method", "learn", "--across"], "--across is the method extract_across"),
        (["sweep", "--method", "learn:epochs"], "'epochs' is not option=value"),
        (["sweep", "--method", "learn:epoch=1"], "learn has no option 'epoch'; it has objective, layers"),
        (["sweep", "--method", "learn:keep=0"], "keep is 0"),
        (["learn", "--to", "v.safetensors", "--layers", "a"], "--layers a: give numbers"),
        (["learn", "--to", "v.safetensors", "--objective", "speed"], "use answer or few-shot"),
        (["sweep", "--method", "learn:epochs=many"], "epochs=many"),
        (["sweep", "--method", "linear_vector:penalty=much"], "are not options that it takes"),
        (["sweep", "--method", "learn:how=subtract"], "how is subtract"),
        (["learn", "--to", "v.safetensors", "--resume", "v.safetensors"], "are both v.safetensors"),
        (["learn", "--to", "v.bin"], "must end in .safetensors"),
    ],
)
def test_mistakes_about_methods_are_one_line(
    capsys: pytest.CaptureFixture[str],
    tiny: Tiny,
    pairs: str,
    options: list[str],
    message: str,
    as_users_run_it: None,
) -> None:
    command, *rest = options
    code, _, err = call(capsys, command, pairs, "--model", tiny.folder, "--shots", "1", "--prompts", "4", *rest)
    assert (code, message in err, err.count("\n")) == (2, True, 1), err
