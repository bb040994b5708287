"""The public names; `__init__.py` imports each when it is first asked for."""

from .demo import DemoModelError, demo_model
from .engines import Engine, LocalEngine, Patch, RemoteEngine, Tokens, engine_for
from .experiments import (
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
from .extraction import extract, extract_across
from .generation import Completions, generate, greedy, patch_generate, patched_logits, sample
from .prompts import PAPER, Example, Prompt, Template
from .tasks import Task, exact_match, first_token, library, starts_with
from .vectors import TaskVectors

__version__: str

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
    "RemoteEngine",
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
