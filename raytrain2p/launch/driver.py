"""The driver of a launch: check everything, compute missing features, and train."""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray

from raytrain2p.config import Findings, InputError, Problem, Settings, flatten_tree
from raytrain2p.config.console import Console
from raytrain2p.config.phases import ALIGNMENT, PHASES
from raytrain2p.config.secrets import one_line
from raytrain2p.config.settings import InstructionSettings, LaunchSettings
from raytrain2p.launch.cluster import Capacity, check_before_connecting, connected, cpus_per_worker
from raytrain2p.launch.monitor import PreparedSplits, naming_run, train
from raytrain2p.launch.places import place_problem, place_problems
from raytrain2p.launch.quiet import muted_stderr, quiet
from raytrain2p.launch.resume import check_resumable, finished_outcome
from raytrain2p.phases.inputs import PhaseInputs, plan_notes
from raytrain2p.phases.instruction.checks import check_encoders
from raytrain2p.phases.registry import read_inputs
from raytrain2p.tracking.create_run import check_launch_is_free
from raytrain2p.tracking.find import check_original, find_artifact
from raytrain2p.tracking.mlflow_store import check_store_is_shared, missing_store, prepare_store, store_exists
from raytrain2p.tracking.run import LAUNCH_ID, Run, launch_lock, recorded_run
from raytrain2p.worker.job import Outcome


def launch(
    settings: Settings,
    phase: int,
    launch_id: str | None,
    verbose: bool,
    console: Console,
    accept_changed_inputs: bool = False,
    command: str | None = None,
) -> Outcome:
    """Train one phase.

    Args:
        launch_id: stable name of the launch; None makes a new one. If it has a run already, that run is resumed.
        verbose: print Ray's own output too.
        accept_changed_inputs: a resumed run may have inputs of other content.
        command: shell line that launches the same, which the run records; None takes what was typed.

    Raises:
        InputError: bad input; nothing was started.
        TrainingFailedError: the workers failed.
        StoppedError: a signal ended it; if it was training, with a checkpoint.
    """
    if not verbose:
        quiet()
    launch_id = checked_launch_id(launch_id or f"launch-{uuid.uuid4().hex[:12]}")
    with naming_run(settings.output.root, launch_id):
        return _launch(settings, phase, launch_id, verbose, console, accept_changed_inputs, command)


def _launch(
    asked: Settings, phase: int, launch_id: str, verbose: bool, console: Console, accept_changed_inputs: bool, command: str | None
) -> Outcome:
    run = run_to_resume(asked, launch_id, phase)
    settings, inputs = check(asked, phase, console, run, accept_changed_inputs)
    if (outcome := finished(run, settings, inputs, console)) is not None:
        return outcome
    with connected(settings.launch, verbose) as capacity:
        check_store(settings, phase, capacity, run, launch_id)
        with only_launch(settings, launch_id):
            before, run = run, run_to_resume(asked, launch_id, phase)  # again: another process may have made it, or trained it, meanwhile
            if run != before:
                settings, inputs = check(asked, phase, console, run, accept_changed_inputs)
            elif run is not None:
                check_resumable(run, settings, inputs.digests, accept_changed_inputs)
            if (outcome := finished(run, settings, inputs, console)) is not None:
                return outcome
            check_aligner_is_there(settings)
            with muted_stderr(verbose):
                encode(inputs, settings, max(cpus for cpus, _ in capacity.nodes), console)
            threads = cpus_per_worker(settings.launch, capacity)
            say_workers(settings.launch, threads, console)
            return train(
                settings,
                prepared(inputs),
                phase,
                launch_id,
                threads,
                console,
                own_cluster=capacity.started_here,
                ray_stays=capacity.of_caller,
                command=command,
            )


def finished(run: Run | None, settings: Settings, inputs: PhaseInputs, console: Console) -> Outcome | None:
    """The outcome of a launch whose run is finished, if these settings do not ask for more steps."""
    outcome = finished_outcome(run, settings, inputs.records) if run is not None else None
    if run is not None and outcome is not None:
        console.say(f"run {run.run_id} is finished already")
    return outcome


