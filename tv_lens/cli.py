"""The command line, `tv-lens`: the library's functions on library tasks or files of pairs.

Results go to standard output, as a table or with `--json`; progress and messages go to standard error.
Exit codes: 0 success, 1 the work failed (one-line message), 2 usage error, 130 interrupted.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

import tv_lens as tv  # which imports torch and TransformerLens only when a command needs them
from tv_lens.cli_checks import (
    FileOptions,
    UsageError,
    check_chat,
    check_folder,
    check_model,
    check_results,
    check_sampling,
    check_vectors,
    check_writable,
    chosen_task,
    chosen_tasks,
    tasks_in,
    with_rule,
)

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
Chat = Annotated[bool, typer.Option("--chat", help="Write prompts as conversations, by the model's own chat template.")]
OneTurn = Annotated[bool, typer.Option("--one-turn", help="With --chat: all demonstrations in one message.")]
System = Annotated[str | None, typer.Option("--system", help="With --chat: the system message.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
TaskName = Annotated[
    str, typer.Argument(metavar="TASK", help="A library task, or a file of pairs (.json, .jsonl, .csv or .tsv).")
]
InputColumn = Annotated[
    str | None, typer.Option("--input", help="In a file: the inputs' column or key, or its number.")
]
OutputColumn = Annotated[str | None, typer.Option("--output", help="In a file: the same for the outputs.")]
Under = Annotated[str | None, typer.Option(help="In a .json file: the part to read, such as train or data.train.")]
Header = Annotated[
    bool | None, typer.Option("--header/--no-header", help="In a table: whether the first row names the columns.")
]


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
        for task in tasks_in(category)
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
    input_column: InputColumn = None,
    output_column: OutputColumn = None,
    under: Under = None,
    header: Header = None,
    template: TemplateText = _TEMPLATE,
    separator: Separator = r"\n",
    chat: Chat = False,
    one_turn: OneTurn = False,
    system: System = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the whole experiment on tasks: zero-shot, few-shot and patched accuracy, and controls."""
    if names and category is not None:
        raise UsageError("give tasks or --category, not both")
    check_model(model, demo=demo, device=device, dtype=dtype)
    options = FileOptions(input_column, output_column, under, header)
    chosen = with_rule(chosen_tasks(names, options) if names else tasks_in(category), rule)
    if save is not None:
        check_writable(save, (".json", ".parquet"))
    if folder is not None:
        check_folder(folder)
    written = _template(template, separator)
    check_chat(written, chat=chat, one_turn=one_turn, system=system)
    for task in chosen:
        check_sampling(task, n_dev, n_test, shots=shots, seed=seed, template=written)
    engine = _engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    experiment = tv.run_experiment(
        engine,
        chosen,
        shots=shots,
        n_dev=n_dev,
        n_test=n_test,
        seed=seed,
        substitutes=substitutes,
        across=across,
        template=_format(engine, written, chat, one_turn, system),
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
    check_writable(to, (".html",))
    check_results(results)
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
    input_column: InputColumn = None,
    output_column: OutputColumn = None,
    under: Under = None,
    header: Header = None,
    template: TemplateText = _TEMPLATE,
    separator: Separator = r"\n",
    chat: Chat = False,
    one_turn: OneTurn = False,
    system: System = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read a task's vectors, one per prompt and layer, and save them with their provenance."""
    check_model(model, demo=demo, device=device, dtype=dtype)
    check_writable(to, (".safetensors",))
    chosen = chosen_task(task, FileOptions(input_column, output_column, under, header))
    written = _template(template, separator)
    check_chat(written, chat=chat, one_turn=one_turn, system=system)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=written)
    if not across:
        chosen.substitutes(asked, substitutes, seed=seed)
    engine = _engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    if chat:
        asked = chosen.sample(
            prompts, shots=shots, seed=seed, template=_format(engine, written, chat, one_turn, system)
        )
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
    input_column: InputColumn = None,
    output_column: OutputColumn = None,
    under: Under = None,
    header: Header = None,
    template: TemplateText = _TEMPLATE,
    separator: Separator = r"\n",
    chat: Chat = False,
    one_turn: OneTurn = False,
    system: System = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Score a task's mean vector at every layer. For a number to report use `tv-lens run`, which holds prompts out."""
    check_model(model, demo=demo, device=device, dtype=dtype)
    [chosen] = with_rule([chosen_task(task, FileOptions(input_column, output_column, under, header))], rule)
    if vectors is not None:
        check_vectors(vectors)
    written = _template(template, separator)
    check_chat(written, chat=chat, one_turn=one_turn, system=system)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=written)
    if vectors is None and not across:
        chosen.substitutes(asked, substitutes, seed=seed)
    loaded = None if vectors is None else tv.TaskVectors.load(vectors)
    engine = _engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    format_ = _format(engine, written, chat, one_turn, system)
    if chat:
        asked = chosen.sample(prompts, shots=shots, seed=seed, template=format_)
    if loaded is None:
        loaded = _method(substitutes, across)(engine, chosen, asked, seed)
    if first_token:
        chosen, max_new_tokens = replace(chosen, accepts=tv.first_token(engine, format_, chosen)), 1
    result = tv.sweep_layers(engine, chosen, asked, loaded.mean(), max_new_tokens=max_new_tokens)
    _show(
        result.to_pandas(),
        {"task": chosen.name, "best": result.best, "ties": result.ties, "layers": _records(result.to_pandas())},
        as_json,
        f"{engine.name}, {chosen.name}, {len(asked)} prompts; best layer {result.best}: {result.at(result.best)}",
    )


