"""`list`: runs, one a line, the oldest first, so that the newest is next to the prompt."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from raytrain2p.config.cli import FAILED, report
from raytrain2p.config.phases import PHASES, SWEEPS
from raytrain2p.runs.known import add_mlflow_argument, known_runs
from raytrain2p.runs.output import human_age, human_bytes, number, print_json, print_table
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import ATTRIBUTES, HEADINGS, ORPHANED, RunSummary, condition, order

COLUMNS = ("run", "phase", "status", "age", "steps", "metric", "best", "size", "tags")
NOT_LISTED = ("settings", "inputs")  # `show` has them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", choices=[*map(str, PHASES), SWEEPS], help="runs of this phase, or sweeps")
    parser.add_argument("--status", type=str.upper, choices=["RUNNING", "FINISHED", "FAILED", "KILLED", ORPHANED], help="runs with it")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="runs that meet it: a metric (its last value), a setting, a tag or a column, as in 'val/loss<2.1' or 'age<7d';"
        " several must all be met",
    )
    parser.add_argument("--sort", metavar="NAME", help="sort by a metric, a setting, a tag or a column (default: the oldest first)")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    add_mlflow_argument(parser)


def run(request: Request) -> int:
    """Print the runs.

    Raises:
        InputError: a condition is none; a name fits no run; there are no runs at all; or MLflow does not answer.
    """
    options = request.options
    conditions = [condition(text) for text in options.where]
    phase = PHASES[int(options.phase)].name if options.phase in map(str, PHASES) else options.phase
    known, damaged = known_runs(request)
    report_unknown([one.name for one in conditions] + [options.sort] * bool(options.sort), known)
    found = [one for one in known if phase in (None, one.phase) and options.status in (None, one.status)]
    found = order([one for one in found if all(each.holds(one) for each in conditions)], options.sort, options.reverse)
    if options.json:
        print_json([{key: value for key, value in asdict(one).items() if key not in NOT_LISTED} for one in found])
    else:
        print_runs(found)
    for line in damaged:
        report(line)
    return FAILED if damaged else 0


def report_unknown(names: Iterable[str], runs: Sequence[RunSummary]) -> None:
    """Report a name that no run has: it may be misspelt."""
    for name in names:
        if HEADINGS.get(name, name) not in ATTRIBUTES and all(run.value(name) is None for run in runs):
            report(f"no run has `{name}`, be it a metric, a setting or a tag")


def print_runs(runs: Sequence[RunSummary]) -> None:
    """A table. MLflow has the last value of the monitored metric, and not the best one."""
    has_best = any(run.is_here for run in runs) or not runs
    columns = COLUMNS if has_best else tuple("last" if column == "best" else column for column in COLUMNS if column != "size")
    print_table(columns, [[value for value in row(run, has_best) if value is not None] for run in runs], cut=True)


def row(one: RunSummary, has_best: bool = True) -> list[str | None]:
    """A line of the table."""
    tags = " ".join(key if value in ("", "true") else f"{key}={value}" for key, value in one.user_tags().items())
    value = one.best if has_best else one.metrics.get(one.monitor)
    size = human_bytes(one.bytes) if has_best else None
    return [one.run_id[:8], one.phase, one.status, human_age(one.timestamp), str(one.steps), one.monitor, number(value), size, tags]
