"""`find`: the directory and the MLflow run of each other, whichever was typed; and the runs of a sweep, an aligner or some data."""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain2p.config import InputError, Problem
from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.phases import ALIGNMENT, PHASES_BY_NAME, SWEEPS
from raytrain2p.config.secrets import masked, one_line
from raytrain2p.config.settings import ALIGNER, INIT
from raytrain2p.runs.known import fitting_runs, named, summaries
from raytrain2p.runs.lineage import came_from, content_of, read_data
from raytrain2p.runs.output import print_json
from raytrain2p.runs.request import Request
from raytrain2p.runs.summary import RunSummary, origin_of, remote_summary
from raytrain2p.storage.errors import StorageError
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.find import find_runs, is_run_directory, read_run
from raytrain2p.tracking.run_directory import RunDirectory

if TYPE_CHECKING:  # MLflow takes 2 s
    from raytrain2p.tracking.mlflow_runs import RemoteRun


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweep", metavar="RUN", help="the trials of a sweep")
    parser.add_argument("--aligner", metavar="RUN|FILE", help="the runs that began with an aligner, be it copied or moved since")
    parser.add_argument("--init", metavar="RUN|FILE", help="the runs that began with the weights of a run, be they copied or moved since")
    parser.add_argument("--data", metavar="VALUE", help="the runs that read this file or embedded set, or records with this digest")
    parser.add_argument("--no-mlflow", action="store_true", help="from the directories alone: faster")


@dataclass(frozen=True)
class InMlflow:
    """What MLflow has, of the stores that were asked.

    Args:
        runs: by run ID.
        away: a line for each store that did not answer, by its URI; None stands for all: none was to be asked.
    """

    runs: dict[str, "RemoteRun"]
    away: dict[str, str] | None


def run(request: Request) -> int:
    """Print what was found.

    Raises:
        InputError: every name that fits no run; the aligner or the weights are none.
    """
    options, damaged = request.options, list[str]()
    local = local_runs(request, damaged)
    mlflow = InMlflow({}, None) if options.no_mlflow else ask_mlflow(request, local)
    here = {one.run_id for one in local}
    known = local + [remote_summary(found) for run_id, found in mlflow.runs.items() if run_id not in here]
    for line in [*damaged, *(mlflow.away or {}).values()]:
        report(line)
    demanded = conditions(request, known)
    chosen = [one for one in named(known, request.names, several=True) if all(fits(one) for fits in demanded)]
    found = [described(one, one.run_id in here, mlflow) for one in chosen]
    if options.json:
        print_json(found)
    else:
        for one in found:
            print_found(one)
    if not found:
        report("no run fits")
    return FAILED if damaged else 0


def local_runs(request: Request, damaged: list[str]) -> list[RunSummary]:
    """All runs of the output root, and those whose directories were named. A line is added for each damaged one, which is left out."""
    runs = find_runs(request.root, [], damaged.append)
    places = {run.path.resolve() for run in runs}
    for path in (Path(name).expanduser().absolute() for name in request.names):
        if is_run_directory(path) and path.resolve() not in places and path.resolve().parent.parent != Path(request.root).resolve():
            try:
                runs.append(read_run(path))
            except DamagedFileError as error:
                damaged.append(error.line)
    return summaries(runs, request.root, damaged)


def ask_mlflow(request: Request, local: Sequence[RunSummary]) -> InMlflow:
    """The runs of ours in the store that was named, else in those that the runs have on record and in the one that the settings name."""
    from raytrain2p.tracking.mlflow_runs import our_runs
    from raytrain2p.tracking.mlflow_store import store_exists

    uris = [request.uri] if request.uri else [run.tracking_uri for run in local]
    if not request.uri and store_exists(request.settings.tracking.uri):
        uris.append(request.settings.tracking.uri)
    found: dict[str, RemoteRun] = {}
    away = dict[str, str]()
    for uri in dict.fromkeys(uris):
        try:
            found |= {run.run_id: run for run in our_runs(uri, mlflow_condition(request, local))}
        except StorageError as error:
            away[uri] = str(error)
    return InMlflow(found, away)


def mlflow_condition(request: Request, local: Sequence[RunSummary]) -> str:
    """What of MLflow may fit, in its own words; all, if only the runs themselves show that."""
    options, names = request.options, request.names
    if not names or options.sweep or options.aligner or options.init or options.data:
        return ""
    if len(names) == 1 and re.fullmatch("[0-9a-f]+", names[0]):
        return f"attributes.run_id LIKE '{names[0]}%'"
    fitting = [fitting_runs(local, name) for name in names]
    ids = ", ".join(f"'{run.run_id}'" for runs in fitting for run in runs)
    return f"attributes.run_id IN ({ids})" if all(fitting) else ""


