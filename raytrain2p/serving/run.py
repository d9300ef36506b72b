"""A server from its start to its end: a Ray of its own on this machine, the deployments, and the answers in flight when it is stopped."""

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from raytrain2p.config import InputError, Problem
from raytrain2p.config.secrets import one_line
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.interrupts import StoppedError, stoppable
from raytrain2p.launch.cluster import connected, local_capacity
from raytrain2p.launch.quiet import muted_stderr, quiet
from raytrain2p.serving.limits import Limits

OBJECT_STORE_MB = 100  # requests and answers alone pass through it
SECONDS_TO_DRAIN, SECONDS_TO_FLUSH = 120.0, 2.0  # for answers; for the last bytes of them in Serve's proxy
PACKAGES = ("fastapi", "prometheus_client", "ray.serve")


def check_installed() -> None:
    """Check that the packages of the extra are here.

    Raises:
        InputError: they are not.
    """
    try:
        for package in PACKAGES:
            __import__(package)
    except ModuleNotFoundError as error:
        raise InputError(Problem("serve", f"needs {error.name}, which is not installed", "pip install 'raytrain2p[serve]'")) from None


def check_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        InputError: it is in use, or the address is not one of this machine.
    """
    where = f"--host {host} --port {port}"
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            Problem(where, f"cannot be listened on: {reason}", "choose another --port, or an address of this machine")
        ) from None


def check_replicas(replicas: int) -> None:
    """Check that this machine has a CPU for each process of the model.

    Raises:
        InputError: it has not.
    """
    if not (capacity := local_capacity()).fits(replicas, 1, 0):
        raise InputError(Problem(f"--replicas {replicas}", f"needs as many CPUs; this machine has {capacity.cpus:g}", "start fewer"))


def run_server(
    path: Path,
    name: str,
    host: str,
    port: int,
    limits: Limits,
    token: str | None,
    replicas: int,
    batch_size: int,
    verbose: bool,
    say: Callable[[str], None],
) -> int:
    """Serve until a signal comes; then finish the answers in flight. Returns the exit code.

    Args:
        path: of the model.pt.
        name: of the model, for clients.
        token: digest of the token that requests must bring, if any.
        replicas: processes with the model.
        batch_size: the most answers that are written together.
        verbose: print Ray's own output too.
        say: called with lines for the user.

    Raises:
        InputError: the model cannot be used, or Ray cannot be started.
        StoppedError: a signal came before the server was ready.
    """
    import ray
    import torch
    from ray import serve

    from raytrain2p.serving.deployment import application

    if not verbose:
        quiet()
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    os.environ["RAY_ADDRESS"] = "local"  # Serve's addresses and its end are those of a whole cluster
    gpus = torch.cuda.device_count()
    launch = LaunchSettings(object_store_mb=OBJECT_STORE_MB)
    with stoppable(), connected(launch, verbose) as capacity:
        # The processes that speak HTTP have one. Threads that compete for it wait for each other: half of the answers on 2 busy CPUs
        cpus = max(1, (int(capacity.cpus) - 1) // replicas)
        app = application(path, name, limits, token, replicas, batch_size, cpus, min(1.0, gpus / replicas))
        say(f"starting the model in {replicas} process{'es' if replicas > 1 else ''} with {cpus} CPU{'s' if cpus > 1 else ''} each")
        with muted_stderr(verbose):
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port},
                logging_config={"enable_access_log": False},  # its lines would have what clients ask for
            )
            handle = serve.run(app, name="raytrain2p", logging_config={"enable_access_log": False})
        try:
            problems = handle.unready.remote().result()
        except ray.exceptions.RayError as error:
            what = f"ended while it was loaded: {one_line(error)}"
            raise InputError(Problem("a process of the model", what, "free memory; --ray-logs shows more")) from None
        if problems:
            raise InputError(problems)
        say(f"{name} at http://{f'[{host}]' if ':' in host else host}:{port}{'' if token else ' (this machine alone)'}; Ctrl-C stops it")
        try:
            wait_for_signal()
        except StoppedError:
            say("stopping after the answers in flight (again: at once)")
            drained = handle.drain.remote(SECONDS_TO_DRAIN).result()
            if not drained:
                say(f"answers that took longer than {SECONDS_TO_DRAIN:.0f} s were cut off")
            time.sleep(SECONDS_TO_FLUSH)
            return 0  # Ray ends with all of Serve: its own shutdown would print what it kills
    raise AssertionError("a server ends by a signal")


def wait_for_signal() -> None:
    """Raises StoppedError."""
    import signal

    while True:
        signal.pause()