@app.command()
def generate(
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...", help="What to answer, without demonstrations.")],
    vectors: Annotated[Path, typer.Option("--vectors", help="Vectors from `tv-lens extract`; their mean is used.")],
    layer: Annotated[
        int, typer.Option("--layer", "-l", min=0, help="The layer to write them to: the output of this block.")
    ],
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
    check_model(model, demo=demo, device=device, dtype=dtype)
    check_vectors(vectors)
    mean = tv.TaskVectors.load(vectors).mean()
    template = mean.template or tv.PAPER
    asked = [tv.Prompt((), query, template=template) for query in queries]
    engine = _engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
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
        with warnings.catch_warnings():
            warnings.showwarning = _warn_in_one_line
            app(args)
    except (tv.TvLensError, OSError, ImportError) as error:
        print("tv-lens: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    sys.exit(0)


def _warn_in_one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning of tv_lens as one line, without the line of code that raised it."""
    if issubclass(category, tv.TvLensWarning):
        text = "tv-lens: warning: " + " ".join(str(message).split())
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    print(text, file=file or sys.stderr)


def _engine(
    model: str | None, *, device: str | None, dtype: str, batch_size: int | None, quiet: bool
) -> tv.LocalEngine:
    """The model, or the demo model; its options are checked."""
    import torch

    from tv_lens.engines.booting import boot

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    bridge = tv.demo_model() if model is None else boot(model, device=device, dtype=dtypes[dtype])
    return tv.LocalEngine(bridge, batch_size=batch_size, progress=not quiet)


def _method(substitutes: int, across: bool) -> tv.Method:
    return tv.AcrossPrompts() if across else tv.Extraction(substitutes=substitutes)


def _template(example: str, separator: str) -> tv.Template:
    return tv.Template(example, separator.replace(r"\n", "\n").replace(r"\t", "\t"))


def _format(
    engine: tv.LocalEngine, written: tv.Template, chat: bool, one_turn: bool, system: str | None
) -> tv.PromptFormat:
    """How prompts are written: by the template, or as conversations."""
    if not chat:
        return written
    return tv.ChatTemplate.of(engine, system=system, layout="one turn" if one_turn else "turns", template=written)


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
