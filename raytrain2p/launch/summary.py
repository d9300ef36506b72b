"""What is said at the end of a launch: where the run is, what it measured, and what to do next."""

import io
from collections import defaultdict

from rich.console import Console as RichConsole
from rich.table import Table

from raytrain2p.config import Settings
from raytrain2p.config.secrets import masked
from raytrain2p.config.sweep import Sweep
from raytrain2p.launch.plan import Outcome, SweepOutcome


def summary(outcome: Outcome, phase: int, settings: Settings) -> str:
    """A table of the test metrics, one column per split, and the next commands."""
    short = outcome.run_id[:8]
    command = (
        f"python -m raytrain2p.train --phase 2 --aligner {short}"
        if phase == 1
        else f'python -m raytrain2p.predict --run {short} --image FILE "What does the picture show?"'
    )
    lines = [
        "",
        f"run        {outcome.run_id}",
        f"directory  {outcome.directory}",
        f"artifact   {outcome.artifact}",
        "",
        metric_table(outcome.metrics),
        f"next       {command}",
        f"compare    mlflow ui --backend-store-uri {masked(settings.tracking.uri)}",
    ]
    return "\n".join(lines)


def sweep_summary(outcome: SweepOutcome, sweep: Sweep) -> str:
    """How many trials came to what, the best one, and the next commands."""
    counts = f"{outcome.trials} trials: {outcome.finished} finished, {outcome.stopped_early} stopped early, {outcome.failed} failed"
    counts += f", {outcome.unfinished} not finished: --resume goes on with them" if outcome.unfinished else ""
    lines = ["", f"sweep      {outcome.run_id}", f"directory  {outcome.directory}", counts]
    if (best := outcome.best) is not None:
        lines.append(f"best       trial {best['trial']}: {sweep.options.metric} {best['objective']:.4f} at step {best['at_step']}")
        lines += [f"             {setting} = {value}" for setting, value in best["settings"].items()]
        lines.append(f"again      {best['command']}")
    return "\n".join([*lines, f"compare    mlflow ui --backend-store-uri {masked(sweep.base.tracking.uri)}"])


def metric_table(metrics: dict[str, float]) -> str:
    """Metrics named `<split>/<metric>`, a row per metric and a column per split."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in metrics.items():
        split, slash, metric = name.partition("/")
        rows[metric if slash else name]["train" if not slash else split] = value
    splits = list(dict.fromkeys(split for row in rows.values() for split in row))
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for split in splits:
        table.add_column(split, justify="right")
    for metric, row in rows.items():
        table.add_row(metric, *(format_metric(metric, row[split]) if split in row else "" for split in splits))
    stream = io.StringIO()
    RichConsole(file=stream, width=120).print(table)
    return stream.getvalue()


def format_metric(name: str, value: float) -> str:
    """Shares as percentages, losses as they are."""
    share = any(word in name for word in ("recall", "chance", "exact_match", "majority"))
    return f"{100 * value:.2f} %" if share else f"{value:.4f}"
