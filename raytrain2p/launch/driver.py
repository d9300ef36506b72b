"""The driver of a launch: check everything, compute missing features, and train."""

import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import ray

from raytrain2p.config import Findings, InputError, Problem, Settings, flatten_tree
from raytrain2p.config.console import Console
from raytrain2p.config.phases import ALIGNMENT, PHASES
from raytrain2p.config.secrets import one_line
from raytrain2p.config.settings import ALIGNER, INIT, InstructionSettings, LaunchSettings
from raytrain2p.launch.cluster import Capacity, check_before_connecting, connected, cpus_per_worker
from raytrain2p.launch.monitor import PreparedSplits, naming_run, train
from raytrain2p.launch.places import place_problem, place_problems
from raytrain2p.launch.quiet import muted_stderr, quiet
from raytrain2p.launch.resume import check_resumable, finished_outcome
from raytrain2p.models.artifacts import recorded_digest
from raytrain2p.phases.inputs import PhaseInputs, plan_notes
from raytrain2p.phases.instruction.checks import check_encoders
from raytrain2p.phases.registry import read_inputs
from raytrain2p.tracking.create_run import check_launch_is_free
from raytrain2p.tracking.find import check_original, find_artifact, has_failed, is_run_directory
from raytrain2p.tracking.mlflow_store import check_store_is_shared, missing_store, prepare_store, store_exists
from raytrain2p.tracking.run import LAUNCH_ID, Run, launch_lock, recorded_run
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.tracking.run_objects import only_driver, open_root
from raytrain2p.worker.job import Outcome

LATEST = "latest"
SettingsT = TypeVar("SettingsT", bound=Settings)


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
        with only_launch(settings, launch_id, console.say):
            before, run = run, run_to_resume(asked, launch_id, phase)  # again: another process may have made it, or trained it, meanwhile
            if run != before:
                settings, inputs = check(asked, phase, console, run, accept_changed_inputs)
            elif run is not None:
                check_resumable(run, settings, inputs.digests, accept_changed_inputs)
            if (outcome := finished(run, settings, inputs, console)) is not None:
                return outcome
            check_artifacts_are_there(settings)
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
        The settings with `model.init` and `model.aligner` resolved to paths, and the phase's inputs.

    Raises:
        InputError: every problem at once.
    """
    findings = Findings()
    with findings:
        open_root(settings.output.root)
    findings.raise_any()
    settings = resolve_artifacts(settings, findings, console, run)
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


def resolve_artifacts(settings: Settings, findings: Findings, console: Console, run: Run | None = None) -> Settings:
    """Replace a run ID or `latest` in `model.init` and `model.aligner` by the path of its artifact, and print that path.

    A run that is resumed keeps what it began with, though `latest` may be another one by now.
    """
    with findings:
        if (wanted := settings.model.init) is not None:
            wanted = (began_with(run, INIT) if wanted == LATEST else None) or wanted
            path = find_artifact(settings.output.root, settings.phase, wanted, INIT, report=console.say)
            if run is None:
                check_as_recorded(path, f"{INIT}={wanted}")
            console.say(f"{INIT}: {path}")
            settings = with_model(settings, init=str(path))
    with findings:
        if isinstance(settings, InstructionSettings):
            settings = resolve_aligner(settings, console, run)
    return settings


def began_with(run: Run | None, setting: str) -> str | None:
    """The value with which a run that is resumed began."""
    return flatten_tree(run.files.read_config() or {}).get(setting) if run is not None else None


def resolve_aligner(settings: InstructionSettings, console: Console, run: Run | None) -> InstructionSettings:
    """By default the latest one; with `model.init` the one in there, for which null stands."""
    wanted = settings.model.aligner
    if wanted in (None, LATEST):
        wanted = began_with(run, ALIGNER) or wanted or (LATEST if settings.model.init is None else None)
    if wanted is None:
        return settings
    path = find_artifact(settings.output.root, ALIGNMENT, wanted, ALIGNER, partial(fits, settings, console), console.say)
    console.say(f"aligner: {path}")
    return with_model(settings, aligner=str(path))


def check_as_recorded(path: Path, setting: str) -> None:
    """An artifact in a run's directory must be the one that the run recorded, and the run must not have failed since.

    Raises:
        InputError: it is not.
    """
    files = RunDirectory(path.parent)
    if not is_run_directory(files.path):
        return
    if has_failed(files.path):
        raise InputError(Problem(setting, f"run {files.run_id[:8]} FAILED after it wrote {path}", "choose another run"))
    if (recorded := files.artifact_digest()) is not None and recorded_digest(path) != recorded:
        what = f"{path} is not the one that run {files.run_id[:8]} recorded: the digest in {files.result.name} differs"
        raise InputError(Problem(setting, what, "restore it from a copy, or choose another run"))


def check_artifacts_are_there(settings: Settings) -> None:
    """Check, now that `prune` sees that this launch is under way, that it has not just deleted what training begins with.

    Raises:
        InputError: it has.
    """
    named = {INIT: settings.model.init, ALIGNER: settings.model.aligner if isinstance(settings, InstructionSettings) else None}
    gone = [f"{setting}={path}" for setting, path in named.items() if path is not None and not Path(path).is_file()]
    if gone:
        raise InputError([Problem(one, "was deleted just now", "choose another one") for one in gone])


def with_model(settings: SettingsT, **changes: str) -> SettingsT:
    changed: Any = settings.model_copy(update={"model": settings.model.model_copy(update=changes)})
    return cast(SettingsT, changed)


def fits(settings: InstructionSettings, console: Console, path: Path) -> bool:
    """Whether an aligner was trained with the encoders of these settings; why not is printed."""
    try:
        check_encoders(with_model(settings, aligner=str(path)))
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
    open_root(settings.output.root)
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
def only_launch(settings: Settings, launch_id: str, say: Callable[[str], None]) -> Iterator[None]:
    """Within, no other process can start this launch.

    Args:
        say: is given a line, if a process on another machine may be alive, which takes a while to find out.

    Raises:
        InputError: another one has.
    """
    lock = launch_lock(settings.output.root, launch_id)
    lock.path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        holder = stack.enter_context(lock.held(1.0)) or stack.enter_context(only_driver(settings.output.root, launch_id, say))
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
