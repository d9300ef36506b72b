"""Messages between a driver and its workers, through one actor. Nothing is kept there that is not on disk too."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain2p.tracking.metrics_file import MetricPoint

SECONDS_TO_ANSWER = 10.0  # the actor's node may be slow or gone
UpdateT = TypeVar("UpdateT")


@dataclass(frozen=True)
class StepProgress:
    """Where training stands after a step."""

    epoch: int
    step: int
    steps: int
    loss: float
    samples_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Stage:
    """What a run does when it does not train."""

    name: str


@dataclass(frozen=True)
class TrialProgress:
    """The last progress line of a trial."""

    trial: int
    line: str


@dataclass(frozen=True)
class TrialReport:
    """A trial's metrics at a checkpoint that is on disk; `epoch` counts whole epochs, `last` is the end of the trial."""

    step: int
    epoch: int
    last: bool
    directory: str
    metrics: dict[str, float]


class ProgressActor:
    """Holds the latest update, and the lines that were not fetched yet."""

    def __init__(self) -> None:
        self.latest: object | None = None
        self.lines: list[str] = []
        self.changed = asyncio.Event()

    async def put(self, update: object) -> None:
        self.latest = update
        self.changed.set()

    async def say(self, line: str) -> None:
        self.lines.append(line)
        self.changed.set()

    async def next(self, seconds: float) -> tuple[object | None, list[str]]:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.changed.wait(), seconds)
        self.changed.clear()
        lines, self.lines = self.lines, []
        return self.latest, lines


class RunActor(ProgressActor):
    """Also holds metric points, requests to stop or to start again, the reports of a trial, and the actor that controls the workers."""

    def __init__(self) -> None:
        super().__init__()
        self.controller: asyncio.Queue[ActorHandle] = asyncio.Queue()
        self.points: list[MetricPoint] = []
        self.request, self.stop, self.training = asyncio.Event(), False, False
        self.reports: asyncio.Queue[TrialReport] = asyncio.Queue()
        self.accepted, self.refusal = asyncio.Event(), ""

    async def put_points(self, points: Sequence[MetricPoint]) -> None:
        self.points += points

    async def take_points(self) -> list[MetricPoint]:
        points, self.points = self.points, []
        return points

    async def request_stop(self) -> bool:
        self.stop = True
        self.request.set()
        return self.training

    async def request_regroup(self) -> bool:
        if self.training:
            self.request.set()
        return self.training

    async def next_request(self) -> bool:
        self.training = True
        if not self.stop:
            self.request.clear()  # it was answered; or the group that it was meant for is gone
        await self.request.wait()
        return self.stop

    async def put_controller(self, controller: ActorHandle) -> None:
        await self.controller.put(controller)

    async def take_controller(self) -> ActorHandle:
        return await self.controller.get()

    async def end_of_training(self) -> None:
        self.training = False

    async def report(self, report: TrialReport) -> str:
        self.accepted.clear()
        await self.reports.put(report)
        await self.accepted.wait()
        return self.refusal

    async def next_report(self) -> TrialReport:
        return await self.reports.get()

    async def accept_report(self, refusal: str) -> None:
        self.refusal = refusal
        self.accepted.set()


class SweepActor(ProgressActor):
    """Also holds the last placement group of each trial's workers, in hexadecimal."""

    def __init__(self) -> None:
        super().__init__()
        self.placements: dict[int, str] = {}

    async def put_placement(self, trial: int, group: str) -> None:
        self.placements[trial] = group

    async def placement(self, trial: int) -> str | None:
        return self.placements.get(trial)


