"""How many workers train while nodes come and go, and which restarts count as failures. Ray's controller runs this.

Ray has a policy of its own for `ScalingConfig(num_workers=(min, max))`. It is not used: it counts what nodes have, not what is free
there, and nodes that are about to be taken away too; it takes any number of workers; and it ends a group that trains to make it
larger, without a checkpoint.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.train import FailureConfig, PreemptionError, PreemptionInfo, ScalingConfig, WorkerGroupError

from raytrain2p.launch.cluster import answers
from raytrain2p.launch.ray_private import (
    DefaultFailurePolicy,
    FailureDecision,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    available_resources_per_node,
    get_draining_nodes,
)
from raytrain2p.worker.channel import RunChannel
from raytrain2p.worker.regroup import RegroupError

SECONDS_TO_FREE = 3.0  # until what a group or an encoder had is free again
SECONDS_TO_FALL = 5.0  # from the first error of a worker until the raylet of its node, which is ending, does not answer
ROUNDING = 1e-6  # of Ray's resources

logger = logging.getLogger(__name__)


class GroupScaling(FixedScalingPolicy):
    """The largest allowed number of workers for which there is room; a group that trains is asked to end with a checkpoint before it
    grows. If there is room for none, Ray waits for the smallest, as for a fixed number.

    Args:
        scaling: what a worker needs.
        counts: numbers of workers that may train, in ascending order; one if it is fixed.
        channel: to the workers and the driver.
        grow_after_s: seconds of training before the group is made larger.
        asks_autoscaler: whether the cluster may have one. On a cluster of the launch's own, the requests would start an actor for nothing.
        is_known: make the controller known on the channel: `fit` keeps it to itself.
    """

    def __init__(
        self,
        scaling: ScalingConfig,
        counts: Sequence[int],
        channel: RunChannel,
        grow_after_s: float,
        asks_autoscaler: bool = True,
        is_known: bool = False,
    ) -> None:
        super().__init__(scaling)
        self.counts, self.channel, self.grow_after_s = list(counts), channel, grow_after_s
        self.asks_autoscaler, self.is_known = asks_autoscaler, is_known
        self.held = Counter[str]()  # workers by node, of the group that trains or has just ended
        self.size, self.looked, self.waits = 0, 0.0, False

    def after_controller_start(self, train_run_context: Any) -> None:
        if self.asks_autoscaler:
            super().after_controller_start(train_run_context)
        if self.is_known:
            self.channel.put_controller(ray.get_runtime_context().current_actor)

    def _get_num_workers_for_resource_request(self) -> int:
        return self.counts[-1]

    def _maybe_send_resource_request(self) -> None:
        if self.asks_autoscaler:
            super()._maybe_send_resource_request()

    def make_decision_for_non_running_worker_group(self) -> ResizeDecision:
        self._maybe_send_resource_request()
        room = self._room_soon()
        count = largest(self.counts, room)
        if self.size:  # the first group is reported by the driver
            self._report(count, room)
        self.held.clear()  # Ray ends the old group before it starts the new one
        return ResizeDecision(num_workers=count, resources_per_worker=self.needed)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> NoopDecision:
        self._maybe_send_resource_request()
        self.held = Counter(worker.metadata.node_id for worker in worker_group_state.workers)
        self.size, self.waits = worker_group_state.num_workers, False
        now = time.monotonic()
        if self.size < self.counts[-1] and now - max(worker_group_state.start_time, self.looked) >= self.grow_after_s:
            self.looked = now
            self._grow()
        return NoopDecision()

    @property
    def needed(self) -> dict[str, float]:
        return dict(self.scaling_config._resources_per_worker_not_none)

    def _grow(self) -> None:
        """Ask the workers to end with a checkpoint if more of them have room: they raise RegroupError, and the group is started again."""
        count = largest(self.counts, room_for_workers(self.needed, self.held))
        with suppress(ray.exceptions.RayError):  # their answer is late: the next time
            if count > self.size and self.channel.request_regroup():
                self.channel.say(f"there is room for {count} workers: they start again from a checkpoint of this step")

    def _room_soon(self) -> int:
        """Room for workers; without a group that ends now, others may be about to free some."""
        deadline = time.monotonic() + (0.0 if self.held or len(self.counts) == 1 else SECONDS_TO_FREE)
        while (room := room_for_workers(self.needed, self.held)) < self.counts[-1] and time.monotonic() < deadline:
            time.sleep(0.5)
        return room

    def _report(self, count: int, room: int) -> None:
        if room < count and not self.waits:
            needed = ", ".join(f"{amount:g} {name}" for name, amount in self.needed.items())
            self.channel.say(f"waiting for nodes: {count} workers need {needed} each, and there is room for {room}")
        elif room >= count != self.size:
            self.channel.say(f"{count} worker{'s' if count > 1 else ''} from now on, {self.size} before")
        self.waits = room < count


class NodesAreNoFailures(DefaultFailurePolicy):
    """Restarts that are not failures of the program: a group that grows, which nothing counts; and nodes that are taken away, which
    launch.max_preemptions counts.

    Args:
        failures: with both budgets.
        is_elastic: a node that is lost without notice is one that is taken away, too. The error of a worker that waited for a lost one
            does not show it, so the nodes are asked.
    """

    def __init__(self, failures: FailureConfig, is_elastic: bool) -> None:
        super().__init__(failures)
        self.is_elastic, self.lost = is_elastic, lost_nodes() if is_elastic else set[str]()

    def make_decision(self, training_failed_error: Exception) -> FailureDecision:
        if (regroup := regroup_of(training_failed_error)) is not None and not regroup.preempted:
            return FailureDecision.RETRY
        if regroup is not None or (self.is_elastic and isinstance(training_failed_error, WorkerGroupError) and self._has_lost_nodes()):
            return super().make_decision(PreemptionError(PreemptionInfo(None, {})))
        return super().make_decision(training_failed_error)

    def _has_lost_nodes(self) -> bool:
        """Whether one was lost since the last time; it may be about to fall."""
        deadline = time.monotonic() + SECONDS_TO_FALL
        while not (new := lost_nodes() - self.lost) and time.monotonic() < deadline:
            time.sleep(0.5)
        self.lost |= new
        return bool(new)


def regroup_of(error: Exception) -> RegroupError | None:
    """The request with which the workers ended, if they did; some may have lost the others first."""
    failures = getattr(error, "worker_failures", None) or {}
    return next((failure for failure in failures.values() if isinstance(failure, RegroupError)), None)


def largest(counts: Sequence[int], room: int) -> int:
    """The largest number of workers that has room; the smallest one if none has."""
    return max((count for count in counts if count <= room), default=counts[0])


def room_for_workers(needed: Mapping[str, float], held: Mapping[str, int]) -> int:
    """Workers for which there is room on nodes that are here to stay.

    Args:
        needed: resources of a worker.
        held: workers of ours by node: their places are free for the group that replaces them.
    """
    try:
        free, going = available_resources_per_node(), set(get_draining_nodes()) | lost_nodes()
    except Exception:  # whatever the client of Ray's control store raises: a head that is away is no failure of the group
        logger.warning("the cluster's nodes are not known", exc_info=True)
        return 0
    return sum(
        held.get(node, 0) + min(int(amounts.get(name, 0.0) / amount + ROUNDING) for name, amount in needed.items() if amount > 0)
        for node, amounts in free.items()
        if node not in going
    )


def lost_nodes() -> set[str]:
    """IDs of the nodes that are gone, and of those whose raylet does not answer: Ray takes half a minute to notice."""
    return {node["NodeID"] for node in ray.nodes() if not (node["Alive"] and answers(raylet(node)))}


def raylet(node: dict[str, Any]) -> str:
    """Where the raylet of a node listens."""
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def is_drained() -> bool:
    """Whether the node of this process is about to be taken away."""
    with suppress(Exception):  # as above
        return ray.get_runtime_context().get_node_id() in get_draining_nodes()
    return False
