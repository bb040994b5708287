"""The errors that tv_lens raises on purpose. All of them derive from `TvLensError`.

The command line prints these, `OSError` and `ImportError` as one line. Any other exception is a bug and keeps its
traceback.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping


class TvLensError(ValueError):
    """Something the caller can fix. The message says what is wrong, where, and what to do about it."""


class UnsupportedError(TvLensError, TypeError):
    """The model or the engine cannot do what was asked."""


class EngineError(TvLensError, RuntimeError):
    """The model did not do what was asked of it, so its numbers cannot be used.

    Examples:
        >>> issubclass(EngineError, TvLensError)
        True
    """


class MissingExtraError(TvLensError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class GridError(TvLensError, RuntimeError):
    """Some cells of a grid failed on their workers. `failures` has the errors, by the cells' names."""

    def __init__(self, message: str, failures: Mapping[str, BaseException] | None = None) -> None:
        super().__init__(message)
        self.failures = dict(failures or {})


class TvLensWarning(UserWarning):
    """A result that may not mean what the caller expects."""


def warn(message: str) -> None:
    """Warn at the line of the caller's code that called tv_lens."""
    depth, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "tv_lens":
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, TvLensWarning, stacklevel=depth + 1)
