"""From prepared splits to an outcome, for a launch and for a trial of a sweep: start the workers, follow them, record how they
ended. It imports no training library, since each trial runs this in a process of its own.
"""

import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass

import ray
from ray.train import PreemptionError

from raytrain2p.config import InputError, Settings
from raytrain2p.config.console import Console
from raytrain2p.config.scratch import SCRATCH, is_remote, scratch_directory
from raytrain2p.config.secrets import masked, one_line
from raytrain2p.interrupts import StoppedError
from raytrain2p.launch.elastic import is_drained, regroup_of
from raytrain2p.launch.progress import followed
from raytrain2p.launch.signals import fit_until_stopped
from raytrain2p.launch.trainer import ray_trainer
from raytrain2p.phases.inputs import InputDigests, Split
from raytrain2p.storage.errors import StorageError, is_disk_failure, is_reachable
from raytrain2p.storage.files import read_json
from raytrain2p.storage.objects import AT_THE_START, PATIENCE, environment
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import Run, disk_gone, recorded_run
from raytrain2p.tracking.run_objects import fetch_launch
from raytrain2p.tracking.run_writer import end_run, end_unrecorded
from raytrain2p.tracking.source import source_tags
from raytrain2p.worker.channel import RunChannel
from raytrain2p.worker.job import Outcome, TrainJob, TrialContext

EXPECTED = (StorageError.__name__, InputError.__name__)  # errors of a worker whose text is for the user


class TrainingFailedError(RuntimeError):
    """The workers failed, and were not, or no longer, started again.

    Attributes:
        run: of the launch, if there was one.
    """

    run: Run | None = None

    @property
    def reason(self) -> str:
        """Why they failed: one line, or the traceback of a worker."""
        return super().__str__()

    def __str__(self) -> str:
        return self.reason if self.run is None else f"run {self.run.run_id} in {self.run.directory}: {self.reason}"


class TrialStoppedError(RuntimeError):
    """The sweep has stopped or paused this trial, and so its workers. Not a failure."""


@dataclass(frozen=True)
class PreparedSplits:
    """The splits in Ray's object store, the digests of what they were made from, and arguments of the command that uses the result.
    Several launches may share them."""

    data: "ray.ObjectRef[Mapping[str, Split]]"
    digests: InputDigests
    use: list[str]


@dataclass(frozen=True)
class TrialLaunch:
    """What a trial of a sweep adds to a launch.

    Args:
        context: its place in the sweep.
        tags: added to those of its run.
        command: shell line that started it.
        launched: seconds since 1970 when the sweep was.
        reported: context in which its reports reach the sweep; its event is set once the sweep has stopped or paused the trial.
    """

    context: TrialContext
    tags: dict[str, str]
    command: str
    launched: float
    reported: Callable[[RunChannel], AbstractContextManager[threading.Event]]


@contextmanager
def naming_run(root: str, launch_id: str) -> Iterator[None]:
    """An error that ends the launch within has its run, if it has one."""
    try:
        yield
    except (StoppedError, TrainingFailedError) as error:
        with suppress(InputError, OSError, StorageError):  # its record is damaged, or its disk gone
            fetch_launch(root, launch_id)
        with suppress(InputError, OSError):
            error.run = recorded_run(root, launch_id)
        raise


