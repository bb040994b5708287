"""Which tokens an answer is made of, behind a query."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tv_lens.engines import engine_for
from tv_lens.prompts import Example, Template
from tv_lens.tasks.rules import Accepts, starts_with


def first_token(model: Any, template: Template = Template()) -> Accepts:
    """A rule for `max_new_tokens=1`: whether the prediction is the whole first token of the answer, as `model`
    writes that behind `template`'s query, or right by `starts_with`. So "Tai" may stand for "Taipei", where that
    is its first token, and "T" may not.

    A first token that is only part of a character is not accepted. Where answers begin with a piece of their
    input (gerunds: "sing" of "singing"), this accepts a mere repetition.
    """
    engine = engine_for(model)

    def ids(text: str) -> list[int]:
        [tokens] = engine.batches([text])
        return [int(token) for token in tokens.ids[0]]

    @functools.cache
    def first(answer: str) -> str:
        asked, shown = ids(template.ask("x")), ids(template.show(Example("x", answer)))
        same = next((i for i, token in enumerate(shown) if asked[i : i + 1] != [token]), len(shown) - 1)
        return engine.decode(torch.tensor([shown[same : same + 1]]))[0].strip()

    def accepts(prediction: str, answer: str) -> bool:
        token = first(answer)
        # Part of a character reads as U+FFFD whichever it is, so it cannot be told right from wrong.
        told = token and "\ufffd" not in token
        return starts_with(prediction, answer) or bool(told and prediction.strip() == token)

    return accepts
