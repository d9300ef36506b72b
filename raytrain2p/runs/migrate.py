"""`migrate`: take directories of older layouts into the one of today, with an MLflow run for each; and back."""

import argparse
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain2p.config import InputError, Problem
from raytrain2p.config.cli import FAILED, report, say
from raytrain2p.config.phases import PHASES, PHASES_BY_NAME
from raytrain2p.config.secrets import masked
from raytrain2p.runs.output import human_bytes, print_json
from raytrain2p.runs.request import Request, reporting_root

if TYPE_CHECKING:  # `--help` waits neither for torch nor for MLflow
    from raytrain2p.runs.migration import Migration
    from raytrain2p.runs.old_layouts import Found

SHOWN = 3  # names of each kind of what is left alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "RUN is one directory here: that of an older run, or one that holds many."
    parser.add_argument("--yes", action="store_true", help="do it; without it, what would be done is printed, and nothing is changed")
    parser.add_argument("--undo", action="store_true", help="put everything back where it was, and move the MLflow runs to MLflow's trash")
    parser.add_argument(
        "--phase", type=int, choices=tuple(PHASES), help="of checkpoints for which neither their names nor those of their folders say it"
    )


def run(request: Request) -> int:
    """Print what becomes what; with `--yes`, do it. Returns 0, or FAILED if a run is left for the same command to finish.

    Raises:
        InputError: no such directory, nothing to do in it, or MLflow cannot be used.
    """
    if len(request.names) != 1:
        raise InputError(Problem("migrate", f"has {len(request.names)} directories; required is one", "give the directory of old runs"))
    from raytrain2p.runs.migration import read_journals

    known = read_journals(request.root, _folder(request))
    return _undo(request, known) if request.options.undo else _migrate(request, known)


def _folder(request: Request) -> Path:
    return Path(request.names[0]).expanduser().resolve()


def _migrate(request: Request, known: "list[Migration]") -> int:
    from raytrain2p.runs.migration import check_outside, migrate, planned
    from raytrain2p.runs.old_layouts import Found, find_old_runs

    folder = _folder(request)
    if not folder.is_dir() and not known:
        raise InputError(Problem(str(folder), "is not a directory", "give the directory of old runs"))
    if halves := [one.source for one in known if one.state == "undoing"]:
        raise InputError(Problem(", ".join(halves), "is being put back", "let `--undo --yes` finish first"))
    begun, done = ([one for one in known if one.state == state] for state in ("begun", "done"))
    found = find_old_runs(folder, PHASES.get(request.options.phase), _mlflow_knows(request)) if folder.is_dir() else Found()
    taken = {(one.source, one.phase) for one in begun}
    new = [planned(old, request.settings) for old in found.runs if (str(old.source), old.phase.name) not in taken]
    for one in new:
        check_outside(one, request.root)
    _check_space(new, request.root)
    if not new and not begun and not done:
        reasons = "; ".join(f"{path} {why}" for path, why in found.left_alone[:SHOWN])
        raise InputError(Problem(str(folder), f"has nothing to migrate ({reasons})", "give the directory of old runs"))
    if not request.options.yes:
        _print_plan(request, [*begun, *new], done, found, "would become")
        return 0
    failures = _each([*begun, *new], known, request, migrate)
    _print_plan(request, [*begun, *new], done, found, "became", failures)
    return FAILED if failures else 0


def _undo(request: Request, known: "list[Migration]") -> int:
    from raytrain2p.runs.migration import undo
    from raytrain2p.runs.old_layouts import Found

    if not known:
        raise InputError(Problem(str(_folder(request)), f"nothing of it was migrated to output.root={request.root}", "set output.root"))
    if not request.options.yes:
        _print_plan(request, known, [], Found(), "would be put back from")
        return 0
    failures = _each(known, known, request, undo)
    _print_plan(request, known, [], Found(), "was put back from", failures)
    return FAILED if failures else 0


def _each(migrations: "list[Migration]", known: "list[Migration]", request: Request, action: Callable[..., Any]) -> dict[str, str]:
    """Apply an action to each, once all journals are written: it changes the times of folders that the others share. Returns what is
    left and why, by launch ID.

    Args:
        known: journals from which this was planned.

    Raises:
        InputError: another migration is under way, or MLflow cannot be used; nothing was changed.
    """
    from raytrain2p.runs.migration import only_migration, read_journals, settings_of, write_journal
    from raytrain2p.storage.errors import StorageError
    from raytrain2p.tracking.mlflow_errors import store_problem
    from raytrain2p.tracking.mlflow_store import STORE_ERRORS, missing_store, prepare_store, store_exists
    from raytrain2p.tracking.mlflow_sync import RunDirectoryError

    failures = dict[str, str]()
    with reporting_root(request.root, "nothing was moved"), only_migration(request.root).held(1.0) as holder:
        if holder is not None or read_journals(request.root, _folder(request)) != known:
            what = f"another migration is under way ({holder})" if holder else "another migration has just ended"
            raise InputError(Problem(f"output.root={request.root}", what, "give the same command again after its end"))
        settings = {one.launch_id: settings_of(one, request.settings, request.uri) for one in migrations}
        for one in migrations:
            if one.run is not None and not store_exists(uri := settings[one.launch_id].tracking.uri):
                raise InputError(missing_store(uri))
        stores = {(one.tracking_uri, one.experiment, one.phase): one for one in migrations}
        for one in stores.values():
            prepare_store(settings[one.launch_id], PHASES_BY_NAME[one.phase].experiment)
        for one in migrations:
            write_journal(request.root, one)
        for one in migrations:
            try:
                action(one, settings[one.launch_id], report)
            except (StorageError, RunDirectoryError) as error:
                failures[one.launch_id] = str(error)
            except STORE_ERRORS as error:
                failures[one.launch_id] = str(store_problem(error))
    return failures


