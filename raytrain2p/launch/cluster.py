"""The Ray cluster of a launch: an existing one, else one that is started here and stopped at the end."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import grpc
import psutil
import ray

from raytrain2p.config import InputError, Problem
from raytrain2p.config.secrets import masked, one_line
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.interrupts import kept_from_children
from raytrain2p.launch.quiet import muted_stderr
from raytrain2p.launch.ray_private import find_bootstrap_address, get_num_cpus, get_system_memory, setproctitle
from raytrain2p.launch.ray_token import ensure_token

SECONDS_TO_ANSWER = 5.0
CACHE_VARIABLES = ("RAYTRAIN2P_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE")


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs by node, and how many machines these nodes are on.

    Args:
        started_here: this launch started the cluster, and stops it.
        of_caller: the program that called us had initialised Ray, which stays as it is.
    """

    nodes: tuple[tuple[float, float], ...]
    machines: int = 1
    started_here: bool = False
    of_caller: bool = False

    @property
    def cpus(self) -> float:
        return sum(cpus for cpus, _ in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(gpus for _, gpus in self.nodes)

    def fits(self, workers: int, cpus: int, gpus: int) -> bool:
        """Whether that many workers fit, each on one node."""
        places = 0
        for node_cpus, node_gpus in self.nodes:
            places += int(min(node_cpus // cpus, node_gpus // gpus if gpus else workers))
        return places >= workers


def existing_address() -> str | None:
    """The address of a running cluster, if there is one: RAY_ADDRESS (`local`: none), or a cluster of `ray start` on this machine.

    Raises:
        InputError: the cluster of RAY_ADDRESS does not answer, or it is `auto` and there is none on this machine.
    """
    if (address := os.environ.get("RAY_ADDRESS")) and address != "auto":
        if address == "local":
            return None
        if not answers(address):
            raise InputError(Problem(f"RAY_ADDRESS={address}", "no Ray cluster answers there", "start the cluster, or unset RAY_ADDRESS"))
        return address
    found = find_bootstrap_address(None)  # still recorded after the cluster was killed
    if found and answers(found):
        return str(found)
    if address == "auto":
        raise InputError(Problem("RAY_ADDRESS=auto", "no Ray cluster runs on this machine", "start one, or unset RAY_ADDRESS"))
    return None


def answers(address: str) -> bool:
    """Whether something listens at `[ray://]host:port`; Ray itself would wait for minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER):
            return True
    except (OSError, ValueError):
        return False


def is_open(address: str) -> bool:
    """Whether a cluster answers a harmless call without a token."""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=SECONDS_TO_ANSWER)
        except grpc.RpcError:
            return False
    return True


def check_token(address: str | None) -> None:
    """Check that a cluster demands a token, as this process does of the cluster's nodes; make one for a cluster to be started here.

    Raises:
        InputError: it demands none, or a token cannot be made.
    """
    if address is None:
        try:
            ensure_token()
        except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
            where, why = getattr(error, "filename", None) or "~/.ray/auth_token", getattr(error, "strerror", None) or error
            fix = "set RAY_AUTH_TOKEN to a secret of at least 32 characters"
            raise InputError(Problem(str(where), f"Ray's token cannot be made there: {why}", fix)) from None
    elif "://" not in address and os.environ.get("RAY_AUTH_MODE") == "token" and is_open(address):
        what = "demands no token, so whoever reaches it can run code, and its nodes cannot answer this launch"
        fix = "start it with RAY_AUTH_MODE=token, as cluster/head.sh does; or set RAY_AUTH_MODE here as the cluster has it"
        raise InputError(Problem(f"Ray at {address}", what, fix))


def local_capacity() -> Capacity:
    """Of a Ray cluster that would be started here; starts none."""
    import torch

    return Capacity(((float(get_num_cpus()), float(torch.cuda.device_count())),))


def cluster_capacity() -> Capacity:
    """Of the cluster that this process is connected to."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    machines = len({node["NodeManagerHostname"] for node in alive})
    return Capacity(tuple((node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in alive), machines)


def check_capacity(launch: LaunchSettings, capacity: Capacity) -> list[Problem]:
    """Resources that the launch's smallest worker group needs and the cluster does not have: Ray would wait for them forever."""
    problems = []
    gpus = 1 if launch.use_gpu else 0
    if launch.use_gpu and capacity.gpus < launch.min_workers:
        problems.append(
            Problem(
                f"launch.num_workers={launch.num_workers} with launch.use_gpu=true",
                f"needs {launch.min_workers} GPUs; the cluster has {capacity.gpus:g}",
                "lower launch.num_workers, set launch.use_gpu=false, or use a larger cluster (RAY_ADDRESS)",
            )
        )
    elif not capacity.fits(launch.min_workers, launch.cpus_per_worker or 1, gpus):
        problems.append(
            Problem(
                f"launch.num_workers={launch.num_workers}",
                f"needs {launch.min_workers} x {launch.cpus_per_worker or 1} CPUs, each worker on one node; "
                f"the cluster has {capacity.cpus:g} on {len(capacity.nodes)} node(s)",
                "lower launch.num_workers or launch.cpus_per_worker, or use a larger cluster (RAY_ADDRESS)",
            )
        )
    return problems


def cpus_per_worker(launch: LaunchSettings, capacity: Capacity) -> int:
    """As set; else 1 with GPUs, and without them as many as leave room for every worker."""
    if launch.cpus_per_worker is not None:
        return launch.cpus_per_worker
    cpus = 1
    while not launch.use_gpu and capacity.fits(launch.max_workers, cpus + 1, 0):
        cpus += 1
    return cpus


def check_before_connecting(launch: LaunchSettings) -> list[Problem]:
    """The same for a cluster that would be started here, before it is; an existing one is checked in `connected`."""
    if ray.is_initialized() or existing_address() is not None:
        return []
    problems, memory = check_capacity(launch, local_capacity()), get_system_memory() // 1024**2
    if launch.object_store_mb > memory:
        what = f"is more than the {memory:,} MB of memory that this machine has"
        problems.append(Problem(f"launch.object_store_mb={launch.object_store_mb}", what, "set it lower; the default is enough for most"))
    return problems


def hide_command_line() -> None:
    """Mask credentials in the title of this process: `ps` shows it to other users, and Ray records it as the job's entry point."""
    typed = psutil.Process().cmdline()
    if (shown := [masked(argument) for argument in typed]) != typed:
        setproctitle(" ".join(shown))


@contextmanager
def connected(launch: LaunchSettings, verbose: bool) -> Iterator[Capacity]:
    """Within, this process is connected to the cluster; yields its capacity.

    Raises:
        InputError: the cluster cannot be reached, or lacks what the launch asks for.
    """
    if ray.is_initialized():
        yield checked_capacity(launch, of_caller=True)
        return
    hide_command_line()
    address = existing_address()
    check_token(address)
    starts = address is None
    options: dict[str, Any] = {"address": address}
    if address is None:
        port = free_port()
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        address = f"{ray.util.get_node_ip_address()}:{port}"
        options = {"address": "local", "object_store_memory": launch.object_store_mb * 1024**2, "include_dashboard": False}
    # Without RAY_ADDRESS, an actor of Ray Train asks the cluster that was started last on this machine for our controller, does
    # not find it, and ends our workers.
    caches = {name: os.environ[name] for name in CACHE_VARIABLES if name in os.environ}
    options["runtime_env"] = {"env_vars": caches | {"RAY_ADDRESS": address}}
    try:
        with muted_stderr(verbose), kept_from_children():
            ray.init(log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        reason = one_line(error, 300)  # ValueError: the object store leaves too little memory
        raise InputError(
            Problem(
                f"Ray at {address}",
                f"cannot be used: {reason}",
                "check RAY_ADDRESS and launch.object_store_mb; give the token of that cluster, in ~/.ray/auth_token or RAY_AUTH_TOKEN; "
                "or stop a cluster that hangs",
            )
        ) from None
    try:
        yield checked_capacity(launch, started_here=starts)
    finally:
        ray.shutdown()
        if starts:
            del os.environ["RAY_GCS_SERVER_PORT"]


def checked_capacity(launch: LaunchSettings, started_here: bool = False, of_caller: bool = False) -> Capacity:
    """Of the cluster that this process is connected to.

    Raises:
        InputError: it lacks what the launch asks for.
    """
    capacity = replace(cluster_capacity(), started_here=started_here, of_caller=of_caller)
    if problems := check_capacity(launch, capacity):
        raise InputError(problems)
    return capacity


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
