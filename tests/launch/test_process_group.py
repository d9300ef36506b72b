"""The workers' process group, in two real processes: it works, and no other machine reaches it."""

import multiprocessing
import os
from datetime import timedelta
from typing import Any

import pytest
import torch

from raytrain2p.config import InputError
from raytrain2p.launch.process_group import check_cuda, host_store, join, network_card
from tests.launch.sockets import listeners

TIMEOUT = timedelta(seconds=60)


def worker(rank: int, address: Any, found: Any) -> None:
    """Join a group of two, add up, and report the sum and the listening sockets."""
    if rank == 0:
        host, port = host_store(TIMEOUT)
        address.put((host, port))
    else:
        host, port = address.get()
    join("gloo", host, port, rank, 2, TIMEOUT)
    total = torch.tensor(float(rank + 1))
    torch.distributed.all_reduce(total)
    found.put((total.item(), listeners(os.getpid())))
    torch.distributed.barrier()


def test_the_network_card_of_an_address_is_found() -> None:
    """tests/cluster shows that Gloo takes it: on those nodes, the host's name has no address."""
    found = {address: network_card(address) for address in ("127.0.0.1", "203.0.113.1")}  # the second is nobody's
    assert found == {"127.0.0.1": "lo", "203.0.113.1": None}


@pytest.mark.timeout(180)
def test_two_workers_add_up_and_listen_on_loopback_alone() -> None:
    spawn = multiprocessing.get_context("spawn")
    address, found = spawn.Queue(), spawn.Queue()
    workers = [spawn.Process(target=worker, args=(rank, address, found)) for rank in range(2)]
    for process in workers:
        process.start()
    results = [found.get(timeout=150) for _ in workers]
    for process in workers:
        process.join()
    assert [total for total, _ in results] == [3.0, 3.0]
    sockets = {one for _, some in results for one in some}
    assert len(sockets) >= 3, "the store, and a Gloo listener of each"
    assert [one for one in sockets if not one.on_loopback] == []


def test_nodes_where_pytorch_finds_no_gpu_are_named_once() -> None:
    check_cuda([None, None])
    with pytest.raises(InputError, match="PyTorch finds no GPU on a, b, where Ray has reserved one"):
        check_cuda(["b", None, "a", "b"])