class Channel(Generic[UpdateT]):
    """StepProgress and lines for the user. The methods of all channels raise RayError if the actor is gone."""

    actor_class: type[ProgressActor] = ProgressActor

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # another node may be lost
        self.actor: ActorHandle = ray.remote(num_cpus=0, scheduling_strategy=here)(self.actor_class).remote()

    def put(self, update: UpdateT) -> None:
        """Replace the latest update; does not wait."""
        self.actor.put.remote(update)

    def say(self, line: str) -> None:
        """Add a line that the user must see; does not wait."""
        self.actor.say.remote(line)

    def say_and_wait(self, line: str) -> None:
        """`say` for a process that is about to end."""
        ray.get(self.actor.say.remote(line), timeout=SECONDS_TO_ANSWER)

    def next(self, seconds: float) -> tuple[UpdateT | None, list[str]]:
        """The latest update and the new lines, as soon as something was added, or after this time."""
        return cast("tuple[UpdateT | None, list[str]]", ray.get(self.actor.next.remote(seconds), timeout=seconds + SECONDS_TO_ANSWER))


class RunChannel(Channel[StepProgress | Stage]):
    """Between the driver of a launch and its workers."""

    actor_class = RunActor

    # metric points of all workers, for rank 0 to write

    def put_points(self, points: Sequence[MetricPoint]) -> None:
        ray.get(self.actor.put_points.remote(points))

    def take_points(self) -> list[MetricPoint]:
        return cast("list[MetricPoint]", ray.get(self.actor.take_points.remote()))

    # requests to the workers

    def request_stop(self) -> bool:
        """Ask the workers to stop; whether they are training, and will."""
        return bool(ray.get(self.actor.request_stop.remote(), timeout=SECONDS_TO_ANSWER))

    def request_regroup(self) -> bool:
        """Ask the workers to end with a checkpoint, to be started again; whether they are training, and will."""
        return bool(ray.get(self.actor.request_regroup.remote(), timeout=SECONDS_TO_ANSWER))

    def next_request(self) -> bool:
        """Returns when there is one: True to stop, False to start again."""
        return bool(ray.get(self.actor.next_request.remote()))

    def end_of_training(self) -> None:
        """From now on requests are not noticed; does not wait."""
        self.actor.end_of_training.remote()

    # Ray Train's controller, which ends the workers

    def put_controller(self, controller: ActorHandle) -> None:
        """Make it known to the driver; does not wait."""
        self.actor.put_controller.remote(controller)

    def end_workers(self) -> None:
        """End the workers at once, and their controller, which may only just start. Returns when they have ended, or do not answer."""
        with contextlib.suppress(ray.exceptions.RayError):  # the controller ends in the call
            controller = ray.get(self.actor.take_controller.remote(), timeout=SECONDS_TO_ANSWER)
            ray.get(controller.abort.remote(), timeout=SECONDS_TO_ANSWER)

    def close(self) -> None:
        """End the actor, which the workers' controller refers to, and which refers to that."""
        ray.kill(self.actor)

    # reports of a trial to the sweep, one at a time

    def report(self, report: TrialReport) -> None:
        """Returns when the sweep lets the trial continue.

        Raises:
            RuntimeError: the report could not be passed on.
        """
        if refusal := ray.get(self.actor.report.remote(report)):
            raise RuntimeError(refusal)

    def next_report(self) -> TrialReport:
        """Waits for it without limit."""
        return cast(TrialReport, ray.get(self.actor.next_report.remote()))

    def accept_report(self, refusal: str = "") -> None:
        """Let the trial continue after its report, or, with a refusal, fail."""
        ray.get(self.actor.accept_report.remote(refusal))


class SweepChannel(Channel[TrialProgress]):
    """Between the driver of a sweep and its trials."""

    actor_class = SweepActor

    def put_placement(self, trial: int, group: str) -> None:
        """Set the placement group, in hexadecimal, of a trial's workers."""
        ray.get(self.actor.put_placement.remote(trial, group))

    def placement(self, trial: int) -> str | None:
        """The last placement group of a trial."""
        return cast("str | None", ray.get(self.actor.placement.remote(trial), timeout=SECONDS_TO_ANSWER))
