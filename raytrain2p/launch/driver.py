"""The driver's side of a launch: check everything, encode what is missing, train on the workers, tell what came out."""

import os
import re
import shlex
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray

from raytrain2p.config import Findings, InputError, Problem, Settings
from raytrain2p.config.secrets import masked
from raytrain2p.config.settings import InstructionSettings
from raytrain2p.launch.chatter import quiet
from raytrain2p.launch.cluster import check_before_connecting, connected, cpus_per_worker
from raytrain2p.launch.phases import PHASES
from raytrain2p.launch.plan import Membership, Outcome, Plan
from raytrain2p.launch.progress import Console, ProgressBoard, followed
from raytrain2p.launch.resuming import check_resumable, finished_outcome
from raytrain2p.launch.stopping import StoppedError, fit_until_stopped
from raytrain2p.launch.trainer import ray_trainer
from raytrain2p.phases.dialogues import check_aligner
from raytrain2p.tracking.checkpoints import StorageError
from raytrain2p.tracking.files import read_json
from raytrain2p.tracking.lookup import find_artifact
from raytrain2p.tracking.mirror import Mirror
from raytrain2p.tracking.recorder import end_run, end_unrecorded
from raytrain2p.tracking.run import Run, launch_lock, read_status, recorded_run
from raytrain2p.tracking.store import check_store_is_shared, prepare_store


class TrainingFailedError(RuntimeError):
    """The workers failed, and were not, or no longer, started again."""


def check(settings: Settings, phase: int, console: Console, run: Run | None = None) -> tuple[Settings, Any]:
    """Everything that can be known before a cluster is asked: models, aligner, records, pictures, resources; and, for a
    launch that has a run already, whether these settings can go on with it.

    Returns:
        The settings with the aligner resolved to a path, and the phase's survey.

    Raises:
        InputError: every problem at once.
    """
    findings = Findings()
    with findings:
        settings = resolve_aligner(settings, console, run)
    with findings:
        findings.extend(check_before_connecting(settings.launch))
    survey = None
    console.show("reading records and decoding new pictures")
    with findings:
        survey = PHASES[phase].survey(settings)
    console.clear()
    if run is not None:
        with findings:
            check_resumable(run, settings, survey.records if survey is not None else None)
    findings.raise_any()
    return settings, survey


def resolve_aligner(settings: Settings, console: Console, run: Run | None = None) -> Settings:
    """Replace a run ID or `latest` by the path of the aligner.pt that it means, and say which one that is.

    A run that goes on keeps the aligner that it began with, though `latest` may mean another one by now.
    """
    if not isinstance(settings, InstructionSettings):
        return settings
    wanted = settings.model.aligner
    if run is not None and wanted == "latest" and (config := read_json(run.path / "config.json")):
        wanted = config["model"]["aligner"]
    path = find_artifact(settings.output.root, "alignment", "aligner.pt", wanted, "model.aligner", partial(fits, settings))
    console.say(f"aligner: {path}")
    return with_aligner(settings, path)


def with_aligner(settings: InstructionSettings, path: Path) -> InstructionSettings:
    return settings.model_copy(update={"model": settings.model.model_copy(update={"aligner": str(path)})})


def fits(settings: InstructionSettings, path: Path) -> bool:
    """Whether an aligner was trained with the encoder and the image size of these settings."""
    try:
        check_aligner(with_aligner(settings, path))
    except InputError:
        return False
    return True


def launch(settings: Settings, phase: int, launch_id: str | None, verbose: bool, console: Console) -> Outcome:
    """Train one phase.

    Args:
        settings: as loaded.
        phase: 1 or 2.
        launch_id: stable name of the launch; None makes a new one. If it has a run already, that run goes on.
        verbose: let Ray's own output through.
        console: where progress goes.

    Raises:
        InputError: bad input; nothing was started.
        TrainingFailedError: the workers failed.
        StoppedError: a signal ended it, with a checkpoint.
    """
    if not verbose:
        quiet()
    launch_id = checked_launch_id(launch_id or f"launch-{uuid.uuid4().hex[:12]}")
    run = recorded_run(settings.output.root, launch_id)
    if run is not None:
        check_phase_of_launch(run, phase)
    settings, survey = check(settings, phase, console, run)
    if run is not None and (outcome := finished_outcome(run, settings, survey.records)) is not None:
        console.say(f"run {run.run_id} is finished already")
        return outcome
    with connected(settings.launch, verbose) as capacity, ExitStack() as stack:
        if problems := check_store_is_shared(settings.tracking.uri, capacity.machines):
            raise InputError(problems)
        if run is None:  # a run that goes on needs no MLflow to do so
            prepare_store(settings, PHASES[phase].experiment)
        holder = stack.enter_context(launch_lock(settings.output.root, launch_id).held(1.0))
        if holder is not None:
            raise InputError(Problem(f"--launch-id {launch_id}", f"is under way: {holder}", "wait for its end, or take another name"))
        encode(survey, settings, max(cpus for cpus, _ in capacity.nodes), console)
        threads = cpus_per_worker(settings.launch, capacity)
        count = settings.launch.num_workers
        each = f"{threads} CPU{'s' if threads > 1 else ''}{' and a GPU' if settings.launch.use_gpu else ''} each"
        console.say(f"starting {count} worker{'s' if count > 1 else ''} with {each}")
        say_if_waiting(threads * settings.launch.num_workers, console)
        return train(settings, prepared(survey), phase, launch_id, threads, console)


def checked_launch_id(launch_id: str) -> str:
    """It names a directory and stands in an MLflow filter.

    Raises:
        InputError: it has characters that do neither.
    """
    if not re.fullmatch(r"\w[\w.-]{0,99}", launch_id):
        raise InputError(Problem(f"--launch-id {launch_id}", "is no name", "take up to 100 letters, digits, `_`, `.` and `-`"))
    return launch_id


