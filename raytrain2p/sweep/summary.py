"""The text at the end of a sweep."""

from collections.abc import Iterator
from pathlib import Path

from raytrain2p.launch.progress import decimal
from raytrain2p.launch.summary import next_lines, run_in
from raytrain2p.sweep.results import SweepOutcome
from raytrain2p.sweep.settings import Sweep
from raytrain2p.tracking.next_commands import look_command, resume_command, store_command, use_command


def sweep_summary(outcome: SweepOutcome, sweep: Sweep, base: Path) -> str:
    """How the trials ended, the best one, and the next commands.

    Args:
        base: directory in which the commands will be typed.
    """
    ends = {"finished": outcome.finished, "stopped early": outcome.stopped_early, "failed": outcome.failed}
    ends["not finished"] = outcome.unfinished
    counts = ", ".join(f"{count} {end}" for end, count in ends.items() if count)
    lines = ["", f"sweep      {outcome.run_id}", f"directory  {outcome.directory}", f"trials     {outcome.trials}: {counts}"]
    if (best := outcome.best) is not None:
        value = f"{sweep.options.metric} {decimal(best['objective'], 4)} at step {best['at_step']}"
        lines.append(f"best       trial {best['trial']}, run {best['run_id']}: {value}")
        lines += [f"             {setting} = {value}" for setting, value in best["settings"].items()]
    return "\n".join([*lines, *next_lines(_commands(outcome, sweep, base))])


def _commands(outcome: SweepOutcome, sweep: Sweep, base: Path) -> Iterator[str]:
    if outcome.unfinished:
        yield resume_command(run_in(outcome.directory, sweep.base.tracking.uri), "tune")
    if outcome.best is not None:
        best = run_in(outcome.best["directory"], sweep.base.tracking.uri)
        yield from (use_command(best, base), outcome.best["command"], look_command(best, base))
    yield store_command(sweep.base.tracking.uri)
