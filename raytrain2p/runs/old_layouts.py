"""Recognizes directories of older layouts, and reads what their checkpoints hold. Changes nothing, and runs no code from a checkpoint."""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, PHASES, Phase
from raytrain2p.config.secrets import masked
from raytrain2p.storage.files import regular_files
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.tracking.run_directory import LAST, RunDirectory, best_checkpoint_name

SUFFIX = Path(LAST).suffix
OLD_DIRECTORY = re.compile(r"(?P<id>[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3}[0-9a-f]{12})_(?P<time>\d{8}_\d{6})", re.IGNORECASE)
NAMED_VALUE = re.compile(r"([A-Za-z_][\w.@/ ]*)=([-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")  # in the name of a checkpoint
PREFIX = re.compile(r"(?i)^(?:phase[-_ ]?\d|[a-z]+)[-_ ](?=epoch=|step=)")  # before those
METRIC = re.compile(r"[\w.@/ -]{1,100}")  # a name that may be one of a file
NOT_TEXT = "its name is not UTF-8: rename it"
GLOBAL = re.compile(r"GLOBAL ([\w.]+)")  # what torch says that it does not load
MODE = re.compile(r"'mode': '(min|max)'")  # in Lightning's name for the state of a ModelCheckpoint


@dataclass(frozen=True)
class Content:
    """What is read of a checkpoint's content: what Lightning 2 writes, as far as it is there.

    Args:
        problem: why nothing could be read; empty if it could.
        monitor, mode, best: of ModelCheckpoint; `best` is the name of the best checkpoint's file.
        scores: values of `monitor` by name of a checkpoint's file.
    """

    problem: str = ""
    epoch: int | None = None
    step: int | None = None
    monitor: str = ""
    mode: str = ""
    best: str = ""
    best_score: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)


def read_content(path: Path) -> Content:
    """What a checkpoint holds. Only tensors and plain values are read, and no weights: they stay in the file, which is mapped into
    memory. (On the `meta` device, ModelCheckpoint's scores would have no values.)"""
    try:
        with warnings.catch_warnings(action="ignore"):
            return _content(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged or foreign file raises many kinds of errors
        if code := GLOBAL.search(str(error)):
            return Content(f"holds {code[1]}, which only code of the program that wrote it can read")
        return Content(f"is damaged, or not a checkpoint of Lightning ({type(error).__name__})")


def _content(found: Any) -> Content:
    if not isinstance(found, dict) or not isinstance(found.get("state_dict"), dict):
        return Content("has no weights")
    callbacks = found.get("callbacks")
    states = [(key, state) for key, state in (callbacks.items() if isinstance(callbacks, dict) else ()) if isinstance(state, dict)]
    key, state = next(((key, state) for key, state in states if _number(state.get("best_model_score")) is not None), ("", {}))
    score, scores = _number(state.get("best_model_score")), state.get("best_k_models")
    best = Path(str(state.get("best_model_path", ""))).name
    values = {Path(str(name)).name: _number(value) for name, value in scores.items()} if isinstance(scores, dict) else {}
    mode = MODE.search(str(key))
    return Content(
        epoch=_count(found.get("epoch")),
        step=_count(found.get("global_step")),
        monitor=monitor if METRIC.fullmatch(monitor := str(state.get("monitor") or "")) else "",
        mode=mode[1] if mode else "",
        best=best,
        best_score=score,
        scores={name: value for name, value in (values | ({best: score} if best else {})).items() if value is not None},
        hyper_parameters=_plain(found.get("hyper_parameters")) or {},
    )


def _number(value: Any) -> float | None:
    """A finite number, be it in a tensor; none so large that no metric is it."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return float(value) if isinstance(value, int | float) and abs(value) < 1e15 else None


def _count(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and 0 <= number < 2**53 else None


def _plain(value: Any, name: str = "") -> Any:
    """A value as JSON has it, without credentials; other objects as their type's name."""
    if isinstance(value, dict):
        return {str(key): _plain(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, name) for inner in value]
    if isinstance(value, str):
        return masked(f"{name}={value}").removeprefix(f"{name}=")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float) else type(value).__name__


@dataclass(frozen=True)
class OldCheckpoint:
    """A checkpoint's file, with what its name and its content say.

    Args:
        name: path in the old directory.
        time: when it was written, in seconds since 1970.
        metrics: those in its name.
    """

    name: str
    size: int
    time_ns: int
    content: Content
    metrics: Mapping[str, float]
    epoch: int | None
    step: int | None

    @property
    def time(self) -> float:
        return max(0.0, self.time_ns / 1e9)

    @property
    def file(self) -> str:
        return Path(self.name).name

    @property
    def is_last(self) -> bool:
        return self.file.startswith("last")

    @property
    def age(self) -> tuple[int, int, int]:
        """Orders the checkpoints of a run, the oldest first."""
        return (-1 if self.step is None else self.step, -1 if self.epoch is None else self.epoch, self.time_ns)


