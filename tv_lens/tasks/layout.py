"""Pick inputs and outputs out of what a file or a collection of records holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from tv_lens.errors import TvLensError
from tv_lens.tasks.cleaning import Problem
from tv_lens.tasks.describe import short, some
from tv_lens.tasks.names import contrast_columns, fits_order, has_usual_name, is_about, usual_columns
from tv_lens.tasks.readers import Content, Located, Number, Object, Table, Tree

# How deep parts are looked for.
_MAX_DEPTH = 3

Column: TypeAlias = str | int


@dataclass(frozen=True)
class Choice:
    """What the caller decides about a file: the columns, the part, and whether a table has a header."""

    input: Column | None = None
    output: Column | None = None
    under: str | None = None
    header: bool | None = None

    @property
    def names(self) -> list[str]:
        """The columns that are given by name."""
        return [each for each in (self.input, self.output) if isinstance(each, str)]


@dataclass(frozen=True)
class Layout:
    """Located pairs, and notes on what was taken for what."""

    pairs: list[Located]
    notes: tuple[str, ...] = ()


def lay_out(content: Content, choice: Choice) -> Layout:
    """The pairs in `content`.

    Raises:
        TvLensError: the columns or the part are not clear, or not there; the message lists them.
    """
    part, notes = part_of(content, choice)
    if isinstance(part, Table):
        return _from_table(part, choice, notes)
    if choice.header is not None:
        raise TvLensError("header= is for tables (.csv, .tsv); leave it out")
    return Layout(_from_items(part, choice), notes)


def part_of(content: Content, choice: Choice) -> tuple[Table | list[Located], tuple[str, ...]]:
    """The table, or the pairs and records, that `under` names; without it the only one there is."""
    if isinstance(content, Tree):
        return _part(content.value, choice)
    if choice.under is not None:
        raise TvLensError(f"under={choice.under!r} picks a part of nested JSON, and this holds no parts; leave it out")
    return content, ()


# Nested data


def _part(value: Any, choice: Choice) -> tuple[Table | list[Located], tuple[str, ...]]:
    prefix = ""
    if choice.under is not None:
        value, prefix = _follow(value, choice.under), f"{choice.under}, "
    if isinstance(value, Object):
        return _object(value, choice, prefix)
    if isinstance(value, list):
        return _list(value, prefix), ()
    raise TvLensError(
        f"{prefix}holds a {type(value).__name__}; expected an object of inputs and outputs, or a list of pairs or "
        "records"
    )


def _follow(value: Any, under: str) -> Any:
    """The part at a key, or at a path of keys joined by dots."""
    if isinstance(value, Object):
        if under in dict(value):
            return dict(value)[under]
        first, _, rest = under.partition(".")
        if rest and first in dict(value):
            return _follow(dict(value)[first], rest)
    parts = dict(_parts(value, Choice()))
    raise TvLensError(
        f"there is no part {under!r}; " + (f"there are {_counted(parts)}" if parts else "it has no parts")
    )


def _list(items: Sequence[Any], prefix: str) -> list[Located]:
    kind = "record" if items and isinstance(items[0], (Object, Mapping)) else "pair"
    return [(f"{prefix}{kind} {i}", item) for i, item in enumerate(items, start=1)]


def _object(value: Object, choice: Choice, prefix: str) -> tuple[Table | list[Located], tuple[str, ...]]:
    columns = _columns_of_lists(value, choice)
    if columns is not None:
        return columns, ()
    if _holds_records(value, choice):
        return [(f"{prefix}record {short(key)}", record) for key, record in value], ()
    parts = dict(_parts(value, choice))
    if len(parts) > 1:
        raise TvLensError(
            f"{prefix}holds several parts: {_counted(parts)}; pick one, such as under={next(iter(parts))!r}"
        )
    if not parts:
        return [(f"{prefix}key {i}", pair) for i, pair in enumerate(value, start=1)], ()
    [(name, part)] = parts.items()
    located, notes = _part(part, Choice(choice.input, choice.output))
    if isinstance(part, Object) and isinstance(located, list) and not _holds_records(part, choice):
        rest = [key for key, _ in value if key != name.split(".")[0]]
        if rest:
            notes = (*notes, f"the pairs under {name!r} are read, {some(rest)} is not part of the task")
    return located, notes


def _parts(value: Any, choice: Choice, depth: int = _MAX_DEPTH) -> Iterator[tuple[str, Any]]:
    """Every part that holds pairs or records, by its path."""
    if not isinstance(value, Object):
        return
    for key, part in value:
        if is_about(key):
            continue
        if _holds_pairs(part, choice):
            yield key, part
        elif depth > 1:
            yield from ((f"{key}.{path}", inner) for path, inner in _parts(part, choice, depth - 1))


def _counted(parts: Mapping[str, Any]) -> str:
    listed = [f"{short(name)} ({len(part)})" for name, part in list(parts.items())[:12]]
    return ", ".join(listed) + (", ..." if len(parts) > 12 else "")


def _holds_pairs(value: Any, choice: Choice) -> bool:
    if isinstance(value, Object):
        return bool(value) and (
            _holds_records(value, choice)
            or _columns_of_lists(value, choice) is not None
            or all(_is_plain(each) for _, each in value)
        )
    if isinstance(value, list):
        return bool(value) and (isinstance(value[0], Object) or (isinstance(value[0], list) and len(value[0]) == 2))
    return False


def _is_plain(value: Any) -> bool:
    """Whether a value may be an output: a text, a number, or a list of them."""
    if isinstance(value, Object):
        return False
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, str) for each in value)
    return isinstance(value, (str, Number))


def _holds_records(value: Object, choice: Choice) -> bool:
    """Whether all values are records, as in {"1": {"input": ..., "output": ...}, ...}."""
    if not value or not all(isinstance(record, Object) and record for _, record in value):
        return False
    keys = [tuple(sorted(key for key, _ in record)) for _, record in value]
    named = set(choice.names)
    is_named = bool(named) and named <= set(keys[0])
    return is_named or usual_columns(keys[0]) is not None or (len(keys) > 1 and len(set(keys)) == 1)


def _columns_of_lists(value: Object, choice: Choice) -> Table | None:
    """A table, if the object holds a list for each column.

    Raises:
        TvLensError: it may be one, or inputs with many accepted answers each.
    """
    lists = {key: each for key, each in value if isinstance(each, list) and not isinstance(each, Object)}
    if len(lists) < 2 or any(isinstance(cell, Object) for column in lists.values() for cell in column):
        return None
    lengths = {len(each) for each in lists.values()}
    named = set(choice.names)
    is_clear = (bool(named) and named <= set(lists)) or usual_columns(list(lists)) is not None
    if is_clear:
        if len(lengths) > 1:
            raise TvLensError(f"the columns {some(list(lists))} have different lengths: {sorted(lengths)}")
        rows = zip(*lists.values(), strict=True)
        return Table([(f"row {i}", row) for i, row in enumerate(rows, start=1)], tuple(lists))
    if len(lists) == len(value) and len(lengths) == 1 and max(lengths) > max(len(lists), 3):
        raise TvLensError(
            f"{some(list(lists))} hold {max(lengths)} values each, so they seem to be columns; say which with "
            "input='...', output='...'. If they are inputs with that many accepted answers, use Task.from_mapping"
        )
    return None


# Records and pairs


def _from_items(items: Sequence[Located], choice: Choice) -> list[Located]:
    is_record = [isinstance(item, (Object, Mapping)) for _, item in items]
    if not any(is_record):
        return _from_pairs(items, choice)
    names = record_names(items)
    source, target = _columns(names, choice)
    return [(location, _pair_of(item, names[source], names[target])) for location, item in items]


def record_names(items: Sequence[Located]) -> list[Any]:
    """The keys of all records, in the order of their first appearance."""
    records = [dict(item) for _, item in items if isinstance(item, (Object, Mapping))]
    return list(dict.fromkeys(key for record in records for key in record))


def _from_pairs(items: Sequence[Located], choice: Choice) -> list[Located]:
    if choice.input is None and choice.output is None:
        return list(items)
    widths = [len(item) for _, item in items if isinstance(item, (list, tuple))]
    source, target = _columns(list(range(max(widths, default=0))), choice)
    return [(location, _cells(item, source, target)) for location, item in items]


def _cells(item: object, source: int, target: int) -> object:
    if not isinstance(item, (list, tuple)) or len(item) <= max(source, target):
        return Problem(f"{short(item)} has no columns {source} and {target}")
    return [item[source], item[target]]


def _pair_of(item: object, source: str, target: str) -> object:
    if not isinstance(item, (Object, Mapping)):
        return Problem(f"{short(item)} is not a record, as the others are")
    record = dict(item)
    if len(record) < len(item):
        return Problem(f"duplicate key in {short(record)}")
    missing = [name for name in (source, target) if name not in record]
    if missing:
        return Problem(f"{short(record)} has no {short(missing[0])}")
    return [record[source], record[target]]


def _columns(names: Sequence[Any], choice: Choice) -> tuple[int, int]:
    """The numbers of the input and the output column.

    Raises:
        TvLensError: they are not clear, or not there; the message lists the columns.
    """
    contrast = contrast_columns(names)
    if contrast and choice.input is None and choice.output is None:
        raise TvLensError(
            f"holds contrastive pairs ({contrast[0]!r} and {contrast[1]!r}), not inputs with outputs; read them with "
            "tv_lens.ContrastivePairs.from_file"
        )
    given = [None if each is None else _number(names, each) for each in (choice.input, choice.output)]
    if given == [None, None]:
        usual = usual_columns(names)
        if usual is None:
            raise TvLensError(
                f"the columns are {_listed(names)}; say which hold the inputs and outputs: input=..., output=..."
            )
        return usual
    source, target = given
    if source is None:
        source = _other(names, target, 0)
    if target is None:
        target = _other(names, source, 1)
    if source is None or target is None:
        missing = "input" if source is None else "output"
        raise TvLensError(f"the columns are {_listed(names)}; say which holds the {missing}s, too: {missing}=...")
    if source == target:
        raise TvLensError(f"input and output are both the column {names[source]!r}; the columns are {_listed(names)}")
    return source, target


def _other(names: Sequence[Any], known: int | None, side: int) -> int | None:
    """The column of the other side: the usual one, or the only one left."""
    usual = usual_columns(names)
    if usual is not None and usual[side] != known:
        return usual[side]
    return next(i for i in range(2) if i != known) if len(names) == 2 else None


def _number(names: Sequence[Any], column: Column) -> int:
    fitting = [i for i, name in enumerate(names) if name == column]
    if len(fitting) > 1:
        raise TvLensError(f"{len(fitting)} columns are named {column!r}; give its number, counted from 0")
    if fitting:
        return fitting[0]
    digits = column if isinstance(column, int) else int(column) if column.isdecimal() else None
    if digits is None or isinstance(column, bool) or not 0 <= digits < len(names):
        raise TvLensError(f"there is no column {column!r}; the columns are {_listed(names)}")
    return digits


def _listed(names: Sequence[Any]) -> str:
    """The columns with their numbers, or their numbers alone if they have no names."""
    shown = [str(i) if name == i else f"{i} {short(name)}" for i, name in list(enumerate(names))[:20]]
    return ", ".join(shown) + (", ..." if len(names) > 20 else "")


# Tables


def _from_table(table: Table, choice: Choice, notes: tuple[str, ...]) -> Layout:
    rows = list(table.rows)
    if table.names is not None:
        if choice.header is not None:
            raise TvLensError("header= is for tables in files (.csv, .tsv); leave it out")
        if not _is_given(choice) and _in_order(table.names):
            notes = (*notes, f"of the columns {_listed(table.names)} the first is read as input, the second as output")
            choice = Choice(0, 1)
        return _picked(rows, table.names, choice, notes)
    if not rows:
        return Layout([], notes)
    first = [str(cell) for cell in rows[0][1]]
    has_names, note = _header(rows, first, choice)
    names: tuple[Column, ...] = tuple(first) if has_names else tuple(range(len(first)))
    if not _is_given(choice):
        if not has_names and len(first) != 2:
            raise TvLensError(
                f"the first row is {_listed(first)}; say which columns hold the inputs and outputs: input=..., "
                "output=... (names from that row, or numbers), and header=False if that row is data"
            )
        if not has_names or _in_order(first):
            choice = Choice(0, 1)
            note += "; the first column is read as input" if has_names and note else ""
    return _picked(rows[1:] if has_names else rows, names, choice, (*notes, note) if note else notes)


def _is_given(choice: Choice) -> bool:
    return choice.input is not None or choice.output is not None


def _in_order(names: Sequence[Any]) -> bool:
    """Whether nothing but their order distinguishes two columns."""
    is_known = usual_columns(names) is not None or contrast_columns(names) is not None
    return len(names) == 2 and not is_known and fits_order(names)


def _header(rows: Sequence[Located], first: Sequence[str], choice: Choice) -> tuple[bool, str]:
    """Whether the first row holds the columns' names, and a note if that is a guess."""
    if choice.header is not None:
        return choice.header, ""
    if usual_columns(first) is not None or contrast_columns(first) is not None:
        return True, ""
    if [name for name in choice.names if name in first or not name.isdecimal()]:
        return True, ""
    quoted = ", ".join(map(short, first))
    if has_usual_name(first) or _differs(rows):
        return True, (
            f"the first row ({quoted}) is read as the columns' names; header=False reads it as data, header=True "
            "silences this warning"
        )
    return False, (
        f"the first row ({quoted}) is read as data; if it names the columns, use header=True, else header=False "
        "silences this warning"
    )


def _differs(rows: Sequence[Located]) -> bool:
    """Whether a cell of the first row begins with another kind of character than all others of its column."""
    _, first = rows[0]
    for column, cell in enumerate(first):
        others = {_kind(cells[column]) for _, cells in rows[1:] if len(cells) > column}
        if len(rows) > 3 and len(others) == 1 and _kind(cell) not in others:
            return True
    return False


def _kind(cell: str) -> str:
    if not cell:
        return "empty"
    return "digit" if cell[0].isdecimal() else "upper" if cell[0].isupper() else "lower" if cell[0].islower() else ""


def _picked(rows: Sequence[Located], names: Sequence[Any], choice: Choice, notes: tuple[str, ...]) -> Layout:
    source, target = _columns(names, choice)
    pairs: list[Located] = []
    for location, cells in rows:
        if len(cells) == len(names):
            pairs.append((location, [cells[source], cells[target]]))
        elif len(names) == 2:
            pairs.append((location, cells))  # which is not a pair
        else:
            pairs.append((location, Problem(f"{short(cells)} has {len(cells)} cells, not {len(names)}")))
    return Layout(pairs, notes)
