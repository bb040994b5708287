"""Write a file whole or not at all, and read JSON into typed values."""

from __future__ import annotations

import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tv_lens.errors import TvLensError

T = TypeVar("T")


def write_whole(path: str | Path, content: bytes) -> None:
    """Write `content` under a temporary name in the same folder, then rename it.

    A reader, or an interrupt, sees the old file or the new one and nothing in between. A symbolic link is followed,
    and an existing file keeps its permissions.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    target = Path(os.path.realpath(path))
    # Not named after the target, whose name may be as long as the file system allows.
    partial = target.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            os.chmod(partial, stat.S_IMODE(target.stat().st_mode))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_whole(path: str | Path) -> bytes:
    """The content of a file.

    Raises:
        OSError: the file cannot be read.
        TvLensError: the path is not one that a file could have.
    """
    try:
        return Path(path).read_bytes()
    except ValueError as error:  # a NUL character
        raise TvLensError(f"{path}: {error}") from error


def to_json(data: Any, indent: int | None = None) -> bytes:
    """`data` (dataclasses included) as readable JSON in UTF-8; any text in it comes back from `from_json`."""
    # A lone surrogate has no UTF-8; Python's escape of it is also JSON's.
    text = json.dumps(msgspec.to_builtins(data), ensure_ascii=False, indent=indent)
    return text.encode(errors="backslashreplace")


def from_json(content: bytes | str) -> Any:
    """The value that JSON holds, if it can be read in one way only.

    Raises:
        TvLensError: invalid JSON, nesting too deep, a duplicate key, NaN or infinity.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) < len(pairs):
            raise TvLensError(f"duplicate key among {[key for key, _ in pairs][:20]}")
        return data

    def refuse_constant(name: str) -> None:
        raise TvLensError(f"{name} is not a JSON number")

    try:
        return json.loads(content, object_pairs_hook=without_duplicates, parse_constant=refuse_constant)
    except UnicodeDecodeError as error:  # its repr is the whole file
        raise TvLensError(f"not UTF-8 ({error})") from error
    except RecursionError as error:
        raise TvLensError("nested too deeply") from error
    except TvLensError:
        raise
    except ValueError as error:  # invalid JSON, or a number of thousands of digits
        raise TvLensError(str(error)) from error


def from_typed_json(content: bytes | str, kind: type[T]) -> T:
    """JSON as a value of type `kind`, every part of it checked against its annotation.

    Raises:
        TvLensError: as `from_json`, or a part of another type; the message gives its JSON path.
    """
    return typed(from_json(content), kind)


def typed(data: Any, kind: type[T]) -> T:
    """Builtin values as a value of type `kind`, without converting any number or text.

    Raises:
        TvLensError: a part of another type; the message gives its JSON path.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise TvLensError(str(error)) from error
    except UnicodeEncodeError as error:  # while it names the key
        raise TvLensError(f"a key is not Unicode text ({error})") from error
