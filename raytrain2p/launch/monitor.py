"""From prepared splits to an outcome, for a launch as for a trial of a sweep: hand the plan to the workers, follow them, say how
it ended. It imports nothing that trains: each trial has this in a process of its own.
"""

import os
import shlex
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray

from raytrain2p.config import Settings
from raytrain2p.config.secrets import masked, one_line
from raytrain2p.launch.progress import Console, followed
from raytrain2p.launch.signals import StoppedError, fit_until_stopped
from raytrain2p.launch.trainer import ray_trainer
from raytrain2p.storage.errors import StorageError, is_disk_failure, is_reachable
from raytrain2p.storage.files import read_json
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import Run, disk_gone, recorded_run
from raytrain2p.tracking.run_writer import end_run, end_unrecorded
from raytrain2p.worker.channel import RunChannel
from raytrain2p.worker.job import Outcome, TrainJob, TrialContext


class TrainingFailedError(RuntimeError):
    """The workers failed, and were not, or no longer, started again."""


class LetGoError(RuntimeError):
    """The sweep has stopped or paused this trial: its workers are gone, and that is no failure."""


@dataclass(frozen=True)
class PreparedSplits:
    """The splits in Ray's object store, and how many training records there are. Several launches may share them."""

    data: Any
    records: int


@dataclass(frozen=True)
class TrialLaunch:
    """What makes a launch a trial of a sweep.

    Args:
        membership: of the sweep.
        tags: more tags of its run.
        command: shell line that started it.
        reported: context in which its reports reach the sweep; its event is set once the sweep has stopped or paused the trial.
    """

    membership: TrialContext
    tags: dict[str, str]
    command: str
    reported: Callable[[Any], AbstractContextManager[threading.Event]]


def train(
    settings: Settings, splits: PreparedSplits, phase: int, launch_id: str, threads: int, console: Console, trial: TrialLaunch | None = None
) -> Outcome:
    """Hand the plan to the workers and follow them to the end.

    Raises:
        TrainingFailedError: the workers failed.
        StoppedError: a signal ended it, with a checkpoint.
        LetGoError: the sweep ended it.
    """
    root, uri = settings.output.root, settings.tracking.uri
    channel = RunChannel.remote()  # type: ignore[attr-defined]
    plan = TrainJob(
        settings,
        phase,
        launch_id,
        command=trial.command if trial else typed_command("raytrain2p.train"),
        threads=threads,
        data=splits.data,
        channel=channel,
        facts={"train_records": splits.records},
        environment=mlflow_environment(),
        membership=trial.membership if trial else None,
        tags=trial.tags if trial else {},
    )
    let_go = threading.Event()
    try:
        with followed(channel, console), trial.reported(channel) if trial else nullcontext(let_go) as let_go:
            signal = fit_until_stopped(ray_trainer(plan).fit, channel, console.say)
    except (StoppedError, KeyboardInterrupt):
        ray.shutdown()  # first the workers end, then it is said how
        end(root, launch_id, uri, "KILLED", console)
        raise
    except Exception as error:
        if let_go.is_set():  # the sweep ends the workers first, and then this process
            raise LetGoError from error
        end(root, launch_id, uri, "FAILED", console)
        raise TrainingFailedError(cause_of(error, disk_gone(root, launch_id))) from error
    run = recorded_run(root, launch_id)
    assert run is not None
    if signal is not None and run.files.read_status()["status"] == "KILLED":
        raise StoppedError(signal)
    if not MlflowSync(run, uri).complete():
        say_sync_later(run, console)
    return Outcome(**read_json(run.files.result))


def mlflow_environment() -> dict[str, str]:
    """Variables that MLflow needs, credentials perhaps: workers get them by hand, not by Ray's runtime environment, which it logs."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}


def typed_command(module: str) -> str:
    """What the user typed, to be typed again."""
    return " ".join([f"python -m {module}", *map(shlex.quote, sys.argv[1:])])


def end(root: str, launch_id: str, uri: str, status: str, console: Console) -> None:
    """Say how the run ended, if there is one and it has not said so itself."""
    try:
        run = recorded_run(root, launch_id)
    except OSError:  # its disk has failed
        run = None
    if run is None or not is_reachable(run.path):
        end_unrecorded(uri, launch_id, status)
        return
    if run.files.read_status()["status"] == status and MlflowSync(run, uri).complete():
        return
    if not end_run(run, uri, status):
        console.say(f"MLflow does not know that run {run.run_id[:8]} is {status}; later: python -m raytrain2p.runs sync {run.run_id[:8]}")
    elif run.files.read_status()["status"] == "RUNNING":
        console.say(f"how it ended is not on its disk yet; once it can be: python -m raytrain2p.runs reconcile {run.run_id[:8]}")
    elif not MlflowSync(run, uri).complete():
        say_sync_later(run, console)


def say_sync_later(run: Run, console: Console) -> None:
    console.say(f"MLflow does not have all of it yet; once it is back: python -m raytrain2p.runs sync {run.run_id[:8]}")


def cause_of(error: Exception, gone: StorageError | None) -> str:
    """The worker's own traceback, without the layers around it; a disk that failed is no bug, and has one line.

    Args:
        error: what Ray raised.
        gone: whether the launch's disk is. Ray may be the first to find that out, and has other words for it.
    """
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.values())) if failures else error
    if StorageError.__name__ in type(first).__name__ or isinstance(first.__cause__, StorageError):
        return masked(str(first.__cause__ or first))
    if gone is not None:
        return str(gone)
    if is_disk_failure(first):
        return masked(one_line(first))
    told = str(error).partition("\n")[2] if failures else "".join(traceback.format_exception(first))
    return masked(told).rstrip() + "\n(--ray-logs shows more)"
