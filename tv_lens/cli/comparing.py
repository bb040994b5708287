"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tv_lens as tv
from tv_lens.cli.app import app
from tv_lens.cli.checks import (
    FileOptions,
    UsageError,
    check_comparison_folder,
    check_model,
    check_page,
    check_writable,
    chosen_methods,
    chosen_strengths,
    chosen_tasks,
    whole_numbers,
    with_rule,
)
from tv_lens.cli.loading import Wording, load_engine, loading, method_of
from tv_lens.cli.options import (
    TEMPLATE,
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

# The methods that are compared by default. The others are compared with the first.
_METHODS = ("extract", "mean_state", "function_vector:heads=40,preselect=60", "state_vectors", "linear_vector")


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="TASK...", help="Library tasks, or files of pairs.")],
    model: ModelName = None,
    demo: Demo = False,
    method: MethodNames = None,
    seeds: Annotated[str, typer.Option(help="Seeds for prompts, splits and controls, such as 0,1,2 or 0-4.")] = "0,1,2",
    shots: Shots = 5,
    n_train: Annotated[int, typer.Option(min=1, help="Prompts that vectors are made from.")] = 25,
    n_dev: Annotated[int, typer.Option(min=1, help="Prompts that choose a layer and a strength.")] = 25,
    n_test: Annotated[int, typer.Option(min=1, help="Prompts that are reported.")] = 50,
    layers: LayerNumbers = None,
    strengths: Strengths = "0.5,1,2",
    folder: Annotated[
        Path | None, typer.Option(help="Keep finished parts here, and resume from them after an interrupt.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write everything as .json, or the estimates as .parquet.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page with tables and a figure as .html.")] = None,
    substitutes: Substitutes = 2,
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
    """Compare methods on the same prompts of tasks, with several seeds: which one's vectors carry a task best?"""
    check_model(model, demo=demo, device=device, dtype=dtype)
    choices = chosen_methods(method or _METHODS, across=False)
    if len(choices) < 2:
        raise UsageError("one method has nothing to be compared with; give --method at least twice, or use tv-lens run")
    chosen = with_rule(chosen_tasks(names, FileOptions(input_column, output_column, under, header)), rule)
    if save is not None:
        check_writable(save, (".json", ".parquet"))
    check_page(report)
    drawn = whole_numbers("--seeds", seeds)
    tried = None if layers is None else whole_numbers("--layers", layers)
    factors = chosen_strengths(strengths)
    if folder is not None:
        check_comparison_folder(folder, drawn)
    wording = Wording.of(template, separator, chat=chat, one_turn=one_turn, system=system)
    for task in chosen:  # an error if inputs are too few
        train_dev_test(task, n_train, n_dev, n_test, shots=shots, seed=drawn[0], template=wording.format())
    with loading(model, quiet=quiet):
        methods = {name: method_of(choice, substitutes, across=False) for name, choice in choices.items()}
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    with resumable(folder):
        comparison = tv.compare(
            engine,
            chosen,
            methods,
            shots=shots,
            n_train=n_train,
            n_dev=n_dev,
            n_test=n_test,
            seeds=drawn,
            strengths=factors,
            template=wording.format(engine),
            max_new_tokens=1 if first_token else max_new_tokens,
            layers=tried,
            folder=folder,
        )
    if save is not None:
        comparison.save(save)
    if report is not None:
        comparison.report(report)
    _show(comparison, as_json, "first_token" if first_token else rule)


def _show(comparison: tv.Comparison, as_json: bool, rule: str) -> None:
    """Print the tables by method, and by task and method; or all estimates as JSON."""
    from tv_lens.views.comparison_tables import by_method_table

    if as_json:
        data = {
            "settings": comparison.settings,
            "seeds": comparison.seeds,
            "by_method": records(comparison.by_method()),
            "estimates": records(comparison.estimates()),
        }
        show([], data, as_json)
        return
    settings, by_method = comparison.settings, by_method_table(comparison)
    show(
        by_method.texts(),
        None,
        as_json,
        f"{settings.model}, {settings.shots} shots, {settings.scoring} by {rule}, seeds "
        f"{', '.join(map(str, comparison.seeds))}\n{by_method.caption}",
    )
    show(
        comparison.summary(),
        None,
        as_json,
        f"With 95% intervals\ndifference: from {comparison.methods[0]}; p difference: the exact two-sided test of it\n"
        "p controls: the exact one-sided test against every control, the largest p\n"
        "share: of the few-shot gain\n"
        "Both p-values are adjusted for all rows by Holm's method.",
        keys=2,
    )
