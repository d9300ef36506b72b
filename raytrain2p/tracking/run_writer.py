"""The exclusive writer of a run directory, on rank 0: it describes the run, appends metrics, and records how the run ended."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from raytrain2p.config import Settings
from raytrain2p.config.escaping import code_block, code_span
from raytrain2p.config.phases import PHASES_BY_NAME
from raytrain2p.config.secrets import masked, without_passwords
from raytrain2p.storage.errors import reporting_disk_errors
from raytrain2p.storage.files import remove_partial_files, write_file
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, running_runs
from raytrain2p.tracking.mlflow_sync import MlflowSync, MlflowSyncThread
from raytrain2p.tracking.run import COMMAND_TAG, DIRECTORY_TAG, LAUNCH_TAG, TIMESTAMP_TAG, Run

SECONDS_TO_SEND = 1800.0  # at the end, while MLflow takes what it does not have yet; model files may be large
SECONDS_TO_LEAVE = 5.0  # when the worker fails: Ray is about to start it again
SECONDS_TO_INHERIT = 60.0  # a killed predecessor may take that long to release the run directory


class RunWriter:
    """Appends metric points, and records how the run ended. Made by `open_run_writer`.

    Args:
        mlflow_sync: sends the directory to MLflow meanwhile.
    """

    def __init__(self, run: Run, mlflow_sync: MlflowSyncThread) -> None:
        self.run, self.mlflow_sync = run, mlflow_sync
        self.metrics_file = MetricsFile(run.files.metrics)

    def resume_from(self, step: int) -> None:
        """Points of later steps that the file has already are not written again."""
        self.metrics_file = MetricsFile(self.metrics_file.path, step)

    def write(self, points: Sequence[MetricPoint]) -> None:
        """Write points to disk; they are sent later.

        Raises:
            StorageError: the disk is full, read-only or gone.
        """
        with reporting_disk_errors(self.metrics_file.path, 200 * len(points)):
            self.metrics_file.append(points)

    def write_metrics(self, metrics: dict[str, float], step: int) -> None:
        now = time.time()
        self.write([MetricPoint(name, float(value), step, now) for name, value in metrics.items()])

    def finish(self, status: str) -> bool:
        """Record how the run ended, and send the rest. Returns whether MLflow has everything."""
        self.run.files.write_status(status)
        return self.mlflow_sync.close(SECONDS_TO_SEND)


@contextmanager
def open_run_writer(run: Run, uri: str, describe: dict[str, Any], report: Callable[[str], None]) -> Iterator[RunWriter]:
    """Within, this process alone writes to the run directory, and the run is RUNNING in MLflow.

    Args:
        uri: of the tracking store, with its password.
        describe: arguments of `describe_run`.
        report: called with a line for the user.

    Raises:
        StorageError: the disk is full, read-only or gone.
        RuntimeError: another process does not release the directory.
    """
    with ExitStack() as stack:
        with reporting_disk_errors(run.files.config, 100_000):
            stack.enter_context(sole_writer(run))
            changes = describe_run(run, **describe)
            run.files.write_status("RUNNING")
        for line in changes:
            report(f"changed since the run began: {line}")
        writer = RunWriter(run, MlflowSyncThread(MlflowSync(run, uri), report))
        try:
            yield writer
        finally:
            writer.mlflow_sync.close(SECONDS_TO_LEAVE)


@contextmanager
def sole_writer(run: Run) -> Iterator[None]:
    """Within, no other process writes to the run directory: workers of a killed launch may live on for a few seconds.

    Raises:
        RuntimeError: another process does not release it.
    """
    with run.files.lock.held(SECONDS_TO_INHERIT) as holder:
        if holder is not None:
            raise RuntimeError(f"another process writes to {run.directory} ({holder}), and does not end")
        remove_partial_files(run.path)
        yield


def describe_run(run: Run, config: dict[str, Any], command: str, facts: dict[str, Any], page: str | None = None) -> list[str]:
    """Write settings, identity and README.md into the run directory, from where they are sent to MLflow.

    Args:
        config: every setting, resolved and without passwords, as nested groups.
        command: shell line that launches the same again.
        facts: what a resumed run is checked against, such as the number of training records.
        page: content of README.md, if it is not the run of a phase.

    Returns:
        A line for each setting that changed since the last time.
    """
    files, before = run.files, run.files.read_config()
    changes = setting_changes(before, config) if before else {}
    if changes:
        files.append_changes(changes)
    files.write_config(config)
    files.write_mlflow_run_id(run.run_id, run.experiment, run.timestamp)
    write_file(files.readme, page or _readme(run, masked(command)))
    tags = {LAUNCH_TAG: run.launch_id, DIRECTORY_TAG: run.directory, TIMESTAMP_TAG: run.timestamp, COMMAND_TAG: masked(command)}
    files.write_record(asdict(run) | facts | {"tags": files.tags() | tags, "described": time.time()})
    return [f"{key}: {old} -> {new}" for key, (old, new) in changes.items()]


def resolved_config(settings: Settings, resolved: dict[str, Any]) -> dict[str, Any]:
    """Every setting as nested groups of plain values, without passwords.

    Args:
        resolved: values that only the worker found, by dotted path, such as the precision chosen for `auto`.
    """
    config: dict[str, Any] = without_passwords(json.loads(settings.model_dump_json()))
    for key, value in resolved.items():
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    return config


def setting_changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Settings that differ, by dotted path, as (before, after)."""
    changes: dict[str, tuple[Any, Any]] = {}
    for key in [*before, *(key for key in after if key not in before)]:
        old, new, path = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            changes |= setting_changes(old, new, f"{path}.")
        elif old != new:
            changes[path] = (old, new)
    return changes


