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
from raytrain2p.launch.autoscaler import check_possible, nodes_held
from raytrain2p.launch.capacity import Capacity, demand, resolved
from raytrain2p.launch.cluster import before_connecting, connected
from raytrain2p.launch.early import EarlyStart
from raytrain2p.launch.models import fetch_models, pin_models
from raytrain2p.launch.monitor import PreparedSplits, naming_run, train
from raytrain2p.launch.nodes import check_nodes
from raytrain2p.launch.places import place_problem, place_problems
from raytrain2p.launch.process_group import check_cuda, host_without_cuda
from raytrain2p.launch.quiet import muted_stderr, quiet
from raytrain2p.launch.resume import check_resumable, finished_outcome
from raytrain2p.launch.submission import launch_id_of_job, lines_of_job
from raytrain2p.models.artifacts import recorded_digest
from raytrain2p.phases.inputs import PhaseInputs, plan_notes
from raytrain2p.phases.instruction.aligner import check_encoders
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
        launch_id: stable name of the launch; None takes that of the job, or makes a new one. If it has a run already, that run is resumed.
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
    of_job = launch_id_of_job(f"phase{phase}", settings.model_dump(mode="json"))
    launch_id = checked_launch_id(launch_id or of_job or f"launch-{uuid.uuid4().hex[:12]}")
    for line in lines_of_job(settings):
        console.say(line)
    with naming_run(settings.output.root, launch_id), EarlyStart(verbose, is_command=command is None) as early:
        return _launch(settings, phase, launch_id, verbose, console, accept_changed_inputs, command, early)


def _launch(
    asked: Settings,
    phase: int,
    launch_id: str,
    verbose: bool,
    console: Console,
    accept_changed_inputs: bool,
    command: str | None,
    early: EarlyStart,
) -> Outcome:
    run = run_to_resume(asked, launch_id, phase)
    settings, inputs = check(asked, phase, console, run, accept_changed_inputs, early.begin)
    if (outcome := finished(run, settings, inputs, console)) is not None:
        return outcome
    with connected(settings.launch, verbose, early.started) as capacity:
        check_possible(settings.launch, capacity)
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
            with nodes_held(settings.launch, capacity, console) as capacity:
                settings = with_resources(settings, capacity)
                if problems := check_store_is_shared(settings.tracking.uri, capacity.machines):  # the nodes may be new
                    raise InputError(problems)
                check_nodes([inputs], settings.launch, console)
                fetch_models(inputs.model_names, settings.launch, console)
                with muted_stderr(verbose):
                    encode(inputs, settings, capacity.most_cpus, console)
            say_workers(settings.launch, asked.launch, capacity, console)
            return train(
                settings,
                prepared(inputs),
                phase,
                launch_id,
                settings.launch.cpus_per_worker or 1,
                console,
                own_cluster=capacity.started_here,
                ray_stays=capacity.of_caller,
                command=command,
            )


def finished(run: Run | None, settings: Settings, inputs: PhaseInputs, console: Console) -> Outcome | None:
    """The outcome of a launch whose run is finished, if these settings do not ask for more steps."""
    outcome = finished_outcome(run, settings, inputs.records) if run is not None else None
    if run is not None and outcome is not None:
        console.say(f"run {run.run_id} of launch {run.launch_id} is finished already")
    return outcome


def check(
    settings: Settings,
    phase: int,
    console: Console,
    run: Run | None = None,
    accept_changed_inputs: bool = False,
    begin: Callable[[LaunchSettings], None] | None = None,
) -> tuple[Settings, PhaseInputs]:
    """Check what does not need a cluster: models, aligner, records, media, resources; and whether `run`, if there is one, can
    be resumed with these settings.

    Args:
        begin: called with resolved settings once what takes no time is checked, with no problem so far, if there is something to train.

    Returns:
        The settings with `model.init` and `model.aligner` resolved to paths and hub models to commits, and the phase's inputs.

    Raises:
        InputError: every problem at once.
    """
    findings = Findings()
    with findings:
        open_root(settings.output.root)
    findings.raise_any()
    settings = pin_models(resolve_artifacts(settings, findings, console, run), run, console)
    with findings:
        settings = with_launch(settings, before_connecting(settings.launch, findings))
        if begin is not None and not findings.problems and (run is None or run.files.read_status()["status"] != "FINISHED"):
            begin(settings.launch)
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


