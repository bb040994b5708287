"""The options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

import tv_lens as tv

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
MethodName = Annotated[
    str | None,
    typer.Option("--method", help="How vectors are made, such as learn or function_vector:heads=40,measure=..."),
]
MethodNames = Annotated[
    list[str] | None,
    typer.Option(
        "--method", help="How vectors are made, such as learn or function_vector:heads=40; repeat to compare."
    ),
]
LayerNumbers = Annotated[
    str | None, typer.Option("--layers", help="Layers to try, such as 5,9,13 or 0-28:2; all by default.")
]
Strengths = Annotated[
    str, typer.Option(help="Strengths to try for vectors that are added, such as 0.5,1,2: multiples of the usual one.")
]
Seed = Annotated[int, typer.Option(help="Seed for prompts, splits and controls.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Length of an answer, in tokens.")]
FirstToken = Annotated[bool, typer.Option("--first-token", help="Score by the answer's first token alone.")]
TemplateText = Annotated[str, typer.Option("--template", help=r"How a demonstration is written; \n is a line end.")]
RuleName = Annotated[str, typer.Option("--rule", help="When an answer is correct: starts_with or exact_match.")]
Separator = Annotated[str, typer.Option(help=r"The text between demonstrations; \n is a line end.")]
Chat = Annotated[bool, typer.Option("--chat", help="Write prompts as conversations, by the model's own chat template.")]
OneTurn = Annotated[bool, typer.Option("--one-turn", help="With --chat: all demonstrations in one message.")]
System = Annotated[str | None, typer.Option("--system", help="With --chat: the system message.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
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
TEMPLATE = tv.PAPER.example