def train(
    settings: Settings,
    splits: PreparedSplits,
    phase: int,
    launch_id: str,
    threads: int,
    console: Console,
    trial: TrialLaunch | None = None,
    own_cluster: bool = False,
    ray_stays: bool = False,
    command: str | None = None,
) -> Outcome:
    """Train on prepared splits.

    Args:
        threads: CPUs of a worker.
        own_cluster: Ray was started by this process, and ends with it.
        ray_stays: this process had initialised Ray before, and keeps it.
        command: shell line that launches the same; None takes what was typed.

    Raises:
        TrainingFailedError: the workers failed.
        StoppedError: a signal ended it, with a checkpoint.
        TrialStoppedError: the sweep ended it.
    """
    channel = RunChannel()
    job = TrainJob(
        settings,
        phase,
        launch_id,
        command=trial.command if trial else command or typed_command("raytrain2p.train"),
        threads=threads,
        data=splits.data,
        channel=channel,
        facts=asdict(splits.digests) | {"use": splits.use},
        environment=passed_environment() | storage_environment(settings),
        launched=trial.launched if trial else time.time(),
        trial=trial.context if trial else None,
        tags=trial.tags if trial else source_tags("raytrain2p.train"),
    )
    try:
        signal = run_workers(job, console, trial, own_cluster, ray_stays)
    finally:
        if ray_stays:
            channel.close()
    return outcome_of(job, console, signal)


def run_workers(job: TrainJob, console: Console, trial: TrialLaunch | None, own_cluster: bool, ray_stays: bool) -> int | None:
    """Run the workers to their end; if they do not end by themselves, record it in the run.

    Returns:
        Number of the signal that asked them to stop, if there was one.
    """
    stopped = threading.Event()
    try:
        with followed(job.channel, console), trial.reported(job.channel) if trial else nullcontext(stopped) as stopped:
            drained = None if own_cluster or trial else is_drained
            return fit_until_stopped(ray_trainer(job, own_cluster, ray_stays).fit, job.channel, console.say, drained)
    except StoppedError:
        job.channel.end_workers() if ray_stays else ray.shutdown()  # before the status is written
        record_end(job, "KILLED", console)
        raise
    except Exception as error:
        if stopped.is_set():  # the sweep ends the workers first, and then this process
            raise TrialStoppedError from error
        record_end(job, "FAILED", console)
        raise TrainingFailedError(cause_of(error, disk_gone(job.settings.output.root, job.launch_id))) from error


def outcome_of(job: TrainJob, console: Console, signal: int | None) -> Outcome:
    """The outcome of workers that ended by themselves.

    Raises:
        StoppedError: they ended before the last step, because of `signal`.
        TrainingFailedError: they ended because training them any further is in vain.
    """
    try:
        fetch_launch(job.settings.output.root, job.launch_id, patience=PATIENCE)
    except StorageError as error:
        raise TrainingFailedError(f"{error}; the workers have ended, and what they uploaded is there") from None
    run = recorded_run(job.settings.output.root, job.launch_id)
    assert run is not None
    status = run.files.read_status()
    if signal is not None and status["status"] == "KILLED":
        raise StoppedError(signal)
    if not MlflowSync(run, job.settings.tracking.uri).complete():
        say_sync_later(run, console)
    if status["status"] == "FAILED":
        raise TrainingFailedError(masked(status.get("reason", "")))
    return Outcome(**read_json(run.files.result))


def passed_environment() -> dict[str, str]:
    """Variables that MLflow and the model hub need. They may hold credentials, so workers do not get them by Ray's runtime environment,
    which it logs."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")} | hub_environment()


def hub_environment() -> dict[str, str]:
    """The hub's token, also one that `hf auth login` has stored here."""
    from huggingface_hub import get_token

    return {"HF_TOKEN": token} if (token := get_token()) else {}


def storage_environment(settings: Settings) -> dict[str, str]:
    """Variables that an object storage needs, likewise; and the place of its files on each node, the same as here."""
    paths = (settings.output.root, settings.model.init, getattr(settings.model, "aligner", None))
    return environment() | {SCRATCH: str(scratch_directory())} if any(path and is_remote(path) for path in paths) else {}


def typed_command(module: str, leave_out: Container[str] = (), more: Iterable[str] = ()) -> str:
    """The command line of this process, without credentials: Ray keeps it with the job.

    Args:
        leave_out: arguments.
        more: others, after them.
    """
    typed = sys.argv[1:]
    if typed[:1] == [module.rpartition(".")[2]]:  # `raytrain2p VERB ...`
        typed = typed[1:]
    return " ".join([f"python -m {module}", *(shlex.quote(masked(argument)) for argument in [*typed, *more] if argument not in leave_out)])


