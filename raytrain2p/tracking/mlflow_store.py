"""The MLflow store: is it there, and may every worker use it? Asked once, in the driver."""

import http.client
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

from raytrain2p.config import InputError, Problem, Settings
from raytrain2p.config.secrets import MASK, masked, one_line

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# What fails is kept on disk and sent again later: MLflow's own retries, minutes of them, would only hide an outage.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the plain-file store is one of the three that we support

import mlflow
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

STORE_ERRORS = (MlflowException, OSError, SQLAlchemyError)
SECONDS_TO_ANSWER = 4
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}


def client_of(uri: str) -> "mlflow.MlflowClient":
    """A client for a tracking URI, with MLflow's environment as it is set above."""
    return mlflow.MlflowClient(uri)


def local_folder(uri: str) -> Path | None:
    """The directory of a store that is a file or a folder on some machine's disk; None for a server or a database server."""
    scheme = urlsplit(uri).scheme
    if scheme == "sqlite":
        return Path(unquote(uri.partition(":///")[2])).parent
    if scheme == "file" or (not scheme and not uri.startswith("databricks")):
        return Path(unquote(urlsplit(uri).path))
    return None


def check_password(uri: str) -> None:
    """Passwords are not recorded: a store that has one needs it again.

    Raises:
        InputError: the URI has a masked one.
    """
    if f":{MASK}@" in uri:
        raise InputError(Problem(f"tracking.uri={uri}", "its password is not recorded with the run", "give tracking.uri=... again with it"))


def check_store_is_shared(uri: str, machines: int) -> list[Problem]:
    """A store on one machine's disk serves no second machine: rank 0 may be placed there."""
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
    """Make the store and the experiment once, in the driver: several workers at a fresh SQLite file fail.

    Raises:
        InputError: the store cannot be used, said within 15 seconds.
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
    """Ask a tracking or database server whether it lives, and do not wait long for its answer: MLflow would for minutes.

    Raises:
        OSError: it does not answer, or the URI names no server.
    """
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    if scheme not in PORTS:
        return
    try:
        host, port = parts.hostname or "", parts.port or PORTS[scheme]
    except ValueError as error:
        raise OSError(str(error)) from None
    socket.create_connection((host, port), timeout=SECONDS_TO_ANSWER).close()
    if scheme != "http":
        return
    try:
        urllib.request.urlopen(f"http://{host}:{port}{parts.path.rstrip('/')}/health", timeout=SECONDS_TO_ANSWER).close()
    except urllib.error.HTTPError:
        return  # somebody answers; whether it is MLflow, the first real request shows
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"no web server answers there: {type(error).__name__}") from None


def experiment_name(settings: Settings, default: str) -> str:
    return settings.tracking.experiment or default
