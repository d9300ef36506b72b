"""A sweep on disk: which trials there are, what came out of each, and the files for people.

What a trial did is read from its own run directory, never noted twice: the table says what the runs say.
"""

import csv
import io
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from raytrain2p.config import InputError, Problem, flatten_tree
from raytrain2p.config.secrets import masked, without_passwords
from raytrain2p.storage.files import read_json, write_file, write_json
from raytrain2p.sweep.settings import Sweep
from raytrain2p.tracking.metrics_file import read_points
from raytrain2p.tracking.run import Run, recorded_run
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.worker.job import OBJECTIVE

EARLY_TAG, TRIAL_TAG, PARENT_TAG = "raytrain2p.stopped_early", "raytrain2p.trial", "mlflow.parentRunId"
LINEAGE_TAG = "raytrain2p.lineage"
WAITING, RUNNING, FINISHED, EARLY, FAILED, KILLED = "waiting", "running", "finished", "stopped early", "failed", "killed"
OVER = (FINISHED, EARLY, FAILED)
# What a sweep that goes on may have otherwise.
MAY_CHANGE = (
    *("sweep.num_trials", "sweep.max_concurrent", "sweep.time_budget_s", "sweep.max_failures", "data.feature_workers"),
    *("launch.cpus_per_worker", "launch.object_store_mb"),
)


@dataclass(frozen=True)
class Trial:
    """One trial, as it was begun.

    Args:
        number: from 0.
        values: the settings that vary, by dotted path; those that are not in it are the base's.
        launch_id: of its launch: whoever starts it again goes on with the same run.
    """

    number: int
    values: dict[str, Any]
    launch_id: str


@dataclass(frozen=True)
class Inheritance:
    """A trial took over another's weights, and went on with settings of its own (population-based training)."""

    at_step: int
    from_trial: int
    from_run: str
    from_step: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class TrialResult:
    """What came of a trial so far."""

    trial: Trial
    state: str = WAITING
    run: Run | None = None
    reports: tuple[tuple[int, float], ...] = ()  # (step, objective)
    steps: int = 0
    reason: str = ""
    lineage: tuple[Inheritance, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)  # as they are by now

    def best(self, mode: str) -> tuple[int, float] | None:
        """Step and value of the best report."""
        real = [report for report in self.reports if math.isfinite(report[1])]
        return (min if mode == "min" else max)(real, key=lambda report: report[1], default=None)


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep leaves: what `--json` prints."""

    run_id: str
    directory: str
    trials: int
    finished: int
    stopped_early: int
    failed: int
    unfinished: int
    best: dict[str, Any] | None


class TrialRecords:
    """The trials of a sweep, one file each, written before the trial begins.

    Args:
        directory: of the sweep's run.
        root: where run directories are.
    """

    def __init__(self, directory: Path, root: str) -> None:
        self.folder, self.root = RunDirectory(directory).trials, root
        self.over: dict[int, TrialResult] = {}  # what is over does not change

    def begin(self, trial: Trial) -> None:
        write_json(self.folder / f"{trial.number:03d}.json", asdict(trial))

    def trials(self) -> list[Trial]:
        """In the order of their numbers."""
        return sorted((Trial(**read_json(path)) for path in self.folder.glob("*.json")), key=lambda trial: trial.number)

    def trial(self, number: int) -> Trial:
        return Trial(**read_json(self.folder / f"{number:03d}.json"))

    def give_up(self, number: int, reason: str) -> None:
        """Note that a trial failed and is not tried again. A run that says FAILED may be."""
        write_file(self.folder / f"{number:03d}.failed", reason + "\n")

    def rows(self) -> list[TrialResult]:
        return [self.row(trial) for trial in self.trials()]

    def row(self, trial: Trial) -> TrialResult:
        """What the trial's own run directory says."""
        if trial.number in self.over:
            return self.over[trial.number]
        run = recorded_run(self.root, trial.launch_id)
        row = row_of(trial, run) if run is not None and run.path.is_dir() else TrialResult(trial, values=trial.values)
        if (self.folder / f"{trial.number:03d}.failed").is_file() and row.state not in OVER:
            row = replace(row, state=FAILED)
        if row.state in OVER:
            self.over[trial.number] = row
        return row


def row_of(trial: Trial, run: Run) -> TrialResult:
    """What a trial's run directory says."""
    points = list(read_points(run.files.metrics))
    lineage = tuple(read_lineage(run.path))
    reason = run.files.tags().get(EARLY_TAG, "")
    return TrialResult(
        trial,
        state_of(run.files.read_status()["status"], reason),
        run,
        tuple((point.step, point.value) for point in points if point.name == OBJECTIVE),
        max((point.step for point in points if point.name == "train_loss"), default=0),
        reason,
        lineage,
        trial.values | (lineage[-1].settings if lineage else {}),
    )


