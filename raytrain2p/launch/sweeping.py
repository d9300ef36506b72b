"""The driver's side of a sweep: check it, prepare once what its trials share, and let them run."""

import uuid
from contextlib import ExitStack

from raytrain2p.config import InputError, Problem
from raytrain2p.config.secrets import one_line
from raytrain2p.config.sweep import Sweep
from raytrain2p.launch.chatter import muted_stderr, quiet
from raytrain2p.launch.cluster import connected
from raytrain2p.launch.conductor import Conductor
from raytrain2p.launch.driver import checked_launch_id, encode, prepared
from raytrain2p.launch.phases import PHASES
from raytrain2p.launch.plan import SweepOutcome
from raytrain2p.launch.progress import Console, ProgressBoard
from raytrain2p.launch.sweep_checks import check_sweep, check_trials, sweep_launch, trials_at_once
from raytrain2p.launch.training import Prepared, mlflow_environment, typed_command
from raytrain2p.launch.trials import TrialPlan
from raytrain2p.tracking.recorder import end_unrecorded, recording
from raytrain2p.tracking.run import SWEEP_TAG, Run, disk_gone, get_or_create_run, launch_lock
from raytrain2p.tracking.storage import FAILED_DISK, StorageError
from raytrain2p.tracking.store import check_store_is_shared, prepare_store
from raytrain2p.tracking.sweeps import PARENT_TAG, SWEEPS, TRIALS, TrialBook, sweep_config, sweep_page


class SweepFailedError(RuntimeError):
    """The disk of a sweep failed. Its text is one line for the user."""


def run_sweep(sweep: Sweep, resumed: Run | None, verbose: bool, console: Console) -> SweepOutcome:
    """Run a sweep, or go on with one.

    Args:
        sweep: checked.
        resumed: the sweep's run, if there is one already.
        verbose: let Ray's own output through.
        console: where progress goes.

    Raises:
        InputError: bad input; nothing was started.
        StoppedError: a signal ended it; `--resume` goes on.
        SweepFailedError: its disk is full, read-only or gone.
    """
    if not verbose:
        quiet()
    launch_id = checked_launch_id(resumed.launch_id if resumed else f"sweep-{uuid.uuid4().hex[:12]}")
    sweep, surveys = check_sweep(sweep, console)
    root, options = sweep.base.output.root, sweep.options
    with connected(sweep_launch(sweep), verbose) as capacity, ExitStack() as stack:
        if problems := check_store_is_shared(sweep.base.tracking.uri, capacity.machines):
            raise InputError(problems)
        experiment = PHASES[options.phase].experiment
        prepare_store(sweep.base, experiment)
        holder = stack.enter_context(launch_lock(root, launch_id).held(1.0))
        if holder is not None:
            raise InputError(Problem(f"--resume {launch_id}", f"is under way: {holder}", "wait for its end"))
        if resumed is not None:
            check_trials(TrialBook(resumed.path, root), sweep, surveys)
        splits: dict[str, Prepared] = {}
        for key, survey in surveys.items():
            if not splits or any(job.store.missing(job.items) for job in survey.jobs):  # most share their features: said once
                with muted_stderr(verbose):
                    encode(survey, sweep.base, max(cpus for cpus, _ in capacity.nodes), console)
            splits[key] = prepared(survey)
        try:
            return conducted(sweep, launch_id, splits, trials_at_once(sweep, capacity), verbose, console)
        except (OSError, StorageError) as error:
            gone = disk_gone(root, launch_id)
            if gone is None and isinstance(error, OSError) and error.errno not in FAILED_DISK:
                raise
            end_unrecorded(sweep.base.tracking.uri, launch_id, "FAILED")
            raise SweepFailedError(one_line(gone or error, 1000)) from error


def conducted(sweep: Sweep, launch_id: str, splits: dict[str, Prepared], at_once: int, verbose: bool, console: Console) -> SweepOutcome:
    """Make the sweep's run, or find it, and let the trials run."""
    run = get_or_create_run(sweep.base, SWEEPS, PHASES[sweep.options.phase].experiment, launch_id, folder=TRIALS)
    command = typed_command("raytrain2p.tune")
    describe = {"config": sweep_config(sweep), "command": command, "facts": {}, "page": sweep_page(run, command)}
    with recording(run, sweep.base.tracking.uri, describe, console.say) as recorder:
        plan = TrialPlan(
            sweep,
            launch_id,
            command,
            run,
            {PARENT_TAG: run.run_id, SWEEP_TAG: run.run_id},
            splits,
            sweep_launch(sweep).cpus_per_worker or 1,
            ProgressBoard.remote(),  # type: ignore[attr-defined]
            mlflow_environment(),
            verbose,
        )
        console.say(f"sweep {run.run_id[:8]}: {at_once} trial{'s' if at_once > 1 else ''} at once, in {run.directory}")
        return Conductor(plan, recorder, at_once, console).run()
