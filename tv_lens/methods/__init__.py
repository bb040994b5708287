"""How vectors are made: one file for each kind. `Method` is what they have in common."""

from tv_lens.methods.base import Method, Read
from tv_lens.methods.contrast import InContextVector, MeanDifference, in_context_vector, mean_difference
from tv_lens.methods.extraction import AcrossPrompts, Extraction, extract, extract_across
from tv_lens.methods.function_vectors import FunctionVector, MeanState, function_vector
from tv_lens.methods.heads import head_effects, read_heads
from tv_lens.methods.learning import DistilledVector, Learned, LearnedVector, learn
from tv_lens.methods.linear import LinearVector, linear_vector
from tv_lens.methods.separators import SeparatorVectors, separator_vectors
from tv_lens.methods.states import StateVectors, state_vectors

__all__ = [
    "AcrossPrompts",
    "DistilledVector",
    "Extraction",
    "FunctionVector",
    "InContextVector",
    "Learned",
    "LearnedVector",
    "LinearVector",
    "MeanDifference",
    "MeanState",
    "Method",
    "Read",
    "SeparatorVectors",
    "StateVectors",
    "extract",
    "extract_across",
    "function_vector",
    "head_effects",
    "in_context_vector",
    "learn",
    "linear_vector",
    "mean_difference",
    "read_heads",
    "separator_vectors",
    "state_vectors",
]
