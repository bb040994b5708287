"""When an answer counts as correct."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import TypeAlias

import regex

from tv_lens.errors import TvLensError

Accepts: TypeAlias = Callable[[str, str], bool]
# From the beginning of a prediction and an answer to the verdict that nothing after it can change, or None.
Decide: TypeAlias = Callable[[str, str], bool | None]


@dataclass(frozen=True)
class Rule:
    """A rule under a name: when does a prediction count as the answer?

    The name goes into an experiment's settings. It is how a resumed run knows that the rule is the same, so give rules
    that differ different names. A plain function can be used as a rule; its name and its source code serve as the
    rule's name. Lambdas, closures and partials have no such name: wrap them in a `Rule` to use them with a folder.

    Attributes:
        name: what tells the rule from others.
        accepts: a function of prediction and answer: whether the prediction counts.
        tokens: how many generated tokens the rule needs to see.
        accepts_ids: if given, judges the generated token ids instead of their text.
        decide: if given, a function of a beginning and the answer. It returns the verdict on every prediction with that
            beginning, itself included, or None while they differ. A sweep then stops an answer as soon as its verdict
            is known. Rules without it see whole answers. `exact_match` and `starts_with` have theirs.

    Examples:
        >>> Rule("ignore case", lambda prediction, answer: prediction.lower() == answer.lower())("COLD", "cold")
        True
    """

    name: str
    accepts: Accepts
    tokens: int = 1
    accepts_ids: Callable[[Sequence[int], str], bool] | None = None
    decide: Decide | None = None

    def __call__(self, prediction: str, answer: str) -> bool:
        return bool(self.accepts(prediction, answer))

    @property
    def is_named(self) -> bool:
        """Whether the name tells this rule from others."""
        return bool(self.name)

    @property
    def can_decide(self) -> bool:
        """Whether this rule may know its verdict before an answer is complete: not if token ids count as well."""
        return self.decide is not None and self.accepts_ids is None

    @staticmethod
    def of(rule: Accepts | Rule) -> Rule:
        """The rule itself, or a function wrapped under its name (an empty one for lambdas, closures and the like).

        Args:
            rule: a rule, or a function.

        Returns:
            A rule; its name is empty for lambdas, closures and the like.
        """
        return rule if isinstance(rule, Rule) else Rule(_function_name(rule), rule, decide=_decide_of(rule))

    def check_named(self, task: str) -> None:
        """Raise TvLensError if a resumed run could not tell this rule from another.

        Args:
            task: the task's name, for the message.

        Raises:
            TvLensError: a resumed run could not tell this rule from another.
        """
        if not self.is_named:
            raise TvLensError(
                f"task {task!r}: its rule is {self.accepts!r}, which has no name, so a run kept in a folder "
                "could not tell whether it is the same rule later; write Rule('a name', rule)"
            )


def _function_name(accepts: Accepts) -> str:
    rule = inspect.unwrap(accepts)
    if not isinstance(rule, FunctionType) or rule.__closure__ or "<" in rule.__qualname__:
        return ""
    if rule.__module__.split(".")[0] == "tv_lens":
        return rule.__name__
    try:
        source = ast.dump(ast.parse(textwrap.dedent(inspect.getsource(rule))))
    except (OSError, TypeError, SyntaxError):  # typed into a console that keeps no source
        return rule.__qualname__
    return f"{rule.__qualname__} (source {hashlib.sha256(source.encode()).hexdigest()[:8]})"


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the texts are equal apart from white space around them. Case counts.

    So "cold" and " cold" are equal, although their token ids differ.

    Args:
        prediction: a generated answer.
        answer: the expected answer.

    Returns:
        True if they are equal.

    Examples:
        >>> exact_match(" cold", "cold"), exact_match("Cold", "cold"), exact_match("col", "cold")
        (True, False, False)
    """
    return prediction.strip() == answer.strip()


def starts_with(prediction: str, answer: str) -> bool:
    """Whether the prediction begins with the whole answer, or is the whole first word of it.

    A longer word or number ("colder", "30", "3,000", "3.5") does not begin with the answer "cold" or "3", in any script
    that puts spaces between words. In Chinese, Japanese, Thai, Lao, Khmer and Burmese, which do not, a longer word
    counts as beginning with a shorter one.

    The second half lets a completion cut short (`max_new_tokens=1`) score on an answer of several words. A fragment of
    a word is never enough; `first_token(model)` also accepts a first *token* that is less than a word.

    Args:
        prediction: a generated answer.
        answer: the expected answer.

    Returns:
        True if it does.

    Examples:
        >>> starts_with("cold and wet", "cold"), starts_with("New", "New York"), starts_with("T", "Taipei")
        (True, True, False)
        >>> starts_with("cold_water()", "cold"), starts_with("colder", "cold"), starts_with("30", "3")
        (True, False, False)
    """
    prediction, answer = prediction.strip(), answer.strip()
    if not answer:
        return not prediction
    if prediction == answer.split()[0]:
        return True
    return prediction.startswith(answer) and not _word_continues(prediction, len(answer))


def _decide_of(accepts: Accepts) -> Decide | None:
    if accepts is exact_match:
        return _decide_exact_match
    return _decide_starts_with if accepts is starts_with else None


def _decide_exact_match(beginning: str, answer: str) -> bool | None:
    return None if _may_equal(beginning, answer.strip()) else False


def _decide_starts_with(beginning: str, answer: str) -> bool | None:
    beginning, answer = beginning.lstrip(), answer.strip()
    if answer and beginning.startswith(answer):
        continues = _continues(beginning, len(answer))
        return None if continues is None else not continues
    first_word = answer.split()[0] if answer else ""
    return None if _may_equal(beginning, answer) or _may_equal(beginning, first_word) else False


def _may_equal(beginning: str, text: str) -> bool:
    """Whether a prediction with this beginning can be the text, apart from white space around it."""
    return beginning.strip() == text or text.startswith(beginning.lstrip())


# Letters, marks and digits of scripts that put spaces between words.
_WORD = regex.compile(
    r"[[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    r"\p{Tai_Tham}\p{New_Tai_Lue}\p{Tai_Le}\p{Javanese}\p{Balinese}]]",
    regex.V1,
)
# What may come between two letters of one word, or two digits of one number.
_APOSTROPHE = regex.compile(r"['\u2019]\p{L}")
_NUMBER_GROUP = regex.compile(r"[.,'_\u2019\u00a0\u202f\u066b\u066c]\p{Nd}")
_GRAPHEME = regex.compile(r"\X")


def _word_continues(text: str, end: int) -> bool:
    """Whether a word, number or character of `text` extends across position `end`."""
    return _continues(text, end) is True


def _continues(beginning: str, end: int) -> bool | None:
    """Whether a word, number or character extends across position `end` of every text with this beginning; None if
    that depends on what follows. Texts are stripped, so white space at the end may be left out.
    """
    last, rest = beginning[end - 1], beginning[end:]
    if not rest:
        return None
    if end not in {match.end() for match in _GRAPHEME.finditer(beginning)}:
        return None if rest.isspace() else True  # a combining mark, or a part of an emoji, follows
    if not _WORD.match(last):
        return False
    if _WORD.match(rest):
        return True
    joint = (_NUMBER_GROUP if last.isdecimal() else _APOSTROPHE).match(rest, partial=True)
    if joint is None:
        return False
    return None if joint.partial else True
