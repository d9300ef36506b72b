"""Takes one old run into the layout of today, and back. A journal has all that is to be done before any of it is done: after a kill at
any moment, the same command finishes it, or `--undo` takes it back.
"""

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from raytrain2p.config import InputError, Problem, Settings
from raytrain2p.config.escaping import code_block, code_span
from raytrain2p.config.phases import PHASES_BY_NAME
from raytrain2p.config.secrets import masked
from raytrain2p.runs.old_layouts import OldRun
from raytrain2p.storage.errors import StorageError, reporting_disk_errors
from raytrain2p.storage.files import link_file, move, remove, write_json
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking.create_run import get_or_create_run
from raytrain2p.tracking.damage import read_as
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile
from raytrain2p.tracking.mlflow_errors import Kind, store_problem
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, check_password, client_of
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import LAUNCH_TAG, Intent, Run, launch_lock, launch_record, migration_journal, run_path
from raytrain2p.tracking.run_directory import BEST, RunDirectory
from raytrain2p.tracking.run_writer import describe_run

MIGRATED_TAG = "raytrain2p.migrated_from"
ENDED = "migrated: training has ended; whether it came as far as it should is not known"
Report = Callable[[str], None]


@dataclass(frozen=True)
class Migration:
    """What becomes what, and all that the new run holds: the content of its journal.

    Args:
        source: the old directory.
        tracking_uri: without its password.
        is_whole: whether all of that directory is moved.
        begin, end: of training, in seconds since 1970.
        moves: an absolute path, or one in the new directory, and the path in the new directory that it gets; in this order.
        is_best_last: whether the best checkpoint is last.ckpt, too.
        folder_times: modification times of the folders that moving changes, in nanoseconds.
        unread: why a checkpoint could not be read, by its path in the old directory.
        counts_epochs: whether the points are at epochs: steps are not known.
        run: the new one, once it is made.
    """

    state: Literal["begun", "done", "undoing"]
    launch_id: Annotated[str, Field(pattern=r"^migrated-[0-9a-f]{16}$")]
    source: str
    tracking_uri: str
    experiment: str | None
    is_whole: bool
    phase: str
    timestamp: str
    begin: float
    end: float
    size: int
    moves: list[tuple[str, str]]
    is_best_last: bool
    folder_times: dict[str, int]
    points: list[MetricPoint]
    config: dict[str, Any]
    unread: dict[str, str]
    counts_epochs: bool
    run: Run | None = None

    def of_root(self, root: str) -> "Migration":
        """With its run where that is now, if the root was moved."""
        if self.run is None:
            return self
        return replace(self, run=replace(self.run, directory=run_path(root, self.phase, self.run.run_id, self.timestamp)))


MIGRATION = TypeAdapter(Migration)


def planned(old: OldRun, settings: Settings) -> Migration:
    """How an old run is migrated. Changes nothing."""
    folders = [old.source]
    if old.is_whole:
        folders += [old.source.parent, *(path for path in old.source.rglob("*") if path.is_dir() and not path.is_symlink())]
    return Migration(
        state="begun",
        launch_id=f"migrated-{hashlib.sha256(old.fingerprint().encode()).hexdigest()[:16]}",
        source=str(old.source),
        tracking_uri=masked(settings.tracking.uri),
        experiment=settings.tracking.experiment,
        is_whole=old.is_whole,
        phase=old.phase.name,
        timestamp=old.begin.strftime("%Y%m%d_%H%M%S"),
        begin=max(0.0, old.begin.timestamp()),
        end=old.end,
        size=old.size,
        moves=old.moves(),
        is_best_last=old.is_best_last,
        folder_times={str(folder): folder.stat().st_mtime_ns for folder in folders},
        points=old.points(),
        config=old.config(),
        unread={one.name: one.content.problem for one in old.checkpoints if one.content.problem},
        counts_epochs=old.counts_epochs,
    )


def journals(root: str) -> Path:
    return migration_journal(root, "any").parent


def only_migration(root: str) -> Lock:
    """Held by the one process that migrates into a root, or undoes it."""
    journals(root).mkdir(parents=True, exist_ok=True)
    return Lock(journals(root) / "lock")


def write_journal(root: str, migration: Migration) -> Migration:
    write_json(migration_journal(root, migration.launch_id), asdict(migration))
    return migration


def read_journals(root: str, folder: Path) -> list[Migration]:
    """The migrations of a directory, and of those below it.

    Raises:
        DamagedFileError: a journal is damaged.
    """
    read = [read_as(path, Migration) for path in sorted(journals(root).glob("migrated-*.json"))]
    found = [MIGRATION.validate_python(one).of_root(root) for one in read if one is not None]
    return [one for one in found if Path(one.source).is_relative_to(folder)]


