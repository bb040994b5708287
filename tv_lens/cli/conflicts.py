"""The command `conflict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tv_lens as tv
from tv_lens.cli.app import app
from tv_lens.cli.checks import (
    FileOptions,
    UsageError,
    check_model,
    check_page,
    check_vectors,
    chosen_method,
    chosen_tasks,
    with_rule,
)
from tv_lens.cli.loading import Wording, load_engine, loading, method_of
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
    TemplateText,
    Under,
)
from tv_lens.cli.output import records, show, write_figure
from tv_lens.progress import stage


@app.command()
def conflict(
    task: Annotated[str, typer.Argument(metavar="TASK", help="The task of the demonstrations, or a file of pairs.")],
    rival: Annotated[str, typer.Argument(metavar="RIVAL", help="The task of the vector, with the same inputs.")],
    model: ModelName = None,
    demo: Demo = False,
    vectors: Annotated[
        Path | None, typer.Option(help="The rival's vectors from `tv-lens extract`; by default they are read now.")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option("--layer", "-l", min=0, help="The layer to write them to; by default the rival's best."),
    ] = None,
    prompts: Count = 20,
    shots: Shots = 5,
    seed: Seed = 0,
    method: MethodName = None,
    substitutes: Substitutes = 2,
    max_new_tokens: NewTokens = 8,
    rule: RuleName = "starts_with",
    plot: Annotated[Path | None, typer.Option(help="Write a figure as .html.")] = None,
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
    """Set demonstrations of one task against the vector of another: which one is answered?

    The queries come from one half of the rival's inputs. Without --vectors, the vector and its layer come from the
    other half. Vectors in a file may have been read from the queries, too.
    """
    check_model(model, demo=demo, device=device, dtype=dtype)
    options = FileOptions(input_column, output_column, under, header)
    chosen, other = with_rule(chosen_tasks([task, rival], options), rule)
    check_page(plot)
    if vectors is not None:
        check_vectors(vectors)
    if vectors is not None and method is not None:
        raise UsageError("--vectors are made already; leave --method out, or --vectors")
    wording = Wording.of(template, separator, chat=chat, one_turn=one_turn, system=system)
    choice = None if method is None else chosen_method(method, across=False)
    dev, test = other.split(0.5, seed=seed)
    n_dev = min(prompts, len(dev))
    dev.sample(n_dev, shots=shots, seed=seed, template=wording.format())
    asked = _asked(chosen, test, prompts, shots=shots, seed=seed, template=wording.format())
    with loading(model, quiet=quiet):
        made_by = method_of(choice, substitutes, across=False)
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    format_ = wording.format(engine)
    asked = _asked(chosen, test, prompts, shots=shots, seed=seed, template=format_)
    dev_prompts = dev.sample(n_dev, shots=shots, seed=seed, template=format_)
    with stage(other.name, "vectors"):
        loaded = made_by(engine, dev, dev_prompts, seed) if vectors is None else tv.TaskVectors.load(vectors)
    mean = loaded.mean()
    if layer is None:
        with stage(other.name):
            layer = tv.sweep_layers(engine, dev, dev_prompts, mean, max_new_tokens=max_new_tokens).best
    clash = tv.conflict(engine, chosen, other, asked, mean, layer, max_new_tokens=max_new_tokens)
    if plot is not None:
        write_figure(clash.plot(), plot)
    data = {
        "task": chosen.name,
        "rival": other.name,
        "model": engine.name,
        "layer": layer,
        "results": records(clash.to_pandas()),
    }
    scores = (
        ("as it is", clash.plain_task, clash.plain_rival),
        (f"with the vector of {other.name}", clash.patched_task, clash.patched_rival),
    )
    show(
        [{"prompts": run, chosen.name: str(own), other.name: str(others)} for run, own, others in scores],
        data,
        as_json,
        f"{engine.name}, {len(asked)} prompts with {shots} demonstrations of {chosen.name}\n"
        f"the vector of {other.name} at layer {layer}; accuracy as either task [exact 95% interval]",
    )


def _asked(
    task: tv.Task, test: tv.Task, n: int, *, shots: int, seed: int, template: tv.PromptFormat
) -> list[tv.Prompt]:
    """Prompts of the task whose queries are inputs of `test`.

    Raises:
        TvLensError: there are none.
    """
    asked = [
        prompt
        for prompt in task.sample(len(task), shots=shots, seed=seed, template=template)
        if prompt.query in test.inputs
    ]
    if not asked:
        raise tv.TvLensError(
            f"{task.name} and {test.name} have too few inputs in common; conflicting tasks share their inputs, as "
            "present_to_past and present_to_gerund do"
        )
    return asked[:n]
