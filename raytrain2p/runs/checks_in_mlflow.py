"""Checks of one run against MLflow: it is there, and has what the directory has, once."""

import hashlib
import math
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raytrain2p.config import scratch
from raytrain2p.runs.difference import NOT_CHANGEABLE, SEND_AGAIN, SYNC, Difference, difference
from raytrain2p.tracking.metrics_file import read_points
from raytrain2p.tracking.mlflow_errors import Kind, store_problem
from raytrain2p.tracking.mlflow_pages import NOTE_TAG
from raytrain2p.tracking.mlflow_runs import RemoteRun
from raytrain2p.tracking.mlflow_store import store_path
from raytrain2p.tracking.mlflow_sync import MlflowSync, params_of, tags_of
from raytrain2p.tracking.run import Run

NAMES_SHOWN = 5
MOVED = "is where the run is now, and MLflow has another directory"

Place = tuple[int, int, float | str]  # of a point: step, milliseconds since 1970, and value


def check_record(run: Run, sync: MlflowSync, remote: RemoteRun | None, unfinished: bool) -> Iterator[Difference]:
    """The run in MLflow, its status, parameters and tags, as one search gives them; and what was not sent yet."""
    if remote is None:
        if not unfinished:  # or it was made just now
            yield difference(run, "MLflow", "does not have this run", "set tracking.uri to the store that has it")
        return
    if remote.lifecycle == "deleted":
        yield difference(run, "MLflow", "has this run as deleted", Kind.DELETED.value[1].replace("RUN_ID", run.run_id))
        return
    if unfinished:
        return  # what MLflow lacks will be sent
    record, config = run.files.read_record() or {}, run.files.read_config()
    if sync.damage:
        yield difference(run, sync.state_path, "is damaged, which has how much was sent", SYNC)
        return
    if (lost := -sync.left()) > 0:
        what = f"has lost {lost:,} bytes that were sent: MLflow has points that are not here any more"
        yield difference(run, run.files.metrics, what, "restore it from a backup, or run `python -m raytrain2p.runs sync`")
    moved = record["directory"] != run.directory and Path(scratch.local_path(record["directory"])).resolve() != run.path.resolve()
    if moved:
        yield difference(run, run.directory, MOVED, SYNC)
    unsent = [what for what in sync.unsent() if not (what == "points" and lost > 0)]
    if unsent:
        yield difference(run, run.directory, f"has what MLflow does not have yet: {', '.join(unsent)}", SYNC)
    if config is not None and "described" in record and not moved and "settings and tags" not in unsent:
        yield from description(run, sync, remote, record["tags"], config)
    if "status" not in unsent:
        yield from status(run, remote)


def description(run: Run, sync: MlflowSync, remote: RemoteRun, tags: dict[str, Any], config: dict[str, Any]) -> Iterator[Difference]:
    """Parameters and tags."""
    refused = sync.refusals()
    if lacking := [name for name in params_of(config) if name not in remote.params and f"param `{name}`" not in refused]:
        yield difference(run, "MLflow", f"lacks parameters that were sent: {some(lacking)}", SEND_AGAIN)
    wanted = tags_of(tags, config, remote.params, remote.tags)
    wanted = {name: value for name, value in wanted.items() if f"tag `{name}`" not in refused}
    if lacking := [name for name in wanted if name not in remote.tags]:
        yield difference(run, "MLflow", f"lacks tags that were sent: {some(lacking)}", SEND_AGAIN)
    for name, value in wanted.items():
        there = remote.tags.get(name, value)
        # The note is edited in MLflow's pages: any counts. A long value is cut off there.
        if there != value and name != NOTE_TAG and not (there and len(there) >= 5000 and value.startswith(there)):
            yield difference(run, "MLflow", f"has the tag {name} as {there!r}, {run.files.record.name} as {value!r}", SEND_AGAIN)