def settings_of(migration: Migration, settings: Settings, uri: str | None) -> Settings:
    """Settings with the store and the experiment that a migration began with.

    Args:
        uri: tracking URI, if the user gave one.

    Raises:
        InputError: the recorded URI needs a password, which is not recorded.
    """
    if uri is None and masked(settings.tracking.uri) == migration.tracking_uri:
        uri = settings.tracking.uri
    elif uri is None:
        check_password(uri := migration.tracking_uri)
    tracking = {"uri": uri, "experiment": migration.experiment}
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update=tracking)})


def migrate(migration: Migration, settings: Settings, report: Report) -> Run:
    """Do what is left of a migration. Its journal is written.

    Args:
        settings: those of `settings_of`.
        report: called with lines for the user.

    Raises:
        StorageError: the disk is full, read-only or gone, or MLflow takes no run. The same call finishes it later.
        STORE_ERRORS: MLflow lacks something of the run, which is on disk. The same call sends it, and so does `runs sync`.
    """
    root = settings.output.root
    with _exclusively(root, migration):
        with reporting_disk_errors(migration_journal(root, migration.launch_id), 100_000):
            migration, run = _identity(migration, settings)
            _describe(migration, run)
            for old, new in migration.moves:
                _move(run.path / old, run.path / new, run, report)
            if migration.is_best_last and not run.files.last_checkpoint.exists():
                link_file(_best(migration, run), run.files.last_checkpoint)
            if run.files.read_status()["status"] != "FINISHED":
                run.files.write_status("FINISHED", ENDED, migration.end)
        MlflowSync(run, settings.tracking.uri).send()
        with reporting_disk_errors(migration_journal(root, migration.launch_id), 100_000):
            write_journal(root, replace(migration, state="done"))
    return run


def undo(migration: Migration, settings: Settings, report: Report) -> None:
    """Put all back where it was, and move the run in MLflow to its trash. Arguments as of `migrate`.

    Raises:
        StorageError: the disk is full, read-only or gone, or MLflow takes no run. The same call finishes it later.
        STORE_ERRORS: MLflow does not answer. The same call finishes it later.
    """
    root = settings.output.root
    with _exclusively(root, migration):
        with reporting_disk_errors(migration_journal(root, migration.launch_id), 100_000):
            migration = write_journal(root, replace(migration, state="undoing"))
            migration, run = _identity(migration, settings)  # of one that was killed early: whatever MLflow has of it is found
            if migration.is_best_last:
                run.files.last_checkpoint.unlink(missing_ok=True)
            for old, new in reversed(migration.moves):
                if os.path.lexists(run.path / new) or not os.path.lexists(original(migration, old)):
                    _move(run.path / new, run.path / old, run, report)
            for folder, time_ns in migration.folder_times.items():
                if Path(folder).is_dir():
                    os.utime(folder, ns=(Path(folder).stat().st_atime_ns, time_ns))
        _delete_run(run, settings.tracking.uri)
        with reporting_disk_errors(migration_journal(root, migration.launch_id), 0):
            _remove_directory(run, report)
            record = launch_record(root, migration.launch_id)
            lock = launch_lock(root, migration.launch_id).path
            for path in (record, record.with_suffix(".creating"), lock, migration_journal(root, migration.launch_id)):
                path.unlink(missing_ok=True)


@contextmanager
def _exclusively(root: str, migration: Migration) -> Iterator[None]:
    """Within, other commands take the run for one that is under way."""
    lock = launch_lock(root, migration.launch_id)
    lock.path.parent.mkdir(parents=True, exist_ok=True)
    with lock.held(5.0) as holder:
        if holder is not None:
            raise StorageError(f"{migration.source} is left alone: another command works on its new run ({holder})")
        yield


def _identity(migration: Migration, settings: Settings) -> tuple[Migration, Run]:
    """The run of a migration: made, or found."""
    if migration.run is not None:
        return migration, migration.run
    root, record = settings.output.root, launch_record(settings.output.root, migration.launch_id)
    if read_as(record, dict[str, Any]) is None:
        intent: Intent = {"launch_id": migration.launch_id, "timestamp": migration.timestamp, "since": migration.begin}
        write_json(record, intent)
    phase = PHASES_BY_NAME[migration.phase]
    run = get_or_create_run(settings, phase.name, phase.experiment, migration.launch_id, {MIGRATED_TAG: migration.source})
    run.files.write_record((run.files.read_record() or asdict(run)) | {"sequence": 0})  # older than all runs: never the latest
    return write_journal(root, replace(migration, run=run)), run


