"""A sweep that is resumed: its own settings, and its run."""

from collections.abc import Sequence
from typing import Any

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import SWEEPS
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.results import TrialRecords, check_unchanged
from raytrain2p.sweep.settings import Sweep
from raytrain2p.tracking.find import check_in_place, find_run
from raytrain2p.tracking.mlflow_store import check_password
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_objects import open_root


def resumed(sweep: Sweep, wanted: str, config: Any, overrides: Sequence[str]) -> tuple[Sweep, Run]:
    """The sweep to resume, and its run.

    Args:
        sweep: as the settings are now.
        wanted: the run of the sweep.
        config: what the user gave in place of the packaged settings, if anything.

    Raises:
        InputError: there is none, or it cannot be resumed with these settings.
    """
    if config is not None:
        what = "a sweep is resumed with its own settings"
        raise InputError(Problem("--resume with --config", what, "give changes as key=value"))
    open_root(sweep.base.output.root)
    run = find_run(sweep.base.output.root, [SWEEPS], wanted, "--resume")
    run.files.check()
    TrialRecords(run.path, sweep.base.output.root).trials()
    if (before := run.files.read_config()) is not None:
        sweep = load_sweep(run.files.config, [*run.files.moved_settings(), *overrides])
        check_unchanged(run, sweep, before)
    check_password(sweep.base.tracking.uri)
    check_in_place(run, sweep.base.output.root, f"--resume {wanted}")
    return sweep, run
