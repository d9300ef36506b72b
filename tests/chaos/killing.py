"""Launches that are killed again and again, and what is left of them."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from tests.launch.launching import start_command

SECONDS_PER_LAUNCH = 240
LONG = "RAYTRAIN2P_CHAOS_TABLE"  # set by `make chaos`: where it wants the table
only_long = pytest.mark.skipif(LONG not in os.environ, reason="part of `make chaos`: each launch takes 20 s or more on 2 cores")


@dataclass
class Verdict:
    """What a launch left, against an undisturbed one: a row of the table in docs/chaos.md."""

    scenario: str
    kills: int
    runs: int
    directories: int
    duplicate_steps: int
    lost_steps: int
    same_losses: bool
    same_weights: bool
    status: str
    seconds_to_next_step: list[float] = field(default_factory=list)

    def check(self) -> None:
        assert (self.runs, self.directories) == (1, 1), self
        assert (self.duplicate_steps, self.lost_steps) == (0, 0), self
        assert self.same_losses, self
        assert self.same_weights, self
        assert self.status == "FINISHED", self


@dataclass
class Launch:
    """One launch ID in one directory, started as often as it takes.

    Args:
        folder: working directory; the store and the run directories are in it.
        arguments: of `python -m raytrain2p.train`.
        environment: beside that of a command.
    """

    folder: Path
    arguments: Sequence[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        log = self.folder / f"log{self.starts}"
        self.process = start_command(self.folder, log, *self.command(), **self.variables)

    def command(self) -> list[str]:
        """What follows `python -m`."""
        return ["raytrain2p.train", *self.arguments, "--launch-id", "chaos", "--json"]

    @property
    def variables(self) -> dict[str, str]:
        """Environment of its commands: features are shared with the launches beside it."""
        return {"RAYTRAIN2P_FEATURES": str(self.folder.parent / "features")} | self.environment

    @property
    def log(self) -> str:
        return (self.folder / f"log{self.starts}").read_text()

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=SECONDS_PER_LAUNCH)

    def directories(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("*/????????????????????????????????_*"))

    def steps(self) -> list[int]:
        """Steps whose loss is noted, in the order of the file."""
        found = []
        for directory in self.directories():
            if (directory / "metrics.jsonl").is_file():
                lines = (directory / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
                found += [point["step"] for point in map(json.loads, lines) if point["name"] == "train_loss"]
        return found

    def wait_for_steps(self, steps: int) -> None:
        """Until so many steps are noted."""
        self.wait_until(lambda: len(self.steps()) >= steps, 120)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Until it holds, while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.running(), self.log[-3000:]
            assert time.monotonic() < deadline, self.log[-3000:]
            time.sleep(0.05)

    def mlflow_runs(self) -> list[mlflow.entities.Run]:
        """Every run of its SQLite store."""
        client = mlflow.MlflowClient(f"sqlite:///{self.folder}/mlflow.db")
        return [run for experiment in client.search_experiments() for run in client.search_runs([experiment.experiment_id])]

    def rank_zero(self) -> int | None:
        """Process ID of the worker that writes."""
        for directory in self.directories():
            if (directory / "status.json").is_file():
                pid = int(json.loads((directory / "status.json").read_text())["pid"])
                return pid if Path(f"/proc/{pid}").exists() else None
        return None


def processes(title: str) -> list[int]:
    """Process IDs whose command line begins like this; Ray gives its processes titles."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if line.startswith(title.encode()):
                found.append(int(entry.name))
    return found


def kill(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def kill_driver(launch: Launch) -> bool:
    return launch.running() and kill(launch.process.pid if launch.process else None)


def kill_rank_zero(launch: Launch) -> bool:
    return kill(launch.rank_zero())


def kill_other_worker(launch: Launch) -> bool:
    others = [pid for pid in processes("ray::RayTrainWorker") if pid != launch.rank_zero()]
    return bool(others) and kill(others[0])


def kill_controller(launch: Launch) -> bool:
    found = processes("ray::TrainController")
    return bool(found) and kill(found[0])


TARGETS = {"driver": kill_driver, "rank 0": kill_rank_zero, "another worker": kill_other_worker, "Ray's controller": kill_controller}


def run_with_kills(launch: Launch, target: str, kills: int, seconds: tuple[float, float], seed: int) -> tuple[int, list[float]]:
    """Start the launch, and start it again whenever it died, while `target` is killed at random moments, until it ends well.

    Args:
        launch: to run.
        target: name of what is killed.
        kills: how often.
        seconds: least and most between the start of the launch, or the last kill, and the next one.
        seed: of the moments.

    Returns:
        How many kills struck, and after each one the seconds until the next step was noted.
    """
    moments = random.Random(seed)
    struck, waits = 0, []
    launch.start()
    due = time.monotonic() + moments.uniform(*seconds)
    killed_at: float | None = None
    noted = 0
    deadline = time.monotonic() + SECONDS_PER_LAUNCH * (kills + 1)
    while time.monotonic() < deadline:
        if killed_at is not None and len(launch.steps()) > noted:
            waits.append(time.monotonic() - killed_at)
            killed_at = None
        if not launch.running():
            if launch.wait() == 0:
                return struck, waits
            launch.start()
        if struck < kills and time.monotonic() >= due and TARGETS[target](launch):
            struck += 1
            if killed_at is None:
                killed_at, noted = time.monotonic(), len(launch.steps())
            due = time.monotonic() + moments.uniform(*seconds)
        time.sleep(0.1)
    raise AssertionError(f"the launch did not end:\n{launch.log[-3000:]}")


def verdict(scenario: str, launch: Launch, undisturbed: Launch, kills: int, waits: list[float]) -> Verdict:
    """Compare what a launch left with what an undisturbed one left."""
    client = mlflow.MlflowClient(f"sqlite:///{launch.folder}/mlflow.db")
    runs = launch.mlflow_runs()
    steps, wanted = launch.steps(), undisturbed.steps()
    sent = [metric.step for run in runs for metric in client.get_metric_history(run.info.run_id, "train_loss")]
    mine, other = last(launch), last(undisturbed)
    return Verdict(
        scenario,
        kills,
        runs=len(runs),
        directories=len(launch.directories()),
        duplicate_steps=len(steps) - len(set(steps)) + len(sent) - len(set(sent)),
        lost_steps=len(set(wanted) - set(steps)) + len(set(wanted) - set(sent)),
        same_losses=losses(launch) == losses(undisturbed),
        same_weights=mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine),
        status=runs[0].info.status,
        seconds_to_next_step=waits,
    )


def losses(launch: Launch) -> dict[int, float]:
    lines = (launch.directories()[0] / "metrics.jsonl").read_text().splitlines()
    return {point["step"]: point["value"] for point in map(json.loads, lines) if point["name"] == "train_loss"}


def last(launch: Launch) -> dict[str, torch.Tensor]:
    """The trained weights of last.ckpt."""
    found: dict[str, Any] = torch.load(launch.directories()[0] / "lightning_checkpoints" / "last.ckpt", weights_only=True)
    weights: dict[str, torch.Tensor] = found["state_dict"]
    return weights
