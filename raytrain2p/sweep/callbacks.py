"""What Ray Tune calls during a sweep: whether to stop, and on changes of trials."""

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray import PlacementGroupID
from ray.tune import Callback, Stopper
from ray.util.placement_group import PlacementGroup, remove_placement_group

from raytrain2p.config.secrets import one_line
from raytrain2p.sweep.live_table import LiveTable
from raytrain2p.sweep.results import FAILED, FINISHED, RUNNING, WAITING
from raytrain2p.worker.channel import SweepChannel


class StopRequest(Stopper):
    """Ends the sweep between two results: on request, or after so many seconds (None: no limit).

    Attributes:
        reason: why the sweep ends; empty while it runs.
    """

    def __init__(self, seconds: float | None) -> None:
        self.deadline = time.monotonic() + seconds if seconds is not None else float("inf")
        self.reason = ""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if not self.reason and time.monotonic() >= self.deadline:
            self.reason = "time budget"
        return bool(self.reason)


def remove_workers(channel: SweepChannel, number: int) -> None:
    """Remove the placement group of a trial: it ends the workers that are left, and frees their CPUs."""
    with suppress(ray.exceptions.RayError, ValueError):
        if (group := channel.placement(number)) is not None:
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


class SweepCallback(Callback):
    """Passes changes of trials to the table and the finalizer, and removes the workers of trials that Tune stops or pauses.

    Args:
        table: shows the state of each trial.
        channel: of the sweep; it has the placement groups of the trials.
        on_over: called with the number of a trial that Tune has ended.
        on_failed: called with the number of a trial that Tune does not try again, and the reason.
    """

    def __init__(
        self, table: LiveTable, channel: SweepChannel, on_over: Callable[[int], None], on_failed: Callable[[int, str], None]
    ) -> None:
        self.table, self.channel, self.on_over, self.on_failed = table, channel, on_over, on_failed
        self.placed: set[int] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.table.changed(trial.config["trial"], RUNNING)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        self.table.changed(trial.config["trial"], RUNNING)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        for trial in trials:
            number = trial.config["trial"]
            if trial.status == "RUNNING":
                self.placed.add(number)
            elif number in self.placed:
                self.placed.discard(number)
                self.table.changed(number, WAITING)
                remove_workers(self.channel, number)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.on_over(trial.config["trial"])
        self.table.changed(trial.config["trial"], FINISHED)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        lines = [line for line in str(trial.get_error() or "no error was reported").splitlines() if line.strip()]
        self.on_failed(trial.config["trial"], one_line(lines[-1]))
        self.table.changed(trial.config["trial"], FAILED)