def check(
    settings: Settings, phase: int, console: Console, run: Run | None = None, accept_changed_inputs: bool = False
) -> tuple[Settings, PhaseInputs]:
    """Check what does not need a cluster: models, aligner, records, media, resources; and whether `run`, if there is one, can
    be resumed with these settings.

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
    with console.status("reading records and decoding new media"), findings:
        inputs = read_inputs(settings, phase)
    if run is not None:
        with findings:
            check_resumable(run, settings, inputs.digests if inputs is not None else None, accept_changed_inputs)
    findings.extend(place_problems(settings, is_new=run is None, jobs=inputs.jobs if inputs is not None else ()))
    findings.raise_any()
    assert inputs is not None
    for note in (*inputs.notes, *plan_notes(settings, inputs.records)):
        console.say(note)
    return settings, inputs


def resolve_aligner(settings: Settings, console: Console, run: Run | None = None) -> Settings:
    """Replace a run ID or `latest` by the path of its aligner.pt, and print that path.

    A run that is resumed keeps the aligner that it began with, though `latest` may be another one by now.
    """
    if not isinstance(settings, InstructionSettings):
        return settings
    wanted = settings.model.aligner
    if run is not None and wanted == "latest" and (config := run.files.read_config()):
        wanted = str(flatten_tree(config).get("model.aligner", wanted))
    path = find_artifact(settings.output.root, ALIGNMENT, wanted, "model.aligner", partial(fits, settings, console), console.say)
    console.say(f"aligner: {path}")
    return with_aligner(settings, path)


def check_aligner_is_there(settings: Settings) -> None:
    """Check, now that `prune` sees that this launch is under way, that it has not just deleted the aligner.

    Raises:
        InputError: it has.
    """
    if isinstance(settings, InstructionSettings) and not Path(settings.model.aligner).is_file():
        raise InputError(Problem(f"model.aligner={settings.model.aligner}", "was deleted just now", "choose another one"))


def with_aligner(settings: InstructionSettings, path: Path) -> InstructionSettings:
    return settings.model_copy(update={"model": settings.model.model_copy(update={"aligner": str(path)})})


def fits(settings: InstructionSettings, console: Console, path: Path) -> bool:
    """Whether an aligner was trained with the encoders of these settings; why not is printed."""
    try:
        check_encoders(with_aligner(settings, path))
    except InputError as error:
        console.say(f"model.aligner=latest passes over {path}: {one_line(error.problems[0], 300)}")
        return False
    return True


def checked_launch_id(launch_id: str) -> str:
    """A launch ID as the user gave it.

    Raises:
        InputError: it has characters that either does not allow.
    """
    if not re.fullmatch(LAUNCH_ID, launch_id):
        raise InputError(Problem(f"--launch-id {launch_id}", "is not a valid name", "take up to 100 letters, digits, `_`, `.` and `-`"))
    return launch_id


def run_to_resume(settings: Settings, launch_id: str, phase: int) -> Run | None:
    """The run that the launch has already, if it has one.

    Raises:
        InputError: it is a run of the other phase, or a copy of one that is still where it was.
    """
    if place_problem("output.root", settings.output.root):
        return None  # `check` reports it
    run = recorded_run(settings.output.root, launch_id)
    if run is not None and run.phase != PHASES[phase].name:
        what = f"belongs to {run.phase} run {run.run_id}; required is one of phase {phase}"
        raise InputError(Problem(f"--launch-id {launch_id}", what, "take another name"))
    if run is not None:
        check_original(run, f"--launch-id {launch_id}")
    return run


def check_store(settings: Settings, phase: int, capacity: Capacity, run: Run | None, launch_id: str) -> None:
    """Check that every machine reaches the MLflow store, and, for a new run, that it answers and has no run of this launch from
    another output root. A resume does not need a server to answer.

    Raises:
        InputError: it does not.
    """
    if problems := check_store_is_shared(settings.tracking.uri, capacity.machines):
        raise InputError(problems)
    if run is None:
        prepare_store(settings, PHASES[phase].experiment)
        check_launch_is_free(settings, PHASES[phase].name, launch_id)
    elif not store_exists(settings.tracking.uri):
        raise InputError(missing_store(settings.tracking.uri))


@contextmanager
def only_launch(settings: Settings, launch_id: str) -> Iterator[None]:
    """Within, no other process can start this launch.

    Raises:
        InputError: another one has.
    """
    lock = launch_lock(settings.output.root, launch_id)
    lock.path.parent.mkdir(parents=True, exist_ok=True)
    with lock.held(1.0) as holder:
        if holder is not None:
            raise InputError(Problem(f"--launch-id {launch_id}", f"is under way: {holder}", "wait for its end, or take another name"))
        yield


def encode(inputs: PhaseInputs, settings: Settings, most_cpus: float, console: Console) -> None:
    """Run the frozen encoders over the items that are not in the feature store.

    Args:
        most_cpus: of one node.
    """
    workers = settings.data.feature_workers
    free = min(ray.available_resources().get("CPU", 0.0), most_cpus)
    cpus = 1 if settings.launch.use_gpu else max(1, int(free // workers))
    for job in inputs.jobs:
        computed = 0
        for line in job.store.damaged:
            console.say(line)
        if job.store.missing(job.items):
            say_if_waiting(cpus * workers, console)
            with console.progress_bar(f"encoding {job.modality}") as progress:
                build = partial(job.spec.build, "cuda" if settings.launch.use_gpu else "cpu")
                computed = job.store.complete(job.items, build, workers, cpus, int(settings.launch.use_gpu), progress)
        if job.items:
            found = len(job.items) - computed
            console.say(f"{job.modality} features of {len(job.items)} items: {computed} computed, {found} found in the store")


def prepared(inputs: PhaseInputs) -> PreparedSplits:
    """The splits, once everything is encoded."""
    return PreparedSplits(ray.put(inputs.prepare()), inputs.digests, inputs.use)


def say_workers(launch: LaunchSettings, threads: int, console: Console) -> None:
    """Print how many workers start, and whether they must wait for CPUs."""
    count = launch.num_workers
    each = f"{threads} CPU{'s' if threads > 1 else ''}{' and a GPU' if launch.use_gpu else ''} each"
    console.say(f"starting {count} worker{'s' if count > 1 else ''} with {each}")
    say_if_waiting(threads * count, console)


def say_if_waiting(needed: int, console: Console) -> None:
    """Print a line if the cluster's free CPUs are fewer than needed: Ray waits for them silently."""
    for _ in range(10):  # the encoders' own CPUs are free again a moment after they finish
        free = ray.available_resources().get("CPU", 0.0)
        if free >= needed:
            return
        time.sleep(0.5)
    console.say(f"waiting for CPUs: {free:g} of {needed} are free, others of this cluster use the rest")
