"""What is known of a run at a glance, from its directory or from MLflow; and conditions on it."""

import ast
import operator
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain2p.config import InputError, Problem, flatten_tree
from raytrain2p.config.phases import SWEEPS
from raytrain2p.runs.output import age_of
from raytrain2p.storage.files import regular_files
from raytrain2p.tracking.damage import read_as
from raytrain2p.tracking.find import is_alive
from raytrain2p.tracking.metrics_file import LOSSES, MetricSummary, read_summary
from raytrain2p.tracking.run import CHANGED_TAG, DIRECTORY_TAG, LAUNCH_TAG, NOT_SET, SWEEP_TAG, TIMESTAMP_TAG, Run
from raytrain2p.tracking.run_directory import RUN_DIRECTORY, RUN_ID_LENGTH, best_of_name
from raytrain2p.tracking.source import VERSION_PREFIX

if TYPE_CHECKING:  # MLflow takes 2 s
    from raytrain2p.tracking.mlflow_runs import RemoteRun

ORPHANED = "ORPHANED"  # RUNNING on disk, and no process works on it
OPERATORS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq, "!=": operator.ne}
LESS_IS_BETTER = re.compile(r"(.*[/_])?loss(/.*)?")  # also of a task, as in `test/loss/name`
MORE_IS_BETTER = re.compile(r".*recall_at_\d+|(.*/)?(exact_match|token_f1)(/.*)?")  # not chance, majority, or with shuffled media
CONDITION = re.compile(r"\s*([^<>=!\s]+)\s*(<=|>=|!=|<|>|=)\s*(.+?)\s*")
# What has a name of its own beside metrics, settings and tags; and the headings of the table that differ from it
ATTRIBUTES = ("run_id", "phase", "status", "age", "best", "steps", "bytes", "sweep", "aligner", "launch_id", "timestamp")
OWN_TAGS = ("raytrain2p.", "mlflow.", VERSION_PREFIX)  # all others are a person's
HEADINGS = {"run": "run_id", "size": "bytes"}
AGE, SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)"), {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


@dataclass(frozen=True)
class RunSummary:
    """A run at a glance: what `list` and `show` print.

    Args:
        status: RUNNING, FINISHED, FAILED, KILLED, or ORPHANED.
        timestamp: when it was made, local time, as in the directory's name.
        directory: where it is; of a run that only MLflow has, where it was recorded.
        best: value of the monitored metric at the best checkpoint; of a sweep, of its best trial.
        monitor: name of that metric.
        steps: optimizer steps that have points.
        metrics: the last value of each metric; also those of test splits.
        bytes: of all files, hard links once.
        sweep: run ID of the sweep that a trial belongs to.
        aligner: run ID of the phase 1 run that a phase 2 run took its aligner from, if it is one.
        settings: by dotted path.
        inputs: digests of the records, the models and the aligner, by `SETTING=VALUE` and part.
    """

    run_id: str
    phase: str
    status: str
    timestamp: str
    directory: str | None
    experiment: str
    launch_id: str
    tracking_uri: str
    monitor: str = ""
    best: float | None = None
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    sweep: str | None = None
    aligner: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def is_here(self) -> bool:
        """Whether its directory was read; otherwise MLflow was."""
        return self.bytes is not None

    @property
    def age(self) -> float | None:
        """Seconds."""
        return age_of(self.timestamp)

    def value(self, name: str) -> Any:
        """An attribute such as `status`, a metric, a setting, or a tag; None if it has none."""
        name = HEADINGS.get(name, name)
        if name in ATTRIBUTES:
            return getattr(self, name)
        return next((values[name] for values in (self.metrics, self.settings, self.tags) if name in values), None)

    def user_tags(self) -> dict[str, str]:
        """The tags that a person gave."""
        return {key: value for key, value in self.tags.items() if not key.startswith(OWN_TAGS)}


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
        run.tracking_uri,
        monitor,
        best,
        steps_of(points),
        last_values(points) | test_metrics(run),
        size_of(run.path),
        tags,
        tags.get(SWEEP_TAG),
        aligner_of(settings),
        settings,
        inputs_of(files.read_record() or {}, settings),
    )


def remote_summary(found: "RemoteRun") -> RunSummary:
    """The summary of a run as MLflow has it, which keeps no best value, and no sizes."""
    tags = found.tags
    changed = {key.removeprefix(CHANGED_TAG): value for key, value in tags.items() if key.startswith(CHANGED_TAG)}
    settings = {key: from_param(value) for key, value in (found.params | changed).items() if value != NOT_SET}
    timestamp = tags.get(TIMESTAMP_TAG) or time.strftime("%Y%m%d_%H%M%S", time.localtime(found.start))
    return RunSummary(
        found.run_id,
        phase_of(found),
        found.status,
        timestamp,
        tags.get(DIRECTORY_TAG),
        found.experiment,
        tags.get(LAUNCH_TAG, ""),
        found.tracking_uri,
        str(settings.get("sweep.metric" if "sweep.metric" in settings else "checkpoint.monitor", "")),
        steps=found.steps,
        metrics=found.metrics,
        tags=tags,
        sweep=tags.get(SWEEP_TAG),
        aligner=aligner_of(settings),
        settings=settings,
    )


def phase_of(found: "RemoteRun") -> str:
    """The phase of a run in MLflow, or `sweeps`, by the directory that it had, if it came that far."""
    return Path(found.tags[DIRECTORY_TAG]).parent.name if DIRECTORY_TAG in found.tags else found.name.partition("_")[0]


