"""The exclusive writer of a run directory, on rank 0: it describes the run, appends metrics, and records how the run ended."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any

from raytrain2p.config import Settings
from raytrain2p.config.escaping import code_block, code_span
from raytrain2p.config.phases import PHASES_BY_NAME
from raytrain2p.config.scratch import is_remote, public
from raytrain2p.config.secrets import masked, without_passwords
from raytrain2p.storage.errors import StorageError, reporting_disk_errors
from raytrain2p.storage.files import remove_partial_files, write_file
from raytrain2p.storage.lease import Lease
from raytrain2p.storage.objects import PATIENCE
from raytrain2p.storage.remote import Directory
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile, write_summary
from raytrain2p.tracking.mlflow_errors import store_problem
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, client_of, running_runs
from raytrain2p.tracking.mlflow_sync import MlflowSync, MlflowSyncThread
from raytrain2p.tracking.next_commands import command, settings_of, use_command
from raytrain2p.tracking.run import COMMAND_TAG, DIRECTORY_TAG, LAUNCH_TAG, ROOT_TAG, TIMESTAMP_TAG, Run
from raytrain2p.tracking.run_directory import ResumeRow
from raytrain2p.tracking.run_objects import own_ended
from raytrain2p.tracking.source import version_tags

RESUMED_TAG, ACCEPTED_TAG = "raytrain2p.resumed", "raytrain2p.accepted_inputs"
TRAIN_INPUT = "data.train"
SECONDS_TO_SEND = 1800.0  # at the end, while MLflow takes what it does not have yet; model files may be large
SECONDS_TO_LEAVE = 5.0  # when the worker fails: Ray is about to start it again
SECONDS_TO_INHERIT = 60.0  # a killed predecessor may take that long to release the run directory


class RunWriter:
    """Appends metric points, and records how the run ended. Made by `open_run_writer`.

    Args:
        mlflow_sync: sends the directory to MLflow meanwhile.
        objects: of a run in an object storage.
    """

    def __init__(self, run: Run, mlflow_sync: MlflowSyncThread, objects: Directory | None = None) -> None:
        self.run, self.mlflow_sync, self.objects = run, mlflow_sync, objects
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

    def upload(self) -> None:
        """Upload what is new in the directory, if the run is in an object storage; replaced checkpoints are deleted there after that.

        Raises:
            StorageError: the storage has been away for too long, or another process has taken over.
        """
        if self.objects is not None:
            self.objects.push()

    def check_lease(self) -> None:
        """Find out whether another process has taken over, without a request.

        Raises:
            LostLeaseError: it has.
        """
        lease = self.objects.lease if self.objects is not None else None
        if lease is not None and lease.lost is not None:
            lease.check(0)

    def finish(self, status: str, reason: str = "") -> bool:
        """Record how the run ended, and send the rest. Returns whether MLflow has everything."""
        write_summary(self.run.files.metrics, self.run.files.metrics_summary)
        self.run.files.write_status(status, reason)
        self.upload()
        has_all = self.mlflow_sync.close(SECONDS_TO_SEND)
        with suppress(StorageError):  # all but how much MLflow has is there
            self.upload()
        return has_all


@contextmanager
def open_run_writer(
    run: Run, uri: str, describe: dict[str, Any], report: Callable[[str], None], lease: Lease | None = None
) -> Iterator[RunWriter]:
    """Within, this process alone writes to the run directory, and the run is RUNNING in MLflow.

    Args:
        lease: of the run, if it is in an object storage, see `own_objects`.
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
        objects = Directory(run.path, lease) if lease is not None else None
        if objects is not None:
            objects.push()  # before MLflow has anything of it
        writer = RunWriter(run, MlflowSyncThread(MlflowSync(run, uri, objects), report), objects)
        if lines := writer.metrics_file.damaged_lines:
            report(f"{run.files.metrics} has damaged lines, which are left out: {len(lines)}")
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


