"""What the command line prints fits the terminal, and files get whole tables."""

from __future__ import annotations

import io
import re
import sys

import pandas as pd
import pytest

from tv_lens.cli.tables import print_table, small_bar

ROWS = pd.DataFrame(
    {
        "task": ["antonyms", "present_to_gerund"],
        "n": [50, 50],
        **{name: ["0.04 [0.00, 0.14]", "0.98 [0.89, 1.00]"] for name in ("zero-shot", "few-shot", "patched")},
        "over ties": ["", "0.90-0.98"],
        "p zero-shot": ["1e-05", "2e-09"],
    }
)
LEGEND = "p zero-shot: McNemar's exact test, patched against zero-shot, two-sided"


def printed(monkeypatch: pytest.MonkeyPatch, columns: int | None, rows: pd.DataFrame = ROWS, keys: int = 1) -> str:
    """What is printed on a terminal of that width; in a file if it is None."""
    stream = io.StringIO()
    stream.isatty = lambda: columns is not None  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns or 80))
    monkeypatch.setenv("TERM", "xterm")
    print_table(rows, LEGEND, keys)
    written = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())  # bold
    return "\n".join(line.rstrip() for line in written.splitlines())


@pytest.mark.parametrize("columns", [24, 40, 59, 60, 80, 100, 300])
def test_every_cell_is_shown_and_no_line_is_too_long(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    text = printed(monkeypatch, columns)
    assert max(map(len, text.splitlines())) <= columns
    squeezed = "".join(text.split())
    for name in ROWS:
        assert name == "task" or "".join(str(name).split()) in squeezed  # which a block does not say
        for cell in ROWS[name]:
            assert "".join(str(cell).split()) in squeezed
    assert " ".join(text.split()).startswith(LEGEND)


def test_a_wide_terminal_has_one_table_and_a_narrower_one_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, 300).count("present_to_gerund") == 1
    parts = printed(monkeypatch, 80).split("\n\n")
    assert len(parts) == 3  # the legend, and two tables
    for part in parts[1:]:
        heading, rule, *rows = part.strip("\n").splitlines()
        assert heading.startswith("task  ")
        assert set(rule) == {"─"}
        assert [row.split()[0] for row in rows] == ["antonyms", "present_to_gerund"]
    both = printed(monkeypatch, 60, ROWS.assign(task=["a", "b"]), keys=2).split("\n\n")
    assert all(part.strip("\n").startswith("task   n") for part in both[1:])


def test_a_narrow_terminal_has_a_block_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    _, one, other, *_ = printed(monkeypatch, 40).split("\n\n")
    assert one.splitlines() == [
        "antonyms",
        "  n            50",
        "  zero-shot    0.04 [0.00, 0.14]",
        "  few-shot     0.04 [0.00, 0.14]",
        "  patched      0.04 [0.00, 0.14]",
        "  p zero-shot  1e-05",  # and no empty cell
    ]
    assert other.splitlines()[0] == "present_to_gerund"


def test_a_row_without_a_name_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pd.DataFrame([{"file": "a_file_with_a_long_name.safetensors", "tasks": 3, "model": "of some size"}])
    assert printed(monkeypatch, 40, rows, keys=0).split("\n\n")[1].splitlines() == [
        "file   a_file_with_a_long_name.safetenso",
        "       rs",
        "tasks  3",
        "model  of some size",
    ]


def test_a_file_has_the_whole_table_and_the_legend_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, None).splitlines()
    assert lines[0] == LEGEND
    assert max(map(len, lines)) > 100
    assert sum("present_to_gerund" in line for line in lines) == 1


def test_bars_have_eighths_where_they_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 20 columns are 160 eighths, and a narrow terminal has 8 columns."""
    for encoding, expected in (
        ("utf-8", ["", "▏", "█████", "█" * 12 + "▊", "█" * 20]),
        ("ascii", ["", "#" * 5, "#" * 20]),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        fractions = [0.0, 1 / 160, 0.25, 102 / 160, 1.0] if encoding == "utf-8" else [0.0, 0.25, 1.0]
        assert [small_bar(each) for each in fractions] == expected
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "40")
    assert small_bar(0.5) == "████"
