"""The files of a run: their names and their formats. No other module spells these names."""

import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic does not take that of typing before Python 3.12

from raytrain2p.config import Findings, InputError, Problem, flatten_tree
from raytrain2p.config.paths import copy_of_working_dir, in_this_copy
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, PHASES_BY_NAME, SWEEPS, Phase
from raytrain2p.config.scratch import local_path
from raytrain2p.storage.files import write_file, write_json
from raytrain2p.storage.locks import Lock
from raytrain2p.tracking.damage import DamagedFileError, check_shape, damaged, read_as

RUN_ID_LENGTH = 32  # the name of a run directory begins with the MLflow run ID
RUN_DIRECTORY = re.compile(rf"[0-9a-f]{{{RUN_ID_LENGTH}}}_\d{{8}}_\d{{6}}")
PRUNED_TRIAL = ".pruned"  # suffix of the mark beside the record of a trial whose run was deleted
BEST, LAST = "best-*.ckpt", "last.ckpt"  # in the folder of checkpoints


class RunStatus(TypedDict):
    """status.json: RUNNING, FINISHED, FAILED or KILLED; when (seconds since 1970), which process wrote it, and, if the worker
    itself ended the run, why."""

    status: Annotated[str, Field(pattern="^(RUNNING|FINISHED|FAILED|KILLED)$")]
    at: Annotated[float, Field(ge=0, le=1e11)]
    host: str
    pid: int
    reason: NotRequired[str]


class RecordShape(TypedDict, total=False):
    """What is read of run.json beside the fields of `Run`."""

    run_id: str
    tags: dict[str, str]
    removed_tags: list[str]
    described: float
    sequence: int
    migrated: str
    use: list[str]


class ConfigShape(TypedDict, total=False):
    """What is read of config.json here."""

    output: dict[str, Any]


class ResumeRow(TypedDict):
    """A row of changes.jsonl: a resume, when it was launched (seconds since 1970), its command, the settings that it changed as
    [before, after], and the parts of inputs whose other content was accepted, by setting."""

    at: Annotated[float, Field(ge=0, le=1e11)]
    command: NotRequired[str]
    changes: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]
    inputs: NotRequired[dict[str, list[str]]]


