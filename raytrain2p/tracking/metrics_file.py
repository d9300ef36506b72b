"""metrics.jsonl: every metric point, once, on disk before it is sent anywhere."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MetricPoint:
    """One value of one metric at one step; `time` in seconds since 1970."""

    name: str
    value: float
    step: int
    time: float


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
        self.written = {(point.name, point.step) for point in read_points(path) if point.step >= resumed_step}

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


def trim_torn_line(path: Path) -> None:
    """Cut off an incomplete last line, left by a killed process: it was sent nowhere, and the next one begins a line of its own."""
    if not path.is_file():
        return
    with path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        tail = b""
        while end and b"\n" not in tail:
            start = max(0, end - 4096)
            stream.seek(start)
            tail = stream.read(end - start) + tail
            end = start
        stream.truncate(end + tail.rfind(b"\n") + 1)


def read_points(path: Path) -> Iterator[MetricPoint]:
    """The complete lines of a metrics.jsonl, which another process may be writing to; none if it does not exist."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n") and line.strip():
                row = json.loads(line)
                yield MetricPoint(row["name"], row["value"], row["step"], row["time"])
