"""A sweep on disk: the records of its trials, their results, and the files for people.

The results of a trial are read from its own run directory and stored nowhere else.
"""

import csv
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from raytrain2p.config import Findings, InputError, Problem, flatten_tree
from raytrain2p.config.escaping import code_block, code_span
from raytrain2p.config.metadata import FREE, belongs_to, settings_where, with_defaults
from raytrain2p.config.secrets import without_passwords
from raytrain2p.config.settings import SettingsGroup
from raytrain2p.storage.errors import StorageError
from raytrain2p.storage.files import read_json, write_file, write_json
from raytrain2p.storage.objects import AT_THE_START, PATIENCE
from raytrain2p.storage.remote import Directory
from raytrain2p.sweep.settings import Sweep, SweepSettings
from raytrain2p.sweep.space import Values
from raytrain2p.tracking.damage import DamagedFileError, check_shape, damaged, read_as
from raytrain2p.tracking.metrics_file import read_points
from raytrain2p.tracking.mlflow_store import store_exists
from raytrain2p.tracking.next_commands import command, password_of, settings_of
from raytrain2p.tracking.run import EARLY_TAG, Run, recorded_run
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.tracking.run_objects import fetch_launch
from raytrain2p.worker.job import OBJECTIVE

PARENT_TAG = "mlflow.parentRunId"
LINEAGE_TAG = "raytrain2p.lineage"
WAITING, RUNNING, FINISHED, EARLY, FAILED, KILLED = "waiting", "running", "finished", "stopped early", "failed", "killed"
OVER = (FINISHED, EARLY, FAILED)


@dataclass(frozen=True)
class Trial:
    """The record of one trial, written before it starts.

    Args:
        number: from 0.
        values: the settings that vary; all others are those of the base.
        launch_id: of its launch: starting it again resumes the same run.
    """

    number: int
    values: Values
    launch_id: str


@dataclass(frozen=True)
class Inheritance:
    """A trial took over the weights of another and continued with changed settings (population-based training)."""

    at_step: int
    from_trial: int
    from_run: str
    from_step: int
    settings: Values


@dataclass(frozen=True)
class TrialResult:
    """The state of a trial, and its results so far."""

    trial: Trial
    state: str = WAITING
    run: Run | None = None
    reports: tuple[tuple[int, float], ...] = ()  # (step, objective)
    steps: int = 0
    reason: str = ""
    lineage: tuple[Inheritance, ...] = ()
    values: Values = field(default_factory=dict)  # the current ones, after any inheritance
    damage: str = ""  # a line about a damaged file of its run: the trial counts as failed

    def best(self, mode: str) -> tuple[int, float] | None:
        """Step and value of the best report."""
        real = [report for report in self.reports if math.isfinite(report[1])]
        return (min if mode == "min" else max)(real, key=lambda report: report[1], default=None)


@dataclass(frozen=True)
class SweepOutcome:
    """The results of a sweep: what `--json` prints, and what `raytrain2p.sweep` returns.

    Attributes:
        run_id, directory: of the sweep.
        trials: how many were begun; the next four say how they ended.
        best: trial, run_id, directory, settings, objective, at_step and more of the best trial; None if none has a result.
    """

    run_id: str
    directory: str
    trials: int
    finished: int
    stopped_early: int
    failed: int
    unfinished: int
    best: dict[str, Any] | None