def describe_run(
    run: Run,
    config: dict[str, Any],
    command: str,
    facts: dict[str, Any],
    page: Callable[[Run, str], str] | None = None,
    launched: float | None = None,
) -> list[str]:
    """Write settings, identity and README.md into the run directory, from where they are sent to MLflow. A resume is added to the
    history; the command stays the first one.

    Args:
        config: every setting, resolved and without passwords, as nested groups.
        command: shell line that launches the same again.
        facts: what a resumed run is checked against: digests of the inputs; and `use`, see `use_command`.
        page: content of README.md from the run and its command, if it is not the run of a phase.
        launched: seconds since 1970 when the command was given (default: now). Workers that are restarted have the same.

    Returns:
        A line for each setting, and each input's content, that changed since the last time.
    """
    files, before, record = run.files, run.files.read_config(), run.files.read_record() or {}
    launched = time.time() if launched is None else launched
    changes = setting_changes(before, config) if before else {}
    inputs = input_changes(record, facts)
    history = files.read_changes()
    if changes or inputs or ("described" in record and record.get("launched") != launched):
        pairs = {key: list(pair) for key, pair in changes.items()}
        row: ResumeRow = {"at": launched, "command": masked(command), "changes": pairs, "inputs": inputs}
        if history and history[-1]["at"] == launched:  # of workers that were restarted
            last = history.pop()
            row["changes"], row["inputs"] = last["changes"] | pairs, last["inputs"] | inputs
        history.append(row)
        files.write_changes(history)
    files.write_config(config)
    files.write_mlflow_run_id(run.run_id, run.experiment, run.timestamp)
    first = files.tags().get(COMMAND_TAG, masked(command))
    made = page(run, first) if page else _readme(run, first, facts.get("use"))
    write_file(files.readme, made + _resumes(history))
    tags = {LAUNCH_TAG: run.launch_id, DIRECTORY_TAG: public(run.directory), TIMESTAMP_TAG: run.timestamp, COMMAND_TAG: first}
    tags |= {ROOT_TAG: public(str(run.path.parent.parent))} | version_tags() | _history_tags(history)  # the root may have been moved
    kept = {"sequence": files.sequence(), "tags": files.tags() | tags, "removed_tags": record.get("removed_tags", [])}
    files.write_record(asdict(run) | facts | kept | {"described": time.time(), "launched": launched})
    lines = [f"{key}: {old} -> {new}" for key, (old, new) in changes.items()]
    return lines + [f"{where}: other content ({', '.join(parts)}), accepted" for where, parts in inputs.items()]


def input_changes(before: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, list[str]]:
    """Inputs with other content than a record has: the parts that differ, by setting. What the record lacks is not compared: it is
    of an earlier version, or the setting had another value.

    Args:
        before: the run's record.
        facts: digests of the inputs now.
    """
    recorded, changed = before.get("inputs", {}), dict[str, list[str]]()
    if any(before[key] != facts[key] for key in ("train_records", "train_digest") if key in before and key in facts):
        changed[TRAIN_INPUT] = ["records"]
    for where, content in facts.get("inputs", {}).items():
        known = recorded.get(where, content)
        if parts := [name for name in {**known, **content} if known.get(name) != content.get(name)]:
            changed[where] = parts
    return changed


def _resumes(history: Sequence[ResumeRow]) -> str:
    """The resumes of a run, for README.md."""
    text = ""
    for row in history:
        text += f"\nResumed at {_local_time(row['at'])} with\n\n{code_block(row['command'])}\n"
        lines = [f"- {code_span(key)}: {code_span(repr(old))} -> {code_span(repr(new))}" for key, (old, new) in row["changes"].items()]
        lines += [f"- other content accepted: {code_span(where)} ({code_span(', '.join(parts))})" for where, parts in row["inputs"].items()]
        text += "".join(f"\n{line}" for line in lines) + "\n" * bool(lines)
    return text


