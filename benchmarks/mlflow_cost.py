"""What tracking costs a step: the program's run writer, against Lightning's MLFlowLogger and against none.

python -m benchmarks.mlflow_cost OUT [--steps N] [--rounds N]     in a process of its own
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.case import prepare
from benchmarks.options import Options
from benchmarks.report import Bar, Found, Table, number
from benchmarks.step import command
from benchmarks.turns import Contestant, Ratio, python

NAMES = {
    "ours": "raytrain2p: all steps, written every 10 steps, sent by a thread",
    "logger": "MLFlowLogger, all steps",
    "logger10": "MLFlowLogger, every 10th step",
}
STEPS, ROUNDS = 300, 3
STEP = 0.02  # seconds asleep: all CPU time is that of tracking
METRICS = ("train_loss", "learning_rate", "epoch")


def measure(options: Options) -> Found:
    steps, rounds = (40, 1) if options.short else (STEPS, ROUNDS)
    out = options.folder / "mlflow"
    out.mkdir()
    child = Contestant(
        "mlflow", python("-m", "benchmarks.mlflow_cost", str(out), "--steps", str(steps), "--rounds", str(rounds)), out / "log", dict
    )
    try:
        child.wait_until((out / "result.json").exists, 580)
    finally:
        child.end()
    results = json.loads((out / "result.json").read_text())
    real = step_seconds(options)
    rows, found, costs = [], Found(), dict[str, list[float]]()
    for name in NAMES:
        costs[name] = [max(one - none, 0.0) / steps for one, none in zip(results[name]["cpu"], results["none"]["cpu"], strict=True)]
        wall = [max(one - none, 0.0) / steps for one, none in zip(results[name]["wall"], results["none"]["wall"], strict=True)]
        shares = f"{statistics.median(costs[name]) / real:.2%}"
        rows.append([NAMES[name], *(f"{number(statistics.median(values) * 1e3)} ms" for values in (costs[name], wall)), shares])
        options.say(f"{NAMES[name]}: {rows[-1][1:]}")
    ours = statistics.median(costs["ours"])
    for name in ("logger", "logger10"):
        found.bars.append(Bar(NAMES[name], Ratio.of([one / ours for one in costs[name]]), "MLflow, CPU time a step"))
    columns = ["who", "CPU time a step", "time a step", f"CPU time, of a step of phase 2 ({real:.2f} s)"]
    notes = [f"{len(METRICS)} metrics a step to SQLite, {steps} steps in which nothing else is computed, with what is sent at the end."]
    found.tables.append(Table("MLflow, beyond the same steps without any", columns, rows, notes))
    return found


def step_seconds(options: Options) -> float:
    """Of phase 2, batch 16, LoRA on all linear layers, by the bare loop."""
    case = options.case.with_aligner(folder=str(options.folder / "mlflow_step"), steps=6)
    prepare(case)
    contestant = command("module_loop", case, case.path / "loop", options)
    try:
        contestant.wait_for_step(case.steps, 240)
        ends = [step.end for _, step in sorted(contestant.steps().items())]
    finally:
        contestant.end()
    return statistics.median(after - before for before, after in itertools.pairwise(ends[1:]))


def with_run_writer(folder: Path, steps: int, step: Callable[[], None]) -> tuple[float, float]:
    """Seconds and CPU seconds, through the program's own run and writer."""
    from raytrain2p.config import load_settings
    from raytrain2p.tracking.create_run import get_or_create_run
    from raytrain2p.tracking.metrics_file import MetricPoint
    from raytrain2p.tracking.mlflow_store import prepare_store
    from raytrain2p.tracking.run import launch_record
    from raytrain2p.tracking.run_writer import open_run_writer

    settings = load_settings(2, None, [f"output.root={folder}/checkpoints", f"tracking.uri=sqlite:///{folder}/mlflow.db"])
    prepare_store(settings, "benchmark")
    launch_record(settings.output.root, "any").parent.mkdir(parents=True, exist_ok=True)
    run = get_or_create_run(settings, "phase2", "benchmark", "launch-benchmark")
    with open_run_writer(run, settings.tracking.uri, {"config": {}, "command": "", "facts": {}}, print) as writer:
        deadline = time.monotonic() + 30
        while "settings and tags" in writer.mlflow_sync.mlflow_sync.unsent() and time.monotonic() < deadline:
            time.sleep(0.2)  # what describes the run is sent once, not in each step
        begin, used = time.perf_counter(), time.process_time()
        points = list[MetricPoint]()
        for number_ in range(1, steps + 1):
            step()
            points += [MetricPoint(name, 0.5, number_, time.time()) for name in METRICS]
            if number_ % 10 == 0:
                writer.write(points)
                points.clear()
        writer.finish("FINISHED")
        return time.perf_counter() - begin, time.process_time() - used


def with_logger(folder: Path, steps: int, step: Callable[[], None], every: int) -> tuple[float, float]:
    from pytorch_lightning.loggers import MLFlowLogger

    logger = MLFlowLogger("benchmark", tracking_uri=f"sqlite:///{folder}/mlflow.db")
    logger.log_hyperparams({"a": 1})
    begin, used = time.perf_counter(), time.process_time()
    for number_ in range(1, steps + 1):
        step()
        if number_ % every == 0:
            logger.log_metrics(dict.fromkeys(METRICS, 0.5), number_)
    logger.finalize("success")
    return time.perf_counter() - begin, time.process_time() - used


def without(folder: Path, steps: int, step: Callable[[], None]) -> tuple[float, float]:
    begin, used = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    return time.perf_counter() - begin, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    ways: dict[str, Callable[..., tuple[float, float]]] = {
        "none": without,
        "ours": with_run_writer,
        "logger": functools.partial(with_logger, every=1),
        "logger10": functools.partial(with_logger, every=10),
    }
    results: dict[str, dict[str, list[Any]]] = {name: {"wall": [], "cpu": []} for name in ways}
    for number_ in range(options.rounds):
        for name, way in ways.items():
            folder = options.out / f"{name}{number_}"
            folder.mkdir()
            wall, cpu = way(folder, options.steps, lambda: time.sleep(STEP))
            results[name]["wall"].append(wall)
            results[name]["cpu"].append(cpu)
    (options.out / "part").write_text(json.dumps(results))
    (options.out / "part").replace(options.out / "result.json")


if __name__ == "__main__":
    main()
