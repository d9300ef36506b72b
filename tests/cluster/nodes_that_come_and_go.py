"""A head and a second Ray node on this machine, which is lost, drained or started again while a launch trains on both."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from matplotlib.figure import Figure

from tests.chaos.killing import Launch
from tests.launch.launching import DASHBOARD_PORT, PORT, WORKER_PORTS, command_environment, head, ray_node, second_node

HEAD_PORT = PORT + 200
STEPS = 400
SECONDS = 300.0  # for whatever a test waits for
ADDRESS = f"127.0.0.2:{HEAD_PORT}"


@dataclass
class Cluster:
    """Of a head and, at times, a second node with one CPU each."""

    folder: Path
    nodes: ExitStack
    started: int = 0
    second: int = 0  # its process ID; 0: there is none

    def start_second(self) -> None:
        self.started += 1
        folder = self.folder / f"node{self.started}"
        folder.mkdir()
        command = second_node(ADDRESS, "--num-cpus=1", "--object-store-memory=100000000")
        self.second = self.nodes.enter_context(ray_node(folder, command))

    def lose_second(self) -> None:
        """As a machine that loses its power: every process ends at once."""
        for process in [psutil.Process(self.second), *psutil.Process(self.second).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.second = 0

    def drain(self, address: str, seconds: int) -> None:
        """Give notice that the node with this address is taken away."""
        script = (
            "import ray, subprocess; ray.init(log_to_driver=False); "
            f"print(next(node['NodeID'] for node in ray.nodes() if node['Alive'] and node['NodeManagerAddress'] == {address!r}))"
        )
        environment = command_environment(self.folder, RAY_ADDRESS=ADDRESS, RAY_AUTH_MODE="token")
        found = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot", f"--deadline-remaining-seconds={seconds}"]
        command = ["ray", "drain-node", f"--address={ADDRESS}", f"--node-id={found.stdout.split()[-1]}", *reason]
        subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], env=environment, check=True, capture_output=True)


def start_cluster(folder: Path, nodes: ExitStack, head_cpus: int = 1) -> Cluster:
    command = head(HEAD_PORT, DASHBOARD_PORT + 200, WORKER_PORTS, "--node-ip-address=127.0.0.2", f"--num-cpus={head_cpus}")
    (folder / "head").mkdir(parents=True)
    nodes.enter_context(ray_node(folder / "head", command))
    return Cluster(folder, nodes)


def many_records(shapes: Path, path: Path) -> Path:
    """The records of coloured shapes forty times over: an epoch, at whose end a checkpoint is saved, has 120 steps of 16."""
    lines = [json.loads(line) for line in (shapes / "phase2.jsonl").read_text().splitlines()]
    rows = [line | ({"image": str(shapes / line["image"])} if "image" in line else {}) for line in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 40))
    return path


def launch_on(config: Path, aligner: Path, records: Path, folder: Path, *overrides: str) -> Launch:
    """Phase 2 on tiny models without dropout. At a learning rate of 1e-2, these random models amplify the rounding of a sum over two
    workers to 1e-3 in 25 steps."""
    settings = {
        "model.aligner": aligner,
        "data.train": records,
        "training.max_steps": STEPS,
        "training.learning_rate": 1e-4,
        "training.global_batch_size": 16,
        "training.log_every": 5,
        "checkpoint.every_steps": 50,
        "data.val": "null",
        "data.test": "{}",
        "launch.grow_after_s": 5,
    }
    arguments = ["--phase=2", f"--config={config}/phase2.yaml", *(f"{key}={value}" for key, value in settings.items()), *overrides]
    return Launch(folder, arguments, {"RAY_ADDRESS": ADDRESS})


LaunchIn = Callable[..., Launch]  # of a folder and settings


def launcher(config: Path, aligner: Path, shapes: Path, folder: Path) -> LaunchIn:
    return partial(launch_on, config, aligner, many_records(shapes, folder / "records.jsonl"))


def undisturbed_losses(launch_in: LaunchIn, folder: Path) -> dict[int, float]:
    """Of one worker. Launched once, for all that is compared with it."""
    launch = launch_in(folder / "undisturbed")
    if not launch.directories():
        launch.start()
        assert launch.wait() == 0, launch.log[-3000:]
    return losses(launch)


def losses(launch: Launch) -> dict[int, float]:
    """Of each step, which metrics.jsonl has once."""
    (directory,) = launch.directories()
    points = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = [(point["step"], point["value"]) for point in points if point["name"] == "train_loss"]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), "each step once, in order"
    return dict(found)


def spread(first: dict[int, float], second: dict[int, float]) -> float:
    """The largest difference of two loss curves."""
    assert first.keys() == second.keys()
    return max(abs(first[step] - second[step]) for step in first)


def changes(log: str) -> list[tuple[int, str]]:
    """Where the number of workers changed: the step from which it resumed, and what was said."""
    found = re.findall(r"(\d+ workers? from now on).*?at step (\d+)", log, re.DOTALL)
    return [(int(step), line) for line, step in found]


def plot(elastic: dict[int, float], undisturbed: dict[int, float], where: list[tuple[int, str]], path: Path) -> None:
    """Both loss curves, and how far they are apart."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    above.plot(*zip(*undisturbed.items(), strict=True), color="tab:orange", linewidth=3, alpha=0.5, label="undisturbed, 1 worker")
    above.plot(*zip(*elastic.items(), strict=True), color="tab:blue", linewidth=0.7, label="launch.num_workers=[1, 2]")
    for step, line in where:
        for axes in (above, below):
            axes.axvline(step, color="grey", linestyle="--", linewidth=0.8)
        above.text(step, above.get_ylim()[1], f" {line}", rotation=90, va="top", ha="right", fontsize=8)
    above.set(ylabel="train_loss", title="A node is lost, and comes back")
    above.legend()
    below.plot(list(elastic), [abs(elastic[step] - undisturbed[step]) for step in elastic], color="tab:blue", linewidth=0.7)
    below.axhline(1e-4, color="tab:red", linewidth=0.8)
    below.set(xlabel="step", ylabel="difference", ylim=(0, 1.2e-4))
    figure.savefig(path, dpi=110)
