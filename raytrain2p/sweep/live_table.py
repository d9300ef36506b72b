"""Progress of a sweep: a live table in a terminal, lines elsewhere."""

import threading
import time
from contextlib import suppress
from types import TracebackType
from typing import Any

import ray
from rich.live import Live
from rich.table import Table

from raytrain2p.config.console import Console, cell
from raytrain2p.launch.progress import POLL_SECONDS, decimal
from raytrain2p.storage.errors import StorageError
from raytrain2p.sweep.results import OVER, RUNNING, WAITING, TrialRecords, TrialResult, best_result
from raytrain2p.sweep.settings import Sweep
from raytrain2p.worker.channel import SECONDS_TO_ANSWER, SweepChannel

PLAIN_SECONDS = 30.0  # between two lines about a trial whose state does not change
SECONDS_BETWEEN_LISTINGS = 10.0  # of the trials' objects
PAUSE_PER_READING = 20  # the pause between two readings of the trials' files, in times of what a reading takes


class LiveTable:
    """State, settings, step and metric of each trial, read from the trials' own runs.

    Args:
        channel: of the sweep; messages of the trials arrive there.
    """

    def __init__(self, records: TrialRecords, sweep: Sweep, channel: SweepChannel, console: Console) -> None:
        self.records, self.sweep, self.channel, self.console = records, sweep, channel, console
        self.settings = [axis.setting for axis in sweep.axes]
        self.progress: dict[int, str] = {}  # by trial: the last line of its worker
        self.running: set[int] = set()
        self.printed: dict[int, tuple[str, int]] = {}  # by trial: state and number of reports, as last printed
        self.printed_at = time.monotonic()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="trial-table", daemon=True)
        self.live = Live(console=console.rich, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) if console.live else None

    def __enter__(self) -> "LiveTable":
        if self.live is not None:
            self.live.start()
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.done.set()
        self.thread.join(POLL_SECONDS + SECONDS_TO_ANSWER + 1)
        with suppress(ray.exceptions.RayError):
            self._receive(0.1)
        with suppress(StorageError):  # the driver asks again
            self._draw(self.records.results(), all_trials=False)
        if self.live is not None:
            self.live.stop()

    def changed(self, number: int, state: str) -> None:
        """Tune has started, paused or ended a trial."""
        (self.running.add if state == RUNNING else self.running.discard)(number)

    def _follow(self) -> None:
        while not self.done.is_set():
            try:
                self._receive(POLL_SECONDS)
            except ray.exceptions.RayError:
                self.done.wait(POLL_SECONDS)
                continue
            started = time.monotonic()
            results = self.records.results(SECONDS_BETWEEN_LISTINGS)
            took = time.monotonic() - started
            if self.done.is_set():  # it was drawn for the last time
                return
            self._draw(results, all_trials=time.monotonic() - self.printed_at >= PLAIN_SECONDS)
            self.done.wait(max(1.0, PAUSE_PER_READING * took))  # long trials have long files, and Tune needs this process too

    def _receive(self, seconds: float) -> None:
        """Wait for messages of the trials, for at most so long."""
        update, lines = self.channel.next(seconds)
        if update is not None:
            self.progress[update.trial] = update.line
        for line in lines:
            self.console.say(line)

    def _draw(self, results: list[TrialResult], all_trials: bool) -> None:
        if self.live is not None:
            self.live.update(self.table(results), refresh=True)
        else:
            self._print(results, all_trials)

    def state(self, result: TrialResult) -> str:
        """A run is RUNNING from its start to its end; while Tune does not run the trial, it is waiting."""
        if result.state in OVER:
            return result.state
        return RUNNING if result.trial.number in self.running else WAITING

    def table(self, results: list[TrialResult]) -> Table:
        """All trials, the best one in bold."""
        mode, best = self.sweep.options.mode, best_result(results, self.sweep.options.mode)
        table = Table(box=None, pad_edge=False)
        for heading in ("trial", "state", *map(short_name, self.settings)):
            table.add_column(cell(heading), no_wrap=True)
        for heading in ("step", self.sweep.options.metric):
            table.add_column(cell(heading), justify="right", no_wrap=True)
        table.add_column("now")  # cut where the terminal is narrow
        for result in results:
            found = result.best(mode)
            table.add_row(
                str(result.trial.number),
                self.state(result),
                *(cell(short(result.values.get(setting))) for setting in self.settings),
                str(result.steps),
                "" if found is None else decimal(found[1], 4),
                cell("" if result.state in OVER else self.progress.get(result.trial.number, ""), no_wrap=True, overflow="ellipsis"),
                style="bold" if best is not None and result.trial.number == best.trial.number else None,
            )
        return table

    def _print(self, results: list[TrialResult], all_trials: bool) -> None:
        """Print a line for each trial whose state has changed; if `all_trials`, also for each that has reported since."""
        mode, best = self.sweep.options.mode, best_result(results, self.sweep.options.mode)
        for result in results:
            now = (self.state(result), len(result.reports))
            before = self.printed.get(result.trial.number, ("", 0))
            if now[0] != before[0] or (all_trials and now != before):
                self.printed[result.trial.number] = now
                self.console.say(self.line(result, mode, best))
        if all_trials:
            self.printed_at = time.monotonic()

    def line(self, result: TrialResult, mode: str, best: TrialResult | None) -> str:
        """One trial, such as `trial 3  running  learning_rate=0.0012  step 30  val/loss 1.2345  best so far: trial 1, 1.1`."""
        found = result.best(mode)
        parts = [f"trial {result.trial.number}", self.state(result)]
        parts += [f"{setting.rpartition('.')[2]}={short(result.values.get(setting))}" for setting in self.settings]
        if result.steps:
            parts.append(f"step {result.steps}")
        if found is not None:
            parts.append(f"{self.sweep.options.metric} {decimal(found[1], 4)}")
        if best is not None and (value := best.best(mode)) is not None:
            parts.append(f"best so far: trial {best.trial.number}, {decimal(value[1], 4)}")
        return "  ".join(parts)


def short_name(setting: str) -> str:
    """A setting without its first group, for headings."""
    return setting.removeprefix("training.").removeprefix("model.")


def short(value: Any) -> str:
    """A value with three digits."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
