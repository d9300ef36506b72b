"""Launches that are killed repeatedly, compared with undisturbed ones."""

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest
import torch

from raytrain2p.runs.request import parse, read_request
from raytrain2p.runs.verify import add_arguments, verify
from tests.launch.launching import start_command

MOMENTS_DIRECTORY = Path(__file__).parent / "moments"  # on PYTHONPATH
SECONDS_PER_LAUNCH = 240
STEPS = 400
HUNG = "rank 0, which hangs"
LONG = "RAYTRAIN2P_CHAOS_TABLE"  # set by `make chaos`: path of the table
only_long = pytest.mark.skipif(LONG not in os.environ, reason="part of `make chaos`: each launch takes 20 s or more on 2 cores")


@dataclass
class Verdict:
    """A launch compared with an undisturbed one: a row of the table in docs/chaos.md."""

    scenario: str
    times: int
    runs: int
    directories: int
    duplicate_steps: int
    lost_steps: int
    same_losses: bool
    same_weights: bool
    status: str
    seconds_to_next_step: list[float] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)  # that `runs verify` finds

    def check(self) -> None:
        assert (self.runs, self.directories) == (1, 1), self
        assert (self.duplicate_steps, self.lost_steps) == (0, 0), self
        assert self.same_losses, self
        assert self.same_weights, self
        assert self.status == "FINISHED", self
        assert not self.differences, self


@dataclass
class Launch:
    """One launch ID in one directory, started as often as necessary.

    Args:
        folder: working directory, with the store and the run directories.
        arguments: of `python -m raytrain2p.train`.
        environment: added to that of a command.
    """

    folder: Path
    arguments: Sequence[str]
    environment: dict[str, str]
    server: str = ""  # tracking URI, if not that of an SQLite file in the folder
    experiment: str = ""  # in a store that several launches share
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        log = self.folder / f"log{self.starts}"
        self.process = start_command(self.folder, log, *self.command(), **self.variables)

    def command(self) -> list[str]:
        """What follows `python -m`."""
        return ["raytrain2p.train", *self.arguments, "--launch-id", f"chaos-{self.experiment}".replace("_", "-"), "--json"]

    @property
    def variables(self) -> dict[str, str]:
        """Environment of its commands. Launches in one parent folder share their features."""
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
        """Steps whose loss is in metrics.jsonl, in the order of the file."""
        found = []
        for directory in self.directories():
            if (directory / "metrics.jsonl").is_file():
                lines = (directory / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
                points = map(json.loads, (line for line in lines if b"train_loss" in line))  # asked for 20 times a second
                found += [point["step"] for point in points if point["name"] == "train_loss"]
        return found

    def wait_for_steps(self, steps: int) -> None:
        """Wait until metrics.jsonl has so many steps."""
        self.wait_until(lambda: len(self.steps()) >= steps, 300)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait for the condition, while the command runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.running(), self.log[-3000:]
            assert time.monotonic() < deadline, self.log[-3000:]
            time.sleep(0.05)

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.server or f"sqlite:///{self.folder}/mlflow.db")

    def mlflow_runs(self) -> list[mlflow.entities.Run]:
        """Every run of its store, or of its experiment."""
        client = self.client
        experiments = [one for one in client.search_experiments() if self.experiment in ("", one.name)]
        return [run for experiment in experiments for run in client.search_runs([experiment.experiment_id])]

    def status(self) -> dict[str, Any] | None:
        """status.json: of the process that writes, or wrote last."""
        for directory in self.directories():
            if (directory / "status.json").is_file():
                found: dict[str, Any] = json.loads((directory / "status.json").read_text())
                return found
        return None

    def rank_zero(self) -> int | None:
        """Process ID of the worker that writes."""
        status = self.status()
        return status["pid"] if status is not None and Path(f"/proc/{status['pid']}").exists() else None

    def differences(self) -> list[str]:
        """What `runs verify` finds under its output root."""
        options = parse("verify", "verify", add_arguments, [f"output.root={self.folder}/checkpoints"])
        return [str(one) for one in verify(read_request(options)).differences]


def launch_in(folder: Path, tiny_config: Path, workers: int = 1, steps: int = STEPS, **environment: str) -> Launch:
    """400 or more steps of phase 1 with dropout on tiny models: a few seconds, several checkpoints and epochs."""
    arguments = [
        "--phase=1",
        f"--config={tiny_config}/phase1.yaml",
        f"training.max_steps={steps}",
        "training.global_batch_size=8",
        "training.log_every=7",
        "checkpoint.every_steps=20",
        "checkpoint.best_of=saves",
        "model.dropout=0.3",
        "data.val=null",
        "launch.max_failures=100",
        f"launch.num_workers={workers}",
    ]
    return Launch(folder, arguments, environment)


def processes(title: str) -> list[int]:
    """IDs of the processes that this one has started, directly or not, whose command line begins like this; Ray gives its
    processes titles. Another launch on the same machine is never among them.
    """
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
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