def _check_space(migrations: "list[Migration]", root: str) -> None:
    """Check that what must be copied from other disks has room.

    Raises:
        InputError: it has not.
    """
    there = next(path for path in (Path(root), *Path(root).parents) if path.is_dir())
    needed = sum(one.size for one in migrations if Path(one.source).stat().st_dev != there.stat().st_dev)
    if needed > (free := shutil.disk_usage(there).free):
        what = f"is on another disk, where {free / 1e9:.1f} GB are free; required are {needed / 1e9:.1f} GB"
        raise InputError(Problem(f"output.root={root}", what, "free space, or set output.root to the disk of the old runs"))


@contextmanager
def _reporting_store(uri: str) -> Iterator[None]:
    """Raises InputError for what MLflow raises."""
    from raytrain2p.tracking.mlflow_errors import store_problem
    from raytrain2p.tracking.mlflow_store import STORE_ERRORS

    try:
        yield
    except STORE_ERRORS as error:
        problem = store_problem(error)
        raise InputError(Problem(f"tracking.uri={masked(uri)}", problem.what, problem.fix or "start the server, or fix the URI")) from None


def _mlflow_knows(request: Request) -> Callable[[str], bool]:
    """A function that returns whether MLflow has a run of an ID. No store is made.

    Raises:
        InputError: it does not answer; the function raises it, too.
    """
    from raytrain2p.tracking.mlflow_errors import Kind, store_problem
    from raytrain2p.tracking.mlflow_store import STORE_ERRORS, check_server, client_of, store_exists

    if not store_exists(uri := request.settings.tracking.uri):
        return lambda run_id: False
    with _reporting_store(uri):
        check_server(uri)
        client = client_of(uri)
        client.search_experiments(max_results=1)  # it is MLflow, and answers

    def knows(run_id: str) -> bool:
        with _reporting_store(uri):
            try:
                client.get_run(run_id)
            except STORE_ERRORS as error:
                if store_problem(error).kind is not Kind.GONE:
                    raise
                return False
        return True

    return knows


def _print_plan(
    request: Request,
    migrations: "list[Migration]",
    done: "list[Migration]",
    found: "Found",
    verb: str,
    failures: dict[str, str] | None = None,
) -> None:
    """What becomes what, or became: as text, or as one JSON document.

    Args:
        done: migrated by an earlier command.
        failures: why a migration is not complete, by launch ID; None of a plan.
    """
    from raytrain2p.runs.migration import moved_names, read_journals

    journals = {one.launch_id: one for one in read_journals(request.root, Path("/"))}
    rows: list[dict[str, Any]] = []
    for one in [*migrations, *done]:
        run = journals.get(one.launch_id, one).run or one.run
        rows.append(
            {
                "from": one.source,
                "phase": one.phase,
                "directory": run.directory if run else f"{request.root}/{one.phase}/<run ID>_{one.timestamp}",
                "run_id": run.run_id if run else None,
                "bytes": one.size,
                "begin": one.begin,
                "end": one.end,
                "files": moved_names(one),
                "not_read": one.unread,
                "was_done": one in done,
                "failure": (failures or {}).get(one.launch_id),
            }
        )
    if request.options.json:
        left = [{"path": str(path), "why": why} for path, why in found.left_alone]
        print_json({"changed": failures is not None, "runs": rows, "left_alone": left})
        return
    for row in rows:
        say(f"{row['from']}  ({row['phase']}, {human_bytes(row['bytes'])})")
        if row["failure"]:
            say(f"    is not complete: {row['failure']}; the same command finishes it")
            continue
        say(f"    {'was migrated before to' if row['was_done'] else verb} {row['directory']}")
        if not row["was_done"] and "back" not in verb:
            for name, problem in row["not_read"].items():
                say(f"    {name} {problem}; kept as a file")
            for old, new in row["files"].items():
                say(f"    {'everything else' if old == '.' else old} -> {new}")
    reasons: dict[str, list[str]] = {}
    for path, why in found.left_alone:
        reasons.setdefault(why, []).append(str(path))
    for why, paths in reasons.items():
        more = f" and {len(paths) - SHOWN:,} more" if len(paths) > SHOWN else ""
        say(f"left alone: {', '.join(paths[:SHOWN])}{more} ({why})")
    if failures is None:
        say("nothing was changed; --yes does it")
