"""Records in memory: lists of dictionaries, datasets, data frames and series, without importing their packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from tv_lens.errors import TvLensError
from tv_lens.tasks.describe import short, some
from tv_lens.tasks.readers import Content, Located, Table


@runtime_checkable
class Frame(Protocol):
    """A pandas data frame."""

    @property
    def columns(self) -> Any:
        """The columns' names."""

    def itertuples(self, index: bool = ..., name: str | None = ...) -> Iterable[tuple[Any, ...]]:
        """The rows, with their labels first."""


@runtime_checkable
class Series(Protocol):
    """A pandas series."""

    @property
    def index(self) -> Any:
        """The labels."""

    def items(self) -> Iterable[tuple[Any, Any]]:
        """Labels with values."""

    def to_frame(self) -> Any:
        """The series as a data frame."""


# What `Task.from_records` accepts. A `datasets.Dataset` is an iterable of mappings.
Records: TypeAlias = Iterable[Any] | Frame | Series


def content_of(records: Records) -> Content:
    """The records in the form that a reader returns.

    Raises:
        TvLensError: something else than records.
    """
    if isinstance(records, (str, bytes)):
        raise TvLensError(f"records are {short(records)}; pass a list of records, or read a file with Task.from_file")
    if isinstance(records, Mapping):
        return _columns(records)
    if isinstance(records, Frame):
        rows = [(f"row {short(label)}", cells) for label, *cells in records.itertuples(index=True, name=None)]
        return Table(rows, tuple(records.columns))
    if isinstance(records, Series):
        return [(f"row {i}", pair) for i, pair in enumerate(records.items(), start=1)]
    if not isinstance(records, Iterable):
        raise TvLensError(f"records are a {type(records).__name__}; pass a list of records or pairs")
    return list(_located(records))


def _located(records: Iterable[Any]) -> Iterator[Located]:
    for i, record in enumerate(records, start=1):
        yield f"{'record' if isinstance(record, Mapping) else 'pair'} {i}", record


def _columns(records: Mapping[Any, Any]) -> Table:
    columns = {name: column for name, column in records.items() if isinstance(column, (list, tuple))}
    if len(columns) < len(records) or len(columns) < 2:
        if all(isinstance(value, (str, list, tuple)) for value in records.values()):
            raise TvLensError("records are a mapping of inputs to outputs; use Task.from_mapping")
        raise TvLensError(
            f"records are a mapping of {some(list(records))}; pass one of its parts, such as records[...]"
        )
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        raise TvLensError(f"the columns {some(list(columns))} have different lengths: {sorted(lengths)}")
    rows = zip(*columns.values(), strict=True)
    return Table([(f"row {i}", cells) for i, cells in enumerate(rows, start=1)], tuple(columns))
