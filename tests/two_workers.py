"""Two real processes over Gloo."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def found_by_two(work: Callable[[int, str], None], folder: Path, seconds: float) -> list[Any]:
    """What `work(rank, folder)` has saved in the folder as `<rank>.pt`, in each of two processes that end within so many seconds."""
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=work, args=(rank, str(folder))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds)
    assert [worker.exitcode for worker in workers] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