def end_run(run: Run, uri: str, status: str) -> bool:
    """Record how a run ended whose workers are gone. Returns whether MLflow has its status. FINISHED is never changed.

    On a full disk the status cannot be written: it is sent to MLflow all the same.
    """
    with suppress(*STORE_ERRORS), run.files.lock.held(SECONDS_TO_INHERIT) as holder:
        if holder is None:
            if run.files.read_status()["status"] != "FINISHED":
                run.files.write_status(status)
            MlflowSync(run, uri).send()
            return True
    with suppress(*STORE_ERRORS):
        recorded = run.files.read_status()["status"]
        client_of(uri).set_terminated(run.run_id, status if recorded == "RUNNING" else recorded)
        return True
    return False


def send_rest(run: Run, uri: str) -> bool:
    """Send what MLflow does not have of a run that has ended: its process may have been killed before it sent everything.
    Returns whether MLflow has everything."""
    if MlflowSync(run, uri).complete():
        return True
    with suppress(*STORE_ERRORS), run.files.lock.held(SECONDS_TO_INHERIT) as holder:
        if holder is None:
            MlflowSync(run, uri).send()
    return MlflowSync(run, uri).complete()


def end_unrecorded(uri: str, launch_id: str, status: str) -> None:
    """Set the status in MLflow of a launch's run that is not on disk: the disk is gone, or the worker was killed before it
    recorded the run."""
    with suppress(*STORE_ERRORS):
        client = client_of(uri)
        for found in running_runs(client, LAUNCH_TAG, launch_id):
            client.set_terminated(found.info.run_id, status)


def _readme(run: Run, command: str) -> str:
    phase, files = PHASES_BY_NAME[run.phase], run.files
    return f"""# {run.phase} run {run.run_id}

Made by raytrain2p on {run.timestamp}, MLflow experiment {code_span(run.experiment)}.

| file | content |
|---|---|
| `{phase.artifact}` | the deployable result |
| `{files.checkpoints.name}/` | the best checkpoint and the last one: what was trained, and the optimizer |
| `{files.config.name}` | every setting; `{files.changes.name}`, if there is one: settings that a resumed run changed |
| `{files.metrics.name}` | every metric point |
| `{files.plots.name}/` | plots |
| `{files.status.name}` | RUNNING, FINISHED, FAILED or KILLED |

Trained with

{code_block(command)}

Use it:

    {phase.next_command.format(run=run.run_id[:8])}

Resume it, if it did not finish:

    python -m raytrain2p.train --phase {phase.number} --resume {run.run_id[:8]}
"""
