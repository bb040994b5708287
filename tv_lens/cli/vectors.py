"""Commands on task vectors: `extract`, `sweep` and `generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import tv_lens as tv
from tv_lens.cli.app import app
from tv_lens.cli.checks import (
    FileOptions,
    UsageError,
    check_model,
    check_vectors,
    check_writable,
    chosen_method,
    chosen_task,
    with_rule,
)
from tv_lens.cli.loading import Wording, load_engine, loading, method_of
from tv_lens.cli.options import (
    TEMPLATE,
    Across,
    BatchSize,
    Chat,
    Count,
    Demo,
    Device,
    Dtype,
    FirstToken,
    Header,
    InputColumn,
    Json,
    MethodName,
    ModelName,
    NewTokens,
    OneTurn,
    OutputColumn,
    Quiet,
    RuleName,
    Seed,
    Separator,
    Shots,
    Substitutes,
    System,
    TaskName,
    TemplateText,
    Under,
)
from tv_lens.cli.output import records, show
from tv_lens.progress import stage


@app.command()
def extract(
    task: TaskName,
    to: Annotated[Path, typer.Option("--to", "-o", help="The file to write, .safetensors.")],
    model: ModelName = None,
    demo: Demo = False,
    prompts: Count = 20,
    shots: Shots = 5,
    seed: Seed = 0,
    method: MethodName = None,
    substitutes: Substitutes = 2,
    across: Across = False,
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
    """Read a task's vectors, one per prompt and layer, and save them with their provenance."""
    check_model(model, demo=demo, device=device, dtype=dtype)
    check_writable(to, (".safetensors",))
    chosen = chosen_task(task, FileOptions(input_column, output_column, under, header))
    wording = Wording.of(template, separator, chat=chat, one_turn=one_turn, system=system)
    choice = None if method is None else chosen_method(method, across=across)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=wording.format())
    if choice is None and not across:
        chosen.substitutes(asked, substitutes, seed=seed)
    with loading(model, quiet=quiet):
        made_by = method_of(choice, substitutes, across)
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=wording.format(engine))
    with stage(chosen.name, "vectors"):
        vectors = made_by(engine, chosen, asked, seed)
    vectors.save(to)
    row = {
        "file": str(to),
        "model": vectors.model,
        "task": vectors.task,
        "prompts": len(vectors),
        "layers": len(vectors.layers),
        "d_model": vectors.d_model,
        "method": vectors.method,
    }
    show([row], row, as_json, keys=0)


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
    method: MethodName = None,
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
    """Score a task's mean vector at every layer. For a number to report use `tv-lens run`, which holds prompts out."""
    check_model(model, demo=demo, device=device, dtype=dtype)
    [chosen] = with_rule([chosen_task(task, FileOptions(input_column, output_column, under, header))], rule)
    if vectors is not None:
        check_vectors(vectors)
    wording = Wording.of(template, separator, chat=chat, one_turn=one_turn, system=system)
    if vectors is not None and method is not None:
        raise UsageError("--vectors are made already; leave --method out, or --vectors")
    choice = None if method is None else chosen_method(method, across=across)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=wording.format())
    if vectors is None and choice is None and not across:
        chosen.substitutes(asked, substitutes, seed=seed)
    loaded = None if vectors is None else tv.TaskVectors.load(vectors)
    with loading(model, quiet=quiet):
        made_by = method_of(choice, substitutes, across)
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    format_ = wording.format(engine)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=format_)
    if loaded is None:
        with stage(chosen.name, "vectors"):
            loaded = made_by(engine, chosen, asked, seed)
    if first_token:
        chosen, max_new_tokens = replace(chosen, accepts=tv.first_token(engine, format_, chosen)), 1
    with stage(chosen.name):
        result = tv.sweep_layers(engine, chosen, asked, loaded.mean(), max_new_tokens=max_new_tokens)
    show(
        _by_layer(result),
        {"task": chosen.name, "best": result.best, "ties": result.ties, "layers": records(result.to_pandas())},
        as_json,
        f"{engine.name}, {chosen.name}, {len(asked)} prompts\nbest layer {result.best}: {result.at(result.best)}",
        bold_row=result.layers.index(result.best),
    )


def _by_layer(result: tv.Sweep) -> list[dict[str, Any]]:
    """A row for each layer, with a bar, the best layer marked, and those that tie with it."""
    from tv_lens.cli.tables import small_bar

    marks = {**dict.fromkeys(result.ties, "ties"), result.best: "best"}
    return [
        {"layer": layer, "accuracy": str(score), "": small_bar(score.accuracy), " ": marks.get(layer, "")}
        for layer, score in zip(result.layers, result.scores, strict=True)
    ]


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
    with loading(model, quiet=quiet):
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    with stage("patched"):
        patched = tv.patch_generate(engine, asked, mean, layer, max_new_tokens=max_new_tokens)
    with stage("zero-shot"):
        zero_shot = tv.generate(engine, asked, max_new_tokens=max_new_tokens)
    rows = [
        {"query": query, "patched": answer, "zero-shot": plain}
        for query, answer, plain in zip(queries, patched, zero_shot, strict=True)
    ]
    show(rows, rows, as_json, f"{mean.task} of {mean.model}, layer {layer}")