@dataclass(frozen=True)
class Entry:
    """A file or folder of a run: as an attribute of `RunDirectory`, its path."""

    name: str

    def __get__(self, directory: "RunDirectory", owner: type) -> Path:
        return directory.path / self.name


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run, or of a sweep."""

    path: Path

    record = Entry("run.json")  # the fields of `Run`, tags, and what a resumed run is checked against
    config = Entry("config.json")  # every setting, resolved
    changes = Entry("changes.jsonl")  # a row for each resume: when, its command, the settings and the inputs that it changed
    status = Entry("status.json")
    metrics = Entry("metrics.jsonl")
    metrics_summary = Entry("metrics_summary.json")  # of a run that has ended: what `read_summary` finds in it
    test_metrics = Entry("test_metrics.json")
    answers = Entry("answers.jsonl")  # sample answers to test records
    result = Entry("result.json")  # the outcome
    readme = Entry("README.md")
    mlflow_run_id = Entry("MLFLOW_RUN_ID.txt")
    checkpoints = Entry("lightning_checkpoints")
    last_checkpoint = Entry(f"lightning_checkpoints/{LAST}")
    plots = Entry("plots")
    training_curve = Entry("plots/training_curve.png")
    answer_sheet = Entry("plots/answers.png")
    earlier = Entry("earlier")  # results of earlier models, which a resumed run has trained on: a folder for each
    old = Entry("migrated_from")  # of a migrated run: what its old directory held beside the best checkpoint and the last
    sync_state = Entry(".mirror.json")  # how much of it MLflow has
    lineage = Entry("lineage.jsonl")  # of a trial: whose weights it took over
    trials = Entry("trials")  # of a sweep: a file for each trial
    study = Entry("study.jsonl")  # of a sweep: Optuna's journal
    trials_table = Entry("trials.csv")  # of a sweep
    best_trial = Entry("best.json")  # of a sweep

    @property
    def run_id(self) -> str:
        return self.path.name[:RUN_ID_LENGTH]

    @property
    def lock(self) -> Lock:
        """Held by rank 0 for as long as it writes to the directory."""
        return Lock(self.path / ".lock")

    def best_checkpoints(self) -> list[Path]:
        """The best checkpoint; after a kill there may be the previous one too."""
        return sorted(self.checkpoints.glob(BEST))

    def all_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("*.ckpt"))

    def artifact(self, phase: Phase) -> Path:
        return self.path / phase.artifact

    def artifact_digest(self) -> str | None:
        """That of the artifact that the result names; None if there is no result, or an earlier version wrote it.

        Raises:
            DamagedFileError: result.json is damaged.
        """
        digest = (read_as(self.result, dict[str, Any]) or {}).get("digest")
        return str(digest) if digest else None

    def comparison(self, ids: Sequence[str]) -> Path:
        """The plot of this run and others."""
        return self.plots / f"comparison_{'_'.join(ids)}.png"

    def mlflow_artifacts(self) -> Iterator[tuple[Path, str | None]]:
        """What goes to MLflow when the run has ended: each file or folder, and its folder among the run's artifacts."""
        yield self.artifact(ALIGNMENT), "aligner"
        yield self.artifact(INSTRUCTION), "model"
        yield self.plots, "plots"
        for path in (self.answers, self.trials_table, self.best_trial):
            yield path, None

    def read_record(self) -> dict[str, Any] | None:
        """run.json; None if there is none.

        Raises:
            DamagedFileError: it is damaged, or that of another run.
        """
        record: dict[str, Any] | None = read_as(self.record, RecordShape)
        if record and RUN_DIRECTORY.fullmatch(self.path.name) and record.get("run_id", self.run_id) != self.run_id:
            raise damaged(self.record, f"is that of run {record['run_id']}")
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        write_json(self.record, record)

    def sequence(self) -> float:
        """The run's place in the order in which the root's runs were made; 0 if an older version made it, and infinite if that is
        damaged: it may be the latest."""
        with suppress(DamagedFileError):
            return int((self.read_record() or {}).get("sequence", 0))
        return math.inf

    def tags(self) -> dict[str, str]:
        """Tags of the MLflow run, as recorded here; none if there is no record."""
        tags: dict[str, str] = (self.read_record() or {}).get("tags", {})
        return tags

    def read_config(self) -> dict[str, Any] | None:
        """Every setting as nested groups; None if the run ended before it wrote them. If the output root was moved, paths in it are
        those of where it is now; and paths in the copy of a job's working directory are in that of this job."""
        config: dict[str, Any] | None = read_as(self.config, ConfigShape)
        config = _with_texts(config, local_path if copy_of_working_dir() is None else lambda text: local_path(in_this_copy(text)))
        before, now = (config or {}).get("output", {}).get("root"), str(self.path.parent.parent)
        if before in (None, now) or self.path.parent.name not in (*PHASES_BY_NAME, SWEEPS):
            return config
        moved: dict[str, Any] = _with_texts(config, lambda text: _moved(text, before, now))
        return moved

    def moved_settings(self) -> list[str]:
        """`key=value` for each setting of config.json that `read_config` has otherwise."""
        before, now = flatten_tree(read_as(self.config, ConfigShape) or {}), flatten_tree(self.read_config() or {})
        return [f"{key}={json.dumps(value)}" for key, value in now.items() if before[key] != value]

    def write_config(self, config: dict[str, Any]) -> None:
        write_json(self.config, config)

    def read_changes(self) -> list[ResumeRow]:
        """The resumes of the run, the oldest first; rows of earlier versions have settings alone."""
        lines = self.changes.read_bytes().splitlines(keepends=True) if self.changes.is_file() else []
        rows = [row_of(self.changes, line) for line in lines if line.endswith(b"\n")]
        return [
            ResumeRow(at=row["at"], command=row.get("command", ""), changes=row["changes"], inputs=row.get("inputs", {})) for row in rows
        ]

    def write_changes(self, rows: list[ResumeRow]) -> None:
        write_file(self.changes, "".join(json.dumps(row) + "\n" for row in rows))

    def write_mlflow_run_id(self, run_id: str, experiment: str, timestamp: str) -> None:
        lines = {"MLflow Run ID": run_id, "Checkpoint Dir": self.path, "Experiment": experiment, "Timestamp": timestamp}
        note = f"""
Note: the name of this directory begins with the MLflow run ID, followed by the time at which the run began:
  Directory:     {self.path.name}
  MLflow Run ID: {run_id}
  Timestamp:     {timestamp:>{len(self.path.name)}}
"""
        write_file(self.mlflow_run_id, "".join(f"{label}: {value}\n" for label, value in lines.items()) + note)

    def read_status(self) -> RunStatus:
        """The last status; RUNNING at time 0 if none was written."""
        status: RunStatus | None = read_as(self.status, RunStatus)
        return status or {"status": "RUNNING", "at": 0.0, "host": "", "pid": 0}

    def check(self) -> None:
        """Read what a resume reads.

        Raises:
            InputError: every damaged file; or the run was migrated.
        """
        findings = Findings()
        for read in (self.read_record, self.read_config, self.read_status, self.read_changes):
            with findings:
                read()
        findings.raise_any()
        if (old := (self.read_record() or {}).get("migrated")) is not None:
            what = f"was migrated from {old}: another program trained it, and its settings are not known"
            raise InputError(Problem(str(self.path), what, "begin a new run"))

    def write_status(self, status: str, reason: str = "", at: float | None = None) -> None:
        """The status that MLflow is to show, too: RUNNING, FINISHED, FAILED or KILLED; since when (default: now)."""
        row: RunStatus = {"status": status, "at": time.time() if at is None else at, "host": socket.gethostname(), "pid": os.getpid()}
        write_json(self.status, row | ({"reason": reason} if reason else {}))


