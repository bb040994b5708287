"""The command `tv-lens`, to which the other files of this folder add theirs."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="tv-lens",
    help="Task vectors of language models: read them, find their layer, write them back, with evidence.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