def with_launch(settings: SettingsT, launch: LaunchSettings) -> SettingsT:
    changed: Any = settings.model_copy(update={"launch": launch})
    return cast(SettingsT, changed)


def with_resources(settings: SettingsT, capacity: Capacity, trial: bool = False) -> SettingsT:
    """The settings with what the launch takes of this cluster.

    Raises:
        InputError: they need GPUs, and the launch uses none.
    """
    from raytrain2p.phases.instruction.checks import attention_problem  # loads transformers

    settings = with_launch(settings, resolved(settings.launch, capacity, trial))
    if isinstance(settings, InstructionSettings) and (problem := attention_problem(settings)) is not None:
        raise InputError(problem)
    return settings


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
    workers, gpus = settings.data.feature_workers, settings.launch.gpus
    free = min(ray.available_resources().get("CPU", 0.0), most_cpus)
    cpus = 1 if gpus else max(1, int(free // workers))
    for job in inputs.jobs:
        computed = 0
        for line in job.store.damaged:
            console.say(line)
        if job.store.missing(job.items):
            say_if_waiting(cpus * workers, gpus * workers, console)
            if gpus:
                check_cuda([ray.get(ray.remote(num_cpus=0, num_gpus=gpus)(host_without_cuda).remote())])
            with console.progress_bar(f"encoding {job.modality}") as progress:
                build = partial(job.spec.build, "cuda" if gpus else "cpu")
                computed = job.store.complete(job.items, build, workers, cpus, gpus, progress)
        if job.items:
            found = len(job.items) - computed
            console.say(f"{job.modality} features of {len(job.items)} items: {computed} computed, {found} found in the store")


def prepared(inputs: PhaseInputs) -> PreparedSplits:
    """The splits, once everything is encoded."""
    return PreparedSplits(ray.put(inputs.prepare()), inputs.digests, inputs.use)


def say_workers(launch: LaunchSettings, asked: LaunchSettings, capacity: Capacity, console: Console) -> None:
    """Print how many workers start, on what and why, and whether they must wait for it.

    Args:
        launch: resolved.
        asked: as given.
    """
    least, most, why = launch.min_workers, launch.max_workers, ""
    count = f"{least} to {most} workers" if launch.is_elastic else f"{most} worker{'s' if most > 1 else ''}"
    if asked.use_gpu == "auto" and launch.use_gpu:
        why = f" (launch.use_gpu=auto: the cluster has {capacity.gpus:g} GPU{'' if capacity.gpus == 1 else 's'})"
    elif asked.use_gpu == "auto" and capacity.autoscales and capacity.limits is None:
        why = " (launch.use_gpu=auto: the cluster has no GPU; whether its autoscaler can add one cannot be read)"
    console.say(f"starting {count} with {demand(launch)} each{why}")
    say_if_waiting((launch.cpus_per_worker or 1) * least, launch.gpus * least, console)


def say_if_waiting(cpus: float, gpus: float, console: Console) -> None:
    """Print a line if the cluster's free CPUs or GPUs are fewer than needed: Ray waits for them silently."""
    needed = {"CPU": cpus, "GPU": gpus}
    for _ in range(10):  # the encoders' own are free again a moment after they finish
        free = ray.available_resources()
        lacking = {name: free.get(name, 0.0) for name, number in needed.items() if free.get(name, 0.0) < number - 1e-6}
        if not lacking:
            return
        time.sleep(0.5)
    what = " and ".join(f"{name}s" for name in lacking)
    shares = ", ".join(f"{number:g} of {needed[name]:g} {name if len(lacking) > 1 else ''}".rstrip() for name, number in lacking.items())
    console.say(f"waiting for {what}: {shares} are free, others of this cluster use the rest")
