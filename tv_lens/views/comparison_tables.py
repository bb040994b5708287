"""The tables of a comparison as they are read: on its page, and in a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tv_lens.evidence.comparisons import Comparison

Row = Mapping[Any, Any]

# The level of the tests.
_LEVEL = 0.05


class Cell(NamedTuple):
    """A cell's text, and the number that it is sorted by; a cell of text has none."""

    text: str
    key: float | None = None

    @property
    def sort(self) -> str:
        """The number as a script reads it, with six digits."""
        return "-Infinity" if self.key == -math.inf else f"{self.key:.6g}"


class Column(NamedTuple):
    """A heading, and the cell of a row."""

    heading: str
    cell: Callable[[Row], Cell]
    is_text: bool = False


class Table(NamedTuple):
    """A table that sorts by its headings. With `keep` the first two columns stay in view."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: list[list[Cell]]
    keep: bool = False

    def texts(self) -> list[dict[str, str]]:
        """The text of each row's cells, by heading."""
        headings = [column.heading for column in self.columns]
        return [dict(zip(headings, (cell.text for cell in row), strict=True)) for row in self.rows]


def by_method_table(comparison: Comparison) -> Table:
    """A row for each method."""
    columns = [
        _text("method", "method"),
        _number("tasks", "tasks", "d"),
        _number("mean accuracy", "accuracy"),
        *(
            [
                _interval(f"difference from {comparison.methods[0]}", "difference", sign="+"),
                _number("better in", "better", "d"),
                _number("worse in", "worse", "d"),
            ]
            if len(comparison.methods) > 1
            else []
        ),
        _number("better than every control in", "beats_controls", "d"),
        _number("as good as few-shot in", "as_good_as_few_shot", "d"),
        _number("log P gain", "logprob_gain", "+.2f"),
        _number("divergence", "divergence"),
        _number("positions", "positions", ",.0f"),
        _number("seconds", "seconds", ".1f"),
    ]
    caption = (
        "Means over tasks, and in how many tasks a method is better or worse (p < 0.05 after Holm's adjustment). The "
        "difference has its 95% interval over tasks like these. Positions and seconds: what making the vectors of a "
        "task took."
    )
    return _table("by-method", caption, columns, comparison.by_method().to_dict("records"))


def estimates_table(comparison: Comparison) -> Table:
    """A row for each task and method."""
    first = comparison.methods[0]
    against_first = [
        _interval(f"difference from {first}", "difference", "difference_low", "difference_high", sign="+"),
        _p(f"p, different from {first} (Holm)", "p_first_holm"),
    ]
    columns = [
        _text("task", "task"),
        _text("method", "method"),
        _text("kind", "category"),
        _number("n", "n", "d"),
        _number("zero-shot", "zero_shot"),
        _number("few-shot", "few_shot"),
        _interval("accuracy", "accuracy", "low", "high"),
        Column("better than every control?", _verdict, is_text=True),
        _p("p, better than every control (Holm)", "p_controls_holm"),
        Column("strongest control", _strongest),
        *(against_first if len(comparison.methods) > 1 else []),
        _interval("share of few-shot gain", "share", "share_low", "share_high"),
        Column("as good as few-shot?", lambda row: Cell("yes" if row["as_good"] else ""), is_text=True),
        _interval("log P gain", "logprob_gain", "logprob_gain_low", "logprob_gain_high", sign="+"),
        _interval("divergence", "divergence", "divergence_low", "divergence_high"),
        _text("layers", "layers"),
        _text("strengths", "strengths"),
        Column("accuracy over ties", _over_ties),
        _number("detectable", "detectable"),
    ]
    caption = (
        "A row for each task and method, all seeds together, with 95% intervals. Both p-values are adjusted for all "
        "rows by Holm's method."
    )
    return _table("results", caption, columns, comparison.estimates().to_dict("records"))._replace(keep=True)


def conditions_table(comparison: Comparison) -> Table:
    """A row for each task, method and condition; none without conditions."""
    columns = [
        _text("task", "task"),
        _text("method", "method"),
        _text("condition", "condition"),
        _number("n", "n", "d"),
        _number("without a vector", "without"),
        _number("with the vector", "accuracy"),
        _interval("difference", "difference", "low", "high", sign="+"),
        _p("p", "p_value"),
    ]
    caption = (
        "The same test queries, asked in other ways, with the layer and the strength that were chosen for the query "
        "alone. p: two-sided, not adjusted."
    )
    return _table("conditions", caption, columns, comparison.conditions().to_dict("records"))


def _table(name: str, caption: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """The table; a column of numbers that no row has is left out."""
    shown = [column for column in columns if column.is_text or any(column.cell(row).key != -math.inf for row in rows)]
    return Table(name, caption, shown, [[column.cell(row) for column in shown] for row in rows])


def _text(heading: str, name: str) -> Column:
    return Column(heading, lambda row: Cell(str(row[name])), is_text=True)


def _number(heading: str, name: str, how: str = ".2f") -> Column:
    return Column(heading, lambda row: _cell(row[name], f"{row[name]:{how}}" if is_known(row[name]) else ""))


def _p(heading: str, name: str) -> Column:
    return _number(heading, name, ".1g")


def _interval(heading: str, name: str, low: str = "", high: str = "", *, sign: str = "") -> Column:
    """A number with its interval, if it has one."""
    low, high = low or f"{name}_low", high or f"{name}_high"

    def cell(row: Row) -> Cell:
        if not is_known(row[name]):
            return _cell(row[name], "")
        value = f"{row[name]:{sign}.2f}"
        interval = f" [{row[low]:{sign}.2f}, {row[high]:{sign}.2f}]" if is_known(row[low]) else ""
        return _cell(row[name], value + interval)

    return Column(heading, cell)


def _verdict(row: Row) -> Cell:
    return Cell("yes" if is_known(row["p_controls_holm"]) and row["p_controls_holm"] < _LEVEL else "")


def _strongest(row: Row) -> Cell:
    name = row["strongest_control"]
    return _cell(row["control_accuracy"], f"{name} {row['control_accuracy']:.2f}" if name else "")


def _over_ties(row: Row) -> Cell:
    low, high = row["tied_low"], row["tied_high"]
    return _cell(low, f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}")


def _cell(value: Any, text: str) -> Cell:
    """A cell of a number; a missing one comes before all others."""
    return Cell(text, float(value) if is_known(value) else -math.inf)


def is_known(value: Any) -> bool:
    """Whether a table has this number: pandas writes a missing one as None, NaN or NA."""
    import pandas as pd

    return not pd.isna(value)
