"""What FSDP exchanges, counted over two real processes."""

from collections import OrderedDict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain2p.worker.lightning_trainer import ShardedStrategy
from tests.two_workers import found_by_two

FROZEN, TRAINED = 64, 8


class Gathered(TorchDispatchMode):
    """Within, counts the bytes that come out of all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "all_gather" in func.overloadpacket.__name__:
            self.bytes += found.numel() * found.element_size()
        return found


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    base, adapter = nn.Linear(FROZEN, FROZEN, bias=False), nn.Linear(FROZEN, TRAINED, bias=False)
    base.requires_grad_(False)
    module, before = nn.Sequential(OrderedDict(base=base, adapter=adapter)), adapter.weight.detach().clone()
    fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    strategy = ShardedStrategy.__new__(ShardedStrategy)  # Ray's context gives it no more than the number of workers
    strategy._lightning_module = module
    with Gathered() as gathered, mock.patch.object(ShardedStrategy, "is_global_zero", rank == 0):
        found = strategy.lightning_module_state_dict()
    right = [name for name, value in found.items() if torch.equal(value, before)]
    torch.save({"names": list(found), "right": right, "bytes": gathered.bytes}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_a_checkpoint_gathers_what_trains_and_not_the_frozen_base(tmp_path: Path) -> None:
    first, second = found_by_two(one_of_two, tmp_path, seconds=120)
    assert first == {"names": ["adapter.weight"], "right": ["adapter.weight"], "bytes": 4 * FROZEN * TRAINED}
    assert second == {"names": [], "right": [], "bytes": 4 * FROZEN * TRAINED}
