"""The command `learn`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import tv_lens as tv
from tv_lens.cli.app import app
from tv_lens.cli.checks import (
    FileOptions,
    UsageError,
    check_model,
    check_page,
    check_writable,
    chosen_task,
    whole_numbers,
)
from tv_lens.cli.loading import Wording, load_engine, loading
from tv_lens.cli.options import (
    TEMPLATE,
    BatchSize,
    Chat,
    Count,
    Demo,
    Device,
    Dtype,
    Header,
    InputColumn,
    Json,
    ModelName,
    OneTurn,
    OutputColumn,
    Quiet,
    Seed,
    Separator,
    Shots,
    System,
    TaskName,
    TemplateText,
    Under,
)
from tv_lens.cli.output import records, show, write_figure
from tv_lens.progress import stage


@app.command()
def learn(
    task: TaskName,
    to: Annotated[Path, typer.Option("--to", "-o", help="The file to write the vectors to, .safetensors.")],
    model: ModelName = None,
    demo: Demo = False,
    prompts: Count = 40,
    shots: Shots = 5,
    seed: Seed = 0,
    layers: Annotated[
        str | None, typer.Option(help="Layers to train, such as 3,9,15 or 0-28:2; all by default.")
    ] = None,
    objective: Annotated[str, typer.Option(help="What is learned: answer, or few-shot.")] = "answer",
    how: Annotated[str, typer.Option(help="How the vectors are written: add or overwrite.")] = "add",
    start: Annotated[str, typer.Option(help="Where training begins: zero, uniform, or a file of vectors.")] = "zero",
    epochs: Annotated[int, typer.Option(min=0, help="At most so many passes over the prompts.")] = 10,
    lr: Annotated[float | None, typer.Option(help="Learning rate; by default 0.05 of the activations' size.")] = None,
    weight_decay: Annotated[float, typer.Option(help="AdamW's weight decay.")] = 0.01,
    step_size: Annotated[int, typer.Option(min=1, help="Prompts for each step of the optimizer.")] = 4,
    validation: Annotated[float, typer.Option(help="The share of prompts that is held out.")] = 0.2,
    patience: Annotated[int, typer.Option(min=1, help="A layer stops after so many epochs without progress.")] = 2,
    resume: Annotated[
        Path | None, typer.Option(help="Keep the training here, .safetensors, and resume from it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the curves of losses and accuracy as .html.")] = None,
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
    """Train vectors by gradient to answer a task's queries without demonstrations, and save them."""
    check_model(model, demo=demo, device=device, dtype=dtype)
    for path in (to, resume):
        if path is not None:
            check_writable(path, (".safetensors",))
    check_page(plot)
    if resume is not None and resume.resolve() == to.resolve():
        raise UsageError(f"--to and --resume are both {to}; keep the training in another file than the vectors")
    if objective not in ("answer", "few-shot") or how not in ("add", "overwrite"):
        raise UsageError(f"--objective {objective}, --how {how}: use answer or few-shot, and add or overwrite")
    trained = None if layers is None else whole_numbers("--layers", layers)
    chosen = chosen_task(task, FileOptions(input_column, output_column, under, header))
    wording = Wording.of(template, separator, chat=chat, one_turn=one_turn, system=system)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=wording.format())
    begun: Any = start if start in ("zero", "uniform") else tv.TaskVectors.load(start)
    with loading(model, quiet=quiet):
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=wording.format(engine))
    with stage(chosen.name, "training"):
        learned = tv.learn(
            engine,
            asked,
            layers=trained,
            how=tv.overwrite if how == "overwrite" else tv.add(),
            start=begun,
            objective="few-shot" if objective == "few-shot" else "answer",
            epochs=epochs,
            lr=lr,
            weight_decay=weight_decay,
            batch_size=step_size,
            validation=validation,
            patience=patience,
            seed=seed,
            file=resume,
        )
    learned.vectors.save(to)
    if plot is not None:
        write_figure(learned.plot(), plot)
    table = learned.best()
    data = {
        "task": chosen.name,
        "model": engine.name,
        "file": str(to),
        "best_layers": list(learned.best_layers),
        "layers": records(table),
    }
    best = ["best" if learned.best_layers and i == 0 else "" for i in range(len(table))]
    chosen_layer = f"best layer {learned.best_layers[0]}, " if learned.best_layers else ""
    title = f"{engine.name}, {chosen.name}, {len(asked)} prompts\n{chosen_layer}saved as {to}"
    by_layer = table[["layer", *(name for name in table if name != "layer")]].assign(**{"": best})
    show(by_layer, data, as_json, title, bold_row=0 if learned.best_layers else None)
