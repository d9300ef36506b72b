"""Contestants take turns: each is a process that is suspended while another one runs, since the speed of a shared machine drifts.

All make the same steps in the same order, and steps differ in length, so the time of a step is compared with that of the same step of
another contestant. The first step of a turn is left out: it was cut by the suspension, and caches are cold.
"""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

SECONDS_PER_TURN = 300.0
SECONDS_TO_END = 15.0  # a run of the program saves first
LOOK = 0.1  # seconds between two looks at the steps of a contestant, which the looks slow down


class Step(NamedTuple):
    """The end of a step, in seconds since 1970, and its loss."""

    end: float
    loss: float


class Ended(RuntimeError):  # noqa: N818
    """A contestant has ended, or is stuck, before it made its steps."""


Steps = Callable[[], dict[int, Step]]  # those made so far, by number; the first is 1


class Contestant:
    """A command and its children, which can be suspended and resumed.

    Args:
        steps: reads the steps that it has made.
        environment: added to that of this process.
    """

    def __init__(self, name: str, command: Sequence[str], log: Path, steps: Steps, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.log, self.steps = name, log, steps
        self.spans: list[tuple[float, float]] = []
        self.started = time.time()
        with log.open("wb") as stream:
            variables = os.environ | {"RAY_ADDRESS": "local", **(environment or {})}
            # a session of its own: Ctrl-C reaches this process alone, which ends the contestants
            self.process = psutil.Popen(command, stdout=stream, stderr=stream, env=variables, start_new_session=True)

    def tree(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return [self.process, *self.process.children(recursive=True)]
        return [self.process]

    def each(self, action: str) -> None:
        """Call a method of psutil.Process on each process."""
        for process in self.tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()

    def wait_until(self, condition: Callable[[], bool], seconds: float, look: float = LOOK) -> None:
        """Wait while it runs.

        Raises:
            Ended: it has ended, or the time is up.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                raise Ended(f"{self.name} ended with {self.process.returncode}: {self.last_lines()}")
            if time.monotonic() > deadline:
                raise Ended(f"{self.name} took more than {seconds:.0f} s: {self.last_lines()}")
            time.sleep(look)

    def wait_until_ended(self, seconds: float) -> None:
        """Wait until its command ends by itself.

        Raises:
            Ended: it failed, or the time is up.
        """
        try:
            code = self.process.wait(seconds)
        except psutil.TimeoutExpired:
            raise Ended(f"{self.name} took more than {seconds:.0f} s: {self.last_lines()}") from None
        if code:
            raise Ended(f"{self.name} ended with {code}: {self.last_lines()}")

    def wait_for_step(self, number: int, seconds: float) -> None:
        self.wait_until(lambda: number in self.steps(), seconds)

    def turn(self, number: int) -> None:
        """Run it alone until it has made this step."""
        begin = time.time()
        self.each("resume")
        try:
            self.wait_for_step(number, SECONDS_PER_TURN)
        finally:
            self.spans.append((begin, time.time()))
            self.each("suspend")

    def durations(self) -> dict[int, float]:
        """Seconds of each step that lies entirely within a turn, by its number."""
        made = self.steps()
        pairs = [(number, made[number - 1].end, made[number].end) for number in made if number - 1 in made]
        return {number: end - begin for number, begin, end in pairs if any(since <= begin and end <= until for since, until in self.spans)}

    def losses(self) -> dict[int, float]:
        return {number: step.loss for number, step in self.steps().items()}

    def last_lines(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-15:])[-2000:]

    def end(self) -> None:
        """Ask it to end, with all its processes, and then end what is left."""
        tree = self.tree()
        self.each("resume")
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.terminate()
        _, alive = psutil.wait_procs(tree, timeout=SECONDS_TO_END)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=10)


def take_turns(contestants: list[Contestant], turns: int, steps: int, say: Callable[[str], None]) -> dict[str, str]:
    """Let each make `steps` steps a turn. One that fails is left out from then on.

    Args:
        contestants: those that have made `steps` steps already, to warm up, and are suspended.

    Returns:
        What was wrong, by name.
    """
    failed: dict[str, str] = {}
    for turn in range(1, turns + 1):
        for contestant in [one for one in contestants if one.name not in failed]:
            try:
                contestant.turn((turn + 1) * steps)
            except Ended as error:
                failed[contestant.name] = str(error)
                say(str(error))
        say(f"turn {turn} of {turns}")
    return failed


@dataclass(frozen=True)
class Ratio:
    """Of pairs of measurements: the median, the quartiles, and their number."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Ratio":
        if len(values) < 2:
            only = values[0] if values else float("nan")
            return cls(only, only, only, len(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def __str__(self) -> str:
        return self.text("{:.2f}".format)

    def text(self, number: Callable[[float], str]) -> str:
        """The median, and the quartiles if there are several measurements."""
        spread = f" ({number(self.low)} to {number(self.high)})" if self.count > 1 else ""
        return f"{number(self.median)}{spread}"


def paired(theirs: Mapping[int, float], ours: Mapping[int, float]) -> Ratio:
    """Of the steps that both made, their time over ours."""
    return Ratio.of([theirs[number] / ours[number] for number in sorted(theirs.keys() & ours.keys())])


def written_steps(folder: Path, workers: int) -> dict[int, Step]:
    """The steps of a contestant whose workers each write a file; the loss is the sum of their shares, the end that of the last."""
    made: dict[int, Step] = {}
    for rank in range(workers):
        for number, (end, loss) in enumerate(_lines(folder / f"steps{rank}"), 1):
            before = made.get(number)
            if rank and before is None:
                continue
            made[number] = Step(max(end, before.end), loss + before.loss) if before else Step(end, loss)
    whole = min((len(_lines(folder / f"steps{rank}")) for rank in range(workers)), default=0)
    return {number: step for number, step in made.items() if number <= whole}


def _lines(path: Path) -> list[tuple[float, float]]:
    if not path.is_file():
        return []
    return [(line[0], line[1]) for line in map(json.loads, path.read_bytes().split(b"\n")[:-1])]


def recorded_steps(root: Path, phase: str = "phase2") -> dict[int, Step]:
    """The steps in the metrics.jsonl of the only run under an output root."""
    points = [json.loads(line) for path in root.glob(f"{phase}/*/metrics.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]
    return {point["step"]: Step(point["time"], point["value"]) for point in points if point["name"] == "train_loss"}


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]