def from_param(text: str) -> Any:
    """A setting's value from MLflow, which has it as Python prints it."""
    if text.startswith("/") or (text[:1].isalpha() and text not in ("None", "True", "False")):
        return text  # of a thousand runs, most are
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


def inputs_of(record: dict[str, Any], settings: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The digests in a run's record, those of the training records like all others."""
    train = {f"data.train={settings.get('data.train')}": {"records": record["train_digest"]}} if "train_digest" in record else {}
    return train | record.get("inputs", {})


def best_of(run: Run, settings: dict[str, Any]) -> tuple[float | None, str]:
    """The value at the best checkpoint, from its name, which result.json keeps; of a sweep, at its best trial. And the metric's name."""
    if run.phase == SWEEPS:
        return (read_as(run.files.best_trial, dict[str, Any]) or {}).get("objective"), str(settings.get("sweep.metric", ""))
    names = [path.name for path in run.files.best_checkpoints()]
    if not names and (kept := (read_as(run.files.result, dict[str, Any]) or {}).get("best")):
        names = [Path(kept).name]
    return best_of_name(names[0]) if names else None, str(settings.get("checkpoint.monitor", ""))


def steps_of(points: dict[str, MetricSummary]) -> int:
    return max((points[name]["step"] for name in LOSSES if name in points), default=0)


def last_values(points: dict[str, MetricSummary]) -> dict[str, float]:
    return {name: summary["last"] for name, summary in points.items() if summary["last"] is not None}


def test_metrics(run: Run) -> dict[str, float]:
    found: dict[str, float] = read_as(run.files.test_metrics, dict[str, float]) or {}
    return found


def size_of(directory: Path) -> int:
    """Bytes of all files under a directory, hard links once; what vanishes meanwhile does not count."""
    return sum({(one.st_dev, one.st_ino): one.st_size for one in regular_files(directory)}.values())


def aligner_of(settings: dict[str, Any]) -> str | None:
    """The run ID of the aligner that the settings name, by the directory that it is in."""
    folder = Path(str(settings.get("model.aligner") or "")).parent.name
    return folder[:RUN_ID_LENGTH] if RUN_DIRECTORY.fullmatch(folder) else None


def aligner_digest(inputs: Mapping[str, Mapping[str, str]]) -> str | None:
    """The content of the aligner that a run began with, from the inputs in its run.json."""
    return next((parts.get("content") for setting, parts in inputs.items() if setting.startswith("model.aligner=")), None)


@dataclass(frozen=True)
class Condition:
    """A condition on the value of this name."""

    name: str
    holds: Callable[[RunSummary], bool]


def direction(summaries: Iterable[RunSummary], metric: str) -> str:
    """Whether less (`min`) or more (`max`) of a metric is better; empty if that is not known."""
    for one in summaries:
        key = "sweep.mode" if one.phase == SWEEPS else "checkpoint.mode"
        if one.monitor == metric and (mode := one.settings.get(key)):
            return str(mode)
    return "min" if LESS_IS_BETTER.fullmatch(metric) else "max" if MORE_IS_BETTER.fullmatch(metric) else ""


def seconds_of(age: str) -> float | None:
    """The seconds of an age such as `12h` or `30d`; None if it is none."""
    match = AGE.fullmatch(age)
    return float(match[1]) * SECONDS[match[2]] if match is not None else None


def condition(text: str) -> Condition:
    """A condition such as `val/loss<2.1`, `status=FINISHED` or `age<7d`. A run without the value does not meet it.

    Raises:
        InputError: it is not one.
    """
    match = CONDITION.fullmatch(text)
    if match is None:
        fix = "write a metric, a setting or a tag, one of < <= > >= = !=, and a value: 'val/loss<2.1'"
        raise InputError(Problem(f"--where {text}", "is not a condition", fix))
    name, symbol, wanted = match.groups()
    if name == "age" and (seconds := seconds_of(wanted)) is not None:
        wanted = str(seconds)
    elif name == "age" and not is_number(wanted):
        raise InputError(Problem(f"--where {text}", f"{wanted} is not an age", "write a number and s, min, h, d or w, as in 'age<7d'"))

    def holds(run: RunSummary) -> bool:
        value = run.value(name)
        if value is None:
            return False
        try:
            return bool(OPERATORS[symbol](float(value), float(wanted)))
        except (TypeError, ValueError):
            if isinstance(value, int | float) and not isinstance(value, bool):
                return symbol == "!="  # as text, 10 would be less than `2,1`
            return bool(OPERATORS[symbol](str(value).lower(), wanted.lower()))  # `True` as in MLflow, `true` as in YAML

    return Condition(name, holds)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def order(runs: Sequence[RunSummary], name: str | None, reverse: bool) -> list[RunSummary]:
    """The runs sorted by a value. Those without it come last, and so does NaN, which is not less than any number, nor more."""
    if name is None:
        return list(reversed(runs)) if reverse else list(runs)
    having = [run for run in runs if (value := run.value(name)) is not None and value == value]
    lacking = [run for run in runs if (value := run.value(name)) is None or value != value]
    try:
        ordered = sorted(having, key=lambda run: float(run.value(name)), reverse=reverse)
    except (TypeError, ValueError):
        ordered = sorted(having, key=lambda run: str(run.value(name)), reverse=reverse)
    return ordered + lacking
