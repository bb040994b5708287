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
from .meaning import (
    Similarities,
    TopTokens,
    VectorMap,
    compare_tasks,
    map_vectors,
    pca,
    similarity,
    top_tokens,
    tsne,
)
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
    "Similarities",
    "Sweep",
    "Task",
    "TaskResult",
    "TaskVectors",
    "Template",
    "Tokens",
    "TopTokens",
    "VectorMap",
    "compare_tasks",
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
    "map_vectors",
    "mcnemar",
    "patch_generate",
    "patched_logits",
    "pca",
    "run_experiment",
    "sample",
    "score",
    "shuffle_outputs",
    "similarity",
    "starts_with",
    "sweep_layers",
    "top_tokens",
    "tsne",
]