def check_phase_of_launch(run: Run, phase: int) -> None:
    """A launch ID belongs to one run, and so to one phase.

    Raises:
        InputError: it was used for the other phase.
    """
    if run.phase != PHASES[phase].name:
        raise InputError(
            Problem(
                f"--launch-id {run.launch_id}",
                f"belongs to {run.phase} run {run.run_id}; required is one of phase {phase}",
                "take another name",
            )
        )


def encode(survey: Any, settings: Settings, most_cpus: float, console: Console) -> None:
    """Run the frozen encoders over what the store does not have yet.

    Args:
        survey: of the phase.
        settings: of the run.
        most_cpus: of one node.
        console: where progress goes.
    """
    workers = settings.data.feature_workers
    free = min(ray.available_resources().get("CPU", 0.0), most_cpus)
    cpus = 1 if settings.launch.use_gpu else max(1, int(free // workers))
    for job in survey.jobs:

        def progress(done: int, total: int, what: str = job.what) -> None:
            console.show(f"encoding {what}: {done}/{total}")

        if job.store.missing(job.items):
            say_if_waiting(cpus * workers, console)
        computed = job.store.complete(job.items, job.build, workers, cpus, int(settings.launch.use_gpu), progress)
        if job.items:
            console.say(f"features of {len(job.items)} {job.what}: {computed} computed, {len(job.items) - computed} found in the store")


@dataclass(frozen=True)
class Prepared:
    """The splits in Ray's object store, and how many training records there are. Several launches may share them."""

    data: Any
    records: int


def prepared(survey: Any) -> Prepared:
    """What a survey found, once everything is encoded."""
    return Prepared(ray.put(survey.prepare()), survey.records)


@dataclass(frozen=True)
class TrialPart:
    """What makes a launch a trial of a sweep.

    Args:
        membership: of the sweep.
        tags: more tags of its run.
        command: shell line that started it.
        reported: context in which its reports reach the sweep.
    """

    membership: Membership
    tags: dict[str, str]
    command: str
    reported: Callable[[Any], AbstractContextManager[None]]


def train(
    settings: Settings, splits: Prepared, phase: int, launch_id: str, threads: int, console: Console, trial: TrialPart | None = None
) -> Outcome:
    """Hand the plan to the workers and follow them to the end.

    Raises:
        TrainingFailedError: the workers failed.
        StoppedError: a signal ended it, with a checkpoint.
    """
    root, uri = settings.output.root, settings.tracking.uri
    board = ProgressBoard.remote()  # type: ignore[attr-defined]
    plan = Plan(
        settings,
        phase,
        launch_id,
        command=trial.command if trial else typed_command("raytrain2p.train"),
        threads=threads,
        data=splits.data,
        board=board,
        facts={"train_records": splits.records},
        environment=mlflow_environment(),
        membership=trial.membership if trial else None,
        tags=trial.tags if trial else {},
    )
    try:
        with followed(board, console), trial.reported(board) if trial else nullcontext():
            signal = fit_until_stopped(ray_trainer(plan).fit, board, console.say)
    except (StoppedError, KeyboardInterrupt):
        ray.shutdown()  # first the workers end, then it is said how
        end(root, launch_id, uri, "KILLED", console)
        raise
    except Exception as error:
        end(root, launch_id, uri, "FAILED", console)
        raise TrainingFailedError(_cause(error)) from error
    run = recorded_run(root, launch_id)
    assert run is not None
    if signal is not None and read_status(run.path)["status"] == "KILLED":
        raise StoppedError(signal)
    if not Mirror(run, uri).complete():
        console.say(f"MLflow does not have all of it yet; once it is back: python -m raytrain2p.runs sync {run.run_id[:8]}")
    return Outcome(**read_json(run.path / "result.json"))


def mlflow_environment() -> dict[str, str]:
    """Variables that MLflow needs, credentials perhaps: workers get them by hand, not by Ray's runtime environment, which it logs."""
    return {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}


def typed_command(module: str) -> str:
    """What the user typed, to be typed again."""
    return " ".join([f"python -m {module}", *map(shlex.quote, sys.argv[1:])])


def end(root: str, launch_id: str, uri: str, status: str, console: Console) -> None:
    """Say how the run ended, if there is one and it has not said so itself."""
    run = recorded_run(root, launch_id)
    if run is None:
        end_unrecorded(uri, launch_id, status)
        return
    if read_status(run.path)["status"] == status and Mirror(run, uri).complete():
        return
    if not end_run(run, uri, status):
        console.say(f"MLflow does not know that run {run.run_id[:8]} is {status}; later: python -m raytrain2p.runs sync {run.run_id[:8]}")


def say_if_waiting(needed: int, console: Console) -> None:
    """Ray starts the workers once others of the cluster leave enough CPUs; without a word that looks like a hang."""
    for _ in range(10):  # the encoders' own CPUs are given back a moment after they finish
        free = ray.available_resources().get("CPU", 0.0)
        if free >= needed:
            return
        time.sleep(0.5)
    console.say(f"waiting for CPUs: {free:g} of {needed} are free, others of this cluster use the rest")


def _cause(error: Exception) -> str:
    """The worker's own traceback, without the layers around it; a full disk is no bug, and has one line."""
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.values())) if failures else error
    if StorageError.__name__ in type(first).__name__ or isinstance(first.__cause__, StorageError):
        return masked(str(first.__cause__ or first))
    return masked("".join(traceback.format_exception(first))).rstrip() + "\n(--ray-logs shows more)"
