"""The command line, `tv-lens`: the library's functions on library tasks or files of pairs.

Results go to standard output, as a table or with `--json`; progress and messages go to standard error.
Exit codes: 0 success, 1 the work failed (one-line message), 2 usage error, 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import tv_lens as tv  # which imports torch and TransformerLens only when a command needs them
from tv_lens.cli.app import app
from tv_lens.cli.checks import UsageError
from tv_lens.cli.comparing import compare
from tv_lens.cli.conflicts import conflict
from tv_lens.cli.experiments import report, run, tasks
from tv_lens.cli.heads import heads
from tv_lens.cli.learning import learn
from tv_lens.cli.output import warn_in_one_line
from tv_lens.cli.tokens import tokens
from tv_lens.cli.vectors import extract, generate, sweep

__all__ = [
    "app",
    "compare",
    "conflict",
    "extract",
    "generate",
    "heads",
    "learn",
    "main",
    "report",
    "run",
    "sweep",
    "tasks",
    "tokens",
]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process. A user's mistake is one line, a bug is a traceback."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = warn_in_one_line
            app(args)
    except (tv.TvLensError, OSError, ImportError) as error:
        print("tv-lens: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    sys.exit(0)
