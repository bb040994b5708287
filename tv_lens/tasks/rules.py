"""When an answer counts as correct."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable

Accepts = Callable[[str, str], bool]


def exact_match(prediction: str, answer: str) -> bool:
    """Whether the texts are equal, white space around them apart: "cold" and " cold" are equal, though
    their token ids differ. Case counts.

    >>> exact_match(" cold", "cold"), exact_match("Cold", "cold"), exact_match("col", "cold")
    (True, False, False)
    """
    return prediction.strip() == answer.strip()


def starts_with(prediction: str, answer: str) -> bool:
    """Whether the prediction begins with the whole answer, or is the whole first word of it. A longer word or
    number ("colder", "30") does not begin with the answer "cold" or "3".

    The second half lets a completion cut short (`max_new_tokens=1`) score on an answer of several words.
    A fragment of a word is never enough; `first_token(model)` also accepts a first *token* that is less
    than a word.

    >>> starts_with("cold and wet", "cold"), starts_with("New", "New York"), starts_with("T", "Taipei")
    (True, True, False)
    >>> starts_with("cold_water()", "cold"), starts_with("colder", "cold"), starts_with("30", "3")
    (True, False, False)
    """
    prediction, answer = prediction.strip(), answer.strip()
    if not answer:
        return not prediction
    begins = prediction.startswith(answer) and not _goes_on(answer[-1], prediction[len(answer) :])
    return begins or prediction == answer.split()[0]


def _goes_on(last: str, rest: str) -> bool:
    """Whether `rest` goes on with the word or number that `last` ends, in scripts that put spaces between words."""
    return all(unicodedata.category(char) in ("Lu", "Ll", "Lt", "Nd") for char in (last, rest[:1] or " "))


def rule_name(rule: Accepts) -> str:
    """What a rule is called in settings: its name, and for rules that are not tv_lens's own a digest of their code, as
    two lambdas have one name.
    """
    code = getattr(rule, "__code__", None)
    if code is None:
        return type(rule).__qualname__
    if rule.__module__.startswith("tv_lens."):
        return rule.__name__
    constants = [each for each in code.co_consts if not hasattr(each, "co_code")]
    digest = hashlib.sha256(code.co_code + repr((constants, code.co_names)).encode()).hexdigest()[:8]
    return f"{rule.__qualname__} {digest}"
