"""`compare`: what differs between runs: settings, inputs, metrics; and their learning curves in one plot."""

import argparse
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.cli import FAILED, report
from raytrain2p.config.phases import PHASES_BY_NAME, SWEEPS
from raytrain2p.config.secrets import masked
from raytrain2p.runs.comparison import SETTINGS, ComparedRun, Row, as_json, read_compared, read_remote, rows_of, short_names
from raytrain2p.runs.output import print_json, print_table
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import phase_of
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import write_file
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import find_runs, read_run, run_directories
from raytrain2p.tracking.run import LAUNCH_ID, LAUNCH_TAG, SWEEP_TAG, Run

if TYPE_CHECKING:  # MLflow
    from raytrain2p.tracking.mlflow_runs import RemoteRun

NARROW = 80  # columns of a terminal, and of a table that many read in a pipe
LEAST = 16  # characters of a cell's line, as in `0.3267 at 1400 *`
MOST_IDS = 8  # in a file's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "A sweep stands for all its trials. `*` marks the best value: the lowest loss, the highest recall or exact match. "
        "A run without a directory here is compared as MLflow has it."
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw their learning curves in one plot")
    parser.add_argument(
        "--log",
        action="store_true",
        help="keep that plot as plots/comparison_<ids>.png of each run named (of a sweep: not of its trials), and as an artifact in MLflow",
    )


def run(request: Request) -> int:
    """Print what differs; draw it, if asked to.

    Raises:
        InputError: a name fits no run; there are fewer than two; one has no metrics; or the plot cannot be written.
    """
    options, findings, damaged = request.options, Findings(), list[str]()
    with findings:
        check_target(options.plot)
    named = list["Run | RemoteRun"]()
    for name in request.names:
        with findings:
            named += find_named(name, request, damaged)
    for line in damaged:
        report(line)
    findings.raise_any()
    reported, runs = len(damaged), read_all(named, request, damaged)
    for line in damaged[reported:]:
        report(line)
    if len(runs) < 2 and not damaged:
        fix = f"name them, or a sweep: python -m raytrain2p.runs {options.verb} RUN RUN"
        raise InputError(Problem("RUN", f"at least two runs are required; there is {len(runs) or 'none'}", fix))
    if len(runs) >= 2:
        complete = output(request, named, runs)
    return 0 if len(runs) >= 2 and complete and not damaged else FAILED


def output(request: Request, named: Sequence["Run | RemoteRun"], runs: Sequence[ComparedRun]) -> bool:
    """Print the table or JSON, and write the plot. Returns whether it is where it was to go."""
    options, rows, complete = request.options, rows_of(runs), True
    if options.plot or options.log:
        from raytrain2p.runs.comparison_plot import comparison_png

        png = comparison_png(runs)
    if options.plot:
        write_plot(options.plot, png)
    if options.json:
        print_json(as_json(runs, rows))
    else:
        print_rows(runs, rows)
        if options.plot:
            print(f"\nplot: {options.plot}")
    if options.log:
        complete = log_plot(named, png, request)
    return complete


def check_target(target: Path | None) -> None:
    """Check that a plot can be written.

    Raises:
        InputError: it cannot.
    """
    if target is None:
        return
    folder, where = target.absolute().parent, f"--plot {target}"
    if target.suffix.lower() != ".png":
        raise InputError(Problem(where, "does not end in .png", "plots are PNG files: --plot comparison.png"))
    if target.is_dir():
        raise InputError(Problem(where, "is a directory", f"name a file in it: --plot {target / 'comparison.png'}"))
    if not folder.is_dir():
        raise InputError(Problem(where, f"there is no directory {folder}", "make it, or choose another place"))
    if not os.access(folder, os.W_OK):
        raise InputError(Problem(where, f"{folder} cannot be written", "choose another place"))


def write_plot(target: Path, png: bytes) -> None:
    """Write a plot where the user wants it.

    Raises:
        InputError: the disk does not take it.
    """
    try:
        write_file(target, png)
    except OSError as error:
        raise InputError(Problem(f"--plot {target}", f"cannot be written: {error.strerror}", "choose another place")) from None


def find_named(name: str, request: Request, damaged: list[str]) -> Sequence["Run | RemoteRun"]:
    """The run of a name; one that has no directory here, as MLflow has it; none if it is damaged.

    Raises:
        InputError: neither has such a run.
    """
    try:
        return find_runs(request.root, [name], damaged.append)
    except InputError:
        if not re.fullmatch(LAUNCH_ID, name) or name == "latest":
            raise
        query = f"attributes.run_id LIKE '{name}%'" if re.fullmatch("[0-9a-f]{4,}", name) else f"tags.`{LAUNCH_TAG}` = '{name}'"
        found = remote_runs(request, query, damaged)
        if len(found) != 1:
            raise
        report(f"{name} has no directory in {request.root}; it is compared as MLflow has it, {masked(request.settings.tracking.uri)}")
        return found


def remote_runs(request: Request, query: str, damaged: list[str]) -> list["RemoteRun"]:
    """The runs that MLflow has and that are not deleted; none, and a line, if it does not answer or there is no store."""
    from raytrain2p.tracking.mlflow_runs import our_runs  # MLflow

    try:
        return [one for one in our_runs(request.settings.tracking.uri, query) if one.lifecycle == "active"]
    except StorageError as error:
        damaged += [] if str(error) in damaged else [str(error)]
        return []


