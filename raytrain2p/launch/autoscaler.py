"""Nodes that a cluster does not have yet: what its autoscaler may add, and asking it for them."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from ray.train import ScalingConfig

from raytrain2p.config import InputError, Problem
from raytrain2p.config.console import Console
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.capacity import (
    MOST_NODES,
    TYPE,
    Capacity,
    Limits,
    Node,
    check_capacity,
    has_nodes,
    needed,
    resolved,
    worker_resources,
)
from raytrain2p.launch.ray_private import AUTOSCALER_STATUS, HeldRequest, KubernetesConfig, internal_kv_get, is_autoscaler_v2

HEAD = "node:__internal_head__"  # a resource of the cluster's first node, 1 in total
SECONDS_TO_WAIT = 1800  # for nodes of an autoscaler: a GPU node of a cloud takes 5 to 15 minutes
SECONDS_TO_READ_LIMITS = 60.0
NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def cluster_capacity(**facts: Any) -> Capacity:
    """Of the cluster that this process is connected to.

    Args:
        facts: other fields of `Capacity`.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    machines = len({node["NodeManagerHostname"] for node in alive})
    return Capacity(tuple(node_with(node["Resources"]) for node in alive), machines, **facts)


def node_with(resources: Mapping[str, float]) -> Node:
    """A node with these resources of Ray."""
    accelerators = frozenset(name.removeprefix(TYPE) for name in resources if name.startswith(TYPE))
    return Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0), accelerators, HEAD in resources)


def with_autoscaler(capacity: Capacity) -> Capacity:
    """With what the cluster's autoscaler may add. It is read on the head node, where alone it can be."""
    if capacity.started_here or not autoscales():
        return capacity
    read, limits = ray.remote(num_cpus=0, resources={HEAD: 0.001}, max_retries=0)(read_limits), None
    with suppress(ray.exceptions.RayError):
        limits = ray.get(read.remote(ray.get_runtime_context().gcs_address), timeout=SECONDS_TO_READ_LIMITS)
    return replace(capacity, autoscales=limits is None or limits.most > 0, limits=limits)


def autoscales() -> bool:
    """Whether the cluster may have an autoscaler: one without reports each node as if it were a type of its own."""
    if is_autoscaler_v2(fetch_from_server=True):
        return True
    status = json.loads(internal_kv_get(AUTOSCALER_STATUS) or "{}")
    types = ((status.get("autoscaler_report") or {}).get("node_type_mapping") or {}).values()
    return not all(re.fullmatch("node_[0-9a-f]{56}", name) for name in types)


def read_limits(gcs_address: str) -> Limits | None:
    """Of the autoscaler that belongs to this process's head node; None if they cannot be read."""
    if (name := os.environ.get("RAY_CLUSTER_NAME")) and NAMESPACE.exists():
        with suppress(Exception):  # the pod may not read its RayCluster
            return limits_of(KubernetesConfig(name, NAMESPACE.read_text().strip())())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            arguments = dict(argument.partition("=")[::2] for argument in process.cmdline() if argument.startswith("--"))
            if arguments.get("--gcs-address") == gcs_address and "--logs-dir" in arguments and is_monitor(process):
                if (path := arguments.get("--autoscaling-config")) is None:
                    return Limits((), 0)
                with suppress(OSError, yaml.YAMLError, AttributeError, TypeError):
                    return limits_of(yaml.safe_load(Path(path).expanduser().read_text()))
    return None


def is_monitor(process: psutil.Process) -> bool:
    return any(Path(argument).name == "monitor.py" for argument in process.cmdline())


def limits_of(config: dict[str, Any]) -> Limits:
    """Of an autoscaler's configuration, as `ray up` writes it and as KubeRay derives it. The head node is in no type: there is one."""
    most = config.get("max_workers", MOST_NODES)
    types = {name: kind for name, kind in config["available_node_types"].items() if name != config.get("head_node_type")}
    return Limits(
        tuple((node_with(kind.get("resources") or {}), min(kind.get("max_workers", most), most)) for kind in types.values()), most
    )


