"""`list`: runs, one a line, the oldest first."""

import argparse
from dataclasses import asdict

from raytrain2p.config.cli import FAILED, report
from raytrain2p.config.phases import PHASES, SWEEPS
from raytrain2p.runs.output import human_age, human_bytes, number, print_json, print_table
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import ORPHANED, RunSummary, condition, order, summary_of
from raytrain2p.tracking.damage import DamagedFileError

COLUMNS = ("run", "phase", "status", "age", "steps", "metric", "best", "size", "tags")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--phase", choices=[*map(str, PHASES), SWEEPS], help="runs of this phase, or sweeps")
    parser.add_argument("--status", type=str.upper, choices=["RUNNING", "FINISHED", "FAILED", "KILLED", ORPHANED], help="runs with it")
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="CONDITION",
        help="runs that meet it: a metric (its last value), a setting or a tag, as in 'val/loss<2.1'; several must all be met",
    )
    parser.add_argument(
        "--sort",
        metavar="NAME",
        help="sort by a metric, a setting, `best`, `steps` or `bytes` (default: by age)",
    )
    parser.add_argument("--reverse", action="store_true", help="the other way round")


def run(request: Request) -> int:
    """Print the runs.

    Raises:
        InputError: a condition is none; a name fits no run; or there are no runs at all.
    """
    options = request.options
    conditions = [condition(text) for text in options.where]
    phase = PHASES[int(options.phase)].name if options.phase in map(str, PHASES) else options.phase
    found, damaged = list[RunSummary](), list[str]()
    runs, damaged = request.runs()
    for each in runs:
        try:
            if phase in (None, each.phase):
                found.append(summary_of(each, request.root))
        except DamagedFileError as error:
            damaged.append(error.line)
    found = [one for one in found if options.status in (None, one.status) and all(holds(one) for holds in conditions)]
    found = order(found, options.sort, options.reverse)
    if options.json:
        print_json([{key: value for key, value in asdict(one).items() if key != "settings"} for one in found])
    else:
        print_table(COLUMNS, [row(one) for one in found])
    for line in damaged:
        report(line)
    return FAILED if damaged else 0


def row(one: RunSummary) -> list[str]:
    """A line of the table."""
    tags = " ".join(key if value in ("", "true") else f"{key}={value}" for key, value in one.user_tags().items())
    size = human_bytes(one.bytes)
    return [one.run_id[:8], one.phase, one.status, human_age(one.timestamp), str(one.steps), one.monitor, number(one.best), size, tags]
