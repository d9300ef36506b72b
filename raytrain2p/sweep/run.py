"""A sweep as a recipe: check it, prepare once what its trials share, run the trials."""

import json
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from raytrain2p.config import InputError, Problem
from raytrain2p.config.console import Console
from raytrain2p.config.phases import PHASES, SWEEPS
from raytrain2p.config.scratch import is_remote
from raytrain2p.config.secrets import one_line
from raytrain2p.launch.autoscaler import check_possible, nodes_held
from raytrain2p.launch.capacity import Capacity
from raytrain2p.launch.cluster import connected
from raytrain2p.launch.driver import checked_launch_id, encode, prepared, with_resources
from raytrain2p.launch.models import fetch_models
from raytrain2p.launch.monitor import (
    PreparedSplits,
    TrainingFailedError,
    naming_run,
    passed_environment,
    storage_environment,
    typed_command,
)
from raytrain2p.launch.nodes import check_nodes
from raytrain2p.launch.places import place_problem
from raytrain2p.launch.quiet import muted_stderr, quiet
from raytrain2p.launch.submission import launch_id_of_job, lines_of_job
from raytrain2p.phases.inputs import PhaseInputs
from raytrain2p.storage.errors import StorageError, is_disk_failure
from raytrain2p.storage.lease import LostLeaseError
from raytrain2p.sweep.feasibility import check_sweep, check_trials, trials_at_once
from raytrain2p.sweep.results import PARENT_TAG, SweepOutcome, TrialRecords, sweep_config, sweep_page
from raytrain2p.sweep.resume import resumed as resumed_from
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.trial import SweepJob
from raytrain2p.sweep.tuner import SweepTuner
from raytrain2p.tracking.create_run import get_or_create_run
from raytrain2p.tracking.mlflow_store import check_store_is_shared, missing_store, prepare_store, store_exists
from raytrain2p.tracking.run import SWEEP_TAG, Run, disk_gone, launch_lock, recorded_run
from raytrain2p.tracking.run_objects import fetch_launch, only_driver, open_root, own_objects, reporting_storage
from raytrain2p.tracking.run_writer import end_unrecorded, open_run_writer
from raytrain2p.tracking.source import source_tags
from raytrain2p.worker.channel import SweepChannel


class SweepFailedError(TrainingFailedError):
    """The disk of a sweep failed, or another driver has taken it over. The message is one line for the user."""


def run_sweep(
    sweep: Sweep,
    resumed: Run | None,
    verbose: bool,
    console: Console,
    accept_changed_inputs: bool = False,
    command: Callable[[Run], str] = lambda run: typed_command("raytrain2p.tune"),
) -> SweepOutcome:
    """Run a sweep, or resume one.

    Args:
        resumed: the run of a sweep to resume.
        verbose: show Ray's own output.
        accept_changed_inputs: trials may be resumed with inputs of other content.
        command: shell line that runs the same as the run of the sweep; by default what was typed.

    Raises:
        InputError: bad input; nothing was started.
        StoppedError: a signal ended the sweep; it can be resumed.
        SweepFailedError: its disk is full, read-only or gone, or another driver has taken over.
    """
    if not verbose:
        quiet()
    root = sweep.base.output.root
    if resumed is None and is_remote(root) and place_problem("output.root", root) is None:  # else `check_sweep` reports that
        open_root(root)
    of_job = launch_id_of_job("sweep", sweep_config(sweep))
    launch_id = checked_launch_id(resumed.launch_id if resumed else of_job or f"sweep-{uuid.uuid4().hex[:12]}")
    if resumed is None and recorded_run(root, launch_id) is not None:  # this job was submitted before
        sweep, resumed = resumed_from(sweep, launch_id, None, [f"tracking.uri={json.dumps(sweep.base.tracking.uri)}"])
    for line in lines_of_job(sweep.base):
        console.say(line)
    with naming_run(root, launch_id):
        return _run_sweep(sweep, resumed, launch_id, verbose, console, accept_changed_inputs, command)


