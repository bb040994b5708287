"""The command `heads`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tv_lens as tv
from tv_lens.cli.app import app
from tv_lens.cli.checks import FileOptions, check_model, check_page, check_writable, chosen_task
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
    System,
    TaskName,
    TemplateText,
    Under,
)
from tv_lens.cli.output import records, show, write_figure
from tv_lens.progress import stage


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
    """Show which attention heads carry a task: the effect of each on prompts with permuted outputs."""
    check_model(model, demo=demo, device=device, dtype=dtype)
    chosen = chosen_task(task, FileOptions(input_column, output_column, under, header))
    for path in (save, vector):
        if path is not None:
            check_writable(path, (".safetensors",))
    check_page(plot)
    wording = Wording.of(template, separator, chat=chat, one_turn=one_turn, system=system)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=wording.format())
    with loading(model, quiet=quiet):
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    asked = chosen.sample(prompts, shots=shots, seed=seed, template=wording.format(engine))
    with stage(chosen.name, "reading heads"):
        read = tv.read_heads(engine, asked)
    with stage(chosen.name, "effects of heads"):
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
        write_figure(effects.plot(mark=top), plot)
    table = effects.to_pandas().head(top)
    data = {
        "task": chosen.name,
        "model": engine.name,
        "measure": effects.measure,
        "how": effects.how,
        "prompts": len(effects),
        "diagnosis": effects.diagnosis,
        "top_heads": [list(head) for head in best],
        "heads": records(table),
    }
    notes = "".join(f"\nnote: {text}" for text in effects.diagnosis)
    title = f"{engine.name}, {chosen.name}, {len(effects)} prompts, {len(effects.heads)} heads, {effects.how}"
    show(
        table.assign(**{name: [f"{value:+.4f}" for value in table[name]] for name in ("effect", "low", "high")}),
        data,
        as_json,
        f"{title}\nchange of {effects.measure}, 95% interval over prompts; significant: with all heads{notes}",
        keys=2,
    )
