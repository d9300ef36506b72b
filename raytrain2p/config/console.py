"""Output for people: one status line below the printed lines in a terminal, occasional lines elsewhere."""

import io
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raytrain2p.config.escaping import printable
from raytrain2p.config.secrets import masked

STDERR = 2  # its file descriptor
PLAIN_SECONDS, MOST_SECONDS = 15.0, 600.0  # between two lines of progress outside a terminal: at first, and at last
PLAIN_SHARE = 0.02  # of the time so far, which is then the time between two lines: a log of ten hours has about 250
PLAIN_WIDTH = 200  # of a table outside a terminal: no cell is wrapped


def cell(text: str, **options: Any) -> Text:
    """Text for a table: neither markup nor control characters in it have an effect.

    Args:
        options: of rich's Text.
    """
    return Text(printable(masked(text)), **options)


class Console:
    """Prints lines, and shows progress: on a status line in a terminal, else on a new line now and then.

    Attributes:
        stream: where the output goes.
        live: whether that is a terminal that can redraw lines.
        rich: console to draw tables on; lines of `say` appear above a `rich.live.Live` on it.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        stream = stream or own_stderr()
        terminal = stream.isatty()
        self.rich = RichConsole(
            file=stream,
            force_terminal=terminal,
            force_jupyter=False,  # it would show lines as HTML, and not on the stream
            width=None if terminal else PLAIN_WIDTH,
            markup=False,
            emoji=False,
            highlight=False,
        )
        self.live = terminal and not self.rich.is_dumb_terminal
        self._status: Live | None = None
        self._shown, self._shown_at, self._since = "", -math.inf, time.monotonic()

    def say(self, line: str) -> None:
        """Print a line that stays. It is neither wrapped nor cut, so that a path in it can be copied."""
        self.rich.print(cell(line), soft_wrap=True)

    def draw(self, table: Table) -> None:
        """Print a table; in a terminal its cells are wrapped to the width."""
        self.rich.print(table)

    def show(self, line: str) -> None:
        """Show the current state; replaces the previous one in a terminal."""
        if line == self._shown:
            return
        if self.live:
            text = cell(line, no_wrap=True, overflow="ellipsis")
            if self._status is None:
                # Redirected output would go to this console, and so past `muted_stderr`.
                self._status = Live(console=self.rich, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
                self._status.start()
            self._status.update(text, refresh=True)
            self._shown = line
        elif (now := time.monotonic()) - self._shown_at >= min(max(PLAIN_SECONDS, PLAIN_SHARE * (now - self._since)), MOST_SECONDS):
            self.say(line)
            self._shown, self._shown_at = line, now

    def clear(self) -> None:
        """Remove the status line."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        self._shown = ""

    def keep(self, line: str) -> None:
        """Print the current state once more, as a line that stays, unless it is there already."""
        there = not self.live and line == self._shown
        self.clear()
        if line and not there:
            self.say(line)

    @contextmanager
    def status(self, line: str) -> Iterator[None]:
        """Within, `line` is shown."""
        self.show(line)
        try:
            yield
        finally:
            self.clear()

    @contextmanager
    def progress_bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Yields a function of (done, total) that moves a bar; outside a terminal it prints lines as `show` does."""
        if not self.live:
            yield lambda done, total: self.show(f"{what}: {done}/{total}")
            return
        self.clear()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.rich, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
            task = bar.add_task(printable(what), total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)


def own_stderr() -> TextIO:
    """A duplicate of standard error; where that has another file descriptor or none, so that `muted_stderr` does not discard it, standard
    error itself. That of a notebook shows its lines in the cell, and has the descriptor of the notebook server's terminal."""
    try:
        if sys.stderr.fileno() != STDERR:
            return sys.stderr
        raw = _Output(os.dup(STDERR), "w")
    except OSError:
        return sys.stderr
    return io.TextIOWrapper(io.BufferedWriter(raw), sys.stderr.encoding, errors="backslashreplace", line_buffering=True)


class _Output(io.FileIO):
    """Discards what cannot be written: its reader or its terminal is gone, and training continues."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)
