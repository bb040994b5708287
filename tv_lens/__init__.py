"""Read in-context-learning task vectors out of a language model, and write them back.

    from tv_lens import Task, extract, patch_generate, sweep_layers

A task vector (Hendel, Geva, Globerson 2023, arXiv 2310.15916) is the residual stream at the last position of a
few-shot prompt; layer `l` is always the output of block `l`.
"""

from tv_lens.demo import DemoModelError, demo_model
from tv_lens.engines import Engine, LocalEngine, Patch, Tokens, engine_for
from tv_lens.experiments import (
    Conflict,
    Evaluation,
    Experiment,
    Score,
    Sweep,
    TaskResult,
    conflict,
    evaluate,
    mcnemar,
    run_experiment,
    score,
    shuffle_outputs,
    sweep_layers,
)
from tv_lens.extraction import extract, extract_across
from tv_lens.generation import Completions, generate, greedy, patch_generate, patched_logits, sample
from tv_lens.prompts import PAPER, Example, Prompt, Template
from tv_lens.tasks import Task, exact_match, first_token, library, starts_with
from tv_lens.vectors import TaskVectors

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "Completions",
    "Conflict",
    "DemoModelError",
    "Engine",
    "Evaluation",
    "Example",
    "Experiment",
    "LocalEngine",
    "Patch",
    "Prompt",
    "Score",
    "Sweep",
    "Task",
    "TaskResult",
    "TaskVectors",
    "Template",
    "Tokens",
    "conflict",
    "demo_model",
    "engine_for",
    "evaluate",
    "exact_match",
    "extract",
    "extract_across",
    "first_token",
    "generate",
    "greedy",
    "library",
    "mcnemar",
    "patch_generate",
    "patched_logits",
    "run_experiment",
    "sample",
    "score",
    "shuffle_outputs",
    "starts_with",
    "sweep_layers",
]