def _history_tags(history: Sequence[ResumeRow]) -> dict[str, str]:
    tags = {}
    if history:
        tags[RESUMED_TAG] = f"{len(history)} times, the last at {_local_time(history[-1]['at'])}: {history[-1]['command']}"
    if accepted := [f"{_local_time(row['at'])}: {where} ({', '.join(parts)})" for row in history for where, parts in row["inputs"].items()]:
        tags[ACCEPTED_TAG] = "\n".join(accepted)
    return tags


def _local_time(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")


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


def end_run(
    run: Run,
    uri: str,
    status: str,
    report: Callable[[str], None] = lambda line: None,
    tags: dict[str, str] | None = None,
    patience: float = PATIENCE,
) -> bool:
    """Record how a run ended whose workers are gone. Returns whether MLflow has its status. FINISHED is never changed.

    On a full disk the status cannot be written: it is sent to MLflow all the same.

    Args:
        report: called with a line for the user if MLflow does not take it.
        tags: to add to the run.
        patience: seconds for which an object storage may be away.

    Raises:
        RuntimeError: of a run in an object storage: another process writes to it.
        StorageError: the object storage is away.
    """
    with suppress(*STORE_ERRORS), own_ended(run, SECONDS_TO_INHERIT, patience) as push:
        if push is not None:
            if tags:
                run.add_tags(tags)
            if run.files.read_status()["status"] != "FINISHED":
                run.files.write_status(status)
            push()  # before MLflow has it: the objects are the truth
            MlflowSync(run, uri).send()
            return True
    try:
        recorded = run.files.read_status()["status"]
        client_of(uri).set_terminated(run.run_id, status if recorded == "RUNNING" else recorded)
        return True
    except STORE_ERRORS as error:
        report(str(store_problem(error)))
        return False


def send_rest(run: Run, uri: str) -> bool:
    """Send what MLflow does not have of a run that has ended: its process may have been killed before it sent everything.
    Returns whether MLflow has everything."""
    if MlflowSync(run, uri).complete():
        return True
    with suppress(*STORE_ERRORS, RuntimeError), own_ended(run, SECONDS_TO_INHERIT) as push:  # the latter: of an object storage
        if push is not None:
            MlflowSync(run, uri).send()
    return MlflowSync(run, uri).complete()


def end_unrecorded(uri: str, root: str, launch_id: str, status: str) -> None:
    """Set the status in MLflow of a launch's run that is not on disk: the disk is gone, or the worker was killed before it
    recorded the run. A run of another output root is left alone."""
    with suppress(*STORE_ERRORS):
        client = client_of(uri)
        for found in running_runs(client, LAUNCH_TAG, launch_id):
            if found.data.tags.get(ROOT_TAG, public(root)) == public(root):
                client.set_terminated(found.info.run_id, status)


def _readme(run: Run, typed: str, use: list[str] | None) -> str:
    phase, files, base = PHASES_BY_NAME[run.phase], run.files, run.path.parent.parent.parent
    return f"""# {run.phase} run {run.run_id}

Made by raytrain2p on {run.timestamp}, MLflow experiment {code_span(run.experiment)}.

| file | content |
|---|---|
| `{phase.artifact}` | the deployable result |
| `{files.checkpoints.name}/` | the best checkpoint and the last one: what was trained, and the optimizer |
| `{files.config.name}` | every setting; `{files.changes.name}`, if there is one: what each resume changed |
| `{files.earlier.name}/` | if there is one: results of earlier models, which a resume has trained on |
| `{files.metrics.name}` | every metric point |
| `{files.plots.name}/` | plots |
| `{files.status.name}` | RUNNING, FINISHED, FAILED or KILLED |

Trained with

{code_block(typed)}

Use it{"" if is_remote(base) else f", in {code_span(str(base))}"}:

{code_block(use_command(run, base, use))}

Resume it, if it did not finish:

{code_block(command("train", "--phase", str(phase.number), "--resume", run.run_id[:8], *settings_of(run, base)))}
"""
