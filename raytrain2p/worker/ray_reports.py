"""What Ray learns of a run: Ray Train its best and last checkpoint, Ray Tune the metrics of a trial."""

import math
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import ray.train
import ray.train.collective

from raytrain2p.config.scratch import is_remote
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.storage.errors import is_reachable, storage_error
from raytrain2p.tracking.checkpoints import CheckpointScore
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.worker.channel import RunChannel, TrialReport
from raytrain2p.worker.job import OBJECTIVE

# A report waits until Ray has fetched the one before, about once a second: short epochs must not wait for that.
SECONDS_BETWEEN = 2.0
WORST = 1e30


class RayReports:
    """Reports the metrics of checkpoints to Ray Train. Ray's checkpoint is a pointer to the run directory, nothing more.

    Scores that come too fast are left out, but never the best one, and never the last.

    Args:
        run: whose directory the pointer names.
        mode: `min` or `max`.
        steps: of the whole run.
        group: all workers must report equally often; rank 0 alone gives Ray the pointer.
    """

    def __init__(self, run: Run, mode: str, steps: int, group: WorkerGroup) -> None:
        self.run, self.worst, self.sign, self.steps, self.group = run, *((math.inf, 1) if mode == "min" else (-math.inf, -1)), steps, group
        self.reported = -math.inf
        self.kept: tuple[dict[str, float], CheckpointScore] | None = None

    def add(self, metrics: dict[str, float], score: CheckpointScore) -> None:
        """One score, alike on every worker."""
        if not self.group.from_first(lambda: score.step == self.steps or time.monotonic() - self.reported >= SECONDS_BETWEEN):
            if self.kept is None or self.sign * self._value(score) < self.sign * self._value(self.kept[1]):
                self.kept = (metrics, score)
            return
        if self.kept is not None:
            self._report(*self.kept)
        self.kept = None
        self._report(metrics, score)
        self.reported = time.monotonic()

    def _value(self, score: CheckpointScore) -> float:
        """A metric that is missing or NaN is the worst: Ray would take it for the best."""
        return score.value if math.isfinite(score.value) else self.worst

    def _report(self, metrics: dict[str, float], score: CheckpointScore) -> None:
        reported = metrics | {score.metric: self._value(score), "step": score.step, "epoch": score.epoch}
        if not self.group.is_first or is_remote(self.run.path):  # Ray keeps its own records on the driver's node then
            ray.train.report(reported)
            return
        folder = Path(tempfile.mkdtemp())
        try:
            RunDirectory(folder).write_record({"run_id": self.run.run_id, "directory": self.run.directory} | asdict(score))
            ray.train.report(reported, checkpoint=ray.train.Checkpoint.from_directory(str(folder)))
        except (OSError, RuntimeError) as error:  # Ray's bookkeeping is on the same disk, and may fail first when that is gone
            if isinstance(error, OSError) or not is_reachable(self.run.path):
                raise storage_error(self.run.files.record, error, 10_000) from None
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def comparable(objective: float, mode: str) -> float:
    """The objective, or a number worse than any real one: schedulers would never stop a trial with NaN."""
    return objective if math.isfinite(objective) else WORST if mode == "min" else -WORST


class TrialReports:
    """Reports a trial to the sweep, and waits until it may continue: a trial that is stopped is stopped at this step, and one
    whose weights another trial takes over waits at this step. Its checkpoint of that step is on disk by then.

    Args:
        channel: between this worker and the trial's driver.
        mode: `min` or `max`.
        steps: of the whole trial.
        steps_per_epoch: to count whole epochs.
    """

    def __init__(self, channel: RunChannel, run: Run, mode: str, steps: int, steps_per_epoch: int, group: WorkerGroup) -> None:
        self.channel, self.run, self.mode, self.group = channel, run, mode, group
        self.steps, self.steps_per_epoch = steps, steps_per_epoch

    def add(self, metrics: dict[str, float], score: CheckpointScore) -> None:
        """One score, alike on every worker."""
        if self.group.is_first:
            step, objective = score.step, comparable(metrics[OBJECTIVE], self.mode)
            report = TrialReport(
                step, step // self.steps_per_epoch, step >= self.steps, self.run.directory, metrics | {OBJECTIVE: objective}
            )
            self.channel.report(report)
        ray.train.collective.barrier()  # without the time limit of torch's collectives: the sweep may take long
