"""Commands on whole experiments: `tasks`, `run` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tv_lens as tv
from tv_lens.cli.app import app
from tv_lens.cli.checks import (
    FileOptions,
    UsageError,
    check_folder,
    check_model,
    check_page,
    check_results,
    check_writable,
    chosen_methods,
    chosen_strengths,
    chosen_tasks,
    tasks_in,
    whole_numbers,
    with_rule,
)
from tv_lens.cli.loading import Wording, load_engine, loading, method_of
from tv_lens.cli.options import (
    TEMPLATE,
    Across,
    BatchSize,
    Chat,
    Demo,
    Device,
    Dtype,
    FirstToken,
    Header,
    InputColumn,
    Json,
    LayerNumbers,
    MethodNames,
    ModelName,
    NewTokens,
    OneTurn,
    OutputColumn,
    Quiet,
    RuleName,
    Seed,
    Separator,
    Shots,
    Strengths,
    Substitutes,
    System,
    TemplateText,
    Under,
)
from tv_lens.cli.output import records, resumable, show
from tv_lens.tasks.halves import train_dev_test


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
    show(rows, rows, as_json)


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
    report: Annotated[Path | None, typer.Option(help="Write a page with tables and figures as .html.")] = None,
    shots: Shots = 5,
    n_train: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts that vectors are made from; by default those that choose the layer."),
    ] = None,
    n_dev: Annotated[int, typer.Option(min=1, help="Prompts that choose the layer.")] = 50,
    n_test: Annotated[int, typer.Option(min=1, help="Prompts that are reported.")] = 50,
    seed: Seed = 0,
    method: MethodNames = None,
    layers: LayerNumbers = None,
    strengths: Strengths = "1",
    substitutes: Substitutes = 2,
    across: Across = False,
    max_new_tokens: NewTokens = 8,
    first_token: FirstToken = False,
    rule: RuleName = "starts_with",
    input_column: InputColumn = None,
    output_column: OutputColumn = None,
    under: Under = None,
    header: Header = None,
    template: TemplateText = TEMPLATE,
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
    check_page(report)
    if folder is not None:
        check_folder(folder)
    wording = Wording.of(template, separator, chat=chat, one_turn=one_turn, system=system)
    choices = chosen_methods(method or [], across=across)
    tried = None if layers is None else whole_numbers("--layers", layers)
    factors = chosen_strengths(strengths)
    for task in chosen:  # an error if inputs are too few
        train_dev_test(task, n_train, n_dev, n_test, shots=shots, seed=seed, template=wording.format())
    with loading(model, quiet=quiet):
        methods = {name: method_of(choice, substitutes, across) for name, choice in choices.items()}
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    with resumable(folder):
        experiment = tv.run_experiment(
            engine,
            chosen,
            shots=shots,
            n_train=n_train,
            n_dev=n_dev,
            n_test=n_test,
            seed=seed,
            layers=tried,
            strengths=factors,
            substitutes=substitutes,
            across=across,
            methods=methods or None,
            template=wording.format(engine),
            max_new_tokens=1 if first_token else max_new_tokens,
            folder=folder,
        )
    if save is not None:
        experiment.save(save)
    if report is not None:
        experiment.report(report)
    settings = experiment.settings
    show(
        experiment.summary(),
        {"settings": settings, "results": records(experiment.to_pandas())},
        as_json,
        f"{settings.model}, {settings.shots} shots, {settings.scoring} by {'first_token' if first_token else rule}, "
        f"seed {settings.seed}\naccuracy [exact 95% interval]; (+2): two more layers tie on dev prompts\n"
        "p controls: the exact one-sided test of patched against every control, the largest p\n"
        "Holm: the same, adjusted for all rows\n"
        "p zero-shot: McNemar's exact test, patched against zero-shot, two-sided",
        keys=1 if len(settings.methods) == 1 else 2,
    )


@app.command()
def report(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="RESULTS", help="What `tv-lens run` or `compare` wrote: with --save, .json, or with --folder."
        ),
    ],
    to: Annotated[Path, typer.Option("--to", "-o", help="The page to write, .html.")],
    as_json: Json = False,
) -> None:
    """Make a page of an experiment or a comparison, even an unfinished one. It works offline."""
    check_page(to)
    is_comparison = check_results(results)
    unfinished: tuple[str, ...] = ()
    made: tv.Experiment | tv.Comparison
    if results.is_dir():
        from tv_lens.evidence.folders import read_folder

        made, unfinished = read_folder(results)
    else:
        made = tv.Comparison.load(results) if is_comparison else tv.Experiment.load(results)
    made.report(to)
    settings = made.settings
    row = {"file": str(to), "model": settings.model, "tasks": len(settings.tasks), "methods": len(settings.methods)}
    title = f"tasks: {', '.join(settings.tasks)}\nnot finished yet: {', '.join(unfinished)}" if unfinished else None
    show([row], {**row, "unfinished": unfinished}, as_json, title, keys=0)