class TrialRecords:
    """The trials of a sweep, one file each, written before the trial starts.

    Args:
        directory: of the sweep's run.
        root: the output root, which holds the run directories.
        objects: of a sweep in an object storage, to which this process writes.
    """

    def __init__(self, directory: Path, root: str, objects: Directory | None = None) -> None:
        self.folder, self.root, self.objects = RunDirectory(directory).trials, root, objects
        self.over: dict[int, TrialResult] = {}  # cached: these do not change any more
        self.fetched = -math.inf

    def begin(self, trial: Trial) -> None:
        write_json(self.folder / f"{trial.number:03d}.json", asdict(trial))
        self._upload(f"{trial.number:03d}.json")

    def _upload(self, name: str) -> None:
        if self.objects is not None:
            self.objects.push([f"{self.folder.name}/{name}"])

    def trials(self) -> list[Trial]:
        """In the order of their numbers.

        Raises:
            InputError: every damaged record.
        """
        findings, found = Findings(), list[Trial]()
        for path in self.folder.glob("[0-9]*.json"):
            with findings:
                found.append(self._read(path))
        findings.raise_any()
        return sorted(found, key=lambda trial: trial.number)

    def trial(self, number: int) -> Trial:
        return self._read(self.folder / f"{number:03d}.json")

    def _read(self, path: Path) -> Trial:
        record = read_as(path, Trial)
        if f"{record['number']:03d}" != path.stem:
            raise damaged(path, f"is the record of trial {record['number']}")
        return Trial(record["number"], record["values"], record["launch_id"])

    def give_up(self, number: int, reason: str) -> None:
        """Record that a trial failed and is not tried again. (A run with the status FAILED may be tried again.)"""
        write_file(self.folder / f"{number:03d}.failed", reason + "\n")
        self._upload(f"{number:03d}.failed")

    def results(self, age: float = 0.0) -> list[TrialResult]:
        """The results so far, of all trials.

        Args:
            age: seconds that they may be old, where an object storage is asked for them; longer, if it is away.
        """
        trials = self.trials()
        if time.monotonic() - self.fetched >= age:
            with suppress(StorageError, OSError) if age else nullcontext():
                self._fetch(trials, AT_THE_START if age else PATIENCE)
            self.fetched = time.monotonic()
        return [self._result(trial) for trial in trials]

    def result(self, trial: Trial) -> TrialResult:
        """The results so far, from the trial's run directory."""
        self._fetch([trial])
        return self._result(trial)

    def _fetch(self, trials: Sequence[Trial], patience: float = PATIENCE) -> None:
        """Fetch the records of the trials' runs that may change, if they are in an object storage."""
        fetch_launch(self.root, *(trial.launch_id for trial in trials if trial.number not in self.over), patience=patience)

    def _result(self, trial: Trial) -> TrialResult:
        if trial.number in self.over:
            return self.over[trial.number]
        try:
            run = recorded_run(self.root, trial.launch_id)
            result = read_trial_result(trial, run) if run is not None and run.path.is_dir() else TrialResult(trial, values=trial.values)
        except DamagedFileError as error:
            result = TrialResult(trial, FAILED, values=trial.values, damage=error.line)
        if (self.folder / f"{trial.number:03d}.failed").is_file() and result.state not in OVER:
            result = replace(result, state=FAILED)
        if result.state in OVER and result.run is not None:
            self.over[trial.number] = result
        return result


def read_trial_result(trial: Trial, run: Run) -> TrialResult:
    """The results in a trial's run directory."""
    status = run.files.read_status()["status"]  # first: a run that has ended gets no more points
    points = list(read_points(run.files.metrics))
    lineage = tuple(read_lineage(run.path))
    reason = run.files.tags().get(EARLY_TAG, "")
    return TrialResult(
        trial,
        state_of(status, reason),
        run,
        tuple((point.step, point.value) for point in points if point.name == OBJECTIVE),
        max((point.step for point in points if point.name == "train_loss"), default=0),
        reason,
        lineage,
        trial.values | (lineage[-1].settings if lineage else {}),
    )


def state_of(status: str, reason: str) -> str:
    """The state of a trial, from the status of its run. One that failed is tried again, unless the sweep has given it up."""
    if status == "FINISHED":
        return EARLY if reason else FINISHED
    return RUNNING if status == "RUNNING" else KILLED


def read_lineage(directory: Path) -> Iterator[Inheritance]:
    """The inheritances of a trial, the oldest first.

    Raises:
        DamagedFileError: a line is damaged.
    """
    path = RunDirectory(directory).lineage
    if path.is_file():
        for line in path.read_bytes().splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise damaged(path, "has a line that is not JSON") from None
            check_shape(path, row, Inheritance)
            yield Inheritance(**{key: row[key] for key in Inheritance.__dataclass_fields__})


def add_inheritance(directory: Path, inheritance: Inheritance) -> None:
    """Add a line to lineage.jsonl; the file is replaced atomically."""
    lines = [json.dumps(asdict(known)) for known in read_lineage(directory)]
    write_file(RunDirectory(directory).lineage, "\n".join([*lines, json.dumps(asdict(inheritance))]) + "\n")


def best_result(results: Sequence[TrialResult], mode: str) -> TrialResult | None:
    """The trial with the best report among those that finished; among all, if none did."""
    reported = [(best[1], result) for result in results if (best := result.best(mode)) is not None]
    reported = [(value, result) for value, result in reported if result.state == FINISHED] or reported
    found = (min if mode == "min" else max)(reported, key=lambda pair: pair[0], default=None)
    return found[1] if found is not None else None