def conditions(request: Request, known: Sequence[RunSummary]) -> list[Callable[[RunSummary], bool]]:
    """What `--sweep`, `--aligner`, `--init` and `--data` demand.

    Raises:
        InputError: there is no such sweep, aligner or run.
    """
    options = request.options
    demanded = list[Callable[[RunSummary], bool]]()
    if options.sweep:
        sweep = run_of(options.sweep, [one for one in known if one.phase == SWEEPS], [one.sweep for one in known], "--sweep")
        demanded.append(lambda run: run.sweep == sweep)
    for setting, wanted in ((ALIGNER, options.aligner), (INIT, options.init)):
        if wanted:
            demanded.append(partial(came_from, setting, *artifact_wanted(setting, wanted, known)))
    if options.data:
        demanded.append(lambda run: read_data(run, options.data))
    return demanded


def artifact_wanted(setting: str, wanted: str, known: Sequence[RunSummary]) -> tuple[str | None, str | None]:
    """The run ID and the digest of the artifact that `--aligner` or `--init` names, as far as they are known.

    Raises:
        InputError: it is neither a file nor a run; or its file is damaged.
    """
    phases = {ALIGNMENT.name: ALIGNMENT} if setting == ALIGNER else PHASES_BY_NAME
    path, recorded = Path(wanted).expanduser(), [origin_of(one.settings, setting) for one in known]
    if path.is_file():
        return origin_of({setting: str(path.absolute())}, setting), content_of(path, *phases.values())
    run_id = run_of(wanted, [one for one in known if one.phase in phases], recorded, f"--{setting.removeprefix('model.')}")
    found = next((one for one in known if one.run_id == run_id and one.phase in phases), None)
    if found is None or found.directory is None:
        return run_id, None
    files, phase = RunDirectory(Path(found.directory)), phases[found.phase]
    artifact = files.artifact(phase)
    try:
        return run_id, files.artifact_digest() or (content_of(artifact, phase) if artifact.is_file() else None)
    except InputError as error:
        report(f"copies of the {artifact.stem} are not found: {artifact} {one_line(error.problems[0].what)}")
        return run_id, None


def run_of(wanted: str, runs: Sequence[RunSummary], recorded: Iterable[str | None], option: str) -> str:
    """The ID of a run that is known, or that other runs have on record.

    Raises:
        InputError: none fits, or several do.
    """
    fitting = {run.run_id for run in fitting_runs(runs, wanted)} or {one for one in recorded if one is not None and one.startswith(wanted)}
    if len(fitting) != 1:
        what = f"fits {len(fitting)} runs: {', '.join(sorted(fitting))}" if fitting else "there is no such run, and no run came from it"
        raise InputError(Problem(f"{option} {wanted}", what, "give a run ID or more of it"))
    return fitting.pop()


def described(run: RunSummary, is_here: bool, mlflow: InMlflow) -> dict[str, Any]:
    """Where a run is, on disk and in MLflow."""
    remote = mlflow.runs.get(run.run_id)
    is_here = is_here or (run.directory is not None and is_run_directory(Path(run.directory)))
    note = "not in MLflow"
    if mlflow.away is None:
        note = "not asked"
    elif run.tracking_uri in mlflow.away or (mlflow.away and remote is None):
        note = "MLflow does not answer"
    known = {"experiment": remote.experiment, "status": remote.status, "lifecycle": remote.lifecycle} if remote is not None else None
    return {
        "run_id": run.run_id,
        "phase": run.phase,
        "directory": run.directory if is_here else None,
        "recorded_directory": run.directory,
        "mlflow": known,
        "note": note if remote is None else "",
        "tracking_uri": masked(remote.tracking_uri if remote is not None else run.tracking_uri),
    }


def print_found(found: dict[str, Any]) -> None:
    """A run in three lines."""
    remote, recorded = found["mlflow"], found["recorded_directory"]
    say(f"{found['run_id']}  {found['phase']}")
    say(f"  directory  {found['directory'] or (f'not here, recorded as {recorded}' if recorded else 'not here, and not recorded')}")
    say(f"  MLflow     {', '.join([*remote.values(), found['tracking_uri']]) if remote else found['note']}")