def state_of(status: str, reason: str) -> str:
    """A run's status, in the words of the table. One that failed is tried again, unless the sweep has given it up."""
    if status == "FINISHED":
        return EARLY if reason else FINISHED
    return RUNNING if status == "RUNNING" else KILLED


def read_lineage(directory: Path) -> Iterator[Inheritance]:
    """What a trial took over from others, the oldest first."""
    path = RunDirectory(directory).lineage
    if path.is_file():
        for line in path.read_text().splitlines():
            yield Inheritance(**json.loads(line))


def note_inheritance(directory: Path, one: Inheritance) -> None:
    """Add a line to lineage.jsonl, which is replaced as a whole."""
    lines = [json.dumps(asdict(known)) for known in read_lineage(directory)]
    write_file(RunDirectory(directory).lineage, "\n".join([*lines, json.dumps(asdict(one))]) + "\n")


def best_row(rows: Sequence[TrialResult], mode: str) -> TrialResult | None:
    """The trial with the best report: of those that came to their end, as they alone have a result; else of all."""
    reported = [row for row in rows if row.best(mode) is not None]
    reported = [row for row in reported if row.state == FINISHED] or reported

    def value(row: TrialResult) -> float:
        found = row.best(mode)
        assert found is not None
        return found[1] if mode == "min" else -found[1]

    return min(reported, key=value, default=None)


def table_of(rows: Sequence[TrialResult], settings: Sequence[str], mode: str) -> list[dict[str, Any]]:
    """The table of trials: plain values by column."""
    return [
        {
            "trial": row.trial.number,
            "state": row.state,
            OBJECTIVE: best[1] if (best := row.best(mode)) else None,
            "at_step": best[0] if best else None,
            "steps": row.steps,
            **{setting: row.values.get(setting) for setting in settings},
            "stopped_early": row.reason,
            "run_id": row.run.run_id if row.run else "",
            "directory": row.run.directory if row.run else "",
        }
        for row in rows
    ]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """As CSV, each value in the words of MLflow's parameters (`False`, and not `false`)."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]) if rows else ["trial"])
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, stream.getvalue())


def write_results(directory: Path, rows: Sequence[TrialResult], settings: Sequence[str], mode: str, phase: int) -> dict[str, Any] | None:
    """trials.csv, and best.json: the best trial, with the command that trains it again; which is returned too."""
    write_table(RunDirectory(directory).trials_table, table_of(rows, settings, mode))
    row = best_row(rows, mode)
    if row is None or row.run is None or (found := row.best(mode)) is None:
        return None
    best = {
        "trial": row.trial.number,
        "run_id": row.run.run_id,
        "directory": row.run.directory,
        OBJECTIVE: found[1],
        "at_step": found[0],
        "settings": row.values,
        "command": again(row.run, phase),
    }
    write_json(RunDirectory(directory).best_trial, best)
    return best


def again(run: Run, phase: int) -> str:
    """The command that trains a trial again, in a run of its own, with all CPUs that there are."""
    config = shlex.quote(str(run.files.config))
    return f"python -m raytrain2p.train --phase {phase} --config {config} launch.cpus_per_worker=null"


def sweep_config(sweep: Sweep) -> dict[str, Any]:
    """A sweep with every setting resolved: what `--config` takes, and what goes to MLflow. Without a password."""
    config: dict[str, Any] = without_passwords(json.loads(sweep.base.model_dump_json()))
    return {"sweep": json.loads(sweep.options.model_dump_json()) | {"base": None}} | config


def check_unchanged(run: Run, sweep: Sweep, before: dict[str, Any]) -> None:
    """Whether a sweep can go on with these settings.

    Args:
        run: of the sweep.
        sweep: as it is to go on.
        before: its config.json, as it began.

    Raises:
        InputError: every setting that differs and must not.
    """
    old, new = flatten_tree(before), flatten_tree(sweep_config(sweep))
    problems = [
        Problem(
            f"{key}={new.get(key)}", f"cannot change: sweep {run.run_id[:8]} began with {old.get(key)}", "leave it, or begin a new sweep"
        )
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if problems:
        raise InputError(problems)


def sweep_page(run: Run, command: str) -> str:
    """README.md of a sweep's directory."""
    return f"""# Sweep {run.run_id}

Made by raytrain2p on {run.timestamp}, MLflow experiment `{run.experiment}`: a parent run, and a child run for each trial.

| file | what it is |
|---|---|
| `trials.csv` | every trial: its state, its settings, its best objective, its run and directory |
| `best.json` | the best trial, and the command that trains it again |
| `plots/` | objective by trial, settings against objective, learning curves |
| `config.json` | the space and every other setting |
| `trials/` | each trial as it was begun |

Started with

    {masked(command)}

Go on with it, if it did not finish:

    python -m raytrain2p.tune --resume {run.run_id[:8]}
"""
