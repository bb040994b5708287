"""Write a file whole or not at all, and read JSON strictly."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: str | Path, content: bytes) -> None:
    """Write `content` beside `path` under another name, then rename: a reader, or an interrupt, finds the old file
    or the new one and nothing between.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_json(data: Any, indent: int | None = None) -> bytes:
    """`data` as JSON in UTF-8, its texts readable; whatever they hold comes back from `from_json`."""
    # Half of a surrogate pair has no UTF-8; Python's escape of it is JSON's as well.
    return json.dumps(data, ensure_ascii=False, indent=indent).encode(errors="backslashreplace")


def from_json(content: bytes | str) -> Any:
    """What JSON holds, where it can be read in one way only.

    Raises:
        ValueError: no JSON, nested too deeply, or a key that stands twice, NaN or an infinity in it.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key stands twice in {[key for key, _ in pairs][:20]}")
        return found

    def no_number(name: str) -> None:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(content, object_pairs_hook=once, parse_constant=no_number)
    except UnicodeDecodeError as error:  # whose repr is the whole file
        raise ValueError(f"not UTF-8 ({error})") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
