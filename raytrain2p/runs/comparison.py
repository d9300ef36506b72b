"""What differs between runs: settings, inputs, metrics; and which run is the best in each metric."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raytrain2p.config.escaping import json_line
from raytrain2p.config.secrets import masked
from raytrain2p.runs.output import human_duration, number
from raytrain2p.runs.summary import RunSummary, direction, last_values, remote_summary, steps_of, summary_of
from raytrain2p.tracking.metrics_file import MetricSummary, read_points, read_summary, summarize_points
from raytrain2p.tracking.run import TRIAL_TAG, Run
from raytrain2p.tracking.run_directory import RUN_ID_LENGTH

if TYPE_CHECKING:  # MLflow
    from raytrain2p.tracking.mlflow_runs import RemoteRun

SETTINGS, INPUTS, METRICS, RUN = "settings", "inputs, by sha256", "metrics, at the end", "run"  # sections of the table
MISSING = "-"
# Their last values say nothing of a model, or repeat another's. JSON has them.
NOT_IN_TABLE = re.compile(r"epoch|learning_rate|(samples|tokens)_per_second|mfu|peak_memory_megabytes|train_loss_epoch|objective|system/.*")
IN_RUN_DIRECTORY = re.compile(rf"([0-9a-f]{{8}})[0-9a-f]{{{RUN_ID_LENGTH - 8}}}_\d{{8}}_\d{{6}}")
LONG = 6  # characters of a common beginning that are worth leaving out
TRAIN_RECORDS = "data.train records"


@dataclass(frozen=True)
class ComparedRun:
    """A run and what its summary does not have.

    Args:
        points: each metric, summarized.
        inputs: digests, by setting and part.
        train_records: their number.
        duration: seconds from the first step to the end, pauses included; None if it has not ended.
        curves: reads (steps, values) of each metric.
    """

    summary: RunSummary
    points: dict[str, MetricSummary]
    inputs: dict[str, str]
    train_records: int | None
    duration: float | None
    curves: Callable[[], dict[str, Any]]

    @property
    def samples_per_second(self) -> float | None:
        """As it was reported last."""
        return self.summary.metrics.get("samples_per_second")

    @property
    def trial(self) -> str:
        """Its number in a sweep."""
        return self.summary.tags.get(TRIAL_TAG, MISSING)

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint, if a point of the monitored metric, or of its mean over an epoch, has that value."""
        side = "highest" if self.summary.settings.get("checkpoint.mode") == "max" else "lowest"
        for name in (self.summary.monitor, f"{self.summary.monitor}_epoch"):
            found: dict[str, Any] = dict(self.points.get(name) or {})
            if self.summary.best is not None and found.get(side) is not None and f"{found[side]:.4f}" == f"{self.summary.best:.4f}":
                step: int = found[f"{side}_step"]
                return step
        return None

    def as_json(self) -> dict[str, Any]:
        """All but the curves."""
        of_tests = {name: {"last": value} for name, value in self.summary.metrics.items() if name not in self.points}
        more = {name: getattr(self, name) for name in ("best_step", "inputs", "train_records", "duration", "samples_per_second")}
        return vars(self.summary) | {"metrics": self.points | of_tests} | more


def read_compared(run: Run, root: str) -> ComparedRun:
    """A run from its directory.

    Raises:
        DamagedFileError: a file of it is damaged.
    """
    record, files = run.files.read_record() or {}, run.files
    digests = {where.partition("=")[0]: parts for where, parts in record.get("inputs", {}).items()}
    inputs = {f"{setting} {part}": str(digest) for setting, parts in digests.items() for part, digest in parts.items()}
    if "train_digest" in record:
        inputs = {TRAIN_RECORDS: record["train_digest"]} | inputs
    status, first = files.read_status(), next(read_points(files.metrics), None)
    duration = status["at"] - first.time if first is not None and status["status"] != "RUNNING" else None

    def read_curves() -> dict[str, Any]:
        from raytrain2p.tracking.plots import read_metrics  # matplotlib

        return read_metrics(files.metrics)

    points = read_summary(files.metrics, files.metrics_summary)
    return ComparedRun(summary_of(run, root), points, inputs, record.get("train_records"), duration, read_curves)