def read_all(named: Sequence["Run | RemoteRun"], request: Request, damaged: list[str]) -> list[ComparedRun]:
    """The runs to compare, each once: for a sweep its trials.

    Args:
        damaged: gets a line for each damaged run, which is left out.

    Raises:
        InputError: runs that were named and have no metrics.
    """
    found, findings = dict[str, ComparedRun](), Findings()
    for one in named:
        is_sweep = (one.phase if isinstance(one, Run) else phase_of(one)) == SWEEPS
        for each in trials_of(one, request, damaged) if is_sweep else [one]:
            try:
                compared = read_compared(each, request.root) if isinstance(each, Run) else read_remote(each, request.settings.tracking.uri)
            except DamagedFileError as error:
                damaged.append(error.line)
                continue
            except StorageError as error:
                damaged.append(str(error))
                continue
            if "train_loss" in compared.points:
                found.setdefault(each.run_id, compared)
            elif is_sweep:
                report(f"{each.run_id[:8]}, trial {compared.trial}, has no metrics, and is left out")
            else:
                findings.add(Problem(f"RUN {each.run_id[:8]}", "has no metrics: it ended before its first step", "leave it out"))
    findings.raise_any()
    return list(found.values())


def trials_of(sweep: "Run | RemoteRun", request: Request, damaged: list[str]) -> Iterator["Run | RemoteRun"]:
    """The trials of a sweep, in the order in which they began."""
    if not isinstance(sweep, Run):
        yield from remote_runs(request, f"tags.`{SWEEP_TAG}` = '{sweep.run_id}'", damaged)
        return
    for directory in run_directories(str(sweep.path.parent.parent), PHASES_BY_NAME):
        try:
            run = read_run(directory)
            if run.files.tags().get(SWEEP_TAG) == sweep.run_id:
                yield run
        except DamagedFileError:
            continue  # whose it was is not known


def log_plot(named: Sequence["Run | RemoteRun"], png: bytes, request: Request) -> bool:
    """Keep a plot in each run named, and send it to MLflow. Returns whether all have it, or will send it at their end."""
    from raytrain2p.runs.sync import sync  # MLflow
    from raytrain2p.tracking.mlflow_sync import RunDirectoryError, reporting_run_disk_errors

    runs = {run.run_id: run for run in named}
    ids = sorted(run_id[:8] for run_id in runs)
    if len(ids) > MOST_IDS:
        ids = [*ids[:MOST_IDS], f"and_{len(ids) - MOST_IDS}_more", hashlib.sha256("".join(ids).encode()).hexdigest()[:8]]
    complete = True
    for run in runs.values():
        if not isinstance(run, Run):
            report(f"{run.run_id[:8]} has no directory in {request.root}, where the plot would be kept")
            complete = False
            continue
        path = run.files.comparison(ids)
        try:
            with reporting_run_disk_errors(path):
                write_file(path, png)
        except RunDirectoryError as error:
            report(str(error))
            complete = False
        else:
            report(f"{run.phase} {run.run_id[:8]}  plot: {path}")
            complete &= sync(run, request.root, request.uri, report)
    return complete


def print_rows(runs: Sequence[ComparedRun], rows: Sequence[Row]) -> None:
    """Print a column for each run; or, if that is narrower and they are too many for a terminal, a line for each."""
    ids = [run.summary.run_id[:8] for run in runs]
    table = [["", *ids]]
    for section in dict.fromkeys([SETTINGS, *(row.section for row in rows)]):
        of_section = [row for row in rows if row.section == section]
        table.append([section if of_section else f"{section}: all the same", *[""] * len(runs)])
        table += [[f" {row.name}", *(row.marked(n) for n in range(len(runs)))] for row in of_section]
    space = shutil.get_terminal_size().columns if sys.stdout.isatty() else NARROW
    names = short_names([row.name for row in rows if row.section == SETTINGS])
    lines = [["run", *(names.get(row.name, row.name) for row in rows)]]
    lines += [[one, *(row.marked(n) for row in rows)] for n, one in enumerate(ids)]
    if len(runs) > 2 and width(table, space) > space and width(lines, space) < width(table, space):
        table = lines
    for block in blocks(folded(table, space), space if sys.stdout.isatty() else None):
        print_table(block[0], block[1:])
    if any(row.best for row in rows):
        print("* the best" + (" of its phase" if len({run.summary.phase for run in runs}) > 1 else ""))


def folded(table: Sequence[Sequence[str]], space: int) -> list[list[str]]:
    """A table whose cells have lines that leave space for two columns beside the first, which takes at most half."""
    first = min(space // 2, widths(table)[0])
    most = max(LEAST, (space - first) // 2 - 2)
    return [[fold(cell, most if n else first) for n, cell in enumerate(line)] for line in table]


def fold(text: str, most: int) -> str:
    """Text in lines, of words and of parts of paths and names if need be; indented like the first one."""
    parts = re.findall(rf".{{1,{most}}}$|.{{1,{most}}}(?<=[\s/_:,.])|.{{{most}}}", text)
    return ("\n  " if text.startswith(" ") else "\n").join(part.rstrip() for part in parts)


def widths(table: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*table, strict=True)]


def width(table: Sequence[Sequence[str]], space: int) -> int:
    """Of a table that is printed, in characters: two are between columns."""
    return sum(widths(folded(table, space))) + 2 * (len(table[0]) - 1)


def blocks(table: Sequence[Sequence[str]], space: int | None) -> Iterator[list[list[str]]]:
    """A table in parts that fit, each with the first column.

    Args:
        space: characters; None if any number fits.
    """
    first, *others = widths(table)
    part, taken = list[int](), first
    for n, one in enumerate(others, 1):
        if part and space is not None and taken + 2 + one > space:
            yield [[line[0], *(line[m] for m in part)] for line in table]
            part, taken = [], first
        part.append(n)
        taken += 2 + one
    yield [[line[0], *(line[n] for n in part)] for line in table]
