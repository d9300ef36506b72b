"""How many workers train while nodes come and go, and which restarts count as failures: Ray's controller asks these policies."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import FailureConfig, PreemptionError, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from raytrain2p.launch import elastic
from raytrain2p.launch.elastic import GroupScaling, NodesAreNoFailures
from raytrain2p.worker.regroup import RegroupError

RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


class Nodes:
    """What Ray reports of a cluster: free CPUs by node, nodes that are drained, and nodes whose raylet does not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **free: float) -> None:
        self.free, self.drained, self.silent = free, dict[str, int](), set[str]()
        monkeypatch.setattr(elastic, "available_resources_per_node", lambda: {node: {"CPU": cpus} for node, cpus in self.free.items()})
        monkeypatch.setattr(elastic, "get_draining_nodes", lambda: self.drained)
        monkeypatch.setattr(elastic, "answers", lambda address: address.partition(":")[0] not in self.silent)
        monkeypatch.setattr(ray, "nodes", lambda: [node(name) for name in self.free])
        monkeypatch.setattr(elastic, "SECONDS_TO_FREE", 0.0)
        monkeypatch.setattr(elastic, "SECONDS_TO_FALL", 0.0)


def node(name: str) -> dict[str, Any]:
    return {"NodeID": name, "Alive": True, "NodeManagerAddress": name, "NodeManagerPort": 1}


class Channel:
    """To workers that train."""

    def __init__(self) -> None:
        self.lines, self.regroups = list[str](), 0

    def say(self, line: str) -> None:
        self.lines.append(line)

    def request_regroup(self) -> bool:
        self.regroups += 1
        return True


@pytest.fixture
def channel() -> Channel:
    return Channel()


def scaling(channel: Any, *counts: int) -> GroupScaling:
    """Of workers with two CPUs."""
    policy = GroupScaling(ScalingConfig(resources_per_worker={"CPU": 2}), counts, channel, grow_after_s=60, asks_autoscaler=False)
    assert policy._get_num_workers_for_resource_request() == counts[-1]
    return policy


def trains(policy: GroupScaling, *nodes: str, since: float = 0.0) -> None:
    """The group of workers on these nodes, one each, trains since so many seconds after the machine's start."""
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in nodes]
    policy.make_decision_for_running_worker_group(SimpleNamespace(workers=workers, num_workers=len(nodes), start_time=since), None)


@pytest.mark.parametrize(("free", "count"), [([2.0], 1), ([5.0, 3.0], 2), ([6.0], 2), ([8.0], 4), ([20.0, 20.0], 4), ([1.9, 1.9], 1)])
def test_the_largest_number_that_divides_the_batch_and_has_room_is_started(
    free: list[float], count: int, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Nodes(monkeypatch, **{f"node{number}": cpus for number, cpus in enumerate(free)})
    assert scaling(channel, 1, 2, 4).make_decision_for_non_running_worker_group().num_workers == count


def test_a_fixed_number_is_never_changed(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    Nodes(monkeypatch, a=2.0, b=100.0)
    policy = scaling(channel, 2)
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    trains(policy, "a", "b")
    assert (channel.regroups, channel.lines) == (0, [])


@pytest.mark.parametrize("how", ["lost", "drained"])
def test_a_group_goes_on_without_the_node_that_goes(how: str, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The places of its own workers count: Ray frees them before the next group starts."""
    nodes = Nodes(monkeypatch, a=0.0, b=0.0, c=0.0)
    policy = scaling(channel, 1, 2, 3)
    trains(policy, "a", "b", "c")
    if how == "lost":
        nodes.silent = {"b"}  # Ray takes it for alive
    else:
        nodes.drained = {"b": 0}
    assert policy.make_decision_for_non_running_worker_group().num_workers == 2
    assert channel.lines == ["2 workers from now on, 3 before"]


def test_it_is_said_once_that_a_group_waits(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(monkeypatch, a=0.0, b=0.0)
    policy = scaling(channel, 2)
    trains(policy, "a", "b")
    nodes.drained = {"b": 0}
    decisions = [policy.make_decision_for_non_running_worker_group().num_workers for _ in range(3)]
    assert decisions == [2, 2, 2], "Ray waits for its place"
    assert channel.lines == ["waiting for nodes: 2 workers need 2 CPU each, and there is room for 1"]


def test_a_group_that_could_be_larger_is_asked_to_end_and_not_sooner_than_set(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(elastic.time, "monotonic", lambda: now)
    nodes = Nodes(monkeypatch, a=0.0)
    policy = scaling(channel, 1, 2, 4)
    trains(policy, "a", since=now - 61)
    assert channel.regroups == 0
    nodes.free["b"] = 2.0
    trains(policy, "a", since=now - 61)
    assert channel.regroups == 0, "it has just looked"
    now += 61
    trains(policy, "a")
    assert channel.regroups == 1
    assert channel.lines == ["there is room for 2 workers: they start again from a checkpoint of this step"]


def test_nodes_that_cannot_be_asked_are_no_failure(channel: Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes(monkeypatch, a=4.0)
    monkeypatch.setattr(elastic, "get_draining_nodes", lambda: nodes.free["the control store is away"])
    policy = scaling(channel, 1, 2)
    trains(policy, "a")
    assert policy.make_decision_for_non_running_worker_group().num_workers == 1


def failed(error: Exception) -> WorkerGroupError:
    return WorkerGroupError("", {0: RuntimeError("the other one left"), 1: error})


def test_growing_is_no_failure_and_preemptions_have_a_budget_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Nodes(monkeypatch, a=1.0)
    policy = NodesAreNoFailures(FailureConfig(max_failures=1, max_preemption_failures=2), is_elastic=False)
    assert [policy.make_decision(failed(RegroupError(preempted=False))) for _ in range(5)] == [RETRY] * 5
    assert [policy.make_decision(failed(RegroupError(preempted=True))) for _ in range(3)] == [RETRY, RETRY, RAISE]
    assert [policy.make_decision(failed(RuntimeError("a bug"))) for _ in range(2)] == [RETRY, RAISE]


@pytest.mark.parametrize(("is_elastic", "expected"), [(True, [RETRY, RAISE]), (False, [RAISE, RAISE])])
def test_a_lost_node_is_no_failure_of_a_group_that_can_shrink(
    is_elastic: bool, expected: list[FailureDecision], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(monkeypatch, a=1.0, b=1.0, c=1.0)
    nodes.silent = {"c"}  # before the launch
    policy = NodesAreNoFailures(FailureConfig(max_failures=0), is_elastic)
    nodes.silent.add("b")
    assert [policy.make_decision(failed(RuntimeError("connection reset"))) for _ in range(2)] == expected


def test_errors_of_ray_itself_are_left_to_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    Nodes(monkeypatch, a=1.0)
    policy = NodesAreNoFailures(FailureConfig(max_failures=0, max_preemption_failures=0), is_elastic=True)
    assert policy.make_decision(PreemptionError(ray.train.PreemptionInfo(None, {}))) is RAISE
