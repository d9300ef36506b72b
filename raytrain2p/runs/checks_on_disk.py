"""Checks of one run's directory: every file is whole, and they agree with each other."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytrain2p.config.phases import PHASES_BY_NAME, SWEEPS
from raytrain2p.runs.difference import RESTORE, Difference, difference, readable
from raytrain2p.storage.files import partial_files
from raytrain2p.tracking.damage import damaged, read_as
from raytrain2p.tracking.metrics_file import SummaryFile, read_points, summarize
from raytrain2p.tracking.run import EARLY_TAG, RUN_FOLDERS, Run

Check = Callable[[Run, bool], Iterator[Difference]]  # of a run, and whether a process works on it: what it still writes is not missing


def check_small_files(run: Run, alive: bool) -> Iterator[Difference]:
    """Without reading what may be large: points, checkpoints, artifacts and plots."""
    yield from all_of((identity, resumes, outcome, answers, of_a_sweep, half_written), run, alive)


def check_content(run: Run, alive: bool) -> Iterator[Difference]:
    """What `check_small_files` does not read."""
    yield from all_of((metrics, checkpoints, artifact, plots), run, alive)


def all_of(checks: tuple[Check, ...], run: Run, alive: bool) -> Iterator[Difference]:
    for check in checks:
        yield from readable(run, check(run, alive), alive)


def identity(run: Run, alive: bool) -> Iterator[Difference]:
    """run.json, config.json and MLFLOW_RUN_ID.txt belong to this directory."""
    files, record = run.files, run.files.read_record() or {}
    if run.path.parent.name in RUN_FOLDERS and run.path.parent.name != run.phase:
        yield difference(run, files.record, f"is that of a run of {run.phase}, in the folder of {run.path.parent.name}", RESTORE)
    if not run.path.name.endswith(run.timestamp):
        yield difference(run, files.record, f"has the timestamp {run.timestamp}, and its directory has another", RESTORE)
    if "described" not in record:
        return  # the launch was killed before it described the run
    for path in (files.config, files.mlflow_run_id, files.readme):
        if not path.is_file():
            yield difference(run, path, "is missing", f"{RESTORE}, or resume the run, which writes it")
    if files.mlflow_run_id.is_file() and run.run_id not in files.mlflow_run_id.read_text(errors="replace"):
        yield difference(run, files.mlflow_run_id, "does not name this run", f"{RESTORE}, or resume the run, which writes it")
    files.read_config()


def resumes(run: Run, alive: bool) -> Iterator[Difference]:
    run.files.read_changes()
    yield from ()


def outcome(run: Run, alive: bool) -> Iterator[Difference]:
    """A run that is FINISHED has its artifact, and its result, which names files that exist; a migrated one never had them."""
    files = run.files
    if "migrated" in (files.read_record() or {}):
        return
    tests = read_as(files.test_metrics, dict[str, float]) or {}
    result = read_as(files.result, dict[str, Any])
    if result is not None and result.get("run_id") != run.run_id:
        yield difference(run, files.result, f"is that of run {result.get('run_id')}", RESTORE)
    elif not alive and run.phase in PHASES_BY_NAME and files.read_status()["status"] == "FINISHED" and EARLY_TAG not in files.tags():
        path = files.artifact(PHASES_BY_NAME[run.phase])
        if not path.is_file():
            yield difference(run, path, "is missing, and the run is FINISHED", f"{RESTORE}, or take it from MLflow's artifacts")
        if result is None:
            yield difference(run, files.result, "is missing, and the run is FINISHED", RESTORE)
        else:
            yield from agreement(run, result, tests)


def agreement(run: Run, result: dict[str, Any], tests: dict[str, float]) -> Iterator[Difference]:
    """What result.json says of the other files. The run may have been moved since, and its checkpoints removed to free space."""
    files, kept = run.files, bool(run.files.all_checkpoints())
    for key in ("best", "last"):
        if kept and (path := result.get(key)) and not (run.checkpoints / Path(path).name).is_file():
            yield difference(
                run, run.checkpoints / Path(path).name, f"is missing, which {files.result.name} names as the {key} checkpoint", RESTORE
            )
    best = Path(result.get("best") or "").name
    if others := [path.name for path in files.best_checkpoints() if path.name != best]:
        yield difference(
            run, run.checkpoints / others[0], f"is not the best checkpoint: {files.result.name} names {best or 'none'}", RESTORE
        )
    measured = result.get("metrics", {})
    if wrong := [name for name, value in tests.items() if not same(measured.get(name), value)]:
        yield difference(run, files.test_metrics, f"has another value of {', '.join(wrong[:3])} than {files.result.name}", RESTORE)


def same(one: float | None, other: float) -> bool:
    return one == other or (one is not None and math.isnan(one) and math.isnan(other))


def answers(run: Run, alive: bool) -> Iterator[Difference]:
    for path in (run.files.answers, run.files.lineage):
        check_lines(path)
    yield from ()


def check_lines(path: Path) -> None:
    """Check that every line of a file is a JSON object; it may not exist.

    Raises:
        DamagedFileError: one is not.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                is_object = isinstance(json.loads(line), dict)
            except (ValueError, RecursionError):
                is_object = False
            if not is_object:
                raise damaged(path, f"has a line that is not a JSON object, the {number}.", RESTORE)


