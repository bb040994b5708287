"""The HTML page of a comparison; `tv_lens.views.report` registers it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tv_lens.evidence.comparisons import Comparison
from tv_lens.evidence.settings import Settings
from tv_lens.vectors import layers_text
from tv_lens.views.pages import describe_controls, describe_format, for_script, write_page
from tv_lens.views.plots import plot
from tv_lens.views.repeating import method_code, own_method, repeat_code

Row = Mapping[str, Any]

# The level of the tests that the page speaks of.
_LEVEL = 0.05


class Cell(NamedTuple):
    """A cell's text, and the number that it is sorted by; a cell of text has none."""

    text: str
    key: float | None = None

    @property
    def sort(self) -> str:
        """The number as a script reads it."""
        return "-Infinity" if self.key == -math.inf else repr(self.key)


class Column(NamedTuple):
    """A heading, and the cell of a row."""

    heading: str
    cell: Callable[[Row], Cell]
    is_text: bool = False


class Table(NamedTuple):
    """A table that sorts by its headings."""

    name: str
    caption: str
    columns: Sequence[Column]
    rows: list[list[Cell]]


def write_comparison(comparison: Comparison, path: str | Path) -> None:
    """Write the page, whole or not at all: what was compared, the table of methods, the figure, the table of tasks and
    methods, the conditions, how to read them, and how to repeat the run. All text is shown as text.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    write_page(
        path,
        "comparison.html",
        settings=comparison.settings,
        seeds=comparison.seeds,
        first=comparison.methods[0],
        facts=_facts(comparison),
        by_method=_by_method(comparison),
        overview=for_script(plot(comparison)),
        estimates=_estimates(comparison),
        conditions=_conditions(comparison),
        template=describe_format(comparison.settings.template),
        repeat=repeat_code(comparison),
    )


def _facts(comparison: Comparison) -> dict[str, str]:
    """What was compared, by name."""
    settings = comparison.settings
    conditions = {"other conditions": ", ".join(settings.conditions)} if settings.conditions else {}
    return {
        "model": f"{settings.model}, {settings.n_layers} layers, {settings.dtype}",
        "tasks": f"{len(settings.tasks)}",
        "methods": "; ".join(_method_text(name, settings) for name in settings.methods),
        "prompts": f"{settings.shots} shots; {_train_text(settings)}, {settings.n_dev} to choose a layer and a strength, "
        f"{settings.n_test} to report, for each task and seed (fewer if a task has fewer inputs)",
        "seeds": ", ".join(map(str, comparison.seeds)),
        "template": describe_format(settings.template),
        "layers tried": layers_text(settings.layers),
        "strengths tried": ", ".join(f"{strength:g}" for strength in settings.strengths)
        + " (of vectors that are not written over an activation)",
        "scoring": f"{settings.scoring} by {', '.join(dict.fromkeys(settings.rules.values()))}, at most "
        f"{settings.max_new_tokens} tokens",
        "controls": describe_controls(list(settings.controls)),
        **conditions,
    }


def _method_text(name: str, settings: Settings) -> str:
    method = own_method(name, settings.methods[name])
    return f"{name} = {settings.methods[name]}" if method is None else f"{name} = {method_code(method)}"


def _train_text(settings: Settings) -> str:
    if settings.n_train is None:
        return "vectors from the dev prompts"
    return f"{settings.n_train} prompts to make vectors from"


def _by_method(comparison: Comparison) -> Table:
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
        "task took. A heading sorts."
    )
    return _table("by-method", caption, columns, comparison.by_method().to_dict("records"))


def _estimates(comparison: Comparison) -> Table:
    first = comparison.methods[0]
    against_first = [
        _interval(f"difference from {first}", "difference", "difference_low", "difference_high", sign="+"),
        _p(f"p, different from {first} (Holm)", "p_first_holm"),
    ]
    columns = [
        _text("task", "task"),
        _text("kind", "category"),
        _text("method", "method"),
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
        "rows by Holm's method. A heading sorts."
    )
    return _table("results", caption, columns, comparison.estimates().to_dict("records"))


def _conditions(comparison: Comparison) -> Table:
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
        "alone. p: two-sided, not adjusted. A heading sorts."
    )
    return _table("conditions", caption, columns, comparison.conditions().to_dict("records"))


def _table(name: str, caption: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """The table; a column of numbers that no row has is left out."""
    shown = [
        column for column in columns if column.is_text or any(column.cell(row).key != -math.inf for row in rows)
    ]
    return Table(name, caption, shown, [[column.cell(row) for column in shown] for row in rows])


def _text(heading: str, name: str) -> Column:
    return Column(heading, lambda row: Cell(str(row[name])), is_text=True)


def _number(heading: str, name: str, how: str = ".2f") -> Column:
    return Column(heading, lambda row: _cell(row[name], f"{row[name]:{how}}" if _known(row[name]) else ""))


def _p(heading: str, name: str) -> Column:
    return _number(heading, name, ".1g")


def _interval(heading: str, name: str, low: str = "", high: str = "", *, sign: str = "") -> Column:
    """A number with its interval, if it has one."""
    low, high = low or f"{name}_low", high or f"{name}_high"

    def cell(row: Row) -> Cell:
        if not _known(row[name]):
            return _cell(row[name], "")
        value = f"{row[name]:{sign}.2f}"
        interval = f" [{row[low]:{sign}.2f}, {row[high]:{sign}.2f}]" if _known(row[low]) else ""
        return _cell(row[name], value + interval)

    return Column(heading, cell)


def _verdict(row: Row) -> Cell:
    return Cell("yes" if _known(row["p_controls_holm"]) and row["p_controls_holm"] < _LEVEL else "")


def _strongest(row: Row) -> Cell:
    name = row["strongest_control"]
    return _cell(row["control_accuracy"], f"{name} {row['control_accuracy']:.2f}" if name else "")


def _over_ties(row: Row) -> Cell:
    low, high = row["tied_low"], row["tied_high"]
    return _cell(low, f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}")


def _cell(value: float | None, text: str) -> Cell:
    """A cell of a number; a missing one comes before all others."""
    return Cell(text, float(value) if _known(value) else -math.inf)


def _known(value: Any) -> bool:
    """Whether a table has this number: pandas writes a missing one as None, NaN or NA."""
    import pandas as pd

    return not pd.isna(value)
