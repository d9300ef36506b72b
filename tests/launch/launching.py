"""Launches as a user makes them: the command in a process of its own, on a Ray that all these tests share."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.pretrained import fingerprint

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("circle", "square")
PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # each test process has a Ray head of its own
HEAD, PORT, DASHBOARD_PORT, WORKER_PORTS = f"127.0.{PROCESS}.2", 6399 + PROCESS, 8299 + PROCESS, 21_000 + 1000 * PROCESS
SWEEP_STEPS = 60
SWEEP_SPACE: dict[str, Any] = {"training.learning_rate": {"loguniform": [1e-4, 3e-2]}, "model.hidden": {"choice": [16, 32]}}


@pytest.fixture(scope="session")
def embedded_features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A feature store for the embedded set, whose images take a minute to encode: once for all tests that take it."""
    return str(tmp_path_factory.mktemp("embedded_features"))


@pytest.fixture(scope="session")
def ray_head(tmp_path_factory: pytest.TempPathFactory, embedded_features: str) -> Iterator[str]:
    """The address of a Ray head with 2 CPUs, started by hand with cluster/head.sh; stopped by its process ID."""
    options = ["--num-cpus=2", "--object-store-memory=200000000", f"--port={PORT}", f"--dashboard-port={DASHBOARD_PORT}"]
    options += [f"--node-ip-address={HEAD}", f"--ray-client-server-port={PORT + 10}"]
    options += [f"--min-worker-port={WORKER_PORTS}", f"--max-worker-port={WORKER_PORTS + 999}"]
    command = ["bash", str(ROOT / "cluster" / "head.sh"), *options]
    # As beside any other Ray: the port is taken on which an agent listens by default, without which no job is taken.
    with taken(52365), ray_node(tmp_path_factory.mktemp("ray"), command, RAYTRAIN2P_FEATURES=embedded_features):  # of jobs
        yield f"{HEAD}:{PORT}"


@contextmanager
def taken(port: int) -> Iterator[None]:
    """Within, the port of 127.0.0.1 is in use, by this process or by one that has it already."""
    with socket.socket() as listener:
        with suppress(OSError):
            listener.bind(("127.0.0.1", port))
            listener.listen()
        yield


@contextmanager
def ray_node(folder: Path, command: Sequence[str], **variables: str) -> Iterator[None]:
    """Within, the node that the command starts is up; stopped by its process ID."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAYTRAIN2P_HOME": str(folder / "home"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **variables,
    }
    log = folder / "node.log"
    with log.open("w") as stream:
        node = subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert node.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the node did not start"
            time.sleep(0.5)
        yield
    finally:
        stop(node)


def stop(node: subprocess.Popen[bytes]) -> None:
    """By its process ID. `ray start --block` ends its daemons at once, but itself takes its time now and then."""
    node.terminate()
    try:
        node.wait(timeout=10)
    except subprocess.TimeoutExpired:
        node.kill()
        node.wait()


@dataclass(frozen=True)
class Command:
    """What a command left: its exit code, its output, and the object of `--json`."""

    code: int
    out: str
    err: str

    @property
    def outcome(self) -> dict[str, Any]:
        assert self.code == 0, self.err[-4000:]
        return json.loads(self.out.strip().splitlines()[-1])

    @property
    def losses(self) -> list[float]:
        """The training loss of each step."""
        return points(self.outcome, "train_loss")


def points(outcome: dict[str, Any], name: str) -> list[float]:
    lines = (Path(outcome["directory"]) / "metrics.jsonl").read_text().splitlines()
    return [point["value"] for point in map(json.loads, lines) if point["name"] == name]


Run = Callable[..., Command]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which a module's commands run one after the other, empty at first."""
    return tmp_path_factory.mktemp("workshop")


@pytest.fixture(scope="module")
def run(workshop: Path, ray_head: str) -> Run:
    """Runs `python -m raytrain2p.COMMAND ...` in the workshop, against the shared head."""

    def in_workshop(*arguments: str, **environment: str) -> Command:
        return run_command(workshop, *arguments, **({"RAY_ADDRESS": ray_head} | environment))

    return in_workshop