def check_possible(launch: LaunchSettings, capacity: Capacity, trial: bool = False) -> None:
    """Check that the cluster has, or may get, what a launch needs.

    Raises:
        InputError: it never can.
    """
    may_wait = capacity.limits is None and seconds_to_wait(launch, capacity) > 0
    if not may_wait and (problems := check_capacity(resolved(launch, capacity, trial), capacity)):
        raise InputError(problems)


def seconds_to_wait(launch: LaunchSettings, capacity: Capacity) -> int:
    if launch.wait_for_nodes_s is not None and not capacity.started_here:
        return launch.wait_for_nodes_s
    return SECONDS_TO_WAIT if capacity.autoscales else 0


@contextmanager
def nodes_held(launch: LaunchSettings, capacity: Capacity, console: Console, trial: bool = False) -> Iterator[Capacity]:
    """Within, the cluster has the nodes that a launch needs: if it lacks some, they are asked for and waited for. An autoscaler keeps
    them until the end, after which Ray Train asks for them itself. If this process is killed, the request ends with its time limit.

    Raises:
        InputError: they did not come.
    """
    wanted = resolved(launch, capacity, trial)
    if capacity.holds(wanted):
        yield capacity
        return
    seconds = seconds_to_wait(launch, capacity)
    asked = "asked its autoscaler for them, " if capacity.autoscales else ""
    has = has_nodes(capacity.nodes, wanted.accelerator_type, wanted.gpus > 0)
    needs = f"needs {needed(wanted)}"
    console.say(f"{needs}; the cluster has {has}: {asked}waiting up to {seconds} s (launch.wait_for_nodes_s)")
    with requested(wanted) if capacity.autoscales else nullcontext():
        with spread_out(wanted) if capacity.autoscales else nullcontext():
            capacity = wait_for_nodes(wanted, capacity, seconds, needs, console)
        yield capacity


def wait_for_nodes(wanted: LaunchSettings, capacity: Capacity, seconds: int, needs: str, console: Console) -> Capacity:
    """The capacity once a group of workers fits.

    Raises:
        InputError: none fits after these seconds.
    """
    began = time.monotonic()
    while not capacity.holds(wanted):
        has = has_nodes(capacity.nodes, wanted.accelerator_type, wanted.gpus > 0)
        if time.monotonic() - began > seconds:
            fix = "see `ray status` on its head for the reason, set it higher, or lower launch.num_workers"
            raise InputError(Problem(f"launch.wait_for_nodes_s={seconds}", f"{needs}; after this time the cluster has {has}", fix))
        console.show(f"waiting for nodes: the cluster has {has}")
        time.sleep(1)
        now = cluster_capacity()
        capacity = replace(capacity, nodes=now.nodes, machines=now.machines)
    console.clear()
    console.say(f"the nodes are there after {time.monotonic() - began:.0f} s")
    return capacity


@contextmanager
def requested(wanted: LaunchSettings) -> Iterator[None]:
    """Within, the autoscaler is asked for the resources of a group of workers; the requests of others stay as they are."""
    with HeldRequest(f"raytrain2p-{socket.gethostname()}-{os.getpid()}", *request_for(wanted)):
        yield


def request_for(wanted: LaunchSettings) -> tuple[ScalingConfig, int]:
    """What is asked for, and how many times."""
    bundle, count = worker_resources(wanted), wanted.max_workers
    if wanted.placement_strategy == "STRICT_PACK":  # on one node
        bundle, count = {name: count * amount for name, amount in bundle.items()}, 1
    return ScalingConfig(use_gpu=wanted.gpus > 0, resources_per_worker=bundle), count


@contextmanager
def spread_out(wanted: LaunchSettings) -> Iterator[None]:
    """Within, a placement group waits for as many nodes as workers, if each takes a node: a single large node may have all resources."""
    if wanted.placement_strategy != "STRICT_SPREAD":
        yield
        return
    group = ray.util.placement_group([worker_resources(wanted)] * wanted.min_workers, strategy="STRICT_SPREAD")
    try:
        yield
    finally:
        ray.util.remove_placement_group(group)
