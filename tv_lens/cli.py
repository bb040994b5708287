"""The command line, `tv-lens`: the library's functions on library tasks or files of pairs.

Results go to standard output, as a table or with `--json`; progress and messages go to standard error. It ends
with 0, with 2 where the command is wrong, with 1 and one line where the work cannot be done, or with 130 after Ctrl-C.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import tv_lens as tv  # which imports torch and TransformerLens only when a command needs them

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    name="tv-lens",
    help="Task vectors of language models: read them, find their layer, write them back, with the evidence.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelName = Annotated[
    str | None, typer.Option("--model", "-m", help="A model's name on the Hugging Face hub, or its folder.")
]
Demo = Annotated[bool, typer.Option("--demo", help="Use the small demo model, which needs no hub.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; the best there is by default.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Rows in a pass; by default as many as a budget allows.")]
Shots = Annotated[int, typer.Option(min=1, help="Demonstrations in a prompt.")]
Count = Annotated[int, typer.Option("--prompts", "-n", min=1, help="How many prompts.")]
Substitutes = Annotated[int, typer.Option(min=1, help="Substitute queries for each prompt.")]
Across = Annotated[bool, typer.Option("--across", help="Average over other prompts instead of substitute queries.")]
Seed = Annotated[int, typer.Option(help="Draws tasks' prompts, splits and controls.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer, in tokens.")]
FirstToken = Annotated[bool, typer.Option("--first-token", help="Score by the answer's first token alone.")]
Example = Annotated[str, typer.Option("--template", help="How a demonstration is written.")]
Rule = Annotated[str, typer.Option(help="When an answer is right: starts_with or exact_match.")]
Separator = Annotated[str, typer.Option(help=r"What stands between demonstrations; \n is a line end.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A library task, or a .json or .csv file of pairs.")]


class Mistake(ValueError):
    """A wrong command: told in one line, with exit code 2."""


_PAPER = "example:{input}->{output}"


@app.command()
def tasks(
    category: Annotated[str | None, typer.Option(help="Only this category.")] = None, as_json: Json = False
) -> None:
    """List the library's tasks."""
    found = _in_category(category)
    rows = [
        {
            "task": task.name,
            "category": task.category,
            "inputs": len(task),
            "example": f"{task.inputs[0]} -> {task.answer(task.inputs[0])}",
        }
        for task in found
    ]
    _show(rows, rows, as_json)


@app.command()
def run(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[TASK]...", help="Library tasks or files of pairs; all by default.")
    ] = None,
    model: ModelName = None,
    demo: Demo = False,
    category: Annotated[str | None, typer.Option(help="All library tasks of this category.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Keep each finished task here, and go on from there after an interrupt.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write everything as .json, or the tidy table as .parquet.")] = None,
    shots: Shots = 5,
    n_dev: Annotated[int, typer.Option(min=1, help="Prompts that choose the layer.")] = 50,
    n_test: Annotated[int, typer.Option(min=1, help="Prompts that are reported on.")] = 50,
    seed: Seed = 0,
    substitutes: Substitutes = 2,
    across: Across = False,
    max_new_tokens: NewTokens = 8,
    first_token: FirstToken = False,
    rule: Rule = "starts_with",
    template: Example = _PAPER,
    separator: Separator = r"\n",
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the whole experiment on tasks: zero-shot, few-shot and patched accuracy, and controls."""
    if names and category is not None:
        raise Mistake("give tasks or --category, not both")
    chosen = _ruled(_tasks(names) if names else _in_category(category), rule)
    if save is not None:
        _writable(save, (".json", ".parquet"))
    written = _template(template, separator)
    experiment = tv.run_experiment(
        _engine(model, demo, device, dtype, batch_size, quiet),
        chosen,
        shots=shots,
        n_dev=n_dev,
        n_test=n_test,
        seed=seed,
        substitutes=substitutes,
        across=across,
        template=written,
        max_new_tokens=1 if first_token else max_new_tokens,
        folder=folder,
    )
    if save is not None:
        experiment.save(save)
    told = experiment.settings
    _show(
        experiment.summary(),
        {"settings": told, "results": _records(experiment.to_pandas())},
        as_json,
        f"{told['model']}, {told['shots']} shots, {told['scoring']} by {'first_token' if first_token else rule}, seed "
        f"{told['seed']}\naccuracy [exact 95% interval]; p: McNemar's exact test, patched against zero-shot",
    )


@app.command()
def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="What `tv-lens run --save` wrote, .json.")],
    to: Annotated[Path, typer.Option("--to", "-o", help="The page to write, .html.")],
    as_json: Json = False,
) -> None:
    """Make a page of an experiment: a table that sorts, figures, every task's answers. It needs no network to read."""
    _writable(to, (".html",))
    experiment = tv.Experiment.load(results)
    experiment.report(to)
    row = {"file": str(to), "model": experiment.settings["model"], "tasks": len(experiment.results)}
    _show([row], row, as_json)