def command_environment(folder: Path, **environment: str) -> dict[str, str]:
    """This process's, with outputs and features kept in the folder."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "RAYTRAIN2P_HOME": str(folder),
        "RAYTRAIN2P_FEATURES": str(folder / "features"),
        "RAY_AUTH_MODE": "disabled",
    }
    return os.environ | settings | environment


STARTED: list[subprocess.Popen[bytes]] = []  # in the background, by tests


def start_command(folder: Path, log: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """`python -m ...` in the background; ended with the test at the latest, lest it hold the CPUs of the shared Ray."""
    with log.open("wb") as stream:
        started = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=command_environment(folder, **environment),
            stdout=stream,
            stderr=stream,
        )
    STARTED.append(started)
    return started


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """Whatever a failed test left running is ended by its process ID."""
    yield
    while STARTED:
        command = STARTED.pop()
        if command.poll() is None:
            command.kill()
            command.wait()


def run_command(folder: Path, *arguments: str, **environment: str) -> Command:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=command_environment(folder, **environment),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    return Command(done.returncode, done.stdout, done.stderr)


def ray_job(words: str) -> subprocess.CompletedProcess[str]:
    """`ray job ...` of the head started by hand, in the project's directory."""
    environment = os.environ | {
        "RAY_ADDRESS": f"http://127.0.0.1:{DASHBOARD_PORT}",
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["ray", "job", *words.split()]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)


def submit(command: str) -> dict[str, Any]:
    """Submit a job to the head started by hand, follow it to its end, and return the outcome that it prints."""
    done = ray_job(f"submit --working-dir . -- {command}")
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    assert "succeeded" in said
    outcome: dict[str, Any] = json.loads(next(line for line in said.splitlines() if line.startswith('{"run_id"')))
    return outcome


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of coloured shapes, as records of both phases: phase1.jsonl and phase2.jsonl (with a text-only record)."""
    folder = tmp_path_factory.mktemp("shapes")
    pairs, dialogues = [], []
    for number in range(48):
        colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number // len(COLOURS) % len(SHAPES)]
        image = Image.new("RGB", (32, 32), "white")
        offset = number // 12
        box = (4 + offset, 4, 24 + offset, 24)
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        image.save(folder / f"{number}.png")
        pairs.append({"text": f"a {colour} {shape}", "image": f"{number}.png"})
        dialogues.append({"instruction": "Which colour?", "response": colour, "image": f"{number}.png", "task": "colour"})
    dialogues[5] = {"instruction": "Say yes.", "response": "yes"}
    for name, rows in (("phase1", pairs), ("phase2", dialogues)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, shapes: Path, tiny_llama: Path, tiny_vit: Path, tiny_bert: Path) -> Path:
    """phase1.yaml and phase2.yaml for small random models on the coloured shapes."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "phase1.yaml").write_text(f"""
data: {{train: {shapes}/phase1.jsonl, val: {shapes}/phase1.jsonl, test: {{same: {shapes}/phase1.jsonl}}}}
model: {{image_encoder: {tiny_vit}, text_encoder: {tiny_bert}, dimension: 16, hidden: 32, dropout: 0.0}}
training: {{max_steps: 6, batch_size: 16, learning_rate: 1e-2, warmup_steps: 2, precision: float32, log_every: 2}}
launch: {{cpus_per_worker: 1}}
""")
    (folder / "phase2.yaml").write_text(f"""
data: {{train: {shapes}/phase2.jsonl, val: {shapes}/phase2.jsonl, test: {{same: {shapes}/phase2.jsonl}}}}
model: {{language_model: {tiny_llama}, image_encoder: {tiny_vit}, soft_tokens: 4, lora: {{rank: 4}}}}
training: {{max_steps: 6, batch_size: 8, learning_rate: 1e-2, warmup_steps: 2, precision: float32, log_every: 2}}
evaluation: {{samples: 4, max_new_tokens: 4}}
launch: {{cpus_per_worker: 1}}
""")
    return folder


@pytest.fixture(scope="session")
def sweep_config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of phase 1 on tiny models: four trials, which report every 10 steps."""
    path = tmp_path_factory.mktemp("sweep") / "sweep.yaml"
    tree = {
        "sweep": {"phase": 1, "base": str(tiny_config / "phase1.yaml"), "num_trials": 4, "metric": "train_loss", "space": SWEEP_SPACE},
        "training": {"max_steps": SWEEP_STEPS},
        "data": {"val": None, "test": {}},
        "checkpoint": {"every_steps": 10, "best_of": "saves"},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="session")
def untrained_aligner(tmp_path_factory: pytest.TempPathFactory, tiny_vit: Path) -> Path:
    """An aligner.pt for tiny_vit, as phase 1 leaves it; not trained."""
    torch.manual_seed(3)
    aligner = Aligner({"image": 32}, hidden=32, dimension=16)
    path = tmp_path_factory.mktemp("aligner") / "aligner.pt"
    models = {"image_encoder": {"name": str(tiny_vit), "fingerprint": fingerprint(tiny_vit)}}
    save_artifact(path, ALIGNMENT, {}, models, image_size=None, shape=aligner.shape, state_dict=aligner.state_dict())
    return path
