"""metrics.jsonl: every metric point, once, on disk before it is sent anywhere."""

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from raytrain2p.storage.files import trim_torn_line, write_json
from raytrain2p.tracking.damage import DamagedFileError, read_as

LOSSES = ("train_loss", "train_loss_epoch")  # a point of them is an optimizer step


@dataclass(frozen=True)
class MetricPoint:
    """One value of one metric at one step; `time` in seconds since 1970."""

    name: Annotated[str, Field(min_length=1)]
    value: float
    step: Annotated[int, Field(ge=0, lt=2**63)]
    time: Annotated[float, Field(ge=0, le=1e11)]


POINT = TypeAdapter(MetricPoint)


class MetricsFile:
    """Appends points to a run's metrics.jsonl.

    A run that resumes from step n repeats the steps after it. Points of them that the file has already stay, and are not
    written again: MLflow has them too, and cannot replace a point.

    Args:
        resumed_step: step that the run resumes from; 0 for a new one.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self.path, self.appending = path, threading.Lock()
        trim_torn_line(path)
        self.damaged_lines: list[bytes] = []
        self.written = {(point.name, point.step) for point in read_points(path, self.damaged_lines) if point.step >= resumed_step}

    def append(self, points: Sequence[MetricPoint]) -> None:
        """Write the points that the file does not have yet. They are on disk when this returns.

        Raises:
            OSError: the disk is full, or gone.
        """
        fresh = [point for point in points if (point.name, point.step) not in self.written]
        lines = [json.dumps({"step": p.step, "name": p.name, "value": p.value, "time": round(p.time, 3)}) + "\n" for p in fresh]
        if not lines:
            return
        with self.appending:
            try:
                with self.path.open("ab") as stream:
                    stream.write("".join(lines).encode())
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError:
                with suppress(OSError):
                    trim_torn_line(self.path)  # there may be space again for the next line, which must begin a line of its own
                raise


def point_of(line: bytes) -> MetricPoint | None:
    """The point of a line; None if the line is damaged: by a power failure, for example, which leaves zeros or half of it."""
    try:
        return POINT.validate_json(line, strict=True)
    except ValidationError:
        return None


def read_points(path: Path, damaged: list[bytes] | None = None, end: int | None = None) -> Iterator[MetricPoint]:
    """The complete lines of a metrics.jsonl, which another process may be writing to; none if it does not exist.

    Args:
        damaged: gets the damaged lines, which are left out.
        end: bytes of the file after which to stop.
    """
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in stream:
            if end is not None and (end := end - len(line)) < 0:
                return
            if not line.endswith(b"\n") or not line.strip():
                continue
            if (point := point_of(line)) is not None:
                yield point
            elif damaged is not None:
                damaged.append(line[:100])


class MetricSummary(TypedDict):
    """One metric of a metrics.jsonl: its last value and step, its extremes with their steps, and the number of points. Values that
    are not finite count as points alone."""

    last: float | None
    step: int
    lowest: float | None
    lowest_step: int
    highest: float | None
    highest_step: int
    points: int


class SummaryFile(TypedDict):
    """The summary of a metrics.jsonl as it was when it had that many bytes."""

    bytes: Annotated[int, Field(ge=0)]
    metrics: dict[str, MetricSummary]


def read_summary(path: Path, kept: Path) -> dict[str, MetricSummary]:
    """Each metric of a metrics.jsonl, summarized.

    Args:
        kept: where `write_summary` kept it; if the metrics have grown since, or it is damaged, the metrics are read.
    """
    with suppress(DamagedFileError, OSError):
        found: SummaryFile | None = read_as(kept, SummaryFile)
        if found is not None and found["bytes"] == path.stat().st_size:
            return found["metrics"]
    return summarize(path)


def write_summary(path: Path, kept: Path) -> None:
    """Keep the summary of a metrics.jsonl, which may have a million points."""
    if path.is_file():
        size = path.stat().st_size
        write_json(kept, SummaryFile(bytes=size, metrics=summarize(path)))


def summarize(path: Path) -> dict[str, MetricSummary]:
    return summarize_points(read_points(path))


def summarize_points(points: Iterable[MetricPoint]) -> dict[str, MetricSummary]:
    found = dict[str, MetricSummary]()
    for point in points:
        name, value, step = point.name, point.value, point.step
        summary = found.get(name)
        if summary is None:
            summary = found[name] = MetricSummary(last=None, step=0, lowest=None, lowest_step=0, highest=None, highest_step=0, points=0)
        summary["points"] += 1
        summary["step"] = max(summary["step"], step)
        if not math.isfinite(value):
            continue
        summary["last"] = value
        if summary["lowest"] is None or value < summary["lowest"]:
            summary["lowest"], summary["lowest_step"] = value, step
        if summary["highest"] is None or value > summary["highest"]:
            summary["highest"], summary["highest_step"] = value, step
    return found