def read_checkpoint(path: Path, name: str) -> OldCheckpoint:
    content, stat = read_content(path), path.stat()
    values = {key.strip("_ "): float(value) for key, value in NAMED_VALUE.findall(PREFIX.sub("", path.stem))}
    values = {key: value for key, value in values.items() if _number(value) is not None}
    epoch, step = _count(values.pop("epoch", None)), _count(values.pop("step", None))
    if (exact := content.scores.get(path.name)) is not None:  # in the name it is rounded
        similar = content.monitor.replace("/", "_")
        values[similar if similar in values else content.monitor] = exact
    return OldCheckpoint(
        name,
        stat.st_size,
        stat.st_mtime_ns,
        content,
        values,
        content.epoch if epoch is None else epoch,
        step if content.step is None else content.step,
    )


@dataclass(frozen=True)
class OldRun:
    """A run of an older layout: a whole directory, or the checkpoints of one phase in a folder.

    Args:
        source: the directory or folder.
        is_whole: whether everything in it belongs to the run.
        links: names of links in the folder that belong to the run.
    """

    source: Path
    is_whole: bool
    phase: Phase
    checkpoints: Sequence[OldCheckpoint]
    links: Sequence[str] = ()

    @cached_property
    def readable(self) -> list[OldCheckpoint]:
        """The oldest first."""
        return sorted((one for one in self.checkpoints if not one.content.problem), key=lambda one: one.age)

    @cached_property
    def best(self) -> tuple[OldCheckpoint, str] | None:
        """The best of the checkpoints that can be read, and its metric; None if no metric is known."""
        state = next((one.content for one in reversed(self.readable) if one.content.monitor), Content())
        names = [metric for one in self.readable for metric in one.metrics]
        if not names:
            return None
        monitor = next((name for name in (state.monitor, state.monitor.replace("/", "_")) if name in names), names[0])
        compared = [one for one in self.readable if monitor in one.metrics]
        named = next((one for one in compared if one.file == state.best), None)
        is_lower_better = state.mode == "min" if state.mode else re.search("(?i)loss|error|perplexity", monitor) is not None
        ordered = sorted(compared, key=lambda one: one.metrics[monitor], reverse=not is_lower_better)
        return named or ordered[0], monitor

    @property
    def last(self) -> OldCheckpoint | None:
        """The latest of the checkpoints that can be read: one that is called so, if there is one."""
        return max(self.readable, key=lambda one: (one.is_last, *one.age), default=None)

    def new_names(self) -> dict[str, str]:
        """Path in the new directory for each checkpoint, by path in the old one."""
        files = RunDirectory(Path())
        names = {one.name: str(files.old / one.name) for one in self.checkpoints} | {name: str(files.old / name) for name in self.links}
        if self.last is not None:
            names[self.last.name] = str(files.last_checkpoint)
        if self.best is not None:
            one, metric = self.best
            names[one.name] = str(files.checkpoints / best_checkpoint_name(one.epoch or 0, metric, one.metrics[metric]))
        return names

    @property
    def is_best_last(self) -> bool:
        """Whether the best checkpoint is the latest, too: it then has both names."""
        return self.best is not None and self.best[0] is self.last

    def moves(self) -> list[tuple[str, str]]:
        """What becomes what, in this order: an absolute path or one in the new directory, and a path in the new directory."""
        if not self.is_whole:
            return [(str(self.source / old), new) for old, new in self.new_names().items()]
        kept = RunDirectory(Path()).old
        return [(str(self.source), str(kept))] + [(str(kept / old), new) for old, new in self.new_names().items() if new != str(kept / old)]

    @property
    def size(self) -> int:
        """Bytes of all that is moved."""
        if not self.is_whole:
            return sum(one.size for one in self.checkpoints)
        return sum(one.st_size for one in regular_files(self.source))

    @property
    def begin(self) -> datetime:
        """Local time: that in the directory's name, else when the first checkpoint was written."""
        if self.is_whole and (match := OLD_DIRECTORY.fullmatch(self.source.name)) is not None:
            with suppress(ValueError):  # digits that are no date
                if (begin := datetime.strptime(match["time"], "%Y%m%d_%H%M%S")).year > 1970:
                    return begin
        return datetime.fromtimestamp(min(one.time for one in self.checkpoints))

    @property
    def end(self) -> float:
        """When the last checkpoint was written, in seconds since 1970."""
        return max(self.begin.timestamp(), *(one.time for one in self.checkpoints))

    @property
    def counts_epochs(self) -> bool:
        """Whether the points are at epochs, because some checkpoint's step is not known."""
        return any(one.step is None and one.epoch is not None for one in self.checkpoints)

    def points(self) -> list[MetricPoint]:
        """The metrics in names and contents, each at its step."""
        found: dict[tuple[str, int], MetricPoint] = {}
        for one in sorted(self.checkpoints, key=lambda one: one.time_ns):
            at = one.epoch if self.counts_epochs else one.step
            best = {} if one.content.best_score is None else {"best_model_score": one.content.best_score}
            epoch = {} if one.epoch is None else {"epoch": float(one.epoch)}
            for name, value in {**one.metrics, **best, **epoch}.items():
                if at is not None:
                    found[name, at] = MetricPoint(name, value, at, one.time)
        return sorted(found.values(), key=lambda point: point.step)

    def config(self) -> dict[str, Any]:
        """The settings that are known: the hyperparameters in the latest checkpoint that has some, and the metric of the best one."""
        known = next((one.content.hyper_parameters for one in reversed(self.readable) if one.content.hyper_parameters), {})
        monitored = {"checkpoint": {"monitor": self.best[1]}} if self.best else {}
        return monitored | ({"hyper_parameters": dict(known)} if known else {})

    def fingerprint(self) -> str:
        """What makes it this run: another one that is written to the same folder later has another."""
        files = sorted((one.name, one.size, one.time_ns) for one in self.checkpoints)
        return json.dumps([str(self.source), self.phase.name, files])


