"""The command lines of the README and of the pages run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from transformer_lens.model_bridge import TransformerBridge

import tv_lens as tv
from tv_lens.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The arguments of each command line, in order: in a console block after "$", or in the text as code."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^\$ tv-lens (.*)$|`tv-lens ([^`]+)`", text, re.M)
    return [shlex.split(one or other, comments=True) for one, other in lines]


COMMANDS = {page.name: commands(page) for page in PAGES if commands(page)}

# Added to a command line, so that it is quick; of an option that is given twice the last one counts.
FEWER = {
    "run": "--shots 2 --n-dev 2 --n-test 2 --max-new-tokens 1 --layers 9,17,21",
    "compare": "--shots 2 --n-train 2 --n-dev 2 --n-test 2 --max-new-tokens 1 --layers 9,17,21 --seeds 0 --strengths 1",
    "extract": "--shots 2 --prompts 2",
    "sweep": "--shots 2 --prompts 2 --max-new-tokens 1",
    "conflict": "--shots 2 --prompts 2 --max-new-tokens 1",
    "generate": "--max-new-tokens 2",
    "heads": "--shots 2 --prompts 2",
    "learn": "--shots 1 --prompts 4 --epochs 1",
}
METHODS = {"learn": "learn:epochs=1,layers=17"}
PLACEHOLDERS = {"COMMAND": "run"}

# A process in which every model is a tiny random one, with as many layers as the commands name.
RUNNER = """
import contextlib, json, os, sys
sys.path.insert(0, sys.argv[1])
import tv_lens as tv
from models import make_tokenizer, make_twins
from tv_lens.cli import main
from tv_lens.engines import booting

tokenizer = make_tokenizer()
tokenizer.chat_template = "{% for each in messages %}<s>{{ each.role }}: {{ each.content }}</s>{% endfor %}<s>bot: "
model = make_twins("llama", tokenizer, num_hidden_layers=22, max_position_embeddings=4096).bridge
tv.demo_model = lambda: model
booting.boot = lambda name, **options: model
for folder, args in json.load(sys.stdin):
    os.chdir(folder)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            main(args)
        except SystemExit as end:
            code = end.code
    print(code, file=sys.stdout, flush=True)
"""


def quick(args: list[str]) -> list[str]:
    """A command line with fewer prompts and steps."""
    args = [args[0], *(METHODS.get(each, each) for each in args[1:])]
    args = [PLACEHOLDERS.get(each, each) for each in args]
    if len(args) == 1 and args[0] in FEWER:  # the name of a command
        return [*args, "--help"]
    if {"--help", "--version"} & set(args):
        return args
    all_tasks = args[0] == "run" and not any(each in tv.library() or each.endswith(".csv") for each in args)
    return [*args, *FEWER.get(args[0], "").split(), *(["--category", "bijection"] if all_tasks else [])]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 6
    named = {args[0] for page in COMMANDS.values() for args in page}
    assert named >= {"compare", "conflict", "extract", "generate", "heads", "learn", "report", "run", "sweep", "tokens"}


@pytest.mark.slow
def test_every_command_line_of_the_pages_runs(tmp_path: Path) -> None:
    """Once each, in order, on a tiny random model, with fewer prompts. They make the files that they name."""
    jobs = []
    for page, lines in COMMANDS.items():
        folder = tmp_path / page
        folder.mkdir()
        for name in ("pairs.csv", "my_pairs.csv", "words.csv"):
            rows = [f"{a}{b},{(a + b).upper()}" for a in "abcdef" for b in "uvwx"]
            (folder / name).write_text("\n".join(["english,german", *rows]) + "\n")
        if page == "library.md":  # which shows a report of results that it does not make
            jobs.append((folder, quick(["run", "antonyms", "--demo", "--save", "results.json"])))
        jobs += [(folder, quick(args)) for args in lines]
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, str(ROOT / "tests")],
        input=json.dumps([(str(folder), args) for folder, args in jobs]),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    codes = run.stdout.split()
    failed = [shlex.join(args) for (_, args), code in zip(jobs, codes, strict=False) if code not in ("0", "None")]
    assert not failed, run.stderr
    assert len(codes) == len(jobs), run.stderr
    written = ("--to", "--save", "--report", "--plot", "--vector")
    for folder, args in jobs:
        for option, value in pairwise(args):
            assert option not in written or (folder / value).is_file(), args


def test_the_answers_on_the_page_are_those_of_the_demo_model(
    demo: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The vector gives the words on the page, and makes no other answer; what the model says without it may differ."""
    monkeypatch.setattr(tv, "demo_model", lambda: demo)
    monkeypatch.chdir(tmp_path)
    wanted = [args for args in COMMANDS["command_line.md"] if "gerund.safetensors" in args and args[0] != "sweep"]
    assert [args[0] for args in wanted[:2]] == ["extract", "generate"]
    for args in wanted[:2]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*args, "--quiet"])
        assert not ended.value.code
    page = (ROOT / "docs" / "command_line.md").read_text(encoding="utf-8")
    shown = re.search(r"^```text generated\n(.*?)^```$", page, re.M | re.S)[1]  # type: ignore[index]
    answers = [line.split()[:2] for line in shown.splitlines()[2:]]
    assert answers == [["sing", "singing"], ["dance", "dancing"]]
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.strip()][-2:] == answers
