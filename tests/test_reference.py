"""The reference holds every public name once, and every public function says what it takes, returns and raises."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tv_lens as tv

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
FUNCTIONS = [name for name in tv.__all__ if inspect.isfunction(getattr(tv, name))]


def source_of(function: Callable[..., Any]) -> ast.FunctionDef:
    [node] = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    return node


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    starred = [each for each in (node.args.vararg, node.args.kwarg) if each is not None]
    return [each.arg for each in [*arguments, *starred] if each.arg not in ("self", "cls")]


def section(docstring: str, name: str) -> str:
    """The body of a section of a docstring in Google's style, "" without one."""
    found_section = re.search(rf"^{name}:\n((?:[ \n].*\n?)+)", docstring + "\n", re.M)
    return "" if found_section is None else inspect.cleandoc("\n" + found_section[1])


def described(docstring: str) -> list[str]:
    return re.findall(r"^\*{0,2}(\w+): ", section(docstring, "Args"), re.M)


def test_the_reference_holds_every_public_name_once() -> None:
    pages = [path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")]
    listed = Counter(name for page in pages for name in re.findall(r"^::: tv_lens\.(\w+)$", page, re.M))
    assert listed == Counter(tv.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_models_type_is_never_any(name: str) -> None:
    for parameter in inspect.signature(getattr(tv, name)).parameters.values():
        if parameter.name == "model":
            assert parameter.annotation == ("object" if name == "engine_for" else "Model")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_return_and_raise(name: str) -> None:
    function = getattr(tv, name)
    node, docstring = source_of(function), inspect.getdoc(function) or ""
    assert described(docstring) == parameters(node)
    assert section(docstring, "Returns")
    if any(isinstance(each, ast.Raise) for each in ast.walk(node)):
        assert section(docstring, "Raises")
