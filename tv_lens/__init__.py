"""Read in-context-learning task vectors out of a language model, and write them back.

    from tv_lens import Task, extract, patch_generate, sweep_layers

A task vector (Hendel, Geva, Globerson 2023, arXiv 2310.15916) is the residual stream at the last position of a
few-shot prompt; layer `l` is always the output of block `l`.
"""

from tv_lens.demo import DemoModelError, demo_model
from tv_lens.engines import Engine, LocalEngine, Patch, Tokens, engine_for
from tv_lens.experiments import Score, Sweep, score, sweep_layers
from tv_lens.extraction import extract, extract_across
from tv_lens.generation import Completions, generate, greedy, patch_generate, patched_logits, sample
from tv_lens.prompts import Example, Prompt, Template
from tv_lens.tasks import Task, exact_match, first_token, starts_with
from tv_lens.vectors import TaskVectors

__version__ = "0.1.0"

__all__ = [
    "Completions",
    "DemoModelError",
    "Engine",
    "Example",
    "LocalEngine",
    "Patch",
    "Prompt",
    "Score",
    "Sweep",
    "Task",
    "TaskVectors",
    "Template",
    "Tokens",
    "demo_model",
    "engine_for",
    "exact_match",
    "extract",
    "extract_across",
    "first_token",
    "generate",
    "greedy",
    "patch_generate",
    "patched_logits",
    "sample",
    "score",
    "starts_with",
    "sweep_layers",
]
