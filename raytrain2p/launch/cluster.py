"""The Ray cluster of a launch: an existing one, else one that is started here and stopped at the end."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from typing import Any

import grpc
import psutil
import ray

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.config.secrets import masked, one_line
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.interrupts import kept_from_children
from raytrain2p.launch.autoscaler import cluster_capacity, with_autoscaler
from raytrain2p.launch.capacity import Capacity, Node, check_capacity, resolved
from raytrain2p.launch.quiet import muted_stderr
from raytrain2p.launch.ray_private import find_bootstrap_address, get_num_cpus, get_system_memory, setproctitle
from raytrain2p.launch.ray_token import ensure_token
from raytrain2p.launch.submission import cluster_of_job, outside_job, submitted_job, unless_of_job

SECONDS_TO_ANSWER = 5.0
SUBMIT = "submit the command to that cluster: ray job submit --working-dir . -- python -m raytrain2p..."
NOT_A_CLUSTER = "is not the HOST:PORT of a Ray cluster, whose disks a launch must share"
CACHE_VARIABLES = ("RAYTRAIN2P_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT")

# How long a thread of torch (through GNU's OpenMP) waits for the others awake, at the end of each operation. Its default, a millisecond or
# more, is too long where cores are shared, if only with Ray's own processes: the one that it waits for needs its core.
SPINS, SHORT = "GOMP_SPINCOUNT", "10000"


def existing_address() -> str | None:
    """The address of a running cluster, if there is one: that of the job, RAY_ADDRESS (`local`: none), or a cluster of `ray start` on
    this machine.

    Raises:
        InputError: the cluster of RAY_ADDRESS does not answer, or is reached by another protocol; or it is `auto` and there is none on
            this machine.
    """
    if (address := os.environ.get("RAY_ADDRESS")) and address != "auto":
        if address == "local":
            return None
        if "://" in address:
            raise InputError(Problem(f"RAY_ADDRESS={address}", NOT_A_CLUSTER, SUBMIT))
        if submitted_job() is not None:
            address = cluster_of_job(address)
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
    """Whether something listens at `host:port`; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
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
    elif os.environ.get("RAY_AUTH_MODE") == "token" and is_open(address):
        what = "demands no token, so whoever reaches it can run code, and its nodes cannot answer this launch"
        fix = "start it with RAY_AUTH_MODE=token, as cluster/head.sh does; or set RAY_AUTH_MODE here as the cluster has it"
        raise InputError(Problem(f"Ray at {address}", what, fix))


def local_capacity() -> Capacity:
    """Of a Ray cluster that would be started here; starts none. Torch counts the GPUs that it can use, and opens none of them."""
    import torch

    return Capacity((Node(float(get_num_cpus()), float(torch.cuda.device_count()), is_head=True),), started_here=True)


def before_connecting(launch: LaunchSettings, findings: Findings, trial: bool = False) -> LaunchSettings:
    """Check and resolve what is asked of a cluster that would be started here, before it is; an existing one is asked once connected."""
    if ray.is_initialized() or existing_address() is not None or launch.accelerator_type is not None:  # Ray finds the type out
        return launch
    capacity, memory = local_capacity(), get_system_memory() // 1024**2
    launch = resolved(launch, capacity, trial)
    findings.extend(check_capacity(launch, capacity))
    if launch.object_store_mb > memory:
        what = f"is more than the {memory:,} MB of memory that this machine has"
        findings.add(Problem(f"launch.object_store_mb={launch.object_store_mb}", what, "set it lower; the default is enough for most"))
    return launch


def hide_command_line() -> None:
    """Mask credentials in the title of this process: `ps` shows it to other users, and Ray records it as the job's entry point."""
    typed = psutil.Process().cmdline()
    if (shown := [masked(argument) for argument in typed]) != typed:
        setproctitle(" ".join(shown))


@contextmanager
def connected(launch: LaunchSettings, verbose: bool, started: Future[bool] | None = None) -> Iterator[Capacity]:
    """Within, this process is connected to the cluster; yields its capacity.

    Args:
        started: of `start_ray`, if it was called before.

    Raises:
        InputError: the cluster cannot be reached.
    """
    if started is None and ray.is_initialized():
        if ray.util.client.ray.is_connected():
            raise InputError(Problem("ray.init", "has connected this program by Ray Client (ray://)", SUBMIT))
        yield with_autoscaler(cluster_capacity(of_caller=True))
        return
    starts = started.result() if started is not None else start_ray(launch, verbose)
    try:
        yield with_autoscaler(cluster_capacity(started_here=starts))
    finally:
        ray.shutdown()


def start_ray(launch: LaunchSettings, verbose: bool) -> bool:
    """Connect this process to the cluster; True if it was started for that.

    Raises:
        InputError: the cluster cannot be reached.
    """
    hide_command_line()
    address = existing_address()
    check_token(address)
    starts = address is None
    options: dict[str, Any] = {"address": address}
    # Without RAY_ADDRESS, an actor of Ray Train asks the cluster that was started last on this machine for our controller, does
    # not find it, and ends our workers.
    inherited = {SPINS: os.environ.get(SPINS, SHORT)}
    if address is None:
        port = free_port()
        address = f"{ray.util.get_node_ip_address()}:{port}"
        # All processes inherit them. A runtime environment would do too, but Ray has processes ready for those that have none.
        inherited |= {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": address}
        options = {"address": "local", "object_store_memory": launch.object_store_mb * 1024**2, "include_dashboard": False}
    else:
        caches = {name: os.environ[name] for name in CACHE_VARIABLES if name in os.environ}
        options["runtime_env"] = {"env_vars": unless_of_job(caches | inherited) | {"RAY_ADDRESS": address}}
    try:
        with muted_stderr(verbose), kept_from_children(), outside_job() if starts else nullcontext(), environment(inherited):
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
    return starts


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Within, this process has these environment variables, and those that it starts keep them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
