"""The MLflow store: checked and prepared once, in the driver; and searched."""

import http.client
import shlex
import socket
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment, ViewType
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from raytrain2p.config import InputError, Problem, Settings
from raytrain2p.config.secrets import MASK, masked
from raytrain2p.storage.files import written_aside
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking.mlflow_errors import Kind, is_unknown_request, store_problem
from raytrain2p.tracking.run import PRUNED_DIRECTORY, PRUNED_TAG

STORE_ERRORS = (MlflowException, OSError, SQLAlchemyError)
SECONDS_TO_ANSWER = 4
SECONDS_TO_OPEN = 60.0  # while other processes create or open the same database: 2 to 10 seconds each on busy cores
HALF_DONE = "_alembic_tmp_"  # begin of the names of tables that only a migration under way has
KIND_TAG, MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
GUESSED = "_inferred"  # end of a kind that nobody chose: the UI looked at what the experiment had
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


class UnusableStoreError(OSError):
    """A store in files is missing, or an interrupted migration broke it."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        super().__init__(f"{problem.where}: {problem.what}; {problem.fix}")

    def __reduce__(self) -> tuple[type["UnusableStoreError"], tuple[Problem]]:
        return type(self), (self.problem,)  # pickled when a worker raises it


def client_of(uri: str) -> MlflowClient:
    """A client for a tracking URI. It makes no store: `prepare_store` alone does.

    Raises:
        UnusableStoreError: the store in files is missing or broken, or the driver of its database is not installed.
    """
    if not store_exists(uri):
        raise UnusableStoreError(missing_store(uri))
    with only_opener(uri):
        try:
            return _opened(uri)
        except ModuleNotFoundError as error:
            what, fix = f"needs {error.name}, which is not installed", "install it, or set tracking.uri to an MLflow server"
            raise UnusableStoreError(Problem(f"tracking.uri={masked(uri)}", what, fix)) from None


@contextmanager
def only_opener(uri: str) -> Iterator[None]:
    """Within, no other process of ours opens or makes a store in files: several that make the tables of one SQLite file break it.

    Raises:
        UnusableStoreError: another process does not end.
    """
    if (path := store_path(uri)) is None:
        yield
        return
    with Lock(path.with_name(f".{path.name}.lock")).held(SECONDS_TO_OPEN) as holder:
        if holder is not None:
            what = f"{holder} has been opening {path} for {SECONDS_TO_OPEN:.0f} seconds, and does not end"
            raise UnusableStoreError(Problem(f"tracking.uri={uri}", what, "end that process"))
        yield


def _opened(uri: str) -> MlflowClient:
    """Opening a database makes tables that it lacks."""
    try:
        return MlflowClient(uri)
    except Exception as error:
        path = store_path(uri)
        if path is None or not uri.startswith("sqlite:") or (problem := _migration_problem(uri, path, error)) is None:
            raise
        raise UnusableStoreError(problem) from error


def _make_database(path: Path) -> None:
    """Make a database aside and rename it: a kill while its tables are made, which takes seconds, would leave it broken.

    Its lock is held: what killed processes left aside is removed.
    """
    for left in path.parent.glob(f".{path.name}.aside-*"):
        left.unlink()
    with written_aside(path) as aside:
        MlflowClient(f"sqlite:///{aside}")


def _migration_problem(uri: str, path: Path, error: Exception) -> Problem | None:
    """Why MLflow cannot open a database, if its tables are not those of this version, and the command that repairs it."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    try:
        tables, revision = schema_of(path)
    except sqlite3.Error:
        return None  # it is not a database, or locked
    halves = sorted(name for name in tables if name.startswith(HALF_DONE))
    known = {one.revision for one in script.walk_revisions()}
    if not halves and (revision in script.get_heads() or (revision is not None and revision not in known)):
        return None
    older = "its tables are of an older MLflow, or " if isinstance(error, MlflowException) and not halves else ""
    left = f" and left {', '.join(halves)}" if halves else ""
    what = (
        f"{older}a migration of its tables was interrupted{left}: they are at revision {revision}, this MLflow's at {script.get_heads()[0]}"
    )
    return Problem(
        f"tracking.uri={uri}", what, f"stop what uses it, and run `python -m raytrain2p.tracking.mlflow_repair {shlex.quote(str(path))}`"
    )


def schema_of(path: Path) -> tuple[set[str], str | None]:
    """The tables of an SQLite database, and the revision of MLflow's.

    Raises:
        sqlite3.Error: it is not a database, or is locked.
    """
    with closing(sqlite3.connect(path)) as database:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        row = database.execute("SELECT version_num FROM alembic_version").fetchone() if "alembic_version" in tables else None
        return tables, row and row[0]


