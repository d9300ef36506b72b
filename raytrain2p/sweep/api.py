"""`raytrain2p.sweep(...)`: a sweep as a call. It imports nothing that takes time before it is called."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain2p.config import Findings
from raytrain2p.config.metadata import known_keys
from raytrain2p.config.program import as_overrides
from raytrain2p.config.settings import SETTINGS_OF_PHASE
from raytrain2p.launch.api import CallableModule, GivenSettings, called, command_line, config_of, quiet_imports

if TYPE_CHECKING:
    from raytrain2p.sweep.results import SweepOutcome
    from raytrain2p.tracking.run import Run
    from raytrain2p.tracking.run_directory import RunDirectory


def sweep(
    settings: GivenSettings = None,
    *,
    resume: "str | Path | Run | RunDirectory | SweepOutcome | None" = None,
    accept_changed_inputs: bool = False,
    quiet: bool = False,
    ray_logs: bool = False,
    **overrides: Any,
) -> "SweepOutcome":
    """Sweep settings of a phase, as `python -m raytrain2p.tune` does.

    >>> outcome = raytrain2p.sweep(sweep={"num_trials": 4}, training={"max_steps": 60})

    Args:
        settings: path of a YAML file with a `sweep` group and what all trials share, or the same as a dictionary; or the checked
            settings of a phase, to which `sweep={"space": ...}` belongs. None takes the packaged sweep.
        resume: a sweep to resume with its own settings: its directory, run ID or the start of one, launch ID, outcome, or `latest`.
        accept_changed_inputs, quiet, ray_logs: as of `raytrain2p.train`.
        overrides: settings of the sweep (`sweep={"num_trials": 4}`) and of the trials, as of `raytrain2p.train`.

    Returns:
        The sweep's run and directory, how its trials ended, and the best one. Trials that failed raise nothing: `failed` counts them.

    Raises:
        InputError: bad input, with every problem; nothing was started.
        TrainingFailedError: the disk of the sweep failed, or another driver has taken it over.
        KeyboardInterrupt: after Ctrl-C (or SIGTERM, while trials run); `resume` resumes it.
    """
    from raytrain2p.sweep.load import load_sweep
    from raytrain2p.sweep.settings import SweepSettings

    problems = Findings()
    known = {key for kind in SETTINGS_OF_PHASE.values() for key in known_keys(kind)} | {*known_keys(SweepSettings, "sweep.")}
    given = as_overrides(overrides, known, problems)
    with problems:
        config = config_of(settings)
        phase = next((number for number, kind in SETTINGS_OF_PHASE.items() if isinstance(settings, kind)), None)
        if phase is not None and isinstance(config, dict):
            config["sweep"] = {"phase": phase}
        checked, run = load_sweep(config, given), None
    problems.raise_any()

    wanted: str | None = None
    if resume is not None:
        from raytrain2p.sweep.resume import resumed
        from raytrain2p.tracking.find import name_of

        wanted = name_of(resume)
        checked, run = resumed(checked, wanted, config, given)

    def command(sweep: "Run") -> str:
        return command_line("tune", ["--config", str(sweep.files.config)] if wanted is None else ["--resume", wanted, *given])

    with quiet_imports():
        from raytrain2p.sweep.run import run_sweep

    with called(quiet) as console:
        return run_sweep(checked, run, ray_logs, console, accept_changed_inputs, command)


class SweepModule(CallableModule):
    """`raytrain2p.sweep`, a package."""

    __call__ = staticmethod(sweep)
    __signature__ = inspect.signature(sweep)
