"""The command `tv-lens`, to which the other files of this folder add theirs."""

from __future__ import annotations

from typing import Annotated

import typer

import tv_lens as tv

app = typer.Typer(
    name="tv-lens",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> bool:
    if asked:
        print(f"tv-lens {tv.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Task vectors of language models: read them, find their layer, write them back, with evidence."""
