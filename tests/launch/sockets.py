"""What strangers can reach and read of processes: their sockets, their titles, the files that they leave."""

import ipaddress
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import grpc
import psutil

# One call without an effect of each of Ray's services that takes a call over the network
GRPC_CALLS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "ray.rpc.InternalKVGcsService/InternalKVKeys",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.ObjectManagerService/Pull",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.ReporterService/GetTraceback",
    "ray.rpc.RayletDriver/ClusterInfo",
    "ray.rpc.RuntimeEnvService/GetRuntimeEnvsInfo",
)
METRICS = "metrics"  # a page of figures for Prometheus, whatever is asked
HTTP_PATHS = ("/", "/metrics", "/api/jobs/", "/nodes", "/get_runtime_envs_info")


@dataclass(frozen=True)
class Listener:
    """A listening socket."""

    ip: str
    port: int
    pid: int
    process: str

    @property
    def on_loopback(self) -> bool:
        ip = ipaddress.ip_address(self.ip)
        return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def listeners(pid: int) -> set[Listener]:
    """Of a process and of all that it has started."""
    found, started = set(), dict[int | None, psutil.Process]()
    with suppress(psutil.NoSuchProcess):
        started = {one.pid: one for one in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]}
    for one in psutil.net_connections("inet"):  # of all processes at once: process by process it takes ten times as long
        if one.status == psutil.CONN_LISTEN and one.pid in started:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found.add(Listener(one.laddr.ip, one.laddr.port, one.pid, " ".join(started[one.pid].cmdline())[:200]))
    return found


@dataclass
class Seen:
    """Of the processes that were started from here: where they listened, and the latest title of each."""

    listening: set[Listener] = field(default_factory=set)
    titles: dict[int, str] = field(default_factory=dict)

    @property
    def ray_sessions(self) -> set[Path]:
        """The directories of the Ray clusters among them."""
        return {Path(found) for title in self.titles.values() for found in re.findall(r"--session[_-]dir[= ](\S+)", title)}


@contextmanager
def watched(seconds: float = 0.3) -> Iterator[Seen]:
    """Within, a thread looks at the processes that are started from here."""
    seen = Seen()
    done = threading.Event()

    def watch() -> None:
        while not done.wait(seconds):
            seen.listening.update(listeners(os.getpid()))
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    seen.titles[process.pid] = " ".join(process.cmdline())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def files_with(secrets: Iterable[str], *folders: Path) -> list[Path]:
    """The files below the folders that contain one of the secrets."""
    wanted = [secret.encode() for secret in secrets]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    found = []
    for path in files:
        with suppress(FileNotFoundError):  # of a cluster that is still there
            if any(secret in path.read_bytes() for secret in wanted):
                found.append(path)
    return found


def answers(port: int, host: str = "127.0.0.1") -> set[str]:
    """What a socket answers without a token, over gRPC and HTTP: `refused`, METRICS, or each other call that it took."""
    return _over_grpc(f"{host}:{port}") | _over_http(host, port)


def _over_grpc(address: str) -> set[str]:
    found = set()
    with grpc.insecure_channel(address) as channel:
        for method in GRPC_CALLS:
            call = channel.unary_unary(f"/{method}", lambda message: message, lambda message: message)
            try:
                call(b"", timeout=3)
                found.add(method)
            except grpc.RpcError as error:
                code = error.code()
                if code == grpc.StatusCode.UNAUTHENTICATED:
                    found.add("refused")
                elif code == grpc.StatusCode.UNAVAILABLE:  # no gRPC is spoken here
                    return set()
                elif code not in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.DEADLINE_EXCEEDED):
                    found.add(f"{method}: {code.name}")
    return found


def _over_http(host: str, port: int) -> set[str]:
    found = set()
    for path in HTTP_PATHS:
        connection = HTTPConnection(host, port, timeout=3)
        with suppress(OSError, HTTPException):
            connection.request("GET", path)
            response = connection.getresponse()
            if response.status in (401, 403):
                found.add("refused")
            elif response.status < 300:
                is_prometheus = response.getheader("Content-Type", "").startswith("text/plain; version=")
                found.add(METRICS if is_prometheus else f"GET {path}")
        connection.close()
    return found
