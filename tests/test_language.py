"""Plain English: phrases and names that the project does not use, in code, messages, tests and documentation."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted(path for name in ("tv_lens", "tests", "examples") for path in (ROOT / name).rglob("*.py"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tv_lens").rglob("*.html")])
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))

# Each with what to write instead.
PHRASES = {
    r"\bstands?\b(?!:|-in)": "is, is listed",
    r"\btold\b": "given, reported, distinguished",
    r"\bgo(es)? on\b": "continue, resume",
    r"\bon(e's|es) own\b|\bof (its|their) own\b": "custom, separate",
    r"\bof before\b": "older",
    r"\bno say\b": "is ignored",
    r"(?<!there )\b(is|are|was|were) no (?!longer\b|more\b|later\b)": "is not a",
    r"\bhangs? on\b": "depend on",
    r"\bcolour|\bneighbour|(token|normal|serial|quant|recogn|organ|summar)is(e|ing|ation)": "American spelling",
    r"\bcannot but\b": "must",
    r"\bas (it|they) can be\b": "as possible",
    r"(^|[.;] )Where (a|an|the|it|they|there|no)\b[^.,;]+, (?!and|or|how)": "If",
    r"\b(none|nothing|false|true|error|raises?|refused|empty|zero|0) where\b": "if",
    r"\bbe had\b": "is available",
}  # fmt: skip
NAMES = {"found", "told", "place", "room", "knowing"}


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Comments, text literals and the words of the names of tests, by line."""
    source = path.read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        elif isinstance(node, ast.FunctionDef):
            yield node.lineno, node.name.replace("_", " ")


def faults(texts: Iterator[tuple[int, str]], path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {match[0]!r}; write: {instead}"
        for line, text in texts
        for phrase, instead in PHRASES.items()
        if (match := re.search(phrase, text, re.I | re.M))
    ]


@pytest.mark.parametrize("path", [path for path in PYTHON if path != Path(__file__)], ids=lambda path: path.name)
def test_python_is_in_plain_english(path: Path) -> None:
    assert faults(texts_of(path), path) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_in_plain_english(path: Path) -> None:
    assert faults(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1), path) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_in_plain_english(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert faults(((i, "".join(cell["source"])) for i, cell in enumerate(cells)), path) == []


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_names_say_what_they_hold(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.id: node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg: node.lineno for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert {name: line for name, line in names.items() if name in NAMES} == {}


@pytest.mark.parametrize(
    "text",
    [
        "The names stand in the stub.",
        "a key that stands twice",
        "stopped, it goes on where it was",
        "rules of one's own",
        "padding has no say",
        "one that is no Unicode",
        "does not hang on the batch",
        "None where the file is missing",
        "Where a GPU is full, smaller passes are made.",
    ],
)
def test_the_phrases_are_recognized(text: str) -> None:
    assert faults(iter([(1, text)]), ROOT / "x") != []


@pytest.mark.parametrize(
    "text",
    ["There is no other task.", "no longer needed", "it is no longer there", "where it stopped", "is not a text"],
)
def test_plain_sentences_are_accepted(text: str) -> None:
    assert faults(iter([(1, text)]), ROOT / "x") == []
