"""Collectives of a worker group: over two real processes, and of a single worker without a process group."""

from pathlib import Path

import torch
import torch.distributed as dist

from raytrain2p.models.distributed import NumberOfFirst, WorkerGroup
from raytrain2p.models.precision import agree_on_precision
from tests.two_workers import found_by_two

CPU = torch.device("cpu")


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group, calls = WorkerGroup.current(), list[int]()
    number = NumberOfFirst(group)

    def make() -> dict[str, int | None]:
        calls.append(rank)
        return {"rank": rank, "nothing": None}

    found = {
        "first": group.is_first,
        "share": group.share([10, 11, 12]),
        "mean": group.mean(torch.tensor([1.0 + rank])).tolist(),
        "gather": group.gather(rank * 10),
        "from_first": group.from_first(make),
        "calls": len(calls),
        "number": [number.exchange(rank + 3), number.exchange(5 - rank), number.exchange(0)],
        "precision": agree_on_precision("bf16" if rank else "float32", CPU, group),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_agree(tmp_path: Path) -> None:
    first, second = found_by_two(one_of_two, tmp_path, seconds=120)
    assert (first.pop("first"), second.pop("first")) == (True, False)
    assert (first.pop("share"), second.pop("share")) == ([10, 12], [11])
    assert (first.pop("calls"), second.pop("calls")) == (1, 0)
    assert first == second
    assert first == {
        "mean": [1.5],
        "gather": [0, 10],
        "from_first": {"rank": 0, "nothing": None},
        "number": [0, 3, 5],
        "precision": "float32",
    }


def test_a_single_worker_needs_no_process_group() -> None:
    group = WorkerGroup.current()
    assert group == WorkerGroup(rank=0, size=1)
    assert group.is_first
    assert group.share([1, 2]) == [1, 2]
    assert group.mean(torch.tensor([3.0])).tolist() == [3.0]
    assert group.gather("x") == ["x"]
    assert group.from_first(lambda: "x") == "x"
    assert [NumberOfFirst(group).exchange(number) for number in (2, 0)] == [2, 0]
    assert agree_on_precision("bf16", CPU, group) == "bf16"