def of_a_sweep(run: Run, alive: bool) -> Iterator[Difference]:
    """best.json, trials.csv and the study. Records of trials are read by the checks of lineage."""
    files = run.files
    if run.phase != SWEEPS:
        return
    read_as(files.best_trial, dict[str, Any])
    if not alive and files.read_status()["status"] == "FINISHED":
        for path in (files.trials_table, files.best_trial):
            if not path.is_file():
                yield difference(run, path, "is missing, and the sweep is FINISHED", f"resume the sweep, which writes it: {run.run_id[:8]}")
    if not alive:
        check_lines(files.study)


def half_written(run: Run, alive: bool) -> Iterator[Difference]:
    for path in () if alive else sorted(partial_files(run.path)):
        yield difference(run, path, "was left half written by a process that was killed", "remove it; a resume does, too")


def metrics(run: Run, alive: bool) -> Iterator[Difference]:
    """metrics.jsonl, and what was kept of it when the run ended."""
    path, bad = run.files.metrics, list[bytes]()
    counts = Counter((point.name, point.step) for point in read_points(path, bad))
    if bad:
        yield difference(run, path, f"has damaged lines: {len(bad)}, the first is {bad[0][:40]!r}", f"{RESTORE}; they are left out")
    if twice := [point for point, count in counts.items() if count > 1]:
        name, step = twice[0]
        yield difference(run, path, f"has {len(twice)} points twice, such as {name} at step {step}", RESTORE)
    kept: SummaryFile | None = read_as(run.files.metrics_summary, SummaryFile)
    if kept is not None and not bad and path.is_file() and kept["bytes"] == path.stat().st_size and kept["metrics"] != summarize(path):
        yield difference(
            run, run.files.metrics_summary, f"is not the summary of {path.name}", "remove it: it is made anew when it is needed"
        )


def checkpoints(run: Run, alive: bool) -> Iterator[Difference]:
    """Every byte of each checkpoint, once: the best and the last may be one file."""
    from raytrain2p.tracking.checkpoints import damage  # imports torch

    seen = set[tuple[int, int]]()
    for path in run.files.all_checkpoints():
        try:
            found = path.stat()
        except OSError as error:
            if os.path.lexists(path):  # else a run under way has just replaced it
                yield difference(run, path, f"cannot be read: {error.strerror}", RESTORE)
            continue
        if (found.st_dev, found.st_ino) not in seen and (reason := damage(path)) is not None and path.exists():
            yield difference(run, path, f"is damaged ({reason})", RESTORE)
        seen.add((found.st_dev, found.st_ino))


def artifact(run: Run, alive: bool) -> Iterator[Difference]:
    """The digest in an artifact is that of its content and that of the result, and it has all parts."""
    if run.phase not in PHASES_BY_NAME or not (path := run.files.artifact(PHASES_BY_NAME[run.phase])).is_file():
        return
    from raytrain2p.config import InputError
    from raytrain2p.models.artifacts import load_artifact  # imports torch

    try:
        found = load_artifact(path, PHASES_BY_NAME[run.phase])
    except InputError as error:
        problem = error.problems[0]
        yield difference(run, problem.where, problem.what, problem.fix)
        return
    if not alive and (wanted := run.files.artifact_digest()) not in (None, found["digest"]):
        yield difference(run, path, f"has the digest {found['digest'][:12]}, {run.files.result.name} has {wanted[:12]}", RESTORE)


def plots(run: Run, alive: bool) -> Iterator[Difference]:
    from PIL import Image

    for path in sorted(run.files.plots.rglob("*.png")):
        try:
            with Image.open(path) as image:
                image.load()
        except Exception as error:  # of a torn file many kinds
            if path.exists():
                yield difference(
                    run, path, f"is not an image that opens ({type(error).__name__})", f"{RESTORE}, or take it from MLflow's artifacts"
                )