def _describe(migration: Migration, run: Run) -> None:
    root = shlex.quote(str(run.path.parent.parent))
    command = f"python -m raytrain2p.runs migrate {shlex.quote(migration.source)} output.root={root} --yes"
    facts = {"migrated": migration.source}
    describe_run(run, migration.config, command, facts, lambda run, command: _readme(migration, run, command), migration.begin)
    MetricsFile(run.files.metrics).append(migration.points)


def _best(migration: Migration, run: Run) -> Path:
    best = f"{run.checkpoints.name}/{BEST.partition('*')[0]}"
    return next(run.path / new for _, new in migration.moves if new.startswith(best))


def _move(source: Path, target: Path, run: Run, report: Report) -> None:
    with reporting_disk_errors(target, 0):
        if os.path.lexists(source):
            target.parent.mkdir(exist_ok=True)
            try:
                move(source, target)
            except FileExistsError:
                raise StorageError(f"{target} is there already, and is not {source}: move it away") from None
        elif not os.path.lexists(target):
            if not run.path.is_dir():
                raise StorageError(f"{run.directory} is gone: mount its disk again")
            report(f"{source} is gone, and is left out")


def _delete_run(run: Run, uri: str) -> None:
    """Move a run to MLflow's trash, and free its launch ID: if the same directory is migrated again, that is another run."""
    client = client_of(uri)
    try:
        found = client.get_run(run.run_id)
    except STORE_ERRORS as error:
        if store_problem(error).kind is not Kind.GONE:
            raise
        return
    if found.info.lifecycle_stage == "active":
        client.set_tag(run.run_id, LAUNCH_TAG, f"{run.launch_id}-undone")
        client.delete_run(run.run_id)


def _remove_directory(run: Run, report: Report) -> None:
    """Remove what the migration made. Whatever else is there stays."""
    if not run.path.is_dir():
        return
    files = run.files
    made = [files.record, files.config, files.readme, files.mlflow_run_id, files.status, files.metrics, files.metrics_summary]
    made += [files.sync_state, files.lock.path]
    folders = [files.old, files.checkpoints, run.path]
    for path in [*made, *(left for folder in folders for left in folder.glob(".*.aside-*"))]:
        remove(path)
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    if run.path.is_dir():
        report(f"{run.path} has files that were not migrated, and stays")


def original(migration: Migration, old: str) -> Path:
    """Where a file or directory of `moves` was at first."""
    path = Path(old)
    return path if path.is_absolute() else Path(migration.source) / path.relative_to(RunDirectory(Path()).old)


def moved_names(migration: Migration) -> dict[str, str]:
    """New paths of the checkpoints, by their paths in the old directory."""
    return {str(original(migration, old).relative_to(migration.source)): new for old, new in migration.moves}


def _readme(migration: Migration, run: Run, command: str) -> str:
    files, local = run.files, "%Y-%m-%d %H:%M:%S"
    begin, end = (datetime.fromtimestamp(at).strftime(local) for at in (migration.begin, migration.end))
    rows = [f"| {code_span(old)} | {code_span(new)} |" for old, new in moved_names(migration).items()]
    unread = [f"- {code_span(name)} {problem}" for name, problem in migration.unread.items()]
    steps = "\nIts metrics are at epochs: not every checkpoint has its step.\n" if migration.counts_epochs else ""
    return f"""# {run.phase} run {run.run_id}

Another program, or an older version, trained this run. It was migrated from

{code_block(migration.source)}

| there | here |
|---|---|
{chr(10).join(rows)}

Everything else of that directory, if it was moved, is in `{files.old.name}/`.

It ran from {begin} (the directory's name, or its first checkpoint) to {end} (its last checkpoint). That it is FINISHED means that it
has ended; whether it came as far as it should is not known. Its metrics are those in the names of its checkpoints and in their
contents; `{files.config.name}` has the settings that they hold. It cannot be resumed.
{steps}{"".join(f"{line}{chr(10)}" for line in ["", "These were moved, but could not be read:", "", *unread] if unread)}
Migrated with

{code_block(command)}

This puts everything back:

{code_block(f"{command} --undo")}
"""


def check_outside(migration: Migration, root: str) -> None:
    """Raises InputError if the new run would be in the directory that is moved."""
    if migration.is_whole and Path(root).resolve().is_relative_to(migration.source):
        what = f"is in {migration.source}, which would be moved into it"
        raise InputError(Problem(f"output.root={root}", what, "set another output.root"))
