"""What the command line refuses before it imports torch: wrong options, tasks, files and folders."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tv_lens as tv
from tv_lens.tasks.readers import kinds

_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "mtia")
_DTYPES = ("float32", "bfloat16", "float16")
# Layers or seeds that one range gives at most.
_MOST_NUMBERS = 10_000


class UsageError(tv.TvLensError):
    """A wrong command: reported in one line, with exit code 2."""


# The methods of `tv_lens.methods`, whose import would load torch.
METHODS = (
    "extract",
    "extract_across",
    "function_vector",
    "in_context_vector",
    "learn",
    "learn_few_shot",
    "linear_vector",
    "mean_difference",
    "mean_state",
    "separator_vectors",
    "state_vectors",
)


class MethodChoice(NamedTuple):
    """A method's name and options, as `NAME:option=value,...` gives them."""

    name: str
    options: dict[str, Any]


class FileOptions(NamedTuple):
    """How files of pairs are read; `Task.from_file` explains them."""

    input: str | None
    output: str | None
    under: str | None
    header: bool | None


def chosen_task(name: str, options: FileOptions) -> tv.Task:
    """The library's task of this name, or the task in this file."""
    [task] = chosen_tasks([name], options)
    return task


def chosen_tasks(names: Sequence[str], options: FileOptions) -> list[tv.Task]:
    """The tasks with these names, each of the library or in a file, with different names."""
    known = tv.library()
    are_files = [name not in known and Path(name).suffix != "" for name in names]
    if not any(are_files) and any(each is not None for each in options):
        raise UsageError(
            "--input, --output, --under and --header say how a file is read; name a file, or leave them out"
        )
    tasks = []
    for name, is_file in zip(names, are_files, strict=True):
        if is_file:
            tasks.append(tv.Task.from_file(name, **options._asdict()))
        elif name in known:
            tasks.append(known[name])
        else:
            close = difflib.get_close_matches(name, known, n=1)
            suggestion = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"no task {name!r}; {suggestion}`tv-lens tasks` lists them; a file ends in {kinds()}")
    twice = [name for i, name in enumerate(each.name for each in tasks) if name in [t.name for t in tasks[:i]]]
    if twice:
        raise UsageError(f"two tasks are named {twice[0]!r}; name one, or rename a file")
    return tasks


def tasks_in(category: str | None) -> list[tv.Task]:
    """The library's tasks of a category, or all of them."""
    known = tv.library().values()
    chosen = [task for task in known if category in (None, task.category)]
    if not chosen:
        names = ", ".join(sorted({task.category for task in known}))
        raise UsageError(f"no category {category!r}; there are {names}")
    return chosen


def with_rule(tasks: Sequence[tv.Task], rule: str) -> list[tv.Task]:
    """The tasks, scored by the rule of this name."""
    rules = {"starts_with": tv.starts_with, "exact_match": tv.exact_match}
    if rule not in rules:
        raise UsageError(f"rule {rule!r} is not {' or '.join(rules)}")
    return [replace(task, accepts=rules[rule]) for task in tasks]


def chosen_method(text: str, *, across: bool) -> MethodChoice:
    """The method in `NAME` or `NAME:option=value,...`; values are JSON, lists such as 9,17, or text."""
    name, _, rest = text.partition(":")
    if across:
        raise UsageError("--across is the method extract_across; give --method or --across, not both")
    if name not in METHODS:
        close = difflib.get_close_matches(name, METHODS, n=1)
        suggestion = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"no method {name!r}; {suggestion}there are {', '.join(METHODS)}")
    options = {}
    for part in re.split(r",(?=\w+=)", rest) if rest else []:
        option, is_pair, value = part.partition("=")
        if not is_pair or not value:
            raise UsageError(f"--method {text}: {part!r} is not option=value, as in function_vector:heads=40")
        options[option] = _option_value(value)
    return MethodChoice(name, options)


def _option_value(text: str) -> Any:
    """JSON, a list of it without brackets, or text."""
    try:
        return json.loads(text)
    except ValueError:
        return _list_or_text(text)


def _list_or_text(text: str) -> Any:
    try:
        return json.loads(f"[{text}]") if "," in text else text
    except ValueError:
        return text


def chosen_methods(texts: Sequence[str], *, across: bool) -> dict[str, MethodChoice]:
    """The methods by the names that they have in tables: their own, or with their options if two are of one kind."""
    choices = [chosen_method(text, across=across) for text in texts]
    of_kind = [choice.name for choice in choices]
    names = [
        text if of_kind.count(choice.name) > 1 else choice.name for text, choice in zip(texts, choices, strict=True)
    ]
    twice = [name for i, name in enumerate(names) if name in names[:i]]
    if twice:
        raise UsageError(f"--method {twice[0]} is given twice")
    return dict(zip(names, choices, strict=True))


