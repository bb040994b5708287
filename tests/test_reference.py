"""The reference holds every public name once, and every public function says what it takes, returns and raises."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tv_lens as tv

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
FUNCTIONS = [name for name in tv.__all__ if inspect.isfunction(getattr(tv, name))]
CLASSES = [name for name in tv.__all__ if inspect.isclass(getattr(tv, name))]


def source_of(function: Callable[..., Any]) -> ast.FunctionDef:
    [node] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(node, ast.FunctionDef)
    return node


def parameters(node: ast.FunctionDef) -> list[str]:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    starred = [each for each in (node.args.vararg, node.args.kwarg) if each is not None]
    return [each.arg for each in [*arguments, *starred] if each.arg not in ("self", "cls")]


def section(docstring: str, name: str) -> str:
    """The body of a section of a docstring in Google's style, "" without one."""
    match = re.search(rf"^{name}:\n((?: .*\n|\n)+)", docstring + "\n", re.M)
    return "" if match is None else textwrap.dedent(match[1])


def described(docstring: str) -> list[str]:
    return re.findall(r"^\*{0,2}(\w+): ", section(docstring, "Args"), re.M)


def test_the_reference_holds_every_public_name_once() -> None:
    pages = [path.read_text(encoding="utf-8") for path in REFERENCE.glob("*.md")]
    listed = Counter(name for page in pages for name in re.findall(r"^::: tv_lens\.(\w+)$", page, re.M))
    assert listed == Counter(tv.__all__)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_models_type_is_never_any(name: str) -> None:
    """Except for a name, and for what is turned into an engine. With an executor a model is booted by its workers."""
    others = {"engine_for": "object", "vllm_engine": "str | None"}
    others |= dict.fromkeys(("run_experiment", "compare"), "Model | Boot")
    for parameter in inspect.signature(getattr(tv, name)).parameters.values():
        if parameter.name == "model":
            assert parameter.annotation == others.get(name, "Model")


def described_by(function: Callable[..., Any]) -> tuple[list[str], bool, bool]:
    """Which parameters a docstring describes, and whether it says what is returned and raised."""
    docstring = inspect.getdoc(function) or ""
    return described(docstring), bool(section(docstring, "Returns")), bool(section(docstring, "Raises"))


def expected_of(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """The parameters, and whether anything is returned."""
    node = source_of(function)
    return parameters(node), not (isinstance(node.returns, ast.Constant) and node.returns.value is None)


def raises(function: Callable[..., Any]) -> bool:
    return any(isinstance(each, ast.Raise) and each.exc for each in ast.walk(source_of(function)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_say_what_they_take_return_and_raise(name: str) -> None:
    function = getattr(tv, name)
    args, returned, raised = described_by(function)
    assert (args, returned) == expected_of(function)
    assert raised or not raises(function)


def own_methods(kind: type) -> list[Callable[..., Any]]:
    """Public methods with parameters that no base class has: these are described there."""
    inherited = {name for base in kind.__mro__[1:] for name in vars(base)}
    members = {name: getattr(kind, name) for name in vars(kind) if not name.startswith("_") and name not in inherited}
    functions = [each for each in members.values() if inspect.isfunction(each) or inspect.ismethod(each)]
    public = [each for each in functions if not each.__name__.startswith("_")]  # a field's default may be private
    return [each for each in public if parameters(source_of(each))]


@pytest.mark.parametrize("name", CLASSES)
def test_methods_say_what_they_take_return_and_raise(name: str) -> None:
    for method in own_methods(getattr(tv, name)):
        args, returned, raised = described_by(method)
        assert (args, returned) == expected_of(method), method.__qualname__
        assert raised or not raises(method), method.__qualname__


WITHOUT_EXAMPLES = [name for name in CLASSES if issubclass(getattr(tv, name), Exception)]


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *CLASSES} - {*WITHOUT_EXAMPLES}))
def test_examples_are_shown(name: str) -> None:
    assert ">>> " in section(inspect.getdoc(getattr(tv, name)) or "", "Examples")
