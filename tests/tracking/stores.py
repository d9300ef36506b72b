"""Runs in both stores that need no server, and what those stores hold."""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raytrain2p.config import Settings, load_settings
from raytrain2p.tracking.create_run import get_or_create_run
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import Run, launch_record

EXPERIMENT = "phase2_training"
STORES = {"sqlite": "sqlite:///{}/mlflow.db", "file": "file:{}/mlruns"}
HOLD = """
with Lock(Path(sys.argv[1])).held() as holder:
    print(holder, flush=True)
    sys.stdin.read()
"""
NOBODY = "http://127.0.0.1:1"  # a server where nobody listens


def settings_in(folder: Path, *overrides: str, store: str = "sqlite", phase: int = 2) -> Settings:
    """Settings with their output and their store in a folder."""
    return load_settings(phase, None, [f"output.root={folder}/checkpoints", f"tracking.uri={STORES[store].format(folder)}", *overrides])


def elsewhere(settings: Settings, uri: str) -> Settings:
    """The same settings with another store."""
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"uri": uri})})


def begin(settings: Settings) -> Settings:
    """Make the place where drivers have their locks: rank 0 does not."""
    launch_record(settings.output.root, "any").parent.mkdir(parents=True, exist_ok=True)
    return settings


def create(settings: Settings, launch_id: str = "launch-1", phase: str = "phase2") -> Run:
    """The run of a launch, as rank 0 gets or creates it."""
    begin(settings)
    return get_or_create_run(settings, phase, EXPERIMENT, launch_id)


def mlflow_runs(settings: Settings, experiment: str = EXPERIMENT) -> list[Any]:
    """All runs that the store has."""
    client = client_of(settings.tracking.uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def mlflow_run(settings: Settings, run: Run) -> Any:
    return client_of(settings.tracking.uri).get_run(run.run_id)


def history(settings: Settings, run: Run, name: str = "train_loss") -> list[tuple[int, float]]:
    """Every point of a metric that the store has, as (step, value); one that it has twice is there twice."""
    return sorted((point.step, point.value) for point in client_of(settings.tracking.uri).get_metric_history(run.run_id, name))


def points(*steps: int, name: str = "train_loss") -> list[MetricPoint]:
    """One point at each of these steps, with half the step as its value."""
    return [MetricPoint(name, step / 2, step, 1_700_000_000.0 + step) for step in steps]


def note(run: Run, *steps: int) -> None:
    """Append points to a run's metrics.jsonl."""
    MetricsFile(run.path / "metrics.jsonl").append(points(*steps))


def fill(folder: Path) -> None:
    """Leave no room on a disk."""
    with (folder / "somebody elses").open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(bytes(4096)):
            pass


@contextmanager
def away(settings: Settings) -> Iterator[None]:
    """Within, the SQLite store of these settings answers nothing about runs, to anybody."""
    path = settings.tracking.uri.removeprefix("sqlite:///")

    def rename(old: str, new: str) -> None:
        with sqlite3.connect(path, timeout=30) as connection:
            connection.execute("PRAGMA legacy_alter_table=ON")  # or other tables' references would be renamed with it
            connection.execute(f"ALTER TABLE {old} RENAME TO {new}")
        connection.close()

    client_of(settings.tracking.uri)  # is kept by MLflow: opened only now, the store would make the table anew
    rename("runs", "runs_away")
    try:
        yield
    finally:
        rename("runs_away", "runs")


@contextmanager
def lock_holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a lock, until it is ended."""
    code = f"import sys\nfrom pathlib import Path\nfrom raytrain2p.storage.locks import Lock\n{HOLD}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "None\n", "it did not get the lock"
        yield process
    finally:
        process.kill()
        process.communicate()
