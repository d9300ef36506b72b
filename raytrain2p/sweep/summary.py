"""The text at the end of a sweep."""

from raytrain2p.config.secrets import masked
from raytrain2p.sweep.results import SweepOutcome
from raytrain2p.sweep.settings import Sweep


def sweep_summary(outcome: SweepOutcome, sweep: Sweep) -> str:
    """How the trials ended, the best one, and the next commands."""
    counts = f"{outcome.trials} trials: {outcome.finished} finished, {outcome.stopped_early} stopped early, {outcome.failed} failed"
    counts += f", {outcome.unfinished} not finished: --resume continues them" if outcome.unfinished else ""
    lines = ["", f"sweep      {outcome.run_id}", f"directory  {outcome.directory}", counts]
    if (best := outcome.best) is not None:
        lines.append(f"best       trial {best['trial']}: {sweep.options.metric} {best['objective']:.4f} at step {best['at_step']}")
        lines += [f"             {setting} = {value}" for setting, value in best["settings"].items()]
        lines.append(f"retrain    {best['command']}")
    return "\n".join([*lines, f"compare    mlflow ui --backend-store-uri {masked(sweep.base.tracking.uri)}"])
