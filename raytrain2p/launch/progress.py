"""What the user sees while a run is under way: one live line in a terminal, occasional lines elsewhere."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import ray

from raytrain2p.launch.chatter import own_stderr

PLAIN_SECONDS = 15.0  # between two lines where nobody looks all the time
POLL_SECONDS = 2.0  # the board answers sooner if there is news


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where rank 0 and the driver leave word for each other. It knows nothing that is not on disk too."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}
        self.lines: list[str] = []
        self.points: list[Any] = []
        self.changed, self.stop, self.listening = asyncio.Event(), asyncio.Event(), False
        self.reports: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.may_go_on = asyncio.Event()
        self.refusal = ""
        self.places: dict[int, str] = {}

    async def put(self, word: dict[str, Any]) -> None:
        """Where things stand; replaces what was put before."""
        self.latest = word
        self.changed.set()

    async def say(self, line: str) -> None:
        """A line that the user must not miss."""
        self.lines.append(line)
        self.changed.set()

    async def put_points(self, points: Sequence[Any]) -> None:
        """Metric points from any worker, for rank 0 to note."""
        self.points += points

    async def take_points(self) -> list[Any]:
        points, self.points = self.points, []
        return points

    async def next(self, seconds: float) -> tuple[dict[str, Any], list[str]]:
        """The latest word and the lines that were not told yet, when there is news or so much time has gone by."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), seconds)
        self.changed.clear()
        lines, self.lines = self.lines, []
        return self.latest, lines

    async def report(self, word: dict[str, Any]) -> None:
        """How a trial does; returns when the sweep lets it go on.

        Raises:
            RuntimeError: the report could not be passed on.
        """
        self.may_go_on.clear()
        await self.reports.put(word)
        await self.may_go_on.wait()
        if self.refusal:
            raise RuntimeError(self.refusal)

    async def next_report(self) -> dict[str, Any]:
        """The next one, whenever it comes."""
        return await self.reports.get()

    async def go_on(self, refusal: str = "") -> None:
        """The sweep has heard the last report, and does not stop the trial; or could not hear it."""
        self.refusal = refusal
        self.may_go_on.set()

    async def place(self, trial: int, group: str) -> None:
        """The placement group, in hexadecimal, of a trial's workers."""
        self.places[trial] = group

    async def place_of(self, trial: int) -> str | None:
        """The last placement group of a trial."""
        return self.places.get(trial)

    async def request_stop(self) -> bool:
        """Ask the workers to stop; whether they are training, and will."""
        self.stop.set()
        return self.listening

    async def wait_for_stop(self) -> None:
        """Returns when the driver has been asked to stop."""
        self.listening = True
        await self.stop.wait()

    async def stop_listening(self) -> None:
        """Training is over: nobody looks for a request any more."""
        self.listening = False


def describe(word: dict[str, Any]) -> str:
    """One line, such as `epoch 0  step 120/250  loss 1.432  18.3 samples/s  1:54 left`."""
    if "stage" in word:
        return str(word["stage"])
    minutes, seconds = divmod(round(word["seconds_left"]), 60)
    return (
        f"epoch {word['epoch']}  step {word['step']}/{word['steps']}  loss {word['loss']:.3f}  "
        f"{word['samples_per_second']:.1f} samples/s  {minutes}:{seconds:02d} left"
    )


class Console:
    """Writes progress to a stream: over one line if it is a terminal, else a new line every now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or own_stderr()
        self.live = self.stream.isatty()
        self.shown, self.since = "", float("-inf")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.clear()
        print(line, file=self.stream, flush=True)

    def show(self, line: str) -> None:
        """Where things stand; replaces the last such line in a terminal."""
        if line == self.shown:
            return
        if self.live:
            self.stream.write(f"\r\x1b[2K{line}")
            self.stream.flush()
            self.shown = line
        elif time.monotonic() - self.since >= PLAIN_SECONDS:
            print(line, file=self.stream, flush=True)
            self.shown, self.since = line, time.monotonic()

    def clear(self) -> None:
        if self.live and self.shown:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()
        self.shown = ""


@contextmanager
def followed(board: Any, console: Console) -> Iterator[None]:
    """Within, a thread shows what workers put on the board."""
    done = threading.Event()

    def follow() -> None:
        stage = ""
        while not done.is_set():
            try:
                word, lines = ray.get(board.next.remote(POLL_SECONDS), timeout=4 * POLL_SECONDS)
            except ray.exceptions.RayError:
                done.wait(POLL_SECONDS)  # the board's node is gone or slow: training goes on without a picture of it
                continue
            for line in lines:
                console.say(line)
            if word.get("stage", stage) != stage:
                stage = word["stage"]
                console.say(stage)
            elif word and "stage" not in word:
                console.show(describe(word))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        console.clear()


def putter(board: Any) -> Callable[[dict[str, Any]], None]:
    """Sends a word to the board without waiting for it."""

    def put(word: dict[str, Any]) -> None:
        board.put.remote(word)

    return put