def trial_table(results: Sequence[TrialResult], settings: Sequence[str], mode: str) -> list[dict[str, Any]]:
    """A line for each trial, with plain values by column."""
    return [
        {
            "trial": result.trial.number,
            "state": result.state,
            OBJECTIVE: best[1] if (best := result.best(mode)) else None,
            "at_step": best[0] if best else None,
            "steps": result.steps,
            **{setting: result.values.get(setting) for setting in settings},
            "stopped_early": result.reason,
            "run_id": result.run.run_id if result.run else "",
            "directory": result.run.directory if result.run else "",
        }
        for result in results
    ]


def write_table(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write CSV, with values as MLflow's parameters have them (`False`, not `false`)."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(lines[0]) if lines else ["trial"])
    writer.writeheader()
    writer.writerows(lines)
    write_file(path, stream.getvalue())


def write_results(directory: Path, results: Sequence[TrialResult], settings: Sequence[str], mode: str, phase: int) -> dict[str, Any] | None:
    """Write trials.csv and best.json: the best trial, with the command that trains it again. Returns the content of best.json."""
    write_table(RunDirectory(directory).trials_table, trial_table(results, settings, mode))
    result = best_result(results, mode)
    if result is None or result.run is None or (found := result.best(mode)) is None:
        return None
    best = {
        "trial": result.trial.number,
        "run_id": result.run.run_id,
        "directory": result.run.directory,
        OBJECTIVE: found[1],
        "at_step": found[0],
        "settings": result.values,
        "command": retrain_command(result.run, phase),
    }
    write_json(RunDirectory(directory).best_trial, best)
    return dict(read_json(RunDirectory(directory).best_trial))  # with URLs in place of paths in scratch


def retrain_command(run: Run, phase: int) -> str:
    """The command that trains a trial again, in a new run, with all CPUs or a whole GPU."""
    share = (run.files.read_config() or {}).get("launch", {}).get("gpus_per_worker", 1)
    resources = ["launch.cpus_per_worker=null", *(["launch.gpus_per_worker=1"] if share < 1 else [])]
    return command("train", "--phase", str(phase), "--config", str(run.files.config), *resources, *password_of(run))


def sweep_config(sweep: Sweep) -> dict[str, Any]:
    """A sweep with every setting resolved, without passwords: what `--config` takes and what is sent to MLflow."""
    config: dict[str, Any] = without_passwords(json.loads(sweep.base.model_dump_json()))
    return {"sweep": json.loads(sweep.options.model_dump_json()) | {"base": None}} | config


def may_change(kind: type[SettingsGroup], prefix: str = "") -> tuple[str, ...]:
    """Settings that a resumed sweep may have otherwise."""
    return settings_where(kind, lambda metadata: metadata.sweep_resume == FREE, prefix)


def check_unchanged(run: Run, sweep: Sweep, before: dict[str, Any]) -> None:
    """Check that a sweep can be resumed with these settings.

    Args:
        before: the sweep's config.json, as it was started.

    Raises:
        InputError: every setting that differs and must not.
    """
    old = with_defaults(with_defaults(flatten_tree(before), SweepSettings, "sweep."), type(sweep.base))
    new = flatten_tree(sweep_config(sweep))
    free = (*may_change(SweepSettings, "sweep."), *may_change(type(sweep.base)))
    problems = [
        Problem(
            f"{key}={new.get(key)}", f"cannot change: sweep {run.run_id[:8]} began with {old.get(key)}", "leave it, or start a new sweep"
        )
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not belongs_to(key, free) and not (key == "tracking.uri" and not store_exists(old[key]))
    ]
    if problems:
        raise InputError(problems)


def sweep_page(run: Run, typed: str) -> str:
    """README.md of a sweep's directory; the command without passwords."""
    files = run.files
    return f"""# Sweep {run.run_id}

Made by raytrain2p on {run.timestamp}, MLflow experiment {code_span(run.experiment)}: a parent run, and a child run for each trial.

| file | what it is |
|---|---|
| `{files.trials_table.name}` | every trial: its state, its settings, its best objective, its run and directory |
| `{files.best_trial.name}` | the best trial, and the command that trains it again |
| `{files.plots.name}/` | objective by trial, learning curves, settings against objective, and which settings matter |
| `{files.config.name}` | the space and every other setting |
| `{files.trials.name}/` | the record of each trial |
| `{files.study.name}` | the Optuna study: what the search has proposed and learnt |

Started with

{code_block(typed)}

Resume it, if it did not finish:

{code_block(command("tune", "--resume", run.run_id[:8], *settings_of(run, run.path.parent.parent.parent)))}
"""
