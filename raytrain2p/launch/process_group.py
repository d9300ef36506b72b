"""The process group of the workers, reachable at the address of their node alone.

Ray's own set-up has PyTorch listen on all interfaces, and neither PyTorch nor Gloo ask for a token. On a node with a loopback
address, no other machine reaches the workers.
"""

import os
import socket
from collections.abc import Iterable
from datetime import timedelta

import psutil
import ray
from ray.train.torch import TorchConfig

from raytrain2p.config import InputError, Problem
from raytrain2p.launch.ray_private import TorchBackend, WorkerGroup, set_torch_environment


class OwnAddressConfig(TorchConfig):
    """As TorchConfig, with the backend below."""

    @property
    def backend_cls(self) -> type["OwnAddressBackend"]:
        return OwnAddressBackend


class OwnAddressBackend(TorchBackend):
    """Starts the process group.

    Raises:
        InputError: a node's PyTorch finds no GPU, though one is reserved. Ray tries no further.
    """

    def on_start(self, worker_group: WorkerGroup, backend_config: TorchConfig) -> None:
        worker_group.execute(set_torch_environment)
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        if gpus:
            check_cuda(worker_group.execute(host_without_cuda))
        timeout = timedelta(seconds=backend_config.timeout_s)
        host, port = worker_group.execute_single(0, host_store, timeout)
        backend = "nccl" if gpus else "gloo"
        size = len(worker_group)
        ray.get([worker_group.execute_single_async(rank, join, backend, host, port, rank, size, timeout) for rank in range(size)])


def host_without_cuda() -> str | None:
    """In a process that has a GPU: the name of its node, if PyTorch finds none there."""
    import torch

    return None if torch.cuda.is_available() else socket.gethostname()


def check_cuda(found: Iterable[str | None]) -> None:
    """Check that PyTorch finds the GPUs that Ray has reserved.

    Args:
        found: by `host_without_cuda`.

    Raises:
        InputError: on some nodes it does not.
    """
    if without := sorted({host for host in found if host is not None}):
        what = f"PyTorch finds no GPU on {', '.join(without)}, where Ray has reserved one"
        raise InputError(Problem("launch.use_gpu=true", what, "install a CUDA build of PyTorch there, or set launch.use_gpu=false"))


def host_store(timeout: timedelta) -> tuple[str, int]:
    """On rank 0: start the store through which the workers find each other. Returns its address."""
    from torch.distributed import TCPStore

    global _store
    host = ray.util.get_node_ip_address()
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port: int = listener.getsockname()[1]
    _store = TCPStore(host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach())
    return host, port


_store = None  # of rank 0; it ends with its process


def network_card(address: str) -> str | None:
    """The name of the network card of this machine that has the address."""
    cards = psutil.net_if_addrs().items()
    return next((name for name, addresses in cards if address in [one.address for one in addresses]), None)


def join(backend: str, host: str, port: int, rank: int, size: int, timeout: timedelta) -> None:
    """On each worker: connect to the others."""
    from torch import distributed

    on_loopback = host.startswith("127.")
    own = "127.0.0.1" if on_loopback else ray.util.get_node_ip_address()
    if (card := network_card(own)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", card)  # it takes that of the host's name, often 127.0.1.1 or nothing
        if on_loopback:
            os.environ.setdefault("NCCL_SOCKET_IFNAME", card)
    store = _store if rank == 0 else distributed.TCPStore(host, port, is_master=False, timeout=timeout)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