def check_model(model: str | None, *, demo: bool, device: str | None, dtype: str) -> None:
    """Refuse options that name no model, or that no model has."""
    if demo == (model is not None):
        raise UsageError("say which model: --model NAME, or --demo")
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {dtype!r} is not float32, bfloat16 or float16")
    kind, _, number = (device or "cpu").partition(":")
    if kind not in _DEVICES or (number and not number.isdecimal()):
        raise UsageError(f"device {device!r} is not one of {', '.join(_DEVICES)}, with a number such as cuda:1")
    if demo and (device not in (None, "cpu") or dtype != "float32"):
        raise UsageError("the demo model runs in float32 on the CPU; leave --device and --dtype out")
    if model is not None and model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
        raise tv.TvLensError(f"cannot load the model {model!r}: there is no such folder")


def check_chat(written: tv.Template, *, chat: bool, one_turn: bool, system: str | None) -> None:
    """Refuse options of conversations that would do nothing."""
    if not chat and (one_turn or system is not None):
        raise UsageError("--one-turn and --system are about conversations; add --chat, or leave them out")
    if chat and not one_turn and written != tv.PAPER:
        raise UsageError(
            "with --chat each demonstration is a separate turn, so --template and --separator do nothing; add "
            "--one-turn to write all demonstrations in one message, or leave them out"
        )


def check_writable(path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a file that could not be written, before the work and not after it."""
    if path.suffix not in suffixes:
        raise UsageError(f"{path}: the file's name must end in {' or '.join(suffixes)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")


def check_page(path: Path | None) -> None:
    """Refuse a page, if there is to be one, that could not be written or drawn, before the work and not after it."""
    if path is None:
        return
    check_writable(path, (".html",))
    try:
        import plotly  # noqa: F401 - whether it is there
    except ImportError as error:
        raise tv.MissingExtraError('a report needs Plotly; pip install "tv_lens[plots]"') from error


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers in "3,9,15", or in "0-28:2": from 0 to 28, every second."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::([1-9]\d*))?)?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"{option} {text}: give numbers with commas between them, such as 3,9,15 or 0-28:2")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last - first > _MOST_NUMBERS:
            raise UsageError(f"{option} {text}: these are more than {_MOST_NUMBERS} numbers")
        numbers += range(first, last + 1, step)
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"{option} {text}: give each number once")
    return numbers


def chosen_strengths(text: str) -> list[float]:
    """The strengths in "0.5,1,2": positive numbers, each once."""
    try:
        strengths = [float(part) for part in text.split(",")]
    except ValueError:
        strengths = []
    if not strengths or len(set(strengths)) < len(strengths) or not all(0 < each < math.inf for each in strengths):
        raise UsageError(f"--strengths {text}: give positive numbers with commas between them, such as 0.5,1,2")
    return strengths


def check_comparison_folder(folder: Path, seeds: Sequence[int]) -> None:
    """Refuse a folder that cannot keep a comparison of these seeds."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    if folder.is_dir() and any(re.fullmatch(r"seed--?\d+", each.name) is None for each in folder.iterdir()):
        raise tv.TvLensError(f"{folder} is not empty and holds no comparison; use another folder")
    for seed in seeds:
        check_folder(folder / f"seed-{seed}")


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot keep a run; whether a run in it has other settings shows later."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    others = [each for each in folder.iterdir() if each.suffix != ".partial"] if folder.is_dir() else []
    if others and not (folder / "settings.json").exists():
        raise tv.TvLensError(f"{folder} is not empty and holds no experiment; use another folder")


def check_vectors(path: Path) -> None:
    """Refuse a file that does not hold tensors."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise tv.TvLensError(f"{path}: no such file of task vectors")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise tv.TvLensError(f"{path}: not a safetensors file, or cut short ({error})") from error


def check_results(path: Path) -> bool:
    """Refuse a file, or a folder of a run, that does not hold results; whether a file holds those of a comparison."""
    from tv_lens.files import from_json, read_whole

    if path.is_dir():
        if not (path / "settings.json").is_file() and not list(path.glob("seed-*/settings.json")):
            raise tv.TvLensError(f"{path}: not a folder that `tv-lens run` or `compare` keeps with --folder")
        return False
    try:
        saved = from_json(read_whole(path))
    except tv.TvLensError as error:
        raise tv.TvLensError(f"{path}: not a saved experiment, or the file is corrupted ({error})") from error
    if not isinstance(saved, dict) or not ({"settings", "results"} <= set(saved) or "experiments" in saved):
        raise tv.TvLensError(f"{path}: not a saved experiment or comparison")
    return "experiments" in saved