def read_remote(found: "RemoteRun", uri: str) -> ComparedRun:
    """A run that has no directory here, from MLflow: settings, metrics and curves; it keeps no digests, and no best checkpoint.

    Raises:
        StorageError: MLflow does not answer.
    """
    from raytrain2p.tracking.mlflow_runs import metric_points  # MLflow

    history = metric_points(uri, found.run_id, [*found.metrics])
    points, first = summarize_points(history), min((point.time for point in history), default=None)
    summary = remote_summary(found)
    side = "highest" if summary.settings.get("checkpoint.mode") == "max" else "lowest"
    scored: dict[str, Any] = dict(points.get(f"{summary.monitor}_epoch") or points.get(summary.monitor) or {})
    summary = replace(summary, directory=None, best=scored.get(side), steps=steps_of(points), metrics=last_values(points))
    duration = found.end - first if found.end is not None and first is not None else None

    def read_curves() -> dict[str, Any]:
        from raytrain2p.tracking.plots import curves  # matplotlib

        return curves(history)

    return ComparedRun(summary, points, {}, None, duration, read_curves)


@dataclass(frozen=True)
class Row:
    """One thing that is compared: a text for each run, and which of them are the best."""

    section: str
    name: str
    texts: list[str]
    best: frozenset[int] = frozenset()

    def marked(self, run: int) -> str:
        return f"{self.texts[run]} *" if run in self.best else self.texts[run]


