"""The driver's side of a launch: check everything, encode what is missing, and train."""

import re
import time
import uuid
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray

from raytrain2p.config import Findings, InputError, Problem, Settings
from raytrain2p.config.phases import ALIGNMENT, PHASES
from raytrain2p.config.settings import InstructionSettings
from raytrain2p.launch.cluster import check_before_connecting, connected, cpus_per_worker
from raytrain2p.launch.monitor import PreparedSplits, train
from raytrain2p.launch.progress import Console
from raytrain2p.launch.quiet import muted_stderr, quiet
from raytrain2p.launch.resume import check_resumable, finished_outcome
from raytrain2p.phases.instruction.data import check_aligner
from raytrain2p.phases.registry import read_inputs
from raytrain2p.tracking.find import find_artifact
from raytrain2p.tracking.mlflow_store import check_store_is_shared, prepare_store
from raytrain2p.tracking.run import Run, launch_lock, recorded_run
from raytrain2p.worker.job import Outcome


def check(settings: Settings, phase: int, console: Console, run: Run | None = None) -> tuple[Settings, Any]:
    """Everything that can be known before a cluster is asked: models, aligner, records, images, resources; and, for a
    launch that has a run already, whether these settings can go on with it.

    Returns:
        The settings with the aligner resolved to a path, and the phase's inputs.

    Raises:
        InputError: every problem at once.
    """
    findings = Findings()
    with findings:
        settings = resolve_aligner(settings, console, run)
    with findings:
        findings.extend(check_before_connecting(settings.launch))
    inputs = None
    console.show("reading records and decoding new images")
    with findings:
        inputs = read_inputs(settings, phase)
    console.clear()
    if run is not None:
        with findings:
            check_resumable(run, settings, inputs.records if inputs is not None else None)
    findings.raise_any()
    return settings, inputs


def resolve_aligner(settings: Settings, console: Console, run: Run | None = None) -> Settings:
    """Replace a run ID or `latest` by the path of the aligner.pt that it means, and say which one that is.

    A run that goes on keeps the aligner that it began with, though `latest` may mean another one by now.
    """
    if not isinstance(settings, InstructionSettings):
        return settings
    wanted = settings.model.aligner
    if run is not None and wanted == "latest" and (config := run.files.read_config()):
        wanted = config["model"]["aligner"]
    path = find_artifact(settings.output.root, ALIGNMENT, wanted, "model.aligner", partial(fits, settings))
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
    settings, inputs = check(settings, phase, console, run)
    if run is not None and (outcome := finished_outcome(run, settings, inputs.records)) is not None:
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
        with muted_stderr(verbose):
            encode(inputs, settings, max(cpus for cpus, _ in capacity.nodes), console)
        threads = cpus_per_worker(settings.launch, capacity)
        count = settings.launch.num_workers
        each = f"{threads} CPU{'s' if threads > 1 else ''}{' and a GPU' if settings.launch.use_gpu else ''} each"
        console.say(f"starting {count} worker{'s' if count > 1 else ''} with {each}")
        say_if_waiting(threads * settings.launch.num_workers, console)
        return train(settings, prepared(inputs), phase, launch_id, threads, console)


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


def encode(inputs: Any, settings: Settings, most_cpus: float, console: Console) -> None:
    """Run the frozen encoders over what the store does not have yet.

    Args:
        inputs: of the phase.
        settings: of the run.
        most_cpus: of one node.
        console: where progress goes.
    """
    workers = settings.data.feature_workers
    free = min(ray.available_resources().get("CPU", 0.0), most_cpus)
    cpus = 1 if settings.launch.use_gpu else max(1, int(free // workers))
    for job in inputs.jobs:

        def progress(done: int, total: int, what: str = job.what) -> None:
            console.show(f"encoding {what}: {done}/{total}")

        if job.store.missing(job.items):
            say_if_waiting(cpus * workers, console)
        computed = job.store.complete(job.items, job.build, workers, cpus, int(settings.launch.use_gpu), progress)
        if job.items:
            console.say(f"features of {len(job.items)} {job.what}: {computed} computed, {len(job.items) - computed} found in the store")


def prepared(inputs: Any) -> PreparedSplits:
    """What a inputs found, once everything is encoded."""
    return PreparedSplits(ray.put(inputs.prepare()), inputs.records)


def say_if_waiting(needed: int, console: Console) -> None:
    """Ray starts the workers once others of the cluster leave enough CPUs; without a word that looks like a hang."""
    for _ in range(10):  # the encoders' own CPUs are given back a moment after they finish
        free = ray.available_resources().get("CPU", 0.0)
        if free >= needed:
            return
        time.sleep(0.5)
    console.say(f"waiting for CPUs: {free:g} of {needed} are free, others of this cluster use the rest")
