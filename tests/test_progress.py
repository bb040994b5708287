"""What is shown while something runs: on a terminal, elsewhere, and not at all."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from models import Twins
from tqdm import std

import tv_lens as tv
from tv_lens import progress
from tv_lens.progress import bar, stage, whole_bar

ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def drawn(self) -> list[str]:
        """What was drawn, one text for each time."""
        return drawn_in(self.getvalue())


def drawn_in(written: str) -> list[str]:
    return [each.rstrip() for each in re.split(r"[\r\n]", ESCAPE.sub("", written)) if each.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard error as a terminal, which is 80 columns wide as long as it does not say otherwise."""
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    show_everything(monkeypatch)
    return stream


def show_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars are shown at once and drawn at every count."""
    really = progress._options
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    monkeypatch.setattr(progress, "_options", lambda made: {**really(made), "mininterval": 0})


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Standard error as a file, with a line for every count."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "_BETWEEN_LINES", 0.0)
    yield stream
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.fixture(autouse=True)
def _no_trace() -> Iterator[None]:
    threads = set(threading.enumerate())
    yield
    assert progress._stages.get() == ()
    assert progress._inner.get() is progress._run_bar.get() is None
    assert not [each for each in set(threading.enumerate()) - threads if each.name == "tv_lens progress"]
    bars: Any = std.tqdm
    assert not list(bars._instances)


def test_a_terminal_shows_what_is_done_and_how_far_it_is(terminal: Terminal) -> None:
    with whole_bar(6, "results") as whole:
        whole.describe("antonyms", "extract")
        whole.update()
        with stage("sweep"), bar(50) as rows:
            rows.update(20)
    drawn = terminal.drawn()
    assert any(re.match(r"antonyms, extract +17%\|.*\| 1/6 results \[00:00, \d+:\d\d left\]", each) for each in drawn)
    assert any(re.match(r"sweep +40%\|.*\| 20/50 rows \[00:00, \d+:\d\d left\]", each) for each in drawn)
    last = re.split(r"[\r\n]", ESCAPE.sub("", terminal.getvalue()))
    assert not last[-1].strip()  # nothing is left behind


def test_bars_can_be_turned_off(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `TQDM_DISABLE=1`, which makes tqdm's bars inert."""
    shown = progress._options
    monkeypatch.setattr(progress, "_options", lambda made: {**shown(made), "disable": True})
    with whole_bar(6, "results") as whole:
        whole.describe("antonyms", "extract")
        whole.skip()
        whole.update()
        with stage("sweep"), bar(50) as rows:
            rows.update(20)
        assert (whole.count, rows.count) == (2, 20)
    assert terminal.getvalue() == ""