def is_record(name: str) -> bool:
    """Whether a file of a run, by its name in the directory, is a record: small, and needed to list and to find the run."""
    inner = name.startswith("trials/")
    return (inner or "/" not in name) and name.endswith((".json", ".jsonl", ".md", ".txt", ".csv"))


def is_checkpoint(name: str) -> bool:
    """Whether a file of a run, by its name, is a checkpoint."""
    return name.endswith(".ckpt")


def row_of(path: Path, line: bytes) -> Any:
    """A row of changes.jsonl.

    Raises:
        DamagedFileError: it is not one.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"has a line that is not JSON: {error}") from None
    check_shape(path, row, ResumeRow)
    return row


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Settings with each text changed."""
    if isinstance(value, dict):
        return {key: _with_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_texts(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _moved(text: str, before: str, now: str) -> str:
    """A path at or under one directory as the one under another."""
    return now + text.removeprefix(before) if text == before or text.startswith(f"{before}/") else text


def next_sequence(root: str, kept: Path) -> int:
    """The number of a new run under an output root: clocks may be wrong, or change to winter time, but this is larger than any.

    Args:
        kept: file with the last number. If it is missing or damaged, the numbers of all runs are read.
    """
    try:
        last = int(kept.read_text())
    except (OSError, ValueError):
        numbers = [RunDirectory(folder).sequence() for folder in Path(root).glob(f"[!.]*/{'?' * RUN_ID_LENGTH}_*")]
        last = int(max((number for number in numbers if number < math.inf), default=0))
    write_file(kept, f"{last + 1}\n")
    return last + 1


def best_of_name(name: str) -> float | None:
    """The monitored metric's value in the name of a best checkpoint."""
    with suppress(ValueError):
        return float(name.removesuffix(".ckpt").rpartition("=")[2])
    return None


def best_checkpoint_name(epoch: int, metric: str, value: float) -> str:
    return f"best-epoch={epoch:02d}-{metric.replace('/', '_')}={value:.4f}.ckpt"
