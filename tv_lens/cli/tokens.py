"""The command `tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import tv_lens as tv
from tv_lens.cli.app import app
from tv_lens.cli.checks import check_model, check_page, check_vectors
from tv_lens.cli.loading import load_engine, loading
from tv_lens.cli.options import BatchSize, Demo, Device, Dtype, Json, ModelName, Quiet
from tv_lens.cli.output import records, show, write_figure


@app.command()
def tokens(
    vectors: Annotated[
        Path, typer.Argument(metavar="VECTORS", help="Vectors from `tv-lens extract` or `learn`; their mean is read.")
    ],
    layer: Annotated[int, typer.Option("--layer", "-l", min=0, help="The layer whose vector is read.")],
    model: ModelName = None,
    demo: Demo = False,
    top: Annotated[int, typer.Option(min=1, help="How many tokens.")] = 10,
    plot: Annotated[Path | None, typer.Option(help="Write a figure as .html.")] = None,
    device: Device = None,
    dtype: Dtype = "float32",
    batch_size: BatchSize = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Show the tokens that a task's vector points to, through the model's final norm and unembedding."""
    check_model(model, demo=demo, device=device, dtype=dtype)
    check_page(plot)
    check_vectors(vectors)
    mean = tv.TaskVectors.load(vectors).mean()
    with loading(model, quiet=quiet):
        engine = load_engine(model, device=device, dtype=dtype, batch_size=batch_size, quiet=quiet)
    read = tv.top_tokens(engine, mean, layer, k=top)
    if plot is not None:
        write_figure(read.plot(), plot)
    table = read.to_pandas().drop(columns="vector")
    data = {"task": mean.task, "model": engine.name, "layer": layer, "tokens": records(table)}
    show(_with_bars(records(table)), data, as_json, f"{mean.task} of {mean.model}, layer {layer}: top tokens")


def _with_bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with a bar for each probability; white space in tokens shows."""
    from tv_lens.cli.tables import small_bar

    return [
        {
            "rank": row["rank"],
            "token": repr(row["token"]),
            "probability": f"{row['probability']:.3f}",
            "": small_bar(row["probability"]),
        }
        for row in rows
    ]
