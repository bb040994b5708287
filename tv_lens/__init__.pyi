"""The public names; `__init__.py` imports each when it is first used."""

from .answers import answer_logprobs, divergence, first_token
from .demo import DemoModelError, demo_model
from .edits import (
    ATTN_OUT,
    HEADS,
    MLP_OUT,
    RESID_POST,
    ByPrompt,
    Edit,
    Edits,
    Head,
    Layers,
    Patch,
    Site,
    Usage,
    Write,
    add,
    by_prompt,
    layers,
    overwrite,
    rotate,
)
from .engines import Engine, LocalEngine, Model, RemoteEngine, Tokens, engine_for, vllm_engine
from .errors import EngineError, GridError, MissingExtraError, TvLensError, TvLensWarning, UnsupportedError
from .evidence.comparing import compare
from .evidence.comparisons import Comparison
from .evidence.conditions import (
    Condition,
    across_conditions,
    free_text,
    occurs,
    other_template,
    shuffled_few_shot,
    zero_shot,
)
from .evidence.controls import Control, OtherTask, RandomDirection, RandomHeads, ShuffledDemonstrations
from .evidence.evaluation import conflict, evaluate, sweep_layers
from .evidence.experimenting import run_experiment
from .evidence.results import (
    Choice,
    Conditions,
    Conflict,
    Cost,
    Evaluation,
    Experiment,
    Score,
    Sweep,
    TaskResult,
    mcnemar,
)
from .evidence.scoring import score
from .evidence.settings import Settings
from .generation import Completions, generate, greedy, patch_generate, patched_logits, sample
from .geometry import Similarities, VectorMap, compare_tasks, map_vectors, pca, similarity, tsne
from .heads import FewShot, HeadEffects, across_tasks, published_heads
from .inspection import TokenTable, show_tokens
from .methods.base import Method
from .methods.contrast import InContextVector, MeanDifference, in_context_vector, mean_difference
from .methods.extraction import AcrossPrompts, Extraction, extract, extract_across
from .methods.function_vectors import FunctionVector, MeanState, function_vector
from .methods.heads import head_effects, read_heads
from .methods.learning import DistilledVector, Learned, LearnedVector, learn
from .methods.linear import LinearVector, linear_vector
from .methods.separators import SeparatorVectors, separator_vectors
from .methods.states import StateVectors, state_vectors
from .prompts import PAPER, ChatTemplate, Example, FreeText, PlainText, Prompt, PromptFormat, Template
from .provenance import Provenance
from .readout import TopTokens, top_tokens
from .shuffling import shuffle_answers, shuffle_outputs, without_demonstrations
from .tasks.contrast import ContrastivePairs, contrastive_library
from .tasks.library import library
from .tasks.rules import Rule, exact_match, starts_with
from .tasks.task import Task
from .vectors import LinearMaps, TaskVectors

__version__: str

__all__ = [
    "ATTN_OUT",
    "HEADS",
    "MLP_OUT",
    "PAPER",
    "RESID_POST",
    "AcrossPrompts",
    "ByPrompt",
    "ChatTemplate",
    "Choice",
    "Comparison",
    "Completions",
    "Condition",
    "Conditions",
    "Conflict",
    "ContrastivePairs",
    "Control",
    "Cost",
    "DemoModelError",
    "DistilledVector",
    "Edit",
    "Edits",
    "Engine",
    "EngineError",
    "Evaluation",
    "Example",
    "Experiment",
    "Extraction",
    "FewShot",
    "FreeText",
    "FunctionVector",
    "GridError",
    "Head",
    "HeadEffects",
    "InContextVector",
    "Layers",
    "Learned",
    "LearnedVector",
    "LinearMaps",
    "LinearVector",
    "LocalEngine",
    "MeanDifference",
    "MeanState",
    "Method",
    "MissingExtraError",
    "Model",
    "OtherTask",
    "Patch",
    "PlainText",
    "Prompt",
    "PromptFormat",
    "Provenance",
    "RandomDirection",
    "RandomHeads",
    "RemoteEngine",
    "Rule",
    "Score",
    "SeparatorVectors",
    "Settings",
    "ShuffledDemonstrations",
    "Similarities",
    "Site",
    "StateVectors",
    "Sweep",
    "Task",
    "TaskResult",
    "TaskVectors",
    "Template",
    "TokenTable",
    "Tokens",
    "TopTokens",
    "TvLensError",
    "TvLensWarning",
    "UnsupportedError",
    "Usage",
    "VectorMap",
    "Write",
    "across_conditions",
    "across_tasks",
    "add",
    "answer_logprobs",
    "by_prompt",
    "compare",
    "compare_tasks",
    "conflict",
    "contrastive_library",
    "demo_model",
    "divergence",
    "engine_for",
    "evaluate",
    "exact_match",
    "extract",
    "extract_across",
    "first_token",
    "free_text",
    "function_vector",
    "generate",
    "greedy",
    "head_effects",
    "in_context_vector",
    "layers",
    "learn",
    "library",
    "linear_vector",
    "map_vectors",
    "mcnemar",
    "mean_difference",
    "occurs",
    "other_template",
    "overwrite",
    "patch_generate",
    "patched_logits",
    "pca",
    "published_heads",
    "read_heads",
    "rotate",
    "run_experiment",
    "sample",
    "score",
    "separator_vectors",
    "show_tokens",
    "shuffle_answers",
    "shuffle_outputs",
    "shuffled_few_shot",
    "similarity",
    "starts_with",
    "state_vectors",
    "sweep_layers",
    "top_tokens",
    "tsne",
    "vllm_engine",
    "without_demonstrations",
    "zero_shot",
]
