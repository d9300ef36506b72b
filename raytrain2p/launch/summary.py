"""The end of a launch, as printed: where the run is, its metrics, and the next commands."""

import shlex
from collections import defaultdict

from rich.table import Table

from raytrain2p.config import Settings
from raytrain2p.config.phases import PHASES
from raytrain2p.config.secrets import masked
from raytrain2p.interrupts import StoppedError
from raytrain2p.launch.progress import Console, cell
from raytrain2p.tracking.run import Run
from raytrain2p.worker.job import Outcome

SHARES = ("recall", "chance", "exact_match", "majority")  # metrics between 0 and 1, printed as percentages


def print_summary(outcome: Outcome, phase: int, settings: Settings, console: Console) -> None:
    short = outcome.run_id[:8]
    command = PHASES[phase].next_command.format(run=short)
    console.say(f"\nrun        {outcome.run_id}\ndirectory  {outcome.directory}\nartifact   {outcome.artifact}\n")
    console.draw(metric_table(outcome.metrics))
    console.say(f"\nnext       {command}\ncompare    mlflow ui --backend-store-uri {masked(settings.tracking.uri)}")


def stopped_line(stopped: StoppedError, command: str) -> str:
    """The last line of a command that a signal stopped: what can be resumed, where it is, and how.

    Args:
        command: that resumes, as in `python -m raytrain2p.COMMAND --resume DIRECTORY`.
    """
    run = stopped.run
    if run is None:
        return f"raytrain2p: {stopped}, before there was a run"
    return f"raytrain2p: {stopped}; run {run.run_id} is in {run.directory}; resume it with: {resume_command(run, command)}"


def resume_command(run: Run, command: str) -> str:
    return f"python -m raytrain2p.{command} --resume {shlex.quote(run.directory)}"


def metric_table(metrics: dict[str, float]) -> Table:
    """Metrics named `<split>/<metric>`, a row per metric and a column per split."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in metrics.items():
        split, slash, metric = name.partition("/")
        rows[metric if slash else name][split if slash else "train"] = value
    splits = list(dict.fromkeys(split for row in rows.values() for split in row))
    table = Table(box=None, pad_edge=False)
    table.add_column("metric", overflow="fold")  # its end may be the name of a task in the records
    for split in splits:
        table.add_column(cell(split), justify="right", overflow="fold")
    for metric, row in rows.items():
        table.add_row(cell(metric), *(format_metric(metric, row[split]) if split in row else "" for split in splits))
    return table


def format_metric(name: str, value: float) -> str:
    return f"{100 * value:.2f} %" if any(word in name for word in SHARES) else f"{value:.4f}"
