"""A few-shot prompt as a value, and how it is written as text."""

from tv_lens.prompts.chat import ChatTemplate
from tv_lens.prompts.formats import (
    Example,
    PromptFormat,
    Segment,
    SegmentRole,
    format_from_dict,
    has_lone_surrogate,
)
from tv_lens.prompts.prompt import Prompt, as_prompts, check_prompts
from tv_lens.prompts.templates import PAPER, FreeText, PlainText, Template

__all__ = [
    "PAPER",
    "ChatTemplate",
    "Example",
    "FreeText",
    "PlainText",
    "Prompt",
    "PromptFormat",
    "Segment",
    "SegmentRole",
    "Template",
    "as_prompts",
    "check_prompts",
    "format_from_dict",
    "has_lone_surrogate",
]
