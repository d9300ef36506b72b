"""What an error of MLflow means, and what to do about it: for the sync, the driver and the commands alike."""

import re
import socket
import sqlite3
import urllib.error
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import partial

import requests
from mlflow.exceptions import RestException
from mlflow.utils import rest_utils
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from raytrain2p.config.secrets import one_line
from raytrain2p.storage.errors import OUT_OF_SPACE

# With an answer of 429 or 5xx MLflow 3.17 drops what the server says, such as that its disk is full.
setattr(rest_utils, "http_request", partial(rest_utils.http_request, raise_on_status=False))  # noqa: B010 (mypy)

NO_ANSWER = (requests.ConnectionError, requests.Timeout, ConnectionError, TimeoutError, socket.gaierror, urllib.error.URLError)
BUSY, TOO_MUCH = (408, 429, 500, 502, 503, 504), (413, 507)
REFUSALS, BAD_PATH = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"), "Invalid artifact path"
DAMAGED = "(sqlite3.DatabaseError)"  # MLflow answers BAD_REQUEST to all requests then
HTTP_STATUS = re.compile(r"(?:failed with error code|too many) (\d{3})\b")  # in the text alone, if the answer is not MLflow's JSON
FULL = re.compile(r"(?i)disk is full|no space left|\bquota\b|insufficient storage")
AUTOFLUSH = re.compile(r"\(raised as a result of [^)]*\)\s*")
PREFIX = re.compile(r"(?s).*(?:Caused by |Response (?:body|text): '?)")
INACTIVE = re.compile(r"must be in (?:the )?'active'")  # MLflow's words for a deleted run or experiment


class Kind(Enum):
    """What is wrong, and what to do about it. AWAY passes by itself, REFUSED is about what was sent; all else needs somebody to act."""

    AWAY = "MLflow is away ({})", ""
    NO_LOGIN = (
        "MLflow's server does not accept the login (401)",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    )
    FORBIDDEN = "MLflow's server does not permit it ({})", "ask its administrator for permission to edit the experiment"
    FULL = "MLflow's store is full, or over a limit ({})", "free space there, or have the limit raised"
    DELETED = (
        "the run, or its experiment, was deleted in MLflow",
        "restore it there, or with `mlflow runs restore --run-id RUN_ID` or `mlflow experiments restore -x ID`",
    )
    GONE = "MLflow does not have it ({})", "set tracking.uri to the store that has it; the run's directory has everything"
    REFUSED = "MLflow does not take it ({})", ""
    FAILED = "MLflow fails ({})", "check tracking.uri and the store"


@dataclass(frozen=True)
class StoreProblem:
    """An error of MLflow in a few words, without passwords."""

    kind: Kind
    reason: str

    @property
    def what(self) -> str:
        return self.kind.value[0].format(self.reason)

    @property
    def fix(self) -> str:
        """What to do about it; empty for what passes by itself."""
        return self.kind.value[1]

    def __str__(self) -> str:
        return "; ".join(filter(None, (self.what, self.fix)))


def store_problem(error: BaseException) -> StoreProblem:
    """Classify what MLflow's client, its database or its artifact store raised."""
    kind, status = _kind(error), _status(error)
    return StoreProblem(kind, f"its server answers {status}" if kind is Kind.AWAY and status else _reason(error))


def is_unknown_request(error: BaseException) -> bool:
    """Whether a server does not know the request at all, be it that it is of an earlier version."""
    return _status(error) == 404 and getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST"


def _kind(error: BaseException) -> Kind:
    causes, status, text = list(_causes(error)), _status(error), str(error)

    def is_any(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if is_any(*NO_ANSWER):
        return Kind.FAILED if is_any(requests.exceptions.SSLError) else Kind.AWAY
    if status in (401, 403):
        return Kind.NO_LOGIN if status == 401 else Kind.FORBIDDEN
    if INACTIVE.search(text):
        return Kind.DELETED
    if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
        return Kind.GONE
    if text.startswith(BAD_PATH) or (is_any(ValueError, OverflowError) and not is_any(requests.RequestException)):
        return Kind.REFUSED  # before it was sent
    if any(getattr(cause, "error_code", "") in REFUSALS for cause in causes) and DAMAGED not in text and not HTTP_STATUS.search(text):
        return Kind.REFUSED  # by MLflow itself
    if status in TOO_MUCH or FULL.search(text) or any(getattr(cause, "errno", None) in OUT_OF_SPACE for cause in causes):
        return Kind.FULL
    if status in BUSY or any(map(_is_outage, causes)):
        return Kind.AWAY
    return Kind.FAILED


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _status(error: BaseException) -> int | None:
    """The HTTP status of the answer, if a server answered."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code
    if found := HTTP_STATUS.search(str(error)):
        return int(found[1])
    return error.get_http_status_code() if isinstance(error, RestException) else None


def _is_outage(error: BaseException) -> bool:
    """Whether a database did not answer. SQLite, a file, is in use for a moment; all else that it reports stays."""
    if not isinstance(error, (OperationalError, InterfaceError)):
        return False
    return not isinstance(error.orig, sqlite3.Error) or "locked" in str(error.orig)


def _reason(error: BaseException) -> str:
    """The error in a few words, without passwords: the innermost one of a failed connection, that of a database without its SQL."""
    database = next((cause for cause in _causes(error) if isinstance(cause, DBAPIError)), None)
    text = str(error if database is None else database.orig).partition("[SQL:")[0]
    return one_line(AUTOFLUSH.sub("", PREFIX.sub("", text))).removesuffix(")").removesuffix("'")
