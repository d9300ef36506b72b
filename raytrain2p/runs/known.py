"""The runs that a verb looks at: from their directories, or from MLflow where there are none."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from raytrain2p.config import InputError, Problem
from raytrain2p.config.cli import report
from raytrain2p.config.secrets import masked
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import RunSummary, remote_summary, summary_of
from raytrain2p.storage.errors import StorageError
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import is_run_directory, run_directories
from raytrain2p.tracking.run import RUN_FOLDERS, Run
from raytrain2p.tracking.run_directory import RUN_ID_LENGTH


def add_mlflow_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mlflow", action="store_true", help="from MLflow alone, which needs no directory and keeps no best value")


def known_runs(request: Request) -> tuple[list[RunSummary], list[str]]:
    """The runs named, or all, the oldest first; and a line for each damaged one, which is left out.

    From MLflow with `--mlflow`, and if there is no directory of a run: a line reports that.

    Raises:
        InputError: a name fits no run, or several; there are no runs at all; or MLflow does not answer.
    """
    if request.options.mlflow:
        try:
            return named(remote_runs(request), request.names), []
        except StorageError as error:
            raise InputError(Problem("--mlflow", str(error), "leave it out: the directories have everything")) from None
    if has_directories(request):
        runs, damaged = request.runs()
        return summaries(runs, request.root, damaged), damaged
    try:
        found = remote_runs(request)
    except StorageError as error:
        report(str(error))
        found = []
    if not found:
        raise request.nothing_here()
    report(f"output.root={request.root} has no runs; these are the ones that MLflow has, {masked(request.settings.tracking.uri)}")
    return named(found, request.names), []


def has_directories(request: Request) -> bool:
    """Whether there is a run's directory, here or by name."""
    return bool(run_directories(request.root, RUN_FOLDERS)) or any(is_run_directory(Path(name)) for name in request.names)


def summaries(runs: Sequence[Run], root: str, damaged: list[str]) -> list[RunSummary]:
    """Their summaries; a line for each damaged one is added, which is left out."""
    found = []
    for run in runs:
        try:
            found.append(summary_of(run, root))
        except DamagedFileError as error:
            damaged.append(error.line)
    return found


def remote_runs(request: Request) -> list[RunSummary]:
    """The runs that MLflow has and that are not deleted there, the oldest first.

    Raises:
        StorageError: it does not answer.
    """
    from raytrain2p.tracking.mlflow_runs import our_runs

    return [remote_summary(run) for run in our_runs(request.settings.tracking.uri) if run.lifecycle == "active"]


def named(runs: Sequence[RunSummary], names: Sequence[str], several: bool = False) -> list[RunSummary]:
    """Those with these names, or all if there are none.

    Args:
        several: whether a name may fit several.

    Raises:
        InputError: every name that fits none, or several.
    """
    chosen, problems = dict[str, RunSummary](), list[Problem]()
    for name in names:
        fitting = fitting_runs(runs, name)
        if not fitting or (len(fitting) > 1 and not several):
            what = f"fits {len(fitting)} runs: {', '.join(run.run_id for run in fitting)}" if fitting else "there is no such run"
            fix = (
                "give a directory, a run ID or more of it, a launch ID, or `latest`; output.root=DIR and tracking.uri=URI say where to look"
            )
            problems.append(Problem(f"RUN {name}", what, fix))
        chosen |= {run.run_id: run for run in fitting}
    if problems:
        raise InputError(problems)
    return [run for run in runs if run.run_id in chosen or not names]


def fitting_runs(runs: Sequence[RunSummary], name: str) -> list[RunSummary]:
    """The runs whose ID begins as a name, or the directory's name, that it is the launch ID of; `latest`: the newest that is no trial."""
    if name == "latest":
        return [run for run in runs if run.sweep is None][-1:]
    start = Path(name).name[:RUN_ID_LENGTH] if "/" in name or "_" in name else name
    return [run for run in runs if name and (run.run_id.startswith(start) or run.launch_id == name)]
