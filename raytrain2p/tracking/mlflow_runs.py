"""What MLflow has: its runs of ours and its registered model versions, as plain data."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities import Run as MlflowRun
from mlflow.entities import ViewType

from raytrain2p.config import InputError
from raytrain2p.config.secrets import masked, one_line
from raytrain2p.storage.errors import StorageError
from raytrain2p.tracking.metrics_file import LOSSES, MetricPoint
from raytrain2p.tracking.mlflow_errors import store_problem
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, UnusableStoreError, check_password, check_server, client_of
from raytrain2p.tracking.run import LAUNCH_TAG

RUNS_PER_PAGE = 250  # MLflow takes 130 kB of memory for each run of a page, with its parameters, tags and last metrics; no more time
OURS = f"tags.`{LAUNCH_TAG}` != ''"


@dataclass(frozen=True)
class RemoteRun:
    """A run as MLflow has it.

    Args:
        status: RUNNING, FINISHED, FAILED or KILLED; SCHEDULED, which nothing of ours sets.
        lifecycle: `active` or `deleted`.
        start: seconds since 1970; so is `end`, None while the run is RUNNING.
        params: as text; values may be cut off at MLflow's limit.
        metrics: the last value of each.
        steps: the last step of the training loss.
        tracking_uri: of the store.
    """

    run_id: str
    name: str
    experiment: str
    experiment_id: str
    status: str
    lifecycle: str
    start: float
    end: float | None
    artifact_uri: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    tracking_uri: str = ""


@contextmanager
def one_line_errors(uri: str) -> Iterator[None]:
    """Turn what a store answers instead of what it was asked into one line for the user.

    Raises:
        StorageError: any of STORE_ERRORS.
    """
    try:
        check_password(uri)
        check_server(uri)  # MLflow itself would wait for longer
        yield
    except InputError as error:
        raise StorageError(one_line(error.problems[0], 1000)) from None
    except UnusableStoreError as error:
        raise StorageError(str(error)) from None
    except STORE_ERRORS as error:
        raise StorageError(f"tracking.uri={masked(uri)}: {store_problem(error)}") from None


def our_runs(uri: str, condition: str = "") -> Iterator[RemoteRun]:
    """Every run that carries a launch ID, the oldest first; deleted ones and those of deleted experiments too.

    Args:
        condition: more of MLflow's filter, such as "attributes.run_id LIKE '8063%'".

    Raises:
        StorageError: the store does not answer, which takes 10 seconds at most, or not as it should. One line.
    """
    with one_line_errors(uri):
        yield from _runs(uri, f"{OURS} AND {condition}" if condition else OURS)


def _runs(uri: str, query: str) -> Iterator[RemoteRun]:
    client = client_of(uri)
    names = {one.experiment_id: one.name for one in pages(lambda token: client.search_experiments(ViewType.ALL, page_token=token))}

    def page(token: str | None) -> Any:
        return client.search_runs(list(names), query, ViewType.ALL, RUNS_PER_PAGE, ["attributes.start_time ASC"], token)

    for found in pages(page, uri.startswith("http")) if names else ():
        yield _remote(found, names, uri)


def metric_points(uri: str, run_id: str, names: Sequence[str]) -> list[MetricPoint]:
    """Every point that MLflow has of these metrics of a run, by step.

    Raises:
        StorageError: see `our_runs`.
    """
    with one_line_errors(uri):
        client = client_of(uri)
        found = [
            MetricPoint(name, one.value, one.step, one.timestamp / 1000)
            for name in names
            for one in client.get_metric_history(run_id, name)
        ]
    return sorted(found, key=lambda point: point.step)


def registered_versions(uri: str) -> dict[str, list[str]]:
    """The registered model versions of each run, by run ID, as in `assistant/3`, the oldest first.

    Raises:
        StorageError: see `our_runs`.
    """
    versions = dict[str, list[tuple[str, int]]]()
    with one_line_errors(uri):
        client = client_of(uri)
        for one in pages(lambda token: client.search_model_versions(page_token=token)):
            versions.setdefault(one.run_id, []).append((one.name, int(one.version)))
    return {run_id: [f"{name}/{version}" for name, version in sorted(found)] for run_id, found in versions.items() if run_id}


def pages(page: Callable[[str | None], Any], ahead: bool = False) -> Iterator[Any]:
    """All items of an answer that comes in pages.

    Args:
        ahead: ask for the next page while the items of one are worked on: right for a server, which takes no turn of this interpreter.
    """
    items = page(None)
    with ThreadPoolExecutor(1, "mlflow-page") as thread:
        while token := getattr(items, "token", None):
            coming = thread.submit(page, token) if ahead else None
            yield from items
            items = page(token) if coming is None else coming.result()
        yield from items


def _remote(found: MlflowRun, names: dict[str, str], uri: str) -> RemoteRun:
    info, data = found.info, found.data
    return RemoteRun(
        info.run_id,
        info.run_name or "",
        names[info.experiment_id],
        info.experiment_id,
        info.status,
        info.lifecycle_stage,
        info.start_time / 1000,
        info.end_time / 1000 if info.end_time else None,
        info.artifact_uri or "",
        dict(data.params),
        dict(data.tags),
        dict(data.metrics),
        max((last.step for last in data._metric_objs if last.key in LOSSES), default=0),  # no request for each run, as public ways need
        uri,
    )
