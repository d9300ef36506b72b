"""What the user sees while a run is under way: one live line in a terminal, occasional lines elsewhere."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import ray


@ray.remote(num_cpus=0)
class RunChannel:
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


def progress_callback(channel: Any) -> Callable[[dict[str, Any]], None]:
    """Sends a word to the channel without waiting for it."""

    def put(word: dict[str, Any]) -> None:
        channel.put.remote(word)

    return put
