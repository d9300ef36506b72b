"""What each contestant reports: the end and the loss of each step, as a line of a file. And what one step did, by torch's profiler."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

PROFILED = 4  # a step after the first ones, which allocate


class Clock:
    """One worker's.

    Args:
        out: folder for `steps<rank>`; `counts` is written there too if `profile` is set.
        steps: after which training may end; 0 for never.
    """

    def __init__(self, out: Path, rank: int, steps: int, profile: bool = False) -> None:
        self.out, self.rank, self.steps, self.done = out, rank, steps, 0
        self.stream = (out / f"steps{rank}").open("a", buffering=1)
        self.watched: Counter[str] = Counter()
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) if profile else None

    def step(self, loss: torch.Tensor | float) -> None:
        """A step is done; `loss` is this worker's share of it."""
        self.done += 1
        self.stream.write(json.dumps([time.time(), float(loss), os.getpid()]) + "\n")
        if self.profiler is not None and self.done == PROFILED - 1:
            self.watched.clear()
            self.profiler.start()
        elif self.profiler is not None and self.done == PROFILED:
            self.profiler.stop()
            (self.out / "counts").write_text(json.dumps(self.counts()))

    @property
    def ended(self) -> bool:
        return 0 < self.steps <= self.done

    def watch(self, name: str, module: nn.Module) -> None:
        """Count a module's calls, and the rows of its output."""

        def count(_: nn.Module, inputs: Any, output: Any) -> None:
            rows = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            self.watched[f"{name} calls"] += 1
            self.watched[f"{name} rows"] += rows.numel() // rows.shape[-1]

        module.register_forward_hook(count)

    def counts(self) -> dict[str, int]:
        """Of the profiled step. An operation that only calls others counts as they do: most are called by one that is listed too."""
        assert self.profiler is not None
        assert self.profiler.profiler is not None
        assert self.profiler.profiler.kineto_results is not None
        names = Counter(event.name() for event in self.profiler.profiler.kineto_results.events())
        return {
            "operations": sum(count for name, count in names.items() if name.startswith("aten::")),
            "matrix products": sum(names[name] for name in ("aten::mm", "aten::bmm", "aten::addmm", "aten::addmm_", "aten::baddbmm")),
            "copies": names["aten::copy_"],
            **self.watched,
        }
