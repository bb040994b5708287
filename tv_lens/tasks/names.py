"""The names that columns, parts and contrasts usually have in files of the field."""

from __future__ import annotations

from collections.abc import Sequence

_INPUTS = {"input", "inputs", "source", "subject", "question", "query", "prompt", "text", "sentence", "word", "x"}
_OUTPUTS = {"output", "outputs", "target", "targets", "object", "answer", "answers", "completion", "response", "label"}
_OUTPUTS |= {"y"}
# A score for each choice (BIG-bench); the best choice is the answer.
_SCORES = "target_scores"
# Columns that belong to the input: a task read without them would be another one.
_MORE_INPUT = {"instruction", "instructions", "context", "passage", "choices", "options"}

# Parts of a file that are about it, or that are not the task itself.
_ABOUT = {"metadata", "meta", "properties", "info", "config", "positive examples", "negative examples"}

# The columns of the two sides of contrastive pairs, and of what comes before both.
_SIDES = (
    ("answer_matching_behavior", "answer_not_matching_behavior"),
    ("positive", "negative"),
    ("chosen", "rejected"),
)
_BEFORE = ("question", "prompt", "input")


def plain(name: object) -> str:
    """A name without case and without white space around it."""
    return str(name).strip().lower()


def usual_columns(names: Sequence[object]) -> tuple[int, int] | None:
    """The numbers of the input and the output column by their usual names; None if they are not clear."""
    plain_names = [plain(name) for name in names]
    if len(set(plain_names)) < len(plain_names) or _MORE_INPUT & set(plain_names):
        return None
    if {"input", "output"} <= set(plain_names):
        return plain_names.index("input"), plain_names.index("output")
    inputs = [i for i, name in enumerate(plain_names) if name in _INPUTS]
    outputs = [i for i, name in enumerate(plain_names) if name in _OUTPUTS]
    if not outputs:
        outputs = [i for i, name in enumerate(plain_names) if name == _SCORES]
    return (inputs[0], outputs[0]) if len(inputs) == len(outputs) == 1 else None


def has_usual_name(names: Sequence[object]) -> bool:
    """Whether one of the names is usual for a column."""
    return bool({plain(name) for name in names} & (_INPUTS | _OUTPUTS | _MORE_INPUT | {"id"}))


def fits_order(names: Sequence[object]) -> bool:
    """Whether the first of two names may be the input and the second the output."""
    source, target = map(plain, names)
    # "object" is an output beside a subject, and often an input elsewhere.
    return source not in (_OUTPUTS - {"object"}) | {"id"} and target not in _INPUTS | {"id"}


def is_about(name: object) -> bool:
    """Whether a part of this name is not the task itself."""
    return plain(name) in _ABOUT


def contrast_columns(names: Sequence[object]) -> tuple[str, str, str | None] | None:
    """The columns of contrastive pairs: positive, negative and what comes before both; None if there are none."""
    known = {plain(name): str(name) for name in names}
    for positive, negative in _SIDES:
        if positive in known and negative in known:
            before = next((known[each] for each in _BEFORE if each in known), None)
            return known[positive], known[negative], before
    return None
