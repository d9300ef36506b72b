"""What the user sees while a sweep is under way: one live table, or plain lines where nobody looks all the time."""

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import ray
from rich.console import Console as RichConsole
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raytrain2p.launch.progress import POLL_SECONDS, Console
from raytrain2p.sweep.results import OVER, RUNNING, WAITING, TrialRecords, TrialResult, best_row
from raytrain2p.sweep.settings import Sweep
from raytrain2p.worker.channel import SweepChannel

PLAIN_SECONDS = 30.0  # between two lines about trials that go on
PAUSE_PER_READING = 20  # times as long as it took to read the trials' files passes before they are read again


class LiveTable:
    """Trial, state, what varies, step, metric, and the best so far; read from the trials' own runs.

    Args:
        trial_records: of the trials.
        sweep: the sweep.
        channel: where trials leave word.
        console: where it is shown.
    """

    def __init__(self, trial_records: TrialRecords, sweep: Sweep, channel: SweepChannel, console: Console) -> None:
        self.trial_records, self.sweep, self.channel, self.console = trial_records, sweep, channel, console
        self.settings = [axis.setting for axis in sweep.axes]
        self.words: dict[int, str] = {}  # by trial: what its worker said last
        self.running: set[int] = set()
        self.told: dict[int, tuple[str, int]] = {}
        self.told_at = time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="trial-table", daemon=True)
        self.live = Live(console=RichConsole(file=console.stream), auto_refresh=False) if console.live else None

    def __enter__(self) -> "LiveTable":
        if self.live is not None:
            self.live.start()
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.done.set()
        self.thread.join(timeout=10)
        with suppress(ray.exceptions.RayError):
            self._hear(0.1)
        if self.live is not None:
            self.live.update(self.table(self.trial_records.rows()), refresh=True)
            self.live.stop()
        else:
            self._tell(self.trial_records.rows(), everything=False)

    def changed(self, number: int, state: str) -> None:
        """Tune has started a trial, or is done with it."""
        (self.running.add if state == RUNNING else self.running.discard)(number)

    def _follow(self) -> None:
        while not self.done.is_set():
            try:
                self._hear(POLL_SECONDS)
            except ray.exceptions.RayError:
                self.done.wait(POLL_SECONDS)
                continue
            began = time.monotonic()
            rows = self.trial_records.rows()
            took = time.monotonic() - began
            if self.live is not None:
                self.live.update(self.table(rows), refresh=True)
            else:
                self._tell(rows, everything=time.monotonic() - self.told_at >= PLAIN_SECONDS)
            self.done.wait(max(1.0, PAUSE_PER_READING * took))  # long trials have long files, and Tune needs this process too

    def _hear(self, seconds: float) -> None:
        """What trials have to say, at once or within so long."""
        update, lines = self.channel.next(seconds)
        if update is not None:
            self.words[update.trial] = update.line
        for line in lines:
            if self.live is not None:
                self.live.console.print(line, markup=False, highlight=False)
            else:
                self.console.say(line)

    def state(self, row: TrialResult) -> str:
        """A run says RUNNING from its birth to its end: while Tune does not run it, the trial waits."""
        if row.state in OVER:
            return row.state
        return RUNNING if row.trial.number in self.running else WAITING

    def table(self, rows: list[TrialResult]) -> Table:
        """All trials, the best one marked."""
        mode, best = self.sweep.options.mode, best_row(rows, self.sweep.options.mode)
        table = Table(box=None, pad_edge=False)
        for heading in ("trial", "state", *(setting.removeprefix("training.").removeprefix("model.") for setting in self.settings)):
            table.add_column(heading, no_wrap=True)
        for heading in ("step", self.sweep.options.metric):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("now")  # where a terminal is narrow, this one is cut, and stays on its line
        for row in rows:
            found = row.best(mode)
            table.add_row(
                str(row.trial.number),
                self.state(row),
                *(short(row.values.get(setting)) for setting in self.settings),
                str(row.steps),
                "" if found is None else f"{found[1]:.4f}",
                Text("" if row.state in OVER else self.words.get(row.trial.number, ""), no_wrap=True, overflow="ellipsis"),
                style="bold" if best is not None and row.trial.number == best.trial.number else None,
            )
        return table

    def _tell(self, rows: list[TrialResult], everything: bool) -> None:
        """A line for each trial whose state changed, and now and then for each that goes on."""
        mode, best = self.sweep.options.mode, best_row(rows, self.sweep.options.mode)
        for row in rows:
            now = (self.state(row), len(row.reports))
            before = self.told.get(row.trial.number, ("", 0))
            if now[0] != before[0] or (everything and now != before):
                self.told[row.trial.number] = now
                self.console.say(self.line(row, mode, best))
        if everything:
            self.told_at = time.monotonic()

    def line(self, row: TrialResult, mode: str, best: TrialResult | None) -> str:
        """One trial, such as `trial 3  running  learning_rate=0.0012  step 30  val/loss 1.2345  best so far: trial 1, 1.1`."""
        found = row.best(mode)
        parts = [f"trial {row.trial.number}", self.state(row)]
        parts += [f"{setting.rpartition('.')[2]}={short(row.values.get(setting))}" for setting in self.settings]
        if row.steps:
            parts.append(f"step {row.steps}")
        if found is not None:
            parts.append(f"{self.sweep.options.metric} {found[1]:.4f}")
        if best is not None and (value := best.best(mode)) is not None:
            parts.append(f"best so far: trial {best.trial.number}, {value[1]:.4f}")
        return "  ".join(parts)


def short(value: Any) -> str:
    """A value as a person reads it in a table."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
