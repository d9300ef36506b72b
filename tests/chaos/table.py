"""`python tests/chaos/table.py build/chaos.json docs/chaos.md`: writes the results of `make chaos` as a page."""

import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

PAGE = """# Chaos: kills and outages

Measured by `make chaos` on {machine}:
{kills} kills at {moments}, and outages. Each launch is compared with an
undisturbed one with the same settings (phase 1 with dropout, 400 steps, 1500 where MLflow or the disk fails; tiny models, float32
on the CPU): the number of MLflow runs and run directories, steps that are duplicated or missing in `metrics.jsonl` or in MLflow, the
loss of every step, and the trained weights, bit for bit. `runs verify` finds nothing afterwards.

| event | times | runs | directories | duplicate steps | missing steps | losses | weights | seconds to the next step |
|---|---|---|---|---|---|---|---|---|
{rows}

Of three random kills the first and the third happen in training, after a random number of further steps; the second happens a
random time after the first, while processes start. The seconds (median, maximum, number of kills) are from a kill to the next
step that was not recorded before; they include the start of the killed process and the steps since the last checkpoint, which are
repeated. A kill that is followed by another one before that step has no such time. Where the disk failed or a checkpoint was
damaged, they start with the next launch, after the repair; where MLflow failed, at that moment: training continues.
A short form runs in `make test`.
"""


def row(one: dict[str, Any]) -> str:
    """A line of the table."""
    waits = one["seconds_to_next_step"]
    seconds = f"{statistics.median(waits):.1f}" if waits else "no step left"
    if len(waits) > 1:
        seconds += f" (maximum {max(waits):.1f}, of {len(waits)})"
    cells = [one["scenario"], one["times"], one["runs"], one["directories"], one["duplicate_steps"], one["lost_steps"]]
    cells += ["equal" if one["same_losses"] else "DIFFER", "equal" if one["same_weights"] else "DIFFER", seconds]
    return "| " + " | ".join(map(str, cells)) + " |"


def page(rows: list[dict[str, Any]]) -> str:
    """The page in Markdown."""
    machine = f"{os.cpu_count()} cores ({platform.machine()}, {platform.system()}), no GPU"
    kills = sum(one["times"] for one in rows if "kill" in one["scenario"].lower())
    moments = "seeded random moments and at each named one"
    return PAGE.format(machine=machine, kills=kills, moments=moments, rows="\n".join(map(row, rows)))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(page(json.loads(source.read_text())))
