"""What is being done, and how far it is: bars on a terminal and in notebooks, plain lines elsewhere.

`stage` says what is done inside it; a bar shows the stages around it. Two bars are shown at most: one of a whole run,
and one of the rows or steps inside. What is over in half a second shows nothing.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from tqdm import std
from tqdm.auto import tqdm

# Seconds: before a bar is shown, between two drawings of it on a terminal, and between two plain lines.
_DELAY = 0.5
_REDRAWN = 0.5
_BETWEEN_LINES = 10.0

# Below this width a line has no bar.
_NARROW = 60


@dataclass(eq=False)
class Bar:
    """Counts finished work. `drawn` is the bar of tqdm; without one, plain lines are printed if `prints_lines`.

    `outer` is the bar of the whole run. So many as `done_before` were done before this run. `begun` are being worked
    on, and this `share` of them is done.
    """

    total: int | None = None
    unit: str = "rows"
    words: tuple[str, ...] = ()
    outer: Bar | None = None
    drawn: Any = None
    prints_lines: bool = False
    done: int = 0
    done_before: int = 0
    begun: int = 0
    share: float = 0.0
    since: float = field(default_factory=lambda: time.monotonic())

    def begin(self, n: int) -> None:
        """Say that `n` more are in work."""
        self.begun = n

    def estimate(self, share: float) -> None:
        """Say how much of what is in work is done, from 0 to 1."""
        self.share = share
        self._show()

    def update(self, n: int = 1) -> None:
        """Count `n` more."""
        self.begun, self.share = 0, 0.0
        self.done += n
        self._show()

    def skip(self, n: int = 1) -> None:
        """Count `n` that were done before, which says nothing about the time that the others take."""
        self.done_before += n
        if self.drawn is not None:
            self.drawn.initial += n
            self.drawn.n += n

    def describe(self, *words: str) -> None:
        """Say what is done now."""
        self.words = words
        if self.drawn is not None:
            self.drawn.set_description_str(", ".join(words), refresh=False)
            _redraw(self.drawn)

    def restart(self) -> None:
        """Measure the time that is left from now on."""
        self.since = time.monotonic()
        if self.drawn is not None:
            self.drawn.unpause()

    def _show(self) -> None:
        if self.drawn is not None:
            self.drawn.update(self.count - self.drawn.n)
        elif self.prints_lines:
            _print_if_due(self)

    @property
    def count(self) -> int:
        """How many are done, with the share of those in work."""
        return self.done_before + self.done + int(self.share * self.begun)

    @property
    def line(self) -> str:
        """What is done, how far it is, and how long the rest takes at this speed."""
        words = ", ".join(self.words)
        if self.total is None:
            return words
        count = f"{words}{': ' if words else ''}{self.count} of {self.total} {self.unit}"
        if self.count == self.done_before:
            return count
        seconds = (self.total - self.count) * (time.monotonic() - self.since) / (self.count - self.done_before)
        return f"{count}, {std.tqdm.format_interval(seconds)} left"


# What is done now, the innermost bar that is shown, and the bar of the whole run.
_stages: ContextVar[tuple[str, ...]] = ContextVar("tv_lens_stages", default=())
_inner: ContextVar[Bar | None] = ContextVar("tv_lens_bar", default=None)
_run_bar: ContextVar[Bar | None] = ContextVar("tv_lens_whole_bar", default=None)


@contextmanager
def stage(*words: str) -> Iterator[None]:
    """Say what is done inside, such as the task and the step. It is not for a generator that yields inside."""
    token = _stages.set((*_stages.get(), *words))
    try:
        yield
    finally:
        _stages.reset(token)


def estimate(share: float) -> None:
    """Say how much of the rows in work is done, from 0 to 1."""
    shown = _inner.get()
    if shown is not None:
        shown.estimate(share)


@contextmanager
def bar(total: int | None, unit: str = "rows", *, shown: bool = True) -> Iterator[Bar]:
    """A bar labeled with the current stages. Inside another bar it shows nothing, unless that is of a whole run."""
    if not shown or _inner.get() is not None:
        yield Bar()
        return
    with _shown(Bar(total, unit, _stages.get(), _run_bar.get()), _inner) as made:
        yield made


@contextmanager
def whole_bar(total: int, unit: str, *, shown: bool = True) -> Iterator[Bar]:
    """The bar of a whole run. The bars of its steps are shown below it."""
    if not shown or _run_bar.get() is not None or _inner.get() is not None:
        yield Bar()
        return
    with _shown(Bar(total, unit), _run_bar) as made:
        yield made


@contextmanager
def _shown(made: Bar, variable: ContextVar[Bar | None]) -> Iterator[Bar]:
    """Show the bar, as what it is on this output, until the end."""
    token = None
    try:
        token = variable.set(made)
        if _in_notebook():
            made.drawn = _unless_disabled(tqdm(**_options(made)))
            yield made
        elif sys.stderr.isatty():
            made.drawn = _unless_disabled(_TerminalBar(**_options(made), dynamic_ncols=True))
            with nullcontext() if made.drawn is None else _redrawn(made.drawn):
                yield made
        else:
            made.prints_lines = True
            yield made
    finally:
        if token is not None:
            variable.reset(token)
        if made.drawn is not None:
            made.drawn.close()


def _unless_disabled(drawn: Any) -> Any:
    """The bar; None if the user has turned tqdm off by `TQDM_DISABLE`."""
    return None if drawn.disable else drawn


def _options(made: Bar) -> dict[str, Any]:
    described = {"total": made.total, "unit": made.unit, "desc": ", ".join(made.words)}
    return {**described, "leave": False, "delay": _DELAY, "file": sys.stderr}


def _in_notebook() -> bool:
    """Whether tqdm draws with widgets here."""
    return any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)


def _redraw(drawn: Any) -> None:
    """Draw the bar now, unless it is new."""
    if time.time() >= drawn.start_t + drawn.delay:
        drawn.refresh()
        drawn.delay = 0  # it has been shown, and is to be removed at the end


# On a terminal


class _TerminalBar(std.tqdm):  # type: ignore[type-arg]
    """A line that fits the window: in a narrow one without a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar. A warning draws it early, and what has been drawn is to be removed at the end."""
        if msg != "":
            self.delay = 0
        return super().display(msg, pos)

    def __str__(self) -> str:
        values: dict[str, Any] = {**self.format_dict}
        columns = values["ncols"] = values["ncols"] or 80
        if self.total is None:
            values["bar_format"], others = "{desc} [{elapsed}]", 12
        elif columns < _NARROW:
            values["bar_format"], others = (
                "{desc} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
                2 * len(str(self.total)) + 16,
            )
        else:
            values["bar_format"] = (
                "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}, {remaining} left]"
            )
            others = 2 * len(str(self.total)) + len(self.unit) + 40
        values["prefix"] = shortened(self.desc, columns - others)
        return self.format_meter(**values)


def shortened(text: str, columns: int) -> str:
    """The text in so many columns, at least four: if it is longer, without its end."""
    return text if len(text) <= columns else text[: max(columns - 3, 1)] + "..."


@contextmanager
def _redrawn(drawn: Any) -> Iterator[None]:
    """Draw the bar again and again, also while nothing is counted, so that it moves."""
    ended = threading.Event()

    def redraw() -> None:
        while not ended.wait(_REDRAWN):
            if not drawn.disable:  # it is when it is closed
                _redraw(drawn)

    thread = threading.Thread(target=redraw, name="tv_lens progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# As plain lines


@dataclass
class _Log:
    """When the last line was printed, by any thread."""

    lock: Any = field(default_factory=threading.Lock)
    last: float = 0.0


_log = _Log()


def _print_if_due(changed: Bar) -> None:
    """Print a line on the bar and the one around it, if they are not new and the last line is old enough."""
    outer = changed if changed.outer is None else changed.outer
    now = time.monotonic()
    with _log.lock:
        if now - max(_log.last, outer.since) < _BETWEEN_LINES:
            return
        _log.last = now
    lines = [each.line for each in dict.fromkeys((outer, changed))]
    print(f"tv-lens: {'; '.join(lines)}", file=sys.stderr, flush=True)