def record_end(job: TrainJob, status: str, console: Console) -> None:
    """Record how the run ended, if there is a run and its worker has not recorded the same."""
    uri, root = job.settings.tracking.uri, job.settings.output.root
    try:
        fetch_launch(root, job.launch_id)
        _record_end(job, status, console)
    except (StorageError, RuntimeError) as error:
        if not is_remote(root):
            raise
        console.say(f"its status cannot be recorded in the object storage: {error}")
        end_unrecorded(uri, root, job.launch_id, status)


def _record_end(job: TrainJob, status: str, console: Console) -> None:
    uri = job.settings.tracking.uri
    try:
        run = recorded_run(job.settings.output.root, job.launch_id)
    except OSError:  # its disk has failed
        run = None
    if run is None or not is_reachable(run.path):
        end_unrecorded(uri, job.settings.output.root, job.launch_id, status)
        return
    if run.files.read_status()["status"] == status and MlflowSync(run, uri).complete():
        return
    if not end_run(run, uri, status, console.say, patience=AT_THE_START):
        console.say(f"run {run.run_id[:8]} is {status}, but not yet in MLflow; later: python -m raytrain2p.runs sync {run.run_id[:8]}")
    elif run.files.read_status()["status"] == "RUNNING":
        console.say(f"its status cannot be written to its disk; once it can: python -m raytrain2p.runs reconcile {run.run_id[:8]}")
    elif not MlflowSync(run, uri).complete():
        say_sync_later(run, console)


def say_sync_later(run: Run, console: Console) -> None:
    console.say(f"MLflow has not received all of the run; once it takes it: python -m raytrain2p.runs sync {run.run_id[:8]}")


def cause_of(error: Exception, gone: StorageError | None) -> str:
    """The worker's traceback, without the layers around it; one line for a disk that failed, which is not a bug.

    Args:
        error: what Ray raised.
        gone: the error of the launch's disk, if that is gone. Ray may be the first to meet it, with an error of its own.
    """
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.values())) if failures else getattr(error, "controller_failure", None) or error
    if any(name in type(first).__name__ for name in EXPECTED) or any(
        isinstance(one, (StorageError, InputError)) for one in (first, first.__cause__)
    ):
        return masked(str(first.__cause__ or first))
    if gone is not None:
        return str(gone)
    if is_disk_failure(first):
        return masked(one_line(first))
    if isinstance(error, PreemptionError) or regroup_of(error) is not None:
        return "nodes were taken away more often than launch.max_preemptions allows"
    lost = {f"worker {rank}": failure for rank, failure in (failures or {}).items()}
    if (failure := getattr(error, "controller_failure", None)) is not None:
        lost["Ray's controller"] = failure
    for which, failure in lost.items():
        if (end := lost_worker(failure)) is not None:
            return f"{which} {end}"
    text = str(error).partition("\n")[2] if failures else "".join(traceback.format_exception(first))
    return masked(text).rstrip() + "\n(more with --ray-logs)"


def lost_worker(failure: Exception) -> str | None:
    """What became of a worker that Ray Train lost, in one line; None if it raised an error itself."""
    reason = getattr(failure, "health_check_failure", failure)
    if type(failure).__name__ == "WorkerHealthCheckTimeoutError":
        return "did not answer for longer than launch.hang_timeout_s: its process is stopped, or its node does not answer"
    if not isinstance(reason, (ray.exceptions.OutOfMemoryError, ray.exceptions.RayActorError)):
        return None
    if isinstance(reason, ray.exceptions.OutOfMemoryError) or any(
        f"{words} memory" in str(reason).lower() for words in ("out of", "low on")
    ):
        return "was ended because its node ran out of memory: lower training.micro_batch_size or data.loader_workers"
    return "was ended from outside, as by `kill` or by the system, which does so when it runs out of memory"
