"""Pairs as a task can hold them: texts, each input once, all problems reported together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from tv_lens.errors import TvLensError
from tv_lens.prompts import has_lone_surrogate
from tv_lens.tasks.describe import short, surrogate_fault
from tv_lens.tasks.readers import Located, Number, Object

# Problems of one file that an error lists.
_MOST = 5
# Digits of a number that may be a text of the task.
_MOST_DIGITS = 100


@dataclass(frozen=True)
class Problem:
    """In the place of a pair: why there is none."""

    message: str


class NotTextError(TvLensError):
    """A value that is not a text, or not texts."""


@dataclass
class Pairs:
    """Inputs and their outputs, the first of which is shown in demonstrations; and what was changed on the way."""

    outputs: dict[str, list[str]] = field(default_factory=dict)
    numbers: list[str] = field(default_factory=list)
    exact_repeats: int = 0
    joined: dict[str, list[str]] = field(default_factory=dict)

    def add(self, text: str, outputs: Sequence[str]) -> None:
        """Add a pair; further outputs of a known input join its own."""
        if text not in self.outputs:
            self.outputs[text] = list(dict.fromkeys(outputs))
            return
        known = self.outputs[text]
        new = [each for each in dict.fromkeys(outputs) if each not in known]
        if new:
            known += new
            self.joined[text] = known
        else:
            self.exact_repeats += 1

    def notes(self) -> list[str]:
        """What was changed, with counts."""
        notes = []
        if self.joined:
            text, outputs = next(iter(self.joined.items()))
            inputs = "input is" if len(self.joined) == 1 else "inputs are"
            notes.append(
                f"{len(self.joined)} {inputs} repeated with other outputs, which all count as correct; the first is "
                f"shown in demonstrations (such as {short(text)}: {', '.join(map(short, outputs[:3]))})"
            )
        if self.exact_repeats:
            notes.append(f"{self.exact_repeats} exact repeat{'s are' if self.exact_repeats > 1 else ' is'} dropped")
        if self.numbers:
            count = len(self.numbers)
            notes.append(f"{count} number{'s are' if count > 1 else ' is'} read as text (such as {self.numbers[0]!r})")
        return notes


def clean(source: str, located: Iterable[Located]) -> Pairs:
    """The pairs as texts; numbers become text.

    Raises:
        TvLensError: rows that are not pairs, all of them in one message, or no pairs.
    """
    pairs, problems = Pairs(), list[tuple[str, str]]()
    for location, pair in located:
        problem = _add(pairs, pair)
        if problem:
            problems.append((location, problem))
    raise_problems(source, problems)
    if not pairs.outputs:
        raise TvLensError(f"{source}: no pairs in it")
    return pairs


def raise_problems(source: str, problems: Sequence[tuple[str, str]]) -> None:
    """Raise TvLensError with all problems, or with the first ones and a count."""
    if len(problems) == 1:
        [(location, message)] = problems
        raise TvLensError(f"{source}, {location}: {message}")
    if problems:
        listed = "".join(f"\n  {location}: {message}" for location, message in problems[:_MOST])
        more = f"\n  and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
        raise TvLensError(f"{source}: {len(problems)} problems{listed}{more}")


def _add(pairs: Pairs, pair: object) -> str:
    """Add a pair, or say why it is not one."""
    try:
        pairs.add(*_checked(pair, pairs))
    except NotTextError as error:
        return str(error)
    return ""


def _checked(pair: object, pairs: Pairs) -> tuple[str, list[str]]:
    if isinstance(pair, Problem):
        raise NotTextError(pair.message)
    fault = NotTextError(f"{short(pair)} is not a pair of non-empty texts, input and output")
    if isinstance(pair, Object) or not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise fault
    try:
        text, outputs = _text(pair[0], pairs), _outputs(pair[1], pairs)
    except NotTextError:
        raise fault from None
    for each in (text, *outputs):
        if has_lone_surrogate(each):
            raise NotTextError(surrogate_fault(each))
    return text, outputs


def _text(value: object, pairs: Pairs) -> str:
    if isinstance(value, Number) or (isinstance(value, Real) and not isinstance(value, bool)):
        text = _digits(value)
        pairs.numbers.append(text)
        return text
    if not isinstance(value, str) or not value.strip():
        raise NotTextError("not a text")
    return value


def _digits(value: Number | Real) -> str:
    try:
        is_plain = math.isfinite(float(value)) and len(str(value)) <= _MOST_DIGITS
    except (OverflowError, ValueError):
        is_plain = False
    if not is_plain:
        raise NotTextError("not a number to read as text")
    return str(value)


def _outputs(value: object, pairs: Pairs) -> list[str]:
    if isinstance(value, (Object, Mapping)):
        return [_text(choice, pairs) for choice in _best(dict(value))]
    if isinstance(value, str) or not isinstance(value, Iterable) or isinstance(value, Set):
        return [_text(value, pairs)]
    outputs = [_text(each, pairs) for each in value]
    if not outputs:
        raise NotTextError("no outputs")
    return outputs


def _best(scores: dict[Any, Any]) -> list[Any]:
    """The choices with the highest score, if not all have it."""
    try:
        numbers = {choice: float(score) for choice, score in scores.items() if not isinstance(score, bool)}
    except (TypeError, ValueError):
        raise NotTextError("not scores") from None
    best = [choice for choice, score in numbers.items() if score == max(numbers.values())]
    if not best or len(numbers) < len(scores) or (len(best) == len(scores) > 1):
        raise NotTextError("no best choice")
    return best
