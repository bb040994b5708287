"""How vectors are made: one file for each kind. `Method` is what they have in common."""

from tv_lens.methods.base import Method
from tv_lens.methods.extraction import AcrossPrompts, Extraction, extract, extract_across

__all__ = ["AcrossPrompts", "Extraction", "Method", "extract", "extract_across"]