@dataclass
class Found:
    """What is below a directory: old runs, and what is not one, with the reason."""

    runs: list[OldRun] = field(default_factory=list)
    left_alone: list[tuple[Path, str]] = field(default_factory=list)


def find_old_runs(folder: Path, phase: Phase | None, is_known: Callable[[str], bool]) -> Found:
    """The runs of older layouts in a directory and below it. Links and hidden directories are not followed.

    Args:
        phase: of checkpoints for which neither their names, nor their contents, nor the names of their folders say it.
        is_known: whether MLflow has a run of this ID.
    """
    found = Found()
    _look(folder, phase, is_known, found)
    return found


def _look(folder: Path, phase: Phase | None, is_known: Callable[[str], bool], found: Found) -> None:
    old = OLD_DIRECTORY.fullmatch(folder.name)
    if not _is_text(folder):
        found.left_alone.append((folder, NOT_TEXT))
    elif RunDirectory(folder).record.exists():
        found.left_alone.append((folder, "a run of this layout"))
    elif old is not None and is_known(old["id"].replace("-", "").lower()):
        found.left_alone.append((folder, "MLflow has its run"))
    elif old is not None:
        names = sorted(str(path.relative_to(folder)) for path in _files(folder) if path.suffix == SUFFIX and _is_text(path))
        checkpoints = [read_checkpoint(folder / name, name) for name in names]
        phases = {kind for one in checkpoints for kind in [_phase_of(one)] if kind}
        kind = _only(phases) or _phase_in(folder.parent.name) or phase
        if not checkpoints:
            found.left_alone.append((folder, "has no checkpoints"))
        elif kind is None:
            found.left_alone.append((folder, "its phase is not known: give --phase"))
        else:
            found.runs.append(OldRun(folder, True, kind, checkpoints))
    else:
        _look_inside(folder, phase, is_known, found)


def _look_inside(folder: Path, phase: Phase | None, is_known: Callable[[str], bool], found: Found) -> None:
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        found.left_alone.append((folder, f"cannot be read: {error.strerror}"))
        return
    found.left_alone += [(path, NOT_TEXT) for path in entries if not _is_text(path)]
    entries = [path for path in entries if _is_text(path)]
    named = [path for path in entries if path.suffix == SUFFIX and (path.stem.startswith("last") or "epoch=" in path.stem.lower())]
    checkpoints = {path.name: read_checkpoint(path, path.name) for path in named if path.is_file() and not path.is_symlink()}
    phases = {name: _phase_of(one) for name, one in checkpoints.items()}
    kind = _only({one for one in phases.values() if one}) or _phase_in(folder.name) or _phase_in(folder.parent.name) or phase
    links = {path.name: path.readlink().name for path in named if path.is_symlink()}
    groups: dict[Phase, list[str]] = {}
    for name, one in phases.items():
        if (its := one or kind) is None:
            found.left_alone.append((folder / name, "its phase is not known: give --phase"))
        else:
            groups.setdefault(its, []).append(name)
    for its, names in groups.items():
        theirs = [name for name, target in links.items() if target in names]
        found.runs.append(OldRun(folder, False, its, [checkpoints[name] for name in names], theirs))
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            _look(path, phase, is_known, found)
        elif path.name not in checkpoints and links.get(path.name) not in checkpoints:
            found.left_alone.append((path, "not a checkpoint of an older layout"))
    if not entries:
        found.left_alone.append((folder, "is empty"))


def _is_text(path: Path) -> bool:
    """Whether a path is UTF-8: others can be written neither to a record nor to MLflow."""
    return os.fsencode(path).decode(errors="replace") == str(path)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _only(phases: set[Phase]) -> Phase | None:
    return next(iter(phases)) if len(phases) == 1 else None


def _phase_of(checkpoint: OldCheckpoint) -> Phase | None:
    """As its name says, else as the name of the best checkpoint says, which is in its content."""
    return _phase_in(checkpoint.file) or _phase_in(checkpoint.content.best)


def _phase_in(name: str) -> Phase | None:
    numbers = set(re.findall(r"(?i)phase[-_ ]?([12])(?!\d)", name))
    if len(numbers) == 1:
        return PHASES[int(numbers.pop())]
    words = [phase for phase, word in ((ALIGNMENT, "align"), (INSTRUCTION, "instruct")) if word in name.lower()]
    return words[0] if len(words) == 1 and not numbers else None
