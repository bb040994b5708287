"""Where vectors come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeAlias

import torch

from tv_lens.prompts import PromptFormat

# Options of a method, as they are written into files.
Option: TypeAlias = bool | int | float | str | list[Any] | None


def versions() -> dict[str, str]:
    """The versions of what computes, for provenance. That of torch includes its build, such as +cu132."""
    numbers = {name: version(name) for name in ("tv-lens", "transformer-lens", "transformers")}
    return {**numbers, "torch": str(torch.__version__)}


@dataclass(frozen=True)
class Term:
    """One summand of vectors that were added up: `factor` times the vectors of `task`, made by `method`."""

    factor: float
    task: str
    method: str

    def __str__(self) -> str:
        return f"{self.factor:g} * {self.task} ({self.method})"


@dataclass(frozen=True, repr=False)
class Provenance:
    """Where vectors come from. `str` writes it as a sum of terms.

    Attributes:
        model: the model's name.
        task: the task's name, or a formula.
        method: how they were made.
        options: the method's options.
        template: how the prompts were written.
        prompts: the texts they were read from, each with its own query.
        substitutes: the queries asked instead.
        prepend_bos: the setting that was used.
        bos: the token in front of every text; "" for none, None if unknown.
        versions: of the packages.
        terms: what was added up, with its factors.

    Examples:
        >>> vectors.provenance.method, vectors.provenance.bos
        ('extract', '<s>')
    """

    model: str
    task: str
    method: str = "extract"
    options: Mapping[str, Option] = field(default_factory=dict)
    template: PromptFormat | None = None
    prompts: tuple[str, ...] = ()
    substitutes: tuple[tuple[str, ...], ...] = ()
    prepend_bos: bool | None = None
    bos: str | None = None
    versions: Mapping[str, str] = field(default_factory=versions)
    terms: tuple[Term, ...] = ()

    def __repr__(self) -> str:
        substitutes = sum(map(len, self.substitutes))
        return f"Provenance({self}; {len(self.prompts)} prompts, {substitutes} substitute queries, {self.template!r})"

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms)) + f", of {self.model}"


def merged_versions(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """The version of each package; all of them if the two sides differ."""
    merged = {}
    for name in {**first, **second}:
        numbers = [number for each in (first, second) if name in each for number in each[name].split(" and ")]
        merged[name] = " and ".join(dict.fromkeys(numbers))
    return merged
