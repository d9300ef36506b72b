"""One trial of a sweep, in its own process: a launch that reports to Ray Tune and can be stopped by it."""

import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from raytrain2p.config import Settings, flatten
from raytrain2p.config.console import Console
from raytrain2p.config.metadata import belongs_to, settings_where
from raytrain2p.launch.monitor import PreparedSplits, TrainingFailedError, TrialLaunch, train
from raytrain2p.launch.quiet import quiet
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.storage.objects import PATIENCE
from raytrain2p.sweep.results import LINEAGE_TAG, Inheritance, Trial, add_inheritance, read_trial_result
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Values
from raytrain2p.tracking.checkpoints import LAST, write_checkpoint
from raytrain2p.tracking.run import TRIAL_TAG, Run, disk_gone, launch_lock, recorded_run
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.tracking.run_objects import fetch_launch
from raytrain2p.worker.channel import RunChannel, SweepChannel, TrialProgress, TrialReport
from raytrain2p.worker.job import OBJECTIVE, TrialContext
from raytrain2p.worker.ray_reports import comparable

SECONDS_TO_INHERIT = 120.0  # a killed process of this trial may hold the lock for so long
SECONDS_BETWEEN_LINES = 2.0


def splits_key(settings: Settings) -> str:
    """A key that is equal for settings with equal splits."""
    names = settings_where(type(settings), lambda metadata: metadata.splits)
    return repr({key: value for key, value in flatten(settings).items() if belongs_to(key, names)})


@dataclass(frozen=True)
class SweepJob:
    """What all trials of a sweep share.

    Args:
        launch_id: of the sweep; a trial's is this and its number.
        command: shell line that started the sweep.
        launched: seconds since 1970 when it was given.
        parent: the sweep's run.
        tags: of each trial's run.
        splits: by `splits_key`.
        threads: CPUs of a worker.
        channel: actor that passes messages of the trials to the sweep's driver.
        environment: variables that MLflow, the model hub and an object storage need.
        verbose: show Ray's own output.
    """

    sweep: Sweep = field(repr=False)  # its tracking URI may have a password
    launch_id: str
    command: str
    launched: float
    parent: Run
    tags: dict[str, str]
    splits: dict[str, PreparedSplits]
    threads: int
    channel: SweepChannel
    environment: dict[str, str] = field(repr=False)
    verbose: bool


def trial_launch_id(sweep: str, number: int) -> str:
    return f"{sweep}-{number:03d}"


def run_trial(config: Values, job: SweepJob) -> None:
    """The function that Ray Tune runs: train one trial, or resume it.

    Args:
        config: the trial's number and the settings that vary, flat.
    """
    os.environ.update(job.environment)
    if not job.verbose:
        quiet()
    values = dict(config)
    number = values.pop("trial")
    launch_id, root = trial_launch_id(job.launch_id, number), job.sweep.base.output.root
    trial = Trial(number, values, launch_id)
    fetch_launch(root, launch_id, patience=PATIENCE)
    if (gone := disk_gone(root, launch_id)) is not None:  # the lock would be written below the mount point
        raise gone
    with launch_lock(root, launch_id).held(SECONDS_TO_INHERIT) as holder:
        if holder is not None:
            raise RuntimeError(f"trial {number} is already running: {holder}")
        run = recorded_run(root, launch_id)
        if run is not None and (reason := run.files.read_status().get("reason")):
            raise TrainingFailedError(reason)  # it diverged, and would again
        if run is None or run.files.read_status()["status"] != "FINISHED":
            if run is not None and (checkpoint := tune.get_checkpoint()) is not None:
                with checkpoint.as_directory() as folder:
                    inherit(run, number, Path(folder), values)
            train_trial(trial, job)
            run = recorded_run(root, launch_id)
            assert run is not None
        report_end(trial, run, job.sweep.options.mode, job.sweep.options.scheduler != "pbt")


def train_trial(trial: Trial, job: SweepJob) -> None:
    """Train a trial to its end, as any launch.

    Raises:
        TrainingFailedError: after the reason was sent to the sweep's driver.
    """
    settings, options, console = job.sweep.settings(trial.values), job.sweep.options, TrialConsole(job.channel, trial.number)
    splits = job.splits.get(splits_key(settings)) or prepare(settings, options.phase, console)
    exchange = options.pbt.interval if options.scheduler == "pbt" else None
    launch = TrialLaunch(
        TrialContext(trial.number, options.metric, job.channel),
        job.tags | {TRIAL_TAG: str(trial.number)},
        f"{job.command}  # trial {trial.number}",
        job.launched,
        partial(forward_reports, number=trial.number, exchange=exchange),
    )
    try:
        train(settings, splits, options.phase, trial.launch_id, job.threads, console, launch)
    except TrainingFailedError as error:
        reason = [line for line in str(error).splitlines() if line.strip()][-2:][0]
        console.say(f"failed: {reason}")
        raise