@app.command()
def extract(
    task: TaskName,
    to: Annotated[Path, typer.Option("--to", "-o", help="The file to write, .safetensors.")],
    model: ModelName = None,
    demo: Demo = False,
    prompts: Count = 20,
    shots: Shots = 5,
    seed: Seed = 0,
    substitutes: Substitutes = 2,
    across: Across = False,
    template: Example = _PAPER,
    separator: Separator = r"\n",
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read a task's vectors, one a prompt and layer, and save them with their provenance."""
    [of] = _tasks([task])
    _writable(to, (".safetensors",))
    asked = of.sample(prompts, shots=shots, seed=seed, template=_template(template, separator))
    vectors = _extract(_engine(model, demo, device, dtype, batch_size, quiet), of, asked, substitutes, across, seed)
    vectors.save(to)
    row = {
        "file": str(to),
        "model": vectors.model,
        "task": vectors.task,
        "prompts": len(vectors),
        "layers": vectors.n_layers,
        "d_model": vectors.d_model,
        "method": vectors.method,
    }
    _show([row], row, as_json)


@app.command()
def sweep(
    task: TaskName,
    model: ModelName = None,
    demo: Demo = False,
    vectors: Annotated[
        Path | None, typer.Option(help="Vectors from `tv-lens extract`; by default read from the same prompts.")
    ] = None,
    prompts: Count = 20,
    shots: Shots = 5,
    seed: Seed = 0,
    substitutes: Substitutes = 2,
    across: Across = False,
    max_new_tokens: NewTokens = 8,
    first_token: FirstToken = False,
    rule: Rule = "starts_with",
    template: Example = _PAPER,
    separator: Separator = r"\n",
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a task's mean vector at every layer. For a number to report use `tv-lens run`, which holds prompts out."""
    [of] = _ruled(_tasks([task]), rule)
    loaded = None if vectors is None else tv.TaskVectors.load(vectors)
    written = _template(template, separator)
    asked = of.sample(prompts, shots=shots, seed=seed, template=written)
    engine = _engine(model, demo, device, dtype, batch_size, quiet)
    if loaded is None:
        loaded = _extract(engine, of, asked, substitutes, across, seed)
    if first_token:
        of, max_new_tokens = replace(of, accepts=tv.first_token(engine, written)), 1
    found = tv.sweep_layers(engine, of, asked, loaded.mean(), max_new_tokens=max_new_tokens)
    _show(
        found.to_pandas(),
        {"task": of.name, "best": found.best, "ties": found.ties, "layers": _records(found.to_pandas())},
        as_json,
        f"{engine.name}, {of.name}, {len(asked)} prompts; best layer {found.best}: {found.at(found.best)}",
    )


@app.command()
def generate(
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="What to answer, without demonstrations.")],
    vectors: Annotated[Path, typer.Option("--vectors", help="Vectors from `tv-lens extract`; their mean is used.")],
    layer: Annotated[int, typer.Option("--layer", "-l", help="Where to write them: the output of this block.")],
    model: ModelName = None,
    demo: Demo = False,
    max_new_tokens: NewTokens = 8,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer queries with a saved task vector written in, and without, in the template it was read with."""
    mean = tv.TaskVectors.load(vectors).mean()
    template = mean.template or tv.PAPER
    asked = [tv.Prompt((), query, template=template) for query in queries]
    engine = _engine(model, demo, device, dtype, batch_size, quiet)
    patched = tv.patch_generate(engine, asked, mean, layer, max_new_tokens=max_new_tokens)
    zero_shot = tv.generate(engine, asked, max_new_tokens=max_new_tokens)
    rows = [
        {"query": query, "patched": answer, "zero-shot": plain}
        for query, answer, plain in zip(queries, patched, zero_shot, strict=True)
    ]
    _show(rows, rows, as_json, f"{mean.task} of {mean.model}, layer {layer}")


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process; a user's mistake is one line, a fault of ours a traceback."""
    try:
        app(args)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, ImportError, tv.DemoModelError)):
            raise
        print("tv-lens: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, Mistake) else 1)
    sys.exit(0)


def _engine(
    model: str | None, demo: bool, device: str | None, dtype: str, batch_size: int | None, quiet: bool
) -> tv.LocalEngine:
    if demo == (model is not None):
        raise Mistake("say which model: --model NAME, or --demo")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise Mistake(f"dtype {dtype!r} is not float32, bfloat16 or float16")
    if demo and (device not in (None, "cpu") or dtype != "float32"):
        raise Mistake("the demo model runs in float32 on the CPU; leave --device and --dtype out")

    import torch
    from transformer_lens.model_bridge import TransformerBridge

    if model is None:
        bridge = tv.demo_model()
    else:
        try:
            bridge = TransformerBridge.boot_transformers(model, device=device, dtype=getattr(torch, dtype))
        except Exception as error:  # of any library on the way, for any reason
            raise ValueError(f"cannot load the model {model!r}: {error}") from error
    return tv.LocalEngine(bridge, batch_size=batch_size, progress=not quiet)


def _tasks(names: Sequence[str]) -> list[tv.Task]:
    known = tv.library()
    found = []
    for name in names:
        if name in known:
            found.append(known[name])
        elif Path(name).suffix.lower() in (".json", ".csv"):
            found.append(tv.Task.from_file(name))
        else:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {close[0]}? " if close else ""
            raise Mistake(f"no task {name!r}; {meant}`tv-lens tasks` lists them; a file ends in .json or .csv")
    return found


def _ruled(tasks: Sequence[tv.Task], rule: str) -> list[tv.Task]:
    rules = {"starts_with": tv.starts_with, "exact_match": tv.exact_match}
    if rule not in rules:
        raise Mistake(f"rule {rule!r} is not {' or '.join(rules)}")
    return [replace(task, accepts=rules[rule]) for task in tasks]


def _in_category(category: str | None) -> list[tv.Task]:
    known = tv.library().values()
    found = [task for task in known if category in (None, task.category)]
    if not found:
        names = ", ".join(sorted({task.category for task in known}))
        raise Mistake(f"no category {category!r}; there are {names}")
    return found


def _template(example: str, separator: str) -> tv.Template:
    return tv.Template(example, separator.replace(r"\n", "\n").replace(r"\t", "\t"))


def _extract(
    engine: tv.LocalEngine, task: tv.Task, prompts: Sequence[tv.Prompt], substitutes: int, across: bool, seed: int
) -> tv.TaskVectors:
    if across:
        return tv.extract_across(engine, prompts)
    return tv.extract(engine, prompts, task.substitutes(prompts, substitutes, seed=seed))


def _writable(path: Path, kinds: Sequence[str]) -> None:
    """Refuses a file that could not be written, before an hour of work rather than after."""
    if path.suffix not in kinds:
        raise Mistake(f"{path}: the file's name must end in {' or '.join(kinds)}")
    if not path.parent.is_dir():
        raise Mistake(f"{path}: there is no folder {path.parent}")


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records"))  # type: ignore[no-any-return]


def _show(table: pd.DataFrame | list[dict[str, Any]], data: Any, as_json: bool, title: str | None = None) -> None:
    if as_json:
        print(json.dumps(data, ensure_ascii=False, indent=1))
        return

    import pandas as pd
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = pd.DataFrame(table)
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in rows:
        drawn.add_column(str(name), justify="right" if pd.api.types.is_numeric_dtype(rows[name]) else "left")
    for row in rows.itertuples(index=False):
        drawn.add_row(*(Text(f"{cell:.2f}" if isinstance(cell, float) else str(cell)) for cell in row))
    if title is not None:
        print(title)
    # As wide as it is: rich would break the cells of a wide table into several lines.
    Console(width=10_000).print(drawn)
