"""metrics.jsonl: every metric point, on disk before anybody else hears of it, and each one once."""

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

    A run that goes on from step n does the steps after it again. What is noted of them already stays, and is not noted
    again: MLflow has it, and MLflow forgets nothing.

    Args:
        path: of the file.
        resumed_step: step that the run goes on from; 0 for a new one.
    """

    def __init__(self, path: Path, resumed_step: int = 0) -> None:
        self.path, self.one_at_a_time = path, threading.Lock()
        trim_torn_line(path)
        self.noted = {(point.name, point.step) for point in read_points(path) if point.step >= resumed_step}

    def append(self, points: Sequence[MetricPoint]) -> None:
        """Note what is not noted yet, on disk when this returns.

        Raises:
            OSError: the disk is full, or gone.
        """
        fresh = [point for point in points if (point.name, point.step) not in self.noted]
        lines = [json.dumps({"step": p.step, "name": p.name, "value": p.value, "time": round(p.time, 3)}) + "\n" for p in fresh]
        if not lines:
            return
        with self.one_at_a_time:
            try:
                with self.path.open("ab") as stream:
                    stream.write("".join(lines).encode())
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError:
                with suppress(OSError):
                    trim_torn_line(self.path)  # there may be room again for the next one, which must not be glued to it
                raise


def trim_torn_line(path: Path) -> None:
    """Cut off a last line that a kill has torn: it was sent nowhere, and what follows must not be glued to it."""
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
    """The whole lines of a metrics.jsonl that may be growing; none if there is no such file."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n") and line.strip():
                row = json.loads(line)
                yield MetricPoint(row["name"], row["value"], row["step"], row["time"])