def prepare(settings: Settings, phase: int, console: "TrialConsole") -> PreparedSplits:
    """Splits that were not prepared before the first trial, because too many trials differ in them."""
    from raytrain2p.launch.driver import encode, prepared
    from raytrain2p.launch.models import fetch_models
    from raytrain2p.phases.registry import read_inputs

    inputs = read_inputs(settings, phase)
    fetch_models(inputs.model_names, settings.launch, console)
    encode(inputs, settings, 1, console)
    return prepared(inputs)


class TrialConsole(Console):
    """Sends a trial's messages to the sweep's driver."""

    def __init__(self, channel: SweepChannel, number: int) -> None:
        super().__init__(sys.stderr)
        self.channel, self.number, self.shown_at = channel, number, -SECONDS_BETWEEN_LINES

    def say(self, line: str) -> None:
        with suppress(ray.exceptions.RayError):  # wait: this process may be about to end
            self.channel.say_and_wait(f"trial {self.number}: {line}")

    def show(self, line: str) -> None:
        if time.monotonic() - self.shown_at >= SECONDS_BETWEEN_LINES:
            self.shown_at = time.monotonic()
            self.channel.put(TrialProgress(self.number, line))

    def clear(self) -> None:
        """The driver shows the lines."""

    def keep(self, line: str) -> None:
        """Its table shows the state of each trial."""


@contextmanager
def forward_reports(channel: RunChannel, number: int, exchange: int | None) -> Iterator[threading.Event]:
    """Within, a thread forwards rank 0's reports to Tune, and then lets rank 0 continue.

    If Tune stops or pauses the trial, rank 0 gets no answer and ends at that step, with this process. The event that is yielded is
    set then.

    Args:
        exchange: steps between two comparisons of population-based training; None for other schedulers.
    """
    stopped = threading.Event()

    def forward() -> None:
        with suppress(ray.exceptions.RayError):  # this process or the worker is ending
            while True:
                trial_report = channel.next_report()
                try:
                    report(trial_report, number, exchange)
                except SystemExit:  # Tune ends a trial's function with it
                    stopped.set()
                    raise
                except Exception as error:  # a full disk, for example: rank 0 must not wait forever
                    channel.accept_report(f"the report could not be forwarded: {type(error).__name__}: {error}")
                    return
                channel.accept_report()

    threading.Thread(target=forward, name="reports", daemon=True).start()
    yield stopped


def report(trial_report: TrialReport, number: int, exchange: int | None) -> None:
    """Report to Tune; does not return if Tune stops or pauses the trial."""
    message: dict[str, Any] = trial_report.metrics | {"epoch": trial_report.epoch, "last": trial_report.last}
    if exchange is None:
        tune.report(message | {"step": trial_report.step})
    elif trial_report.step % exchange == 0 and not trial_report.last:
        report_with_weights(message | {"step": trial_report.step}, Path(trial_report.directory), number)
    else:  # between two exchanges, and at its end, a trial is not compared
        tune.report(message)


def report_end(trial: Trial, run: Run, mode: str, compared_by_step: bool) -> None:
    """Repeat the last report: Tune requires one of every trial, and a trial that was killed right after it has none otherwise."""
    step, objective = next(reversed(read_trial_result(trial, run).reports), (0, math.nan))
    tune.report({OBJECTIVE: comparable(objective, mode), "last": True} | ({"step": step} if compared_by_step else {}))


def report_with_weights(message: dict[str, Any], directory: Path, number: int) -> None:
    """Report with a checkpoint of this step, and the trial that it belongs to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(RunDirectory(directory).last_checkpoint, folder / LAST)
        write_json(folder / "of.json", {"trial": number, "run_id": RunDirectory(directory).run_id, "step": message["step"]})
        tune.report(message, checkpoint=tune.Checkpoint.from_directory(folder))


def inherit(run: Run, number: int, folder: Path, values: Values) -> None:
    """Replace this trial's last checkpoint by that of another trial, unless it is its own.

    Args:
        folder: with the checkpoint, and `of.json`: the trial, run and step that it belongs to.
        values: the settings with which this trial continues.

    Raises:
        RuntimeError: another process holds the run's lock.
    """
    source = read_json(folder / "of.json")
    if source["trial"] == number:
        return
    result = read_trial_result(Trial(number, values, run.launch_id), run)
    inheritance = Inheritance(result.steps, source["trial"], source["run_id"], source["step"], values)
    last = result.lineage[-1] if result.lineage else None
    if last is not None and (last.from_run, last.from_step) == (inheritance.from_run, inheritance.from_step):
        return  # done before the trial failed; it has trained since
    checkpoint = torch.load(folder / LAST, map_location="cpu", weights_only=True)
    for state in checkpoint["callbacks"].values():
        if "best" in state:
            state["best"] = None  # the file of the other trial's best is not here
    with run.files.lock.held(SECONDS_TO_INHERIT) as holder:
        if holder is not None:
            raise RuntimeError(f"another process still writes to {run.directory}: {holder}")
        write_checkpoint(checkpoint, run.checkpoints / LAST, None)
        add_inheritance(run.path, inheritance)
        lineage = (*result.lineage, inheritance)
        line = "; ".join(f"at step {each.at_step} from trial {each.from_trial} at step {each.from_step}" for each in lineage)
        run.add_tags({LINEAGE_TAG: line})