def some(names: list[str]) -> str:
    """The first few names."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def status(run: Run, remote: RemoteRun) -> Iterator[Difference]:
    """The status that was sent, and when the run ended."""
    mine = run.files.read_status()
    if mine["status"] == "RUNNING":
        return  # orphaned, which is a difference of its own
    if remote.status != mine["status"]:
        behind = remote.status == "FINISHED"
        fix = "another copy of the directory has finished, and counts" if behind else SEND_AGAIN
        yield difference(run, "MLflow", f"has the status {remote.status}, {run.files.status.name} has {mine['status']}", fix)
    elif remote.end is None or round(1000 * remote.end) != round(1000 * mine["at"]):
        yield difference(run, "MLflow", f"has another time at which the run ended than {run.files.status.name}", SEND_AGAIN)


def check_points(run: Run, sync: MlflowSync, remote: RemoteRun, more: bool) -> Iterator[Difference]:
    """Every point that was sent is in MLflow, once, with its value and time; and no other is.

    Args:
        more: MLflow may have more points than the directory: they are just being sent, or lines are damaged.
    """
    sent, here = int(sync.state["sent"]), defaultdict[str, Counter[Place]](Counter)
    for point in read_points(run.files.metrics, end=sent):
        here[point.name][point.step, round(point.time * 1000), as_stored(point.value)] += 1
    all_sent = not more and not sync.left()
    for name in sorted({*here, *remote.metrics}):
        if f"metric `{name}`" in sync.refusals():
            continue
        history = sync.client.get_metric_history(run.run_id, name)
        there = Counter((point.step, point.timestamp, as_stored(point.value)) for point in history)
        yield from points_of(run, name, here[name], there, all_sent)


def as_stored(value: float) -> float | str:
    """A value so that equal ones compare equal; SQL stores keep the largest number for infinity."""
    return "NaN" if math.isnan(value) else max(-sys.float_info.max, min(sys.float_info.max, value))


def points_of(run: Run, name: str, here: Counter[Place], there: Counter[Place], all_sent: bool) -> Iterator[Difference]:
    """One metric: points that MLflow lacks, has otherwise, has twice, or has alone."""
    where = f"MLflow, metric {name},"
    lacking, others = here - there, there - here if all_sent else Counter[Place]()
    twice = {place: count for place, count in others.items() if place in here}
    at = {step: (moment, value) for step, moment, value in others if (step, moment, value) not in twice}
    changed = sorted((place for place in lacking if place[0] in at), key=lambda place: place[:2])
    missing = sorted((place for place in lacking if place[0] not in at), key=lambda place: place[:2])
    alone = sorted(step for step in at if step not in {place[0] for place in changed})
    if missing:
        yield difference(run, where, f"lacks {len(missing)} of {here.total()} points, the first at step {missing[0][0]}", SEND_AGAIN)
    if changed:
        step, moment, value = changed[0]
        other_moment, other = at[step]
        what = f"value {other}, here {value}" if other != value else f"time {other_moment} ms, here {moment} ms"
        yield difference(run, where, f"has {len(changed)} other points, the first at step {step}: {what}", NOT_CHANGEABLE)
    if twice:
        yield difference(
            run, where, f"has {len(twice)} points more than once, such as step {min(place[0] for place in twice)}", NOT_CHANGEABLE
        )
    if alone:
        what = f"has {len(alone)} points that {run.files.metrics.name} lacks, the first at step {alone[0]}"
        yield difference(run, where, what, NOT_CHANGEABLE)


def check_artifacts(run: Run, sync: MlflowSync, remote: RemoteRun, known: set[str]) -> Iterator[Difference]:
    """The files that were sent, byte by byte.

    Args:
        known: paths of files that are damaged on disk, which are not compared.
    """
    for file, folder, now in sync.artifacts():
        name = str(file.relative_to(run.path))
        if sync.state["artifacts"].get(name) != now or str(file) in known:
            continue  # refused, or not sent yet
        place = f"{folder}/{file.name}" if folder else file.name
        with tempfile.TemporaryDirectory() as scratch:
            copy = fetched(sync, remote, place, scratch)
            if copy is None:
                yield difference(run, "MLflow", f"lacks the artifact {place}, which was sent", SEND_AGAIN)
            elif copy.stat().st_size != now[0] or sha256(copy) != sha256(file):
                yield difference(run, "MLflow", f"has another content of the artifact {place} than {file}", SEND_AGAIN)


def fetched(sync: MlflowSync, remote: RemoteRun, place: str, scratch: str) -> Path | None:
    """An artifact: where it lies, if that is a folder of this machine; else downloaded. None if MLflow does not have it.

    Raises:
        STORE_ERRORS: MLflow is away, for example.
    """
    folder = store_path(remote.artifact_uri)
    if folder is not None:
        return folder / place if (folder / place).is_file() else None
    try:
        return Path(sync.client.download_artifacts(remote.run_id, place, scratch))
    except Exception as error:
        if store_problem(error).kind is Kind.GONE:
            return None
        raise


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
