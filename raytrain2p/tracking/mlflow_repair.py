"""`python -m raytrain2p.tracking.mlflow_repair FILE`: rebuild an MLflow database (SQLite) whose migration was interrupted.

SQLite commits each step of a migration by itself, so `mlflow db upgrade` finds one that is half done, and fails. Here the rows are
copied into a new database with the tables of the last complete revision, and that one is migrated.
"""

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from alembic import command
from alembic.util import CommandError
from mlflow.store.db.utils import _get_alembic_config
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialTables
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from raytrain2p.config.cli import FAILED, Parser, report, say
from raytrain2p.config.secrets import one_line
from raytrain2p.storage.files import link_file, written_aside
from raytrain2p.tracking.mlflow_store import HALF_DONE, only_opener, schema_of

BROKEN = ".broken"  # the old file is kept under this name


def repair(path: Path) -> str:
    """Rebuild a database. The old one is kept beside it. Nothing else may be using it. Returns a line for the user.

    Raises:
        sqlite3.Error: it is not a database, or rows of it do not fit.
        OSError: the disk is full, or another process is opening it.
    """
    with only_opener(f"sqlite:///{path}"):
        _, revision = schema_of(path)
        with written_aside(path) as aside:
            aside.unlink(missing_ok=True)
            make_tables(aside, revision)
            rows = copy_rows(path, aside)
            migrate(aside, "heads")
            link_file(path, path.with_name(path.name + BROKEN))
    return f"{path} is rebuilt, with {rows} rows; the broken file is kept as {path.name}{BROKEN}"


def make_tables(path: Path, revision: str | None) -> None:
    """A new database with the tables of a revision; None: those that MLflow makes before the first one."""
    engine = create_engine(f"sqlite:///{path}")
    InitialTables.metadata.create_all(engine)
    engine.dispose()
    if revision is not None:
        migrate(path, revision)


def migrate(path: Path, revision: str) -> None:
    command.upgrade(_get_alembic_config(f"sqlite:///{path}"), revision)


def copy_rows(source: Path, target: Path) -> int:
    """Copy the rows of all tables and columns that both databases have. A table that the migration had just dropped is under
    its temporary name. Returns the number of rows."""
    with closing(sqlite3.connect(target)) as database:
        database.execute("ATTACH ? AS old", (str(source),))

        def columns(schema: str, table: str) -> list[str]:
            return [row[1] for row in database.execute(f'PRAGMA {schema}.table_info("{table}")')]

        tables = [name for (name,) in database.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")]
        rows = 0
        for table in tables:
            origin = table if columns("old", table) else HALF_DONE + table
            both = ", ".join(f'"{name}"' for name in columns("main", table) if name in columns("old", origin))
            if both and table != "alembic_version":
                copied = database.execute(f'INSERT OR REPLACE INTO main."{table}" ({both}) SELECT {both} FROM old."{origin}"')  # noqa: S608 - names of its own tables
                rows += copied.rowcount
        database.commit()
        return rows


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 if the database could not be repaired; it is unchanged then."""
    parser = Parser(
        prog="python -m raytrain2p.tracking.mlflow_repair", description="Rebuild an MLflow database whose migration was interrupted."
    )
    parser.add_argument("file", type=Path, help="the database, SQLite")
    path = parser.parse_args(arguments).file
    if not path.is_file():
        parser.error(f"{path}: no such file")
    try:
        say(repair(path.absolute()))
    except (OSError, sqlite3.Error, SQLAlchemyError, CommandError) as error:
        report(f"{path} is unchanged: {one_line(error)}")
        return FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