def differing(runs: Sequence[ComparedRun], values: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of what is not the same in all runs, or that one lacks. What a phase's models do not have is compared in the other one;
    and a run that has no values on record is not compared."""
    keys = dict.fromkeys(key for one in values for key in one)
    groups = [*dict.fromkeys(key.partition(".")[0] for key in keys)]  # what the first one lacks is not at the end

    def differs(key: str) -> bool:
        phases = {run.summary.phase for run, one in zip(runs, values, strict=True) if key in one or not key.startswith("model.")}
        comparable = [one for run, one in zip(runs, values, strict=True) if one and run.summary.phase in phases]
        return any(key not in one or one[key] != comparable[0].get(key) for one in comparable)

    return [key for key in sorted(keys, key=lambda key: groups.index(key.partition(".")[0])) if differs(key)]


def differing_settings(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Each setting that differs, as texts."""
    settings = [run.summary.settings for run in runs]
    return {key: readable(settings, key) for key in differing(runs, settings)}


def readable(settings: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The values of a setting as they are typed; of long paths what differs, and of run directories the start of the run ID."""
    values = [one.get(key, MISSING) for one in settings]
    texts = [masked(typed(value)) for value in values]  # before they are cut: half a password is not found
    paths = {text for text in texts if "/" in text}
    shared = os.path.commonprefix([*paths]).rpartition("/")[0] if len(paths) > 1 else ""  # noqa: RUF071 - of URIs, too
    shortened = [f"...{text.removeprefix(shared)}" if text in paths and len(shared) > LONG else text for text in texts]
    return [IN_RUN_DIRECTORY.sub(r"\1", text) for text in shortened]


def typed(value: Any) -> str:
    """A value as it is typed; sources with weights as in `emoji:train x 2`."""
    if isinstance(value, list):
        return ", ".join(map(typed, value)) if value else "[]"
    if isinstance(value, dict) and {*value} == {"path", "weight"}:
        return f"{value['path']} x {value['weight']:g}" if value["weight"] is not None else value["path"]
    return value if isinstance(value, str) and value and value.isprintable() else json_line(value)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted name, as in `rank`, if no other has that."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: end if last.count(end) == 1 else name for name, end in zip(names, last, strict=True)}


def rows_of(runs: Sequence[ComparedRun]) -> list[Row]:
    """All rows of the table."""
    rows = [Row(SETTINGS, name, texts) for name, texts in differing_settings(runs).items()]
    for name in differing(runs, [run.inputs for run in runs]):
        texts = [run.inputs.get(name, MISSING)[:8] for run in runs]
        if name == TRAIN_RECORDS:
            texts = [f"{text} ({run.train_records:,})" if run.train_records else text for text, run in zip(texts, runs, strict=True)]
        rows.append(Row(INPUTS, name, texts))
    return [*rows, *metric_rows(runs), *run_rows(runs)]


def metric_rows(runs: Sequence[ComparedRun]) -> Iterator[Row]:
    """The value at the best checkpoint; then each metric's last value, and its best one if it has several."""
    monitors = dict.fromkeys(run.summary.monitor for run in runs if run.summary.best is not None)
    for monitor in monitors:
        best = [run.summary.best if run.summary.monitor == monitor else None for run in runs]
        steps = [run.best_step for run in runs]
        yield Row(METRICS, f"best {monitor}", values_at(best, steps), best_of_row(runs, monitor, best))
    for name in dict.fromkeys(name for run in runs for name in run.summary.metrics):
        last, mode = [run.summary.metrics.get(name) for run in runs], direction((run.summary for run in runs), name)
        if NOT_IN_TABLE.fullmatch(name) or (not mode and len({*last}) == 1):  # the latter: chance, of the same test records
            continue
        yield Row(METRICS, name, values_at(last), best_of_row(runs, name, last))
        found: list[dict[str, Any]] = [dict(run.points.get(name) or {}) for run in runs]
        side = {"min": "lowest", "max": "highest"}.get(mode)
        if side and name not in (*monitors, "train_loss") and any(one.get("points", 0) > 1 for one in found):
            best, steps = [one.get(side) for one in found], [one.get(f"{side}_step") for one in found]
            yield Row(METRICS, f"{side} {name}", values_at(best, steps), best_of_row(runs, name, best))


def run_rows(runs: Sequence[ComparedRun]) -> Iterator[Row]:
    """What came of each run; status, phase and trial where they tell the runs apart."""
    statuses, phases = [run.summary.status for run in runs], [run.summary.phase for run in runs]
    trials = [run.trial for run in runs]
    for name, texts in (("phase", phases), ("trial", trials)):
        if len({*texts}) > 1:
            yield Row(RUN, name, texts)
    if {*statuses} != {"FINISHED"}:
        yield Row(RUN, "status", statuses)
    yield Row(RUN, "steps", [str(run.summary.steps) for run in runs])
    yield Row(RUN, "duration", [MISSING if run.duration is None else human_duration(run.duration) for run in runs])
    if any(run.samples_per_second is not None for run in runs):
        speeds = [run.samples_per_second for run in runs]
        yield Row(RUN, "samples per second", [MISSING if speed is None else f"{speed:.3g}" for speed in speeds])


def values_at(values: Sequence[float | None], steps: Sequence[int | None] | None = None) -> list[str]:
    """As in `1.4522 at 90`."""
    at = ["" if step is None else f" at {step}" for step in steps or [None] * len(values)]
    return [MISSING if value is None else f"{number(value)}{step}" for value, step in zip(values, at, strict=True)]


def best_of_row(runs: Sequence[ComparedRun], name: str, values: Sequence[float | None]) -> frozenset[int]:
    """The runs that have the best value of a metric: in each phase, since the losses of two phases measure different things."""
    best = set[int]()
    for phase in {run.summary.phase for run in runs}:
        of_phase = {n: value for n, value in enumerate(values) if value is not None and value == value and runs[n].summary.phase == phase}
        if (mode := direction((run.summary for run in runs), name)) and len({*of_phase.values()}) > 1:
            top = (min if mode == "min" else max)(of_phase.values())
            best |= {n for n, value in of_phase.items() if value == top}
    return frozenset(best)


def ranked(runs: Sequence[ComparedRun]) -> list[int]:
    """The runs of a phase, the best first, by what their best checkpoints were chosen by; if that is not one metric, by the last
    training loss."""
    first = runs[0].summary
    values, sign = [run.summary.best for run in runs], -1 if direction((run.summary for run in runs), first.monitor) == "max" else 1
    if any(run.summary.monitor != first.monitor for run in runs):
        values, sign = [run.summary.metrics.get("train_loss") for run in runs], 1
    order = {n: float("inf") if value is None or value != value else sign * value for n, value in enumerate(values)}
    return sorted(order, key=order.__getitem__)


def as_json(runs: Sequence[ComparedRun], rows: Sequence[Row]) -> dict[str, Any]:
    """Everything: each run, what differs by run ID, and the best of each row."""
    ids = [run.summary.run_id for run in runs]

    def by_run(values: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {key: {run: one[key] for run, one in zip(ids, values, strict=True) if key in one} for key in differing(runs, values)}

    return {
        "runs": [run.as_json() for run in runs],
        "differing_settings": by_run([run.summary.settings for run in runs]),
        "differing_inputs": by_run([run.inputs for run in runs]),
        "best": {row.name: [ids[n] for n in sorted(row.best)] for row in rows if row.best},
    }
