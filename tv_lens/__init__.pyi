"""The public names; `__init__.py` imports each when it is first asked for."""

from .answers import first_token
from .demo import DemoModelError, demo_model
from .engines import Engine, LocalEngine, Patch, RemoteEngine, Tokens, engine_for
from .evidence.controls import shuffle_outputs
from .evidence.evaluation import conflict, evaluate, score, sweep_layers
from .evidence.experiments import run_experiment
from .evidence.results import Conflict, Evaluation, Experiment, Score, Sweep, TaskResult, mcnemar
from .generation import Completions, generate, greedy, patch_generate, patched_logits, sample
from .geometry import Similarities, VectorMap, compare_tasks, map_vectors, pca, similarity, tsne
from .methods.extraction import extract, extract_across
from .prompts import PAPER, Example, Prompt, Template
from .readout import TopTokens, top_tokens
from .tasks.library import library
from .tasks.rules import exact_match, starts_with
from .tasks.task import Task
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
