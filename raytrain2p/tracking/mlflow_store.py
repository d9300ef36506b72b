"""The MLflow store: checked and prepared once, in the driver; and searched."""

import http.client
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from raytrain2p.config import InputError, Problem, Settings
from raytrain2p.config.secrets import MASK, masked, one_line

STORE_ERRORS = (MlflowException, OSError, SQLAlchemyError)
SECONDS_TO_ANSWER = 4
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def client_of(uri: str) -> MlflowClient:
    """A client for a tracking URI."""
    return MlflowClient(uri)


def running_runs(client: MlflowClient, tag: str, value: str) -> list[MlflowRun]:
    """The runs of all experiments that are RUNNING in MLflow and have this value of a tag."""
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"attributes.status = 'RUNNING' AND tags.`{tag}` = '{value}'"))


def store_exists(uri: str) -> bool:
    """Whether a store can be searched: a client for an SQLite file that does not exist would create it."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).is_file()


def local_folder(uri: str) -> Path | None:
    """The directory of a store on the disk of one machine; None for a tracking server or a database server."""
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        return Path(unquote(uri.partition(":///")[2])).parent
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
    if machines < 2 or local_folder(uri) is None:
        return []
    return [
        Problem(
            f"tracking.uri={masked(uri)}",
            f"is on one machine's disk, and the cluster has {machines} machines",
            "start `mlflow server` and set tracking.uri=http://HOST:PORT",
        )
    ]


def prepare_store(settings: Settings, default_experiment: str) -> None:
    """Create the store and the experiment once, in the driver: several workers that open a new SQLite file at once fail.

    Raises:
        InputError: the store cannot be used. Found within 15 seconds.
    """
    uri, name = settings.tracking.uri, experiment_name(settings, default_experiment)
    location = None
    try:
        check_server(uri)
        folder = local_folder(uri)
        if uri.startswith("sqlite:") and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            location = (folder / "mlruns" / name).as_uri()  # MLflow's default is relative to the process's working directory
        client = client_of(uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            client.create_experiment(name, artifact_location=location)
    except (*STORE_ERRORS, ImportError, ValueError) as error:
        reason = one_line(error, 300)
        raise InputError(
            Problem(f"tracking.uri={masked(uri)}", f"MLflow cannot use it: {reason}", "start the server, or fix the URI")
        ) from None
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise InputError(
            Problem(
                f"tracking.experiment={name}",
                "the experiment of this name was deleted in MLflow",
                f"restore it (`mlflow experiments restore -x {experiment.experiment_id}`), or set tracking.experiment to another name",
            )
        )


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