def _run_sweep(
    sweep: Sweep,
    resumed: Run | None,
    launch_id: str,
    verbose: bool,
    console: Console,
    accept_changed_inputs: bool,
    command: Callable[[Run], str],
) -> SweepOutcome:
    sweep, inputs_by_key = check_sweep(sweep, console, is_new=resumed is None)
    root, options = sweep.base.output.root, sweep.options
    with connected(sweep.base.launch, verbose) as capacity, ExitStack() as stack:
        check_possible(sweep.base.launch, capacity, trial=True)
        if problems := check_store_is_shared(sweep.base.tracking.uri, capacity.machines):
            raise InputError(problems)
        if resumed is not None and not store_exists(sweep.base.tracking.uri):
            raise InputError(missing_store(sweep.base.tracking.uri))
        experiment = PHASES[options.phase].experiment
        prepare_store(sweep.base, experiment)
        lock = launch_lock(root, launch_id)
        lock.path.parent.mkdir(parents=True, exist_ok=True)
        holder = stack.enter_context(lock.held(1.0)) or stack.enter_context(only_driver(root, launch_id, console.say))
        if holder is not None:
            raise InputError(Problem(f"--resume {launch_id}", f"is under way: {holder}", "wait for its end"))
        if resumed is not None:
            with reporting_storage(f"output.root={root}"):
                fetch_launch(root, launch_id)  # again: another process may have continued it meanwhile
                check_trials(TrialRecords(resumed.path, root), sweep, inputs_by_key, accept_changed_inputs)
        with nodes_held(sweep.base.launch, capacity, console, trial=True) as capacity:
            if problems := check_store_is_shared(sweep.base.tracking.uri, capacity.machines):
                raise InputError(problems)
            sweep = replace(sweep, base=with_resources(sweep.base, capacity, trial=True))
            check_nodes(list(inputs_by_key.values()), sweep.base.launch, console)
            splits = prepare_splits(sweep, inputs_by_key, capacity, verbose, console)
        try:
            return run_trials(sweep, launch_id, splits, capacity, verbose, console, command)
        except LostLeaseError as error:
            raise SweepFailedError(str(error)) from error
        except (OSError, StorageError) as error:
            gone = disk_gone(root, launch_id)
            if gone is None and not is_disk_failure(error):
                raise
            end_unrecorded(sweep.base.tracking.uri, root, launch_id, "FAILED")
            raise SweepFailedError(one_line(gone or error, 1000)) from error


def prepare_splits(
    sweep: Sweep, inputs_by_key: dict[str, PhaseInputs], capacity: Capacity, verbose: bool, console: Console
) -> dict[str, PreparedSplits]:
    """Compute missing features, and put the splits that the trials share into Ray's object store."""
    fetch_models([name for inputs in inputs_by_key.values() for name in inputs.model_names], sweep.base.launch, console)
    splits: dict[str, PreparedSplits] = {}
    for key, inputs in inputs_by_key.items():
        if not splits or any(job.store.missing(job.items) for job in inputs.jobs):  # most share features: log them once
            with muted_stderr(verbose):
                encode(inputs, sweep.base, capacity.most_cpus, console)
        splits[key] = prepared(inputs)
    return splits


def run_trials(
    sweep: Sweep,
    launch_id: str,
    splits: dict[str, PreparedSplits],
    capacity: Capacity,
    verbose: bool,
    console: Console,
    command: Callable[[Run], str],
) -> SweepOutcome:
    """Create the sweep's run, or find it, and run the trials."""
    source, at_once = source_tags("raytrain2p.tune"), trials_at_once(sweep, capacity)
    with ExitStack() as stack:
        lease = stack.enter_context(own_objects(sweep.base.output.root, launch_id))
        run = get_or_create_run(sweep.base, SWEEPS, PHASES[sweep.options.phase].experiment, launch_id, source)
        shell_line, launched = command(run), time.time()
        describe = {"config": sweep_config(sweep), "command": shell_line, "facts": {}, "page": sweep_page, "launched": launched}
        writer = stack.enter_context(open_run_writer(run, sweep.base.tracking.uri, describe, console.say, lease))
        job = SweepJob(
            sweep,
            launch_id,
            shell_line,
            launched,
            run,
            {PARENT_TAG: run.run_id, SWEEP_TAG: run.run_id} | source,
            splits,
            sweep.base.launch.cpus_per_worker or 1,
            SweepChannel(),
            passed_environment() | storage_environment(sweep.base),
            verbose,
        )
        console.say(f"sweep {run.run_id[:8]}: {at_once} trial{'s' if at_once > 1 else ''} at once, in {run.directory}")
        return SweepTuner(job, writer, at_once, console, ray_stays=capacity.of_caller).run()
