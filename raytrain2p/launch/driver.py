"""The driver's side of a launch: check everything, encode what is missing, train on the workers, tell what came out."""

import json
import re
import shlex
import sys
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raytrain2p.config import Findings, InputError, Problem, Settings
from raytrain2p.config.settings import InstructionSettings
from raytrain2p.launch.chatter import quiet
from raytrain2p.launch.cluster import Capacity, check_before_connecting, connected, cpus_per_worker
from raytrain2p.launch.phases import PHASES
from raytrain2p.launch.progress import Console, ProgressBoard, followed
from raytrain2p.launch.worker import COLLECTIVE_TIMEOUT, Plan, train_worker
from raytrain2p.tracking.lookup import find_artifact
from raytrain2p.tracking.run import finish_run, prepare_store, recorded_run


class TrainingFailedError(RuntimeError):
    """The workers failed, and were not, or no longer, started again."""


@dataclass(frozen=True)
class Outcome:
    """What a launch leaves: `--json` prints it."""

    run_id: str
    directory: str
    best: str | None
    last: str | None
    artifact: str
    metrics: dict[str, float]


def check(settings: Settings, phase: int, console: Console) -> tuple[Settings, Any]:
    """Everything that can be known before a cluster is asked: models, aligner, records, pictures, resources.

    Returns:
        The settings with the aligner resolved to a path, and the phase's survey.

    Raises:
        InputError: every problem at once.
    """
    findings = Findings()
    with findings:
        settings = resolve_aligner(settings, console)
    with findings:
        findings.extend(check_before_connecting(settings.launch))
    survey = None
    console.show("reading records and decoding new pictures")
    with findings:
        survey = PHASES[phase].survey(settings)
    console.clear()
    findings.raise_any()
    return settings, survey


def resolve_aligner(settings: Settings, console: Console) -> Settings:
    """Replace a run ID or `latest` by the path of the aligner.pt that it means, and say which one that is."""
    if not isinstance(settings, InstructionSettings):
        return settings
    path = find_artifact(settings.output.root, "alignment", "aligner.pt", settings.model.aligner, "model.aligner")
    console.say(f"aligner: {path}")
    return settings.model_copy(update={"model": settings.model.model_copy(update={"aligner": str(path)})})


def launch(settings: Settings, phase: int, launch_id: str | None, verbose: bool, console: Console) -> Outcome:
    """Train one phase.

    Args:
        settings: as loaded.
        phase: 1 or 2.
        launch_id: stable name of the launch; None makes a new one.
        verbose: let Ray's own output through.
        console: where progress goes.

    Raises:
        InputError: bad input; nothing was started.
        TrainingFailedError: the workers failed.
    """
    if not verbose:
        quiet()
    settings, survey = check(settings, phase, console)
    launch_id = checked_launch_id(launch_id or f"launch-{uuid.uuid4().hex[:12]}")
    check_phase_of_launch(settings, phase, launch_id)
    with connected(settings.launch, verbose) as capacity:
        prepare_store(settings, PHASES[phase].experiment)
        encode(survey, settings, capacity, console)
        return train(settings, survey, phase, launch_id, capacity, console)


def checked_launch_id(launch_id: str) -> str:
    """It names a directory and stands in an MLflow filter.

    Raises:
        InputError: it has characters that do neither.
    """
    if not re.fullmatch(r"\w[\w.-]{0,99}", launch_id):
        raise InputError(Problem(f"--launch-id {launch_id}", "is no name", "take up to 100 letters, digits, `_`, `.` and `-`"))
    return launch_id


def check_phase_of_launch(settings: Settings, phase: int, launch_id: str) -> None:
    """A launch ID belongs to one run, and so to one phase.

    Raises:
        InputError: it was used for the other phase.
    """
    run = recorded_run(settings.output.root, launch_id)
    if run is not None and run.phase != PHASES[phase].name:
        raise InputError(
            Problem(
                f"--launch-id {launch_id}",
                f"belongs to {run.phase} run {run.run_id}; required is one of phase {phase}",
                "take another name",
            )
        )


def encode(survey: Any, settings: Settings, capacity: Capacity, console: Console) -> None:
    """Run the frozen encoders over what the store does not have yet."""
    workers = settings.data.feature_workers
    free = min(ray.available_resources().get("CPU", 0.0), max(cpus for cpus, _ in capacity.nodes))
    cpus = 1 if settings.launch.use_gpu else max(1, int(free // workers))
    for job in survey.jobs:

        def progress(done: int, total: int, what: str = job.what) -> None:
            console.show(f"encoding {what}: {done}/{total}")

        if job.store.missing(job.items):
            say_if_waiting(cpus * workers, console)
        computed = job.store.complete(job.items, job.build, workers, cpus, int(settings.launch.use_gpu), progress)
        if job.items:
            console.say(f"features of {len(job.items)} {job.what}: {computed} computed, {len(job.items) - computed} found in the store")


def train(settings: Settings, survey: Any, phase: int, launch_id: str, capacity: Capacity, console: Console) -> Outcome:
    """Hand the plan to the workers and follow them to the end."""
    storage = Path(settings.output.root) / ".ray"
    threads = cpus_per_worker(settings.launch, capacity)
    board = ProgressBoard.remote()  # type: ignore[attr-defined]
    command = " ".join(["python -m raytrain2p.train", *map(shlex.quote, sys.argv[1:])])
    plan = Plan(settings, phase, launch_id, command, str(storage), threads, ray.put(survey.prepare()), board)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        torch_config=TorchConfig(timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=settings.launch.num_workers, use_gpu=settings.launch.use_gpu, resources_per_worker=_resources(settings, threads)
        ),
        run_config=RunConfig(
            name=launch_id,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=settings.launch.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    workers = f"{settings.launch.num_workers} worker{'s' if settings.launch.num_workers > 1 else ''}"
    console.say(f"starting {workers} with {threads} CPU{'s' if threads > 1 else ''}{' and a GPU' if settings.launch.use_gpu else ''} each")
    say_if_waiting(threads * settings.launch.num_workers, console)
    try:
        with followed(board, console):
            result = trainer.fit()
    except (KeyboardInterrupt, SystemExit):  # Ray's own handler of Ctrl-C ends the process with exit code 0
        if (run := recorded_run(settings.output.root, launch_id)) is not None:
            with suppress(Exception):
                finish_run(run, "KILLED")
        raise KeyboardInterrupt from None
    except Exception as error:
        if (run := recorded_run(settings.output.root, launch_id)) is not None:
            with suppress(Exception):  # the failure itself is what the user must hear about
                finish_run(run, "FAILED")
        raise TrainingFailedError(_cause(error)) from error
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        return Outcome(**json.loads((Path(folder) / "run.json").read_text()))


def say_if_waiting(needed: int, console: Console) -> None:
    """Ray starts the workers once others of the cluster leave enough CPUs; without a word that looks like a hang."""
    for _ in range(10):  # the encoders' own CPUs are given back a moment after they finish
        free = ray.available_resources().get("CPU", 0.0)
        if free >= needed:
            return
        time.sleep(0.5)
    console.say(f"waiting for CPUs: {free:g} of {needed} are free, others of this cluster use the rest")


def _resources(settings: Settings, threads: int) -> dict[str, float]:
    return {"CPU": float(threads)} | ({"GPU": 1.0} if settings.launch.use_gpu else {})


def _cause(error: Exception) -> str:
    """The worker's own traceback, without the layers around it."""
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.values())) if failures else error
    return "".join(traceback.format_exception(first)).rstrip() + "\n(--ray-logs shows more)"