def stop_rank_zero(launch: Launch) -> bool:
    """It stays, and does not answer."""
    pid = launch.rank_zero()
    if pid is not None:
        os.kill(pid, signal.SIGSTOP)
    return pid is not None


TARGETS = {
    "driver": kill_driver,
    "rank 0": kill_rank_zero,
    "another worker": kill_other_worker,
    "Ray's controller": kill_controller,
    HUNG: stop_rank_zero,
}


class Stopwatch:
    """Seconds from a kill to the next step of the process that takes over: a worker may outlive its driver for a moment."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.measured: list[float] = []
        self.killed_at: float | None = None  # None: stopped

    def start(self, killed_at: float) -> None:
        """Measure from this moment (seconds since the epoch)."""
        self.killed_at, self.before = killed_at, self.launch.status()
        self.steps_before: int | None = None

    def update(self) -> None:
        """Stop if the next step is there."""
        if self.killed_at is None:
            return
        if self.steps_before is None and self.launch.status() != self.before:
            self.steps_before = len(self.launch.steps())
        if self.steps_before is not None and len(self.launch.steps()) > self.steps_before:
            self.measured.append(time.time() - self.killed_at)
            self.killed_at = None

    def stopped(self) -> bool:
        return self.killed_at is None


def keep_up(launch: Launch, stopwatch: Stopwatch, condition: Callable[[], bool]) -> bool:
    """Start the launch again whenever it ends with an error, until the condition holds (True) or it has succeeded (False)."""
    deadline = time.monotonic() + SECONDS_PER_LAUNCH
    while time.monotonic() < deadline:
        running = launch.running()
        stopwatch.update()
        if not running:
            if launch.wait() == 0:
                return False
            launch.start()
        if condition():
            return True
        time.sleep(0.05)
    raise AssertionError(f"the launch did not continue:\n{launch.log[-3000:]}")


def run_with_kills(launch: Launch, target: str, kills: int, seconds: tuple[float, float], seed: int) -> tuple[int, list[float]]:
    """Start the launch, and again whenever it ends with an error, until it succeeds; meanwhile kill `target` at random moments.

    Of three kills the first and the third happen in training, after a random number of further steps; the second `seconds`
    after the first, when processes are starting most of the time.

    Args:
        target: key of TARGETS.
        seconds: least and most between a first kill and a second one.
        seed: of the random moments.

    Returns:
        The number of kills, and the seconds from each kill to the next step, unless another kill came before that step.
    """
    moments, stopwatch = random.Random(seed), Stopwatch(launch)

    def killed(number: int) -> bool:
        """Whether the launch lasted until this kill."""
        if number % 3 == 1:
            due = time.monotonic() + moments.uniform(*seconds)
            running = keep_up(launch, stopwatch, lambda: time.monotonic() >= due)
        else:
            running = keep_up(launch, stopwatch, stopwatch.stopped)
            wanted = len(launch.steps()) + moments.randint(1, 20)
            running = running and keep_up(launch, stopwatch, lambda: len(launch.steps()) >= wanted)
        if not (running and keep_up(launch, stopwatch, lambda: TARGETS[target](launch))):
            return False
        stopwatch.start(time.time())
        return True

    launch.start()
    count = len(list(itertools.takewhile(killed, range(kills))))
    keep_up(launch, stopwatch, lambda: False)
    return count, stopwatch.measured


def verdict(scenario: str, launch: Launch, undisturbed: Launch, times: int, waits: list[float]) -> Verdict:
    """Compare the runs, directories, steps and weights of a launch with those of an undisturbed one."""
    runs = launch.mlflow_runs()
    steps, wanted = launch.steps(), undisturbed.steps()
    sent = [metric.step for run in runs for metric in launch.client.get_metric_history(run.info.run_id, "train_loss")]
    mine, other = last(launch), last(undisturbed)
    return Verdict(
        scenario,
        times,
        runs=len(runs),
        directories=len(launch.directories()),
        duplicate_steps=len(steps) - len(set(steps)) + len(sent) - len(set(sent)),
        lost_steps=len(set(wanted) - set(steps)) + len(set(wanted) - set(sent)),
        same_losses=losses(launch) == losses(undisturbed),
        same_weights=mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine),
        status=runs[0].info.status,
        seconds_to_next_step=waits,
        differences=launch.differences(),
    )


def losses(launch: Launch) -> dict[int, float]:
    lines = (launch.directories()[0] / "metrics.jsonl").read_text().splitlines()
    return {point["step"]: point["value"] for point in map(json.loads, lines) if point["name"] == "train_loss"}


def last(launch: Launch) -> dict[str, torch.Tensor]:
    """The trained weights of last.ckpt."""
    found: dict[str, Any] = torch.load(launch.directories()[0] / "lightning_checkpoints" / "last.ckpt", weights_only=True)
    weights: dict[str, torch.Tensor] = found["state_dict"]
    return weights
