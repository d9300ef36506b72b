"""Ray's view of a run: Ray Train's of its checkpoints, the same best and the same last as on disk, and Ray Tune's of a trial."""

import math
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.collective

from raytrain2p.storage.errors import is_reachable, storage_error
from raytrain2p.tracking.checkpoints import CheckpointScore
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.worker.job import OBJECTIVE

# A report waits until Ray has fetched the one before, about once a second: epochs that are shorter must not wait for that.
SECONDS_BETWEEN = 2.0
WORST = 1e30


class RayReports:
    """Tells Ray what each checkpoint is worth. Ray's checkpoint is a pointer to the run directory, nothing more.

    Judgements that come too fast are left out, but never the best one, and never the last.

    Args:
        run: whose directory the pointer names.
        mode: `min` or `max`.
        is_first: whether this worker is rank 0, which alone hands Ray the pointer; all workers must report equally often.
    """

    def __init__(self, run: Run, mode: str, is_first: bool) -> None:
        self.run, self.worst, self.sign, self.is_first = run, math.inf if mode == "min" else -math.inf, 1 if mode == "min" else -1, is_first
        self.reported = -math.inf
        self.kept: tuple[dict[str, float], CheckpointScore] | None = None

    def add(self, metrics: dict[str, float], score: CheckpointScore, is_final: bool) -> None:
        """One score, alike on every worker."""
        due = is_final or time.monotonic() - self.reported >= SECONDS_BETWEEN
        if not ray.train.collective.broadcast_from_rank_zero(due):
            if self.kept is None or self.sign * self._value(score) < self.sign * self._value(self.kept[1]):
                self.kept = (metrics, score)
            return
        if self.kept is not None:
            self._report(*self.kept)
        self.kept = None
        self._report(metrics, score)
        self.reported = time.monotonic()

    def _value(self, score: CheckpointScore) -> float:
        """A metric that is missing or no number is the worst: Ray would take it for the best."""
        return score.value if math.isfinite(score.value) else self.worst

    def _report(self, metrics: dict[str, float], score: CheckpointScore) -> None:
        told = metrics | {score.metric: self._value(score), "step": score.step, "epoch": score.epoch}
        if not self.is_first:
            ray.train.report(told)
            return
        folder = Path(tempfile.mkdtemp())
        try:
            RunDirectory(folder).write_record({"run_id": self.run.run_id, "directory": self.run.directory} | asdict(score))
            ray.train.report(told, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))
        except (OSError, RuntimeError) as error:  # Ray's bookkeeping lies on the same disk, and may be the first to find it gone
            if isinstance(error, OSError) or not is_reachable(self.run.path):
                raise storage_error(self.run.files.record, error, 10_000) from None
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def comparable(objective: float, mode: str) -> float:
    """A number that is worse than any real one, if it is none: schedulers would let a trial with NaN go on for ever."""
    return objective if math.isfinite(objective) else WORST if mode == "min" else -WORST


class TrialReports:
    """Tells the sweep how a trial does, and waits until it may go on: a trial that is stopped is stopped there, and one
    whose weights another takes over stands just there. Its checkpoint of that step is on disk by then.

    Args:
        channel: between this worker and the trial's driver.
        run: of the trial.
        mode: `min` or `max`.
        steps: of the whole trial.
        steps_per_epoch: to count whole epochs.
        is_first: whether this worker is rank 0, which alone asks.
    """

    def __init__(self, channel: Any, run: Run, mode: str, steps: int, steps_per_epoch: int, is_first: bool) -> None:
        self.mode = mode
        self.channel, self.run, self.steps, self.steps_per_epoch, self.is_first = channel, run, steps, steps_per_epoch, is_first

    def add(self, metrics: dict[str, float], score: CheckpointScore) -> None:
        """One score, alike on every worker."""
        if self.is_first:
            step = score.step
            word = {"step": step, "epoch": step // self.steps_per_epoch, "last": step >= self.steps, "directory": self.run.directory}
            told = metrics | {OBJECTIVE: comparable(metrics[OBJECTIVE], self.mode)}
            ray.get(self.channel.report.remote(word | told))
        ray.train.collective.barrier()
