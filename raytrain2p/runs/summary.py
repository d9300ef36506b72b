"""What is known of a run at a glance, from its directory; and conditions on it."""

import operator
import os
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raytrain2p.config import InputError, Problem, flatten_tree
from raytrain2p.config.phases import SWEEPS
from raytrain2p.tracking.damage import read_as
from raytrain2p.tracking.find import is_alive
from raytrain2p.tracking.metrics_file import MetricSummary, read_summary
from raytrain2p.tracking.run import SWEEP_TAG, Run
from raytrain2p.tracking.run_directory import RUN_DIRECTORY, RUN_ID_LENGTH, best_of_name

ORPHANED = "ORPHANED"  # RUNNING on disk, and no process works on it
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq, "!=": operator.ne}
CONDITION = re.compile(r"\s*([^<>=!\s]+)\s*(<=|>=|!=|<|>|=)\s*(.+?)\s*")


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance: what `list` and `show` print.

    Args:
        status: RUNNING, FINISHED, FAILED, KILLED, or ORPHANED.
        timestamp: when it was made, local time, as in the directory's name.
        best: value of the monitored metric at the best checkpoint; of a sweep, of its best trial.
        monitor: name of that metric.
        steps: optimizer steps that have points.
        metrics: the last value of each metric; also those of test splits.
        bytes: of all files, hard links once.
        sweep: run ID of the sweep that a trial belongs to.
        aligner: run ID of the phase 1 run that a phase 2 run took its aligner from, if it is one.
        settings: by dotted path.
    """

    run_id: str
    phase: str
    status: str
    timestamp: str
    directory: str | None
    experiment: str
    launch_id: str
    monitor: str = ""
    best: float | None = None
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    sweep: str | None = None
    aligner: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str) -> Any:
        """A metric, a setting, a tag, or one of `status`, `phase`, `steps`, `bytes`, `best` and `sweep`; None if it has none."""
        if name in ("status", "phase", "steps", "bytes", "best", "sweep", "timestamp", "aligner"):
            return getattr(self, name)
        return next((values[name] for values in (self.metrics, self.settings, self.tags) if name in values), None)

    def user_tags(self) -> dict[str, str]:
        """The tags that a person gave."""
        return {key: value for key, value in self.tags.items() if not key.startswith(("raytrain2p.", "mlflow."))}


def summary_of(run: Run, root: str) -> RunSummary:
    """The summary of a run's directory.

    Raises:
        DamagedFileError: a file of it is damaged.
    """
    files = run.files
    settings, tags, status = flatten_tree(files.read_config() or {}), files.tags(), files.read_status()["status"]
    points = read_summary(files.metrics, files.metrics_summary)
    best, monitor = best_of(run, settings)
    return RunSummary(
        run.run_id,
        run.phase,
        ORPHANED if status == "RUNNING" and not is_alive(run, root) else status,
        run.timestamp,
        run.directory,
        run.experiment,
        run.launch_id,
        monitor,
        best,
        steps_of(points),
        last_values(points) | test_metrics(run),
        size_of(run.path),
        tags,
        tags.get(SWEEP_TAG),
        aligner_of(settings),
        settings,
    )


def best_of(run: Run, settings: dict[str, Any]) -> tuple[float | None, str]:
    """The value at the best checkpoint, from its name, which result.json keeps; of a sweep, at its best trial. And the metric's name."""
    if run.phase == SWEEPS:
        return (read_as(run.files.best_trial, dict[str, Any]) or {}).get("objective"), str(settings.get("sweep.metric", ""))
    names = [path.name for path in run.files.best_checkpoints()]
    if not names and (kept := (read_as(run.files.result, dict[str, Any]) or {}).get("best")):
        names = [Path(kept).name]
    return best_of_name(names[0]) if names else None, str(settings.get("checkpoint.monitor", ""))


def steps_of(points: dict[str, MetricSummary]) -> int:
    return max((points[name]["step"] for name in ("train_loss", "train_loss_epoch") if name in points), default=0)


def last_values(points: dict[str, MetricSummary]) -> dict[str, float]:
    return {name: summary["last"] for name, summary in points.items() if summary["last"] is not None}


def test_metrics(run: Run) -> dict[str, float]:
    found: dict[str, float] = read_as(run.files.test_metrics, dict[str, float]) or {}
    return found


def size_of(directory: Path) -> int:
    """Bytes of all files under a directory, hard links once; what vanishes meanwhile does not count."""
    sizes = dict[tuple[int, int], int]()
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                found = os.lstat(os.path.join(folder, name))  # noqa: PTH118 - of thousands of files
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode):
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def aligner_of(settings: dict[str, Any]) -> str | None:
    """The run ID of the aligner that the settings name, by the directory that it is in."""
    folder = Path(str(settings.get("model.aligner") or "")).parent.name
    return folder[:RUN_ID_LENGTH] if RUN_DIRECTORY.fullmatch(folder) else None


def condition(text: str) -> Callable[[RunSummary], bool]:
    """A condition such as `val/loss<2.1`, `status=FINISHED` or `training.learning_rate>=1e-4`. A run without the value does not meet it.

    Raises:
        InputError: it is not one.
    """
    match = CONDITION.fullmatch(text)
    if match is None:
        fix = "write a metric, a setting or a tag, one of < <= > >= = !=, and a value: 'val/loss<2.1'"
        raise InputError(Problem(f"--where {text}", "is not a condition", fix))
    name, symbol, wanted = match.groups()

    def holds(run: RunSummary) -> bool:
        value = run.value(name)
        if value is None:
            return False
        try:
            return bool(OPERATORS[symbol](float(value), float(wanted)))
        except (TypeError, ValueError):
            return bool(OPERATORS[symbol](str(value), wanted))

    return holds


def order(runs: Sequence[RunSummary], name: str | None, reverse: bool) -> list[RunSummary]:
    """The runs sorted by a value. Those without it come last."""
    if name is None:
        return list(reversed(runs)) if reverse else list(runs)
    having = [run for run in runs if run.value(name) is not None]
    numeric = all(isinstance(run.value(name), int | float) for run in having)
    ordered = sorted(having, key=lambda run: run.value(name) if numeric else str(run.value(name)), reverse=reverse)
    return ordered + [run for run in runs if run.value(name) is None]
