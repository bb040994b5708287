"""The command line, `tv-lens`: the library's functions on library tasks or files of pairs.

Results go to standard output, as a table or with `--json`; progress and messages go to standard error.
Exit codes: 0 success, 1 the work failed (one-line message), 2 usage error, 130 interrupted.
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
    help="Task vectors of language models: read them, find their layer, write them back, with evidence.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelName = Annotated[
    str | None, typer.Option("--model", "-m", help="A model's name on the Hugging Face hub, or its folder.")
]
Demo = Annotated[bool, typer.Option("--demo", help="Use the small demo model, which needs no hub.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default the best one available.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Rows in a pass; by default as many as a budget allows.")]
Shots = Annotated[int, typer.Option(min=1, help="Demonstrations in a prompt.")]
Count = Annotated[int, typer.Option("--prompts", "-n", min=1, help="How many prompts.")]
Substitutes = Annotated[int, typer.Option(min=1, help="Substitute queries for each prompt.")]
Across = Annotated[bool, typer.Option("--across", help="Average over other prompts instead of substitute queries.")]
Seed = Annotated[int, typer.Option(help="Seed for prompts, splits and controls.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer, in tokens.")]
FirstToken = Annotated[bool, typer.Option("--first-token", help="Score by the answer's first token alone.")]
TemplateText = Annotated[str, typer.Option("--template", help="How a demonstration is written.")]
RuleName = Annotated[str, typer.Option("--rule", help="When an answer is correct: starts_with or exact_match.")]
Separator = Annotated[str, typer.Option(help=r"The text between demonstrations; \n is a line end.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
TaskName = Annotated[str, typer.Argument(metavar="TASK", help="A library task, or a .json or .csv file of pairs.")]


class UsageError(tv.TvLensError):
    """A wrong command: reported in one line, with exit code 2."""


# `tv.PAPER`, the default everywhere; importing `tv_lens.prompts` does not import torch.
_TEMPLATE = tv.PAPER.example


@app.command()
def tasks(
    category: Annotated[str | None, typer.Option(help="Only this category.")] = None, as_json: Json = False
) -> None:
    """List the library's tasks."""
    rows = [
        {
            "task": task.name,
            "category": task.category,
            "inputs": len(task),
            "example": f"{task.inputs[0]} -> {task.answer(task.inputs[0])}",
        }
        for task in _in_category(category)
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
        Path | None, typer.Option(help="Keep each finished task here, and resume from it after an interrupt.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write everything as .json, or the tidy table as .parquet.")] = None,
    shots: Shots = 5,
    n_dev: Annotated[int, typer.Option(min=1, help="Prompts that choose the layer.")] = 50,
    n_test: Annotated[int, typer.Option(min=1, help="Prompts that are reported.")] = 50,
    seed: Seed = 0,
    substitutes: Substitutes = 2,
    across: Across = False,
    max_new_tokens: NewTokens = 8,
    first_token: FirstToken = False,
    rule: RuleName = "starts_with",
    template: TemplateText = _TEMPLATE,
    separator: Separator = r"\n",
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the whole experiment on tasks: zero-shot, few-shot and patched accuracy, and controls."""
    if names and category is not None:
        raise UsageError("give tasks or --category, not both")
    chosen = _with_rule([_task(name) for name in names] if names else _in_category(category), rule)
    if save is not None:
        _writable(save, (".json", ".parquet"))
    written = _template(template, separator)
    experiment = tv.run_experiment(
        _engine(model, demo=demo, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet),
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
    settings = experiment.settings
    _show(
        experiment.summary(),
        {"settings": settings, "results": _records(experiment.to_pandas())},
        as_json,
        f"{settings.model}, {settings.shots} shots, {settings.scoring} by {'first_token' if first_token else rule}, "
        f"seed {settings.seed}\naccuracy [exact 95% interval]; p: McNemar's exact test, patched against zero-shot",
    )


@app.command()
def report(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="What `tv-lens run --save` wrote, .json.")],
    to: Annotated[Path, typer.Option("--to", "-o", help="The page to write, .html.")],
    as_json: Json = False,
) -> None:
    """Make an HTML page of an experiment: a sortable table, figures and every task's answers. It works offline."""
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
    template: TemplateText = _TEMPLATE,
    separator: Separator = r"\n",
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read a task's vectors, one per prompt and layer, and save them with their provenance."""
    chosen = _task(task)
    _writable(to, (".safetensors",))
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=_template(template, separator))
    engine = _engine(model, demo=demo, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    vectors = _method(substitutes, across)(engine, chosen, asked, seed)
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
    rule: RuleName = "starts_with",
    template: TemplateText = _TEMPLATE,
    separator: Separator = r"\n",
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a task's mean vector at every layer. For a number to report use `tv-lens run`, which holds prompts out."""
    [chosen] = _with_rule([_task(task)], rule)
    loaded = None if vectors is None else tv.TaskVectors.load(vectors)
    written = _template(template, separator)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=written)
    engine = _engine(model, demo=demo, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    if loaded is None:
        loaded = _method(substitutes, across)(engine, chosen, asked, seed)
    if first_token:
        chosen, max_new_tokens = replace(chosen, accepts=tv.first_token(engine, written, chosen)), 1
    result = tv.sweep_layers(engine, chosen, asked, loaded.mean(), max_new_tokens=max_new_tokens)
    _show(
        result.to_pandas(),
        {"task": chosen.name, "best": result.best, "ties": result.ties, "layers": _records(result.to_pandas())},
        as_json,
        f"{engine.name}, {chosen.name}, {len(asked)} prompts; best layer {result.best}: {result.at(result.best)}",
    )


@app.command()
def heads(
    task: TaskName,
    model: ModelName = None,
    demo: Demo = False,
    prompts: Count = 25,
    shots: Annotated[int, typer.Option(min=2, help="Demonstrations in a prompt.")] = 10,
    seed: Seed = 0,
    top: Annotated[int, typer.Option(min=1, help="How many heads to show, and to make the function vector of.")] = 10,
    log_probability: Annotated[
        bool, typer.Option("--log-probability", help="Measure the change of log P(answer) instead of P(answer).")
    ] = False,
    attribution: Annotated[
        bool, typer.Option("--attribution", help="Estimate effects from one gradient per prompt: fast.")
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write all effects as .safetensors.")] = None,
    vector: Annotated[Path | None, typer.Option(help="Write the function vector as .safetensors.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a heat map of all heads as .html.")] = None,
    template: TemplateText = _TEMPLATE,
    separator: Separator = r"\n",
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show which attention heads carry a task: the effect of each on prompts with permuted outputs."""
    chosen = _task(task)
    for path, kind in ((save, ".safetensors"), (vector, ".safetensors"), (plot, ".html")):
        if path is not None:
            _writable(path, (kind,))
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=_template(template, separator))
    engine = _engine(model, demo=demo, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    read = tv.read_heads(engine, asked)
    effects = tv.head_effects(
        engine,
        asked,
        read,
        measure="log-probability" if log_probability else "probability",
        how="attribution" if attribution else "exact",
        seeds=[seed],
    )
    best = effects.top(min(top, len(effects.heads)))
    if save is not None:
        effects.save(save)
    if vector is not None:
        tv.function_vector(engine, read, best).save(vector)
    if plot is not None:
        effects.plot(mark=top).write_html(plot, include_plotlyjs=True)
    table = effects.to_pandas().head(top)
    data = {
        "task": chosen.name,
        "model": engine.name,
        "measure": effects.measure,
        "how": effects.how,
        "prompts": len(effects),
        "diagnosis": effects.diagnosis,
        "top_heads": [list(head) for head in best],
        "heads": _records(table),
    }
    notes = "".join(f"\nnote: {text}" for text in effects.diagnosis)
    _show(
        table.assign(**{name: [f"{value:+.4f}" for value in table[name]] for name in ("effect", "low", "high")}),
        data,
        as_json,
        f"{effects!r}\nchange of {effects.measure}, 95% interval over prompts; significant: with all heads{notes}",
    )


@app.command()
def generate(
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="What to answer, without demonstrations.")],
    vectors: Annotated[Path, typer.Option("--vectors", help="Vectors from `tv-lens extract`; their mean is used.")],
    layer: Annotated[int, typer.Option("--layer", "-l", help="The layer to write them to: the output of this block.")],
    model: ModelName = None,
    demo: Demo = False,
    max_new_tokens: NewTokens = 8,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Answer queries with and without a saved task vector, in the template it was read with."""
    mean = tv.TaskVectors.load(vectors).mean()
    template = mean.template or tv.PAPER
    asked = [tv.Prompt((), query, template=template) for query in queries]
    engine = _engine(model, demo=demo, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    patched = tv.patch_generate(engine, asked, mean, layer, max_new_tokens=max_new_tokens)
    zero_shot = tv.generate(engine, asked, max_new_tokens=max_new_tokens)
    rows = [
        {"query": query, "patched": answer, "zero-shot": plain}
        for query, answer, plain in zip(queries, patched, zero_shot, strict=True)
    ]
    _show(rows, rows, as_json, f"{mean.task} of {mean.model}, layer {layer}")


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process. A user's mistake is one line, a bug is a traceback."""
    try:
        app(args)
    except (tv.TvLensError, OSError, ImportError) as error:
        print("tv-lens: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    sys.exit(0)


def _engine(
    model: str | None, *, demo: bool, device: str | None, dtype: str, batch_size: int | None, quiet: bool
) -> tv.LocalEngine:
    if demo == (model is not None):
        raise UsageError("say which model: --model NAME, or --demo")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype {dtype!r} is not float32, bfloat16 or float16")
    if demo and (device not in (None, "cpu") or dtype != "float32"):
        raise UsageError("the demo model runs in float32 on the CPU; leave --device and --dtype out")

    import torch

    from tv_lens.engines.booting import boot

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    bridge = tv.demo_model() if model is None else boot(model, device=device, dtype=dtypes[dtype])
    return tv.LocalEngine(bridge, batch_size=batch_size, progress=not quiet)


def _method(substitutes: int, across: bool) -> tv.Method:
    return tv.AcrossPrompts() if across else tv.Extraction(substitutes=substitutes)


def _task(name: str) -> tv.Task:
    known = tv.library()
    if name in known:
        return known[name]
    if Path(name).suffix:
        return tv.Task.from_file(name)
    close = difflib.get_close_matches(name, known, n=1)
    suggestion = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"no task {name!r}; {suggestion}`tv-lens tasks` lists them; a file ends in .json or .csv")


def _with_rule(tasks: Sequence[tv.Task], rule: str) -> list[tv.Task]:
    rules = {"starts_with": tv.starts_with, "exact_match": tv.exact_match}
    if rule not in rules:
        raise UsageError(f"rule {rule!r} is not {' or '.join(rules)}")
    return [replace(task, accepts=rules[rule]) for task in tasks]


def _in_category(category: str | None) -> list[tv.Task]:
    known = tv.library().values()
    chosen = [task for task in known if category in (None, task.category)]
    if not chosen:
        names = ", ".join(sorted({task.category for task in known}))
        raise UsageError(f"no category {category!r}; there are {names}")
    return chosen


def _template(example: str, separator: str) -> tv.Template:
    return tv.Template(example, separator.replace(r"\n", "\n").replace(r"\t", "\t"))


def _writable(path: Path, kinds: Sequence[str]) -> None:
    """Refuse a file that could not be written, before the work and not after it."""
    if path.suffix not in kinds:
        raise UsageError(f"{path}: the file's name must end in {' or '.join(kinds)}")
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}")


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records"))  # type: ignore[no-any-return]


def _show(table: pd.DataFrame | list[dict[str, Any]], data: Any, as_json: bool, title: str | None = None) -> None:
    if as_json:
        from tv_lens.files import to_json

        print(to_json(data, indent=1).decode())
        return

    import pandas as pd
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = pd.DataFrame(table)
    table_to_print = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in rows:
        table_to_print.add_column(str(name), justify="right" if pd.api.types.is_numeric_dtype(rows[name]) else "left")
    for row in rows.itertuples(index=False):
        table_to_print.add_row(*(Text(f"{cell:.2f}" if isinstance(cell, float) else str(cell)) for cell in row))
    if title is not None:
        print(title)
    # At its full width: rich would break the cells of a wide table into several lines.
    Console(width=10_000).print(table_to_print)