def test_a_warning_before_a_bar_is_due_leaves_no_bar_behind(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_DELAY", 60.0)
    with bar(50, "rows"), std.tqdm.external_write_mode(file=terminal):
        terminal.write("a warning\n")
    assert "a warning" in terminal.drawn()
    last = re.split(r"[\r\n]", ESCAPE.sub("", terminal.getvalue()))
    assert not last[-1].strip()


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 200])
def test_a_line_fits_the_window(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """In a pseudo-terminal of that size."""
    primary, secondary = pty.openpty()
    fcntl.ioctl(secondary, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    show_everything(monkeypatch)
    with os.fdopen(secondary, "w") as stream:
        monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
        with stage("a task whose name is longer than a line of most terminals", "control shuffled"):
            with bar(4000) as rows:
                rows.update(2000)
            with bar(None) as waiting:
                waiting.update()
        stream.flush()
        drawn = drawn_in(os.read(primary, 10_000).decode())
    os.close(primary)
    assert 3 * columns // 4 < max(map(len, drawn)) <= columns
    if columns >= 40:
        assert any("2000/4000" in each and "[00:0" in each for each in drawn)


def test_a_bar_moves_while_nothing_is_counted(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_REDRAWN", 0.001)
    drawings = threading.Event()
    really = progress._TerminalBar.refresh

    def refresh(self: Any, *args: Any, **options: Any) -> None:
        really(self, *args, **options)
        if len(terminal.drawn()) > 3:
            drawings.set()

    monkeypatch.setattr(progress._TerminalBar, "refresh", refresh)
    with stage("loading"), bar(10):
        assert drawings.wait(20)
    assert set(terminal.drawn()) == {terminal.drawn()[0]}


def test_what_is_over_at_once_is_not_shown(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_DELAY", 1e9)
    monkeypatch.setattr(progress, "_REDRAWN", 0.0001)
    with bar(3) as rows:
        rows.update(3)
    assert terminal.getvalue() == ""


def test_a_file_gets_plain_lines(lines: io.StringIO) -> None:
    with whole_bar(6, "results") as whole:
        whole.describe("antonyms", "extract")
        whole.skip(2)
        whole.update()
        with stage("sweep"), bar(50) as rows:
            rows.update(20)
    first, second = lines.getvalue().splitlines()
    assert re.fullmatch(r"tv-lens: antonyms, extract: 3 of 6 results, \d+:\d\d left", first)
    assert second.startswith(first)
    assert re.fullmatch(r"; sweep: 20 of 50 rows, \d+:\d\d left", second.removeprefix(first))


@pytest.mark.parametrize("kind", ["terminal", "lines"])
def test_a_part_of_the_rows_in_work_counts(kind: str, request: pytest.FixtureRequest) -> None:
    """By hand: half of 30 rows are 15, and when all of them are done they are counted once."""
    stream = request.getfixturevalue(kind)
    with bar(50) as rows:
        rows.begin(30)
        progress.estimate(0.5)
        assert rows.count == 15
        rows.update(30)
        assert rows.count == 30
        rows.begin(20)
        assert rows.count == 30
    shown = [match[0] for match in re.finditer(r"\b(15|30)(/| of )50 rows", stream.getvalue())]
    assert list(dict.fromkeys(each.replace("/", " of ") for each in shown)) == ["15 of 50 rows", "30 of 50 rows"]


def test_lines_are_far_between(lines: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [100.0]
    monkeypatch.setattr(progress, "_BETWEEN_LINES", 10.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    monkeypatch.setattr(progress, "_log", progress._Log())
    with bar(100) as rows:
        for _ in range(50):
            seconds[0] += 1
            rows.update()
    assert [line.split(",")[0] for line in lines.getvalue().splitlines()] == [
        f"tv-lens: {n} of 100 rows" for n in (10, 20, 30, 40, 50)
    ]
    assert "10 of 100 rows, 01:30 left" in lines.getvalue()  # at one row a second


def test_inside_of_a_bar_there_is_no_other(lines: io.StringIO) -> None:
    """The rows of a training's steps are not shown."""
    with stage("training"), bar(8, "steps") as steps:
        with bar(50) as rows, whole_bar(3, "results") as whole:
            rows.update(20)
            whole.update()
        steps.update()
    assert [line.split(",")[0] for line in lines.getvalue().splitlines()] == ["tv-lens: training: 1 of 8 steps"]


@pytest.mark.parametrize("kind", ["terminal", "lines"])
def test_nothing_is_shown_if_it_is_turned_off(kind: str, request: pytest.FixtureRequest) -> None:
    stream = request.getfixturevalue(kind)
    with whole_bar(2, "results", shown=False) as whole, stage("sweep"), bar(9, shown=False) as rows:
        whole.describe("antonyms")
        rows.update(3)
        whole.update()
    assert stream.getvalue() == ""


@pytest.mark.parametrize("kind", ["terminal", "lines"])
def test_an_error_leaves_nothing_behind(kind: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(kind)

    def interrupted() -> None:
        with whole_bar(2, "results"), stage("sweep"), bar(9) as rows:
            rows.update()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    # `_no_trace` checks the rest.


def test_each_thread_has_its_stages(lines: io.StringIO) -> None:
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        with stage(f"task {number}"), bar(100) as rows:
            barrier.wait()
            for _ in range(100):
                rows.update()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    printed = lines.getvalue().splitlines()
    assert all(re.fullmatch(r"tv-lens: task \d: \d+ of 100 rows, \d+:\d\d left", line) for line in printed)
    assert len(printed) == 400


WORDS = tuple(f"{a}{b}" for a in "abcd" for b in "uvwx")
TASKS = [tv.Task("upper", WORDS, str.upper), tv.Task("double", WORDS, lambda text: text * 2)]
SMALL: dict[str, Any] = {"shots": 2, "n_dev": 3, "n_test": 3, "max_new_tokens": 1, "layers": [0, 2]}


def test_a_run_says_task_method_stage_and_rows(llama: Twins, lines: io.StringIO) -> None:
    methods = [tv.Extraction(substitutes=1), tv.MeanState()]
    tv.run_experiment(llama.bridge, TASKS, methods=methods, **SMALL)
    printed = lines.getvalue()
    for pattern in (
        r"vectors of upper: 0 of 4 results; reading: \d+ of \d+ rows",
        r"upper, extract: 0 of 4 results; sweep: \d+ of \d+ rows",
        r"upper, extract: 0 of 4 results; few-shot: 3 of 3 rows",
        r"double, mean_state: 3 of 4 results, \d+:\d\d left; test prompts: \d+ of \d+ rows",
        r"double, mean_state: 4 of 4 results, 00:00 left\n",
    ):
        assert re.search(pattern, printed), (pattern, printed)
    before = len(printed)
    tv.run_experiment(tv.LocalEngine(llama.bridge, progress=False), TASKS[:1], **SMALL)
    assert len(lines.getvalue()) == before