def runs_with_tag(client: MlflowClient, tag: str, value: str, condition: str = "", view: int = ViewType.ACTIVE_ONLY) -> list[MlflowRun]:
    """The runs of all experiments that have this value of a tag, and meet a further condition; unless `view` says so, no deleted one."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    mark = '"' if "'" in value else "'"
    return list(client.search_runs(experiments, f"tags.`{tag}` = {mark}{value}{mark}{condition}", view))


def running_runs(client: MlflowClient, tag: str, value: str) -> list[MlflowRun]:
    """Those of them that are RUNNING in MLflow."""
    return runs_with_tag(client, tag, value, " AND attributes.status = 'RUNNING'")


def record_pruned(client: MlflowClient, run_id: str, delete: bool) -> None:
    """Record in MLflow that a run has no directory any more: its launch ID is free again. If there is no such run, nothing is done.

    Args:
        delete: delete the run, too, as MLflow's own interface does: it can be restored until `mlflow gc` removes it, with its artifacts.
            Its logged model is deleted for good: it is made from the directory alone.
    """
    try:
        client.set_tag(run_id, PRUNED_TAG, PRUNED_DIRECTORY)
        if delete:
            delete_models(client, run_id)
            client.delete_run(run_id)
    except STORE_ERRORS as error:
        if store_problem(error).kind not in (Kind.DELETED, Kind.GONE):
            raise


def delete_models(client: MlflowClient, run_id: str) -> None:
    """Delete the logged model of a run; a server before MLflow 3 has none."""
    experiment = client.get_run(run_id).info.experiment_id
    try:
        for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
            client.delete_logged_model(model.model_id)
    except MlflowException as error:
        if not is_unknown_request(error):
            raise


def store_exists(uri: str) -> bool:
    """Whether there is a store; a server counts as one. A client for one in files that does not exist would create it."""
    path = store_path(uri)
    return path is None or path.exists()


def missing_store(uri: str) -> Problem:
    return Problem(f"tracking.uri={uri}", "there is no such store", "if it was moved, set tracking.uri to where it is now")


def store_path(uri: str) -> Path | None:
    """The file or directory of a store on the disk of one machine; None for a tracking server or a database server."""
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        return Path(unquote(uri.partition(":///")[2].partition("?")[0]))
    if scheme == "file" or (not scheme and not uri.startswith("databricks")):
        return Path(unquote(urlsplit(uri).path))
    return None


def check_password(uri: str) -> None:
    """Refuse a recorded URI whose password is masked: passwords are not recorded.

    Raises:
        InputError: the URI has a masked password.
    """
    if MASK in uri:
        raise InputError(Problem(f"tracking.uri={uri}", "its password is not recorded with the run", "give tracking.uri=... again with it"))


def check_store_is_shared(uri: str, machines: int) -> list[Problem]:
    """A store on the disk of one machine cannot be used from a second one, where rank 0 may be placed."""
    if machines < 2 or store_path(uri) is None:
        return []
    return [
        Problem(
            f"tracking.uri={masked(uri)}",
            f"is on one machine's disk, and the cluster has {machines} machines",
            "start `mlflow server` and set tracking.uri=http://HOST:PORT",
        )
    ]


def prepare_store(settings: Settings, default_experiment: str) -> None:
    """Create the store and the experiment once, in the driver, unless another launch does at the same moment.

    Raises:
        InputError: the store cannot be used. Found within 15 seconds, or within 60 if another process opens the same file.
    """
    uri, name = settings.tracking.uri, experiment_name(settings, default_experiment)
    location = None
    try:
        check_server(uri)
        path = store_path(uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with only_opener(uri):
            if path is not None and uri.startswith("sqlite:"):
                location = (path.parent / "mlruns" / name).as_uri()  # MLflow's default is relative to the process's working directory
                if not path.exists() or not path.stat().st_size:
                    _make_database(path)
            client = _opened(uri)
            experiment = _get_or_create_experiment(client, name, location)
            mark_experiment(client, experiment)
    except UnusableStoreError as error:
        raise InputError(error.problem) from None
    except (*STORE_ERRORS, ImportError, ValueError) as error:
        problem = store_problem(error)
        raise InputError(
            Problem(
                f"tracking.uri={masked(uri)}", f"MLflow cannot use it: {problem.what}", problem.fix or "start the server, or fix the URI"
            )
        ) from None
    if experiment.lifecycle_stage == "deleted":
        raise InputError(
            Problem(
                f"tracking.experiment={name}",
                "the experiment of this name was deleted in MLflow",
                f"restore it (`mlflow experiments restore -x {experiment.experiment_id}`), or set tracking.experiment to another name",
            )
        )


def _get_or_create_experiment(client: MlflowClient, name: str, location: str | None) -> Experiment:
    """The experiment of this name. Of several launches that create it on a server at once, all but one are refused."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
    return experiment


def mark_experiment(client: MlflowClient, experiment: Experiment) -> None:
    """Without a kind, the UI takes an experiment for one of generative AI, and training runs for evaluation runs."""
    kind = experiment.tags.get(KIND_TAG, "")
    if (not kind or kind.endswith(GUESSED)) and experiment.lifecycle_stage == "active":
        client.set_experiment_tag(experiment.experiment_id, KIND_TAG, MODEL_TRAINING)


def check_server(uri: str) -> None:
    """Check that a tracking or database server answers within seconds: MLflow would wait for minutes.

    Raises:
        OSError: it does not answer, or the URI is not valid.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in PORTS:
        return
    try:
        host, port = parts.hostname or "", parts.port or PORTS[scheme]
    except ValueError as error:
        raise OSError("it has no valid port; in a password, write # / ? and @ as %23 %2F %3F and %40") from error
    socket.create_connection((host, port), timeout=SECONDS_TO_ANSWER).close()
    if scheme != "http":
        return
    try:
        urllib.request.urlopen(f"http://{host}:{port}{parts.path.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        return  # a web server answers; the first real request shows whether it is MLflow
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"it does not answer as a web server does: {type(error).__name__}") from None


def experiment_name(settings: Settings, default: str) -> str:
    return settings.tracking.experiment or default
