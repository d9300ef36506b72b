"""Commands as a user runs them, each in a process of its own, on a Ray cluster that the tests share."""

import fcntl
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from raytrain2p.config import load_settings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.data.features import write_shard
from raytrain2p.data.media import MediaRef, decode
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.pretrained import fingerprint
from raytrain2p.phases.registry import read_inputs

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("circle", "square")
PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))  # each test process has a Ray head of its own
PORT, DASHBOARD_PORT, WORKER_PORTS = 6399 + PROCESS, 8299 + PROCESS, 21_000 + 1000 * PROCESS
SWEEP_STEPS = 60
SWEEP_SPACE: dict[str, Any] = {"training.learning_rate": {"loguniform": [1e-4, 3e-2]}, "model.hidden": {"choice": [16, 32]}}


@pytest.fixture(scope="session")
def embedded_features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A feature store for the embedded set, whose images take a minute to encode: shared by all tests and test processes that use
    them."""
    base = tmp_path_factory.getbasetemp()
    return str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "embedded_features")


@pytest.fixture(scope="session")
def ray_head_pid(tmp_path_factory: pytest.TempPathFactory, embedded_features: str) -> Iterator[int]:
    """A Ray head with 2 CPUs, started with cluster/head.sh; stopped by its process ID."""
    # The default port of the node's agent, which takes jobs, is in use, as beside another Ray cluster. Jobs use these features. A job
    # joins the head that was started last with its folder: with Ray's default, that would be another test process's.
    with port_in_use(52365), tempfile.TemporaryDirectory(prefix="ray") as sessions:  # not pytest's: sockets have short paths
        command = head(PORT, DASHBOARD_PORT, WORKER_PORTS, f"--temp-dir={sessions}")
        with ray_node(tmp_path_factory.mktemp("ray"), command, RAYTRAIN2P_FEATURES=embedded_features) as pid:
            yield pid


@pytest.fixture(scope="session")
def ray_head(ray_head_pid: int) -> str:
    """The address of the Ray head."""
    return f"127.0.0.1:{PORT}"


def head(port: int = PORT, dashboard_port: int = DASHBOARD_PORT, worker_ports: int = WORKER_PORTS, *more: str) -> list[str]:
    """The command that starts a head with ports of its own."""
    options = ["--num-cpus=2", "--object-store-memory=200000000", f"--port={port}", f"--dashboard-port={dashboard_port}"]
    options += [f"--ray-client-server-port={port + 10}", f"--min-worker-port={worker_ports}", f"--max-worker-port={worker_ports + 999}"]
    return ["bash", str(ROOT / "cluster" / "head.sh"), *options, *more]


def second_node(head: str, *options: str) -> list[str]:
    """The command that starts a node at 127.0.0.3, and joins it to a head that has an address of its own. Both have one host name and
    one folder of the session: for what needs more, see tests/cluster/local_nodes.py.
    """
    variables = ["RAY_AUTH_MODE=token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1"]  # launches set 0, with which Ray joins no other node
    start = ["ray", "start", "--block", f"--address={head}", "--node-ip-address=127.0.0.3"]
    return ["env", *variables, *start, "--dashboard-agent-listen-port=0", "--disable-usage-stats", *options]


def encode_here(phase: int, config: Path, store: Path, *overrides: str) -> None:
    """Fill a feature store in this process, for a launch that is a test of something else: it starts an encoder's process less for each
    modality."""
    inputs = read_inputs(load_settings(phase, str(config), [*overrides, f"data.feature_store={store}"]), phase)
    for job in inputs.jobs:
        job.store.directory.mkdir(parents=True, exist_ok=True)
        missing = job.store.missing(job.items)
        inputs_of = [decode(item) if isinstance(item, MediaRef) else item for item in (job.items[key] for key in missing)]
        if missing:
            write_shard(job.store.directory, missing, [grid.numpy() for grid in job.spec.build()(inputs_of)])


@contextmanager
def port_in_use(port: int) -> Iterator[None]:
    """Within, the port of 127.0.0.1 is in use, by this process or by another one."""
    with socket.socket() as listener:
        with suppress(OSError):
            listener.bind(("127.0.0.1", port))
            listener.listen()
        yield


@contextmanager
def ray_node(folder: Path, command: Sequence[str], **variables: str) -> Iterator[int]:
    """Within, the node that the command starts is running; stopped by its process ID, which is yielded."""
    environment = os.environ | {
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
        yield node.pid
    finally:
        if node.poll() is None:
            stop(node)


def stop(node: subprocess.Popen[bytes]) -> None:
    """End a node and all that it has started, by their process IDs. `ray start --block` ends its daemons within 2 seconds, but
    often not itself, and at times not its agents.
    """
    started = psutil.Process(node.pid).children(recursive=True)
    node.terminate()
    _, alive = psutil.wait_procs([psutil.Process(node.pid), *started], timeout=4)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


@dataclass(frozen=True)
class Command:
    """The result of a command: its exit code and its output."""

    code: int
    out: str
    err: str

    @property
    def outcome(self) -> dict[str, Any]:
        """The object that `--json` prints."""
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
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of the commands of a test module; empty at first."""
    return tmp_path_factory.mktemp("workdir")


@pytest.fixture(scope="module")
def run(workdir: Path, ray_head: str) -> Run:
    """Runs `python -m raytrain2p.COMMAND ...` in `workdir`, on the shared cluster."""

    def in_workdir(*arguments: str, **environment: str) -> Command:
        return run_command(workdir, *arguments, **({"RAY_ADDRESS": ray_head} | environment))

    return in_workdir


def command_environment(folder: Path, **environment: str) -> dict[str, str]:
    """The environment of this process, with outputs and features in the folder."""
    settings = {
        "OMP_NUM_THREADS": "1",
        "RAYTRAIN2P_HOME": str(folder),
        "RAYTRAIN2P_FEATURES": str(folder / "features"),
    }
    return os.environ | settings | environment


STARTED: list[subprocess.Popen[bytes]] = []  # background commands of the current test


def start_command(folder: Path, log: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """Start `python -m ...` in the background. It is ended after the test at the latest, so that it frees its CPUs of the cluster."""
    with log.open("wb") as stream:
        started = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=command_environment(folder, **environment),
            stdout=stream,
            stderr=stream,
            preexec_fn=heed_sighup,
        )
    STARTED.append(started)
    return started


def heed_sighup() -> None:
    """Though the tests run under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def end_background_commands() -> Iterator[None]:
    """End what a failed test left running, by process ID."""
    yield
    while STARTED:
        command = STARTED.pop()
        if command.poll() is None:
            command.kill()
            command.wait()


@pytest.fixture(autouse=True)
def no_ray_begins_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process of the tests: each refused launch would take seconds more. For the real thing see tests/launch/test_early.py."""
    monkeypatch.setattr("raytrain2p.launch.early.EarlyStart.begin", lambda *_: None)


class Terminal:
    """A terminal of its own for a command, whose output goes to a file, too.

    Args:
        log: the file.
    """

    def __init__(self, log: Path) -> None:
        self.log, self.over = log, threading.Event()
        self.mine, self.commands = pty.openpty()
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with self.log.open("wb", buffering=0) as stream:
            while not self.over.is_set():
                if select.select([self.mine], [], [], 0.1)[0]:
                    stream.write(os.read(self.mine, 65536))

    def start(self, folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start `python -m ...` in it, as its foreground command."""

        def in_foreground() -> None:
            heed_sighup()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        started = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=command_environment(folder, **environment),
            stdin=self.commands,
            stdout=self.commands,
            stderr=self.commands,
            start_new_session=True,
            preexec_fn=in_foreground,
        )
        STARTED.append(started)
        return started

    def close(self) -> None:
        """As the user closes its window: the kernel sends SIGHUP, and what is written to it fails."""
        self.over.set()
        self.thread.join()
        os.close(self.commands)
        os.close(self.mine)


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
    """`ray job ...` on the shared head, in the project's directory."""
    environment = os.environ | {
        "RAY_ADDRESS": f"http://127.0.0.1:{DASHBOARD_PORT}",
        "RAY_AUTH_MODE": "token",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["ray", "job", *words.split()]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)


def submit(command: str, options: str = "") -> dict[str, Any]:
    """Submit a job to the shared head, wait for its end, and return the outcome that it prints.

    Args:
        options: of `ray job submit`, without spaces in them.
    """
    done = ray_job(f"submit {options} --working-dir . -- {command}")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    assert "succeeded" in output
    outcome: dict[str, Any] = json.loads(next(line for line in output.splitlines() if line.startswith('{"run_id"')))
    return outcome


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of coloured shapes, as records of both phases: phase1.jsonl and phase2.jsonl (with a text-only record)."""
    folder = tmp_path_factory.mktemp("shapes")
    pairs, instructions = [], []
    for number in range(48):
        colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number // len(COLOURS) % len(SHAPES)]
        image = Image.new("RGB", (32, 32), "white")
        offset = number // 12
        box = (4 + offset, 4, 24 + offset, 24)
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        image.save(folder / f"{number}.png")
        pairs.append({"text": f"a {colour} {shape}", "image": f"{number}.png"})
        instructions.append({"instruction": "Which colour?", "response": colour, "image": f"{number}.png", "task": "colour"})
    instructions[5] = {"instruction": "Say yes.", "response": "yes"}
    for name, rows in (("phase1", pairs), ("phase2", instructions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, shapes: Path, tiny_llama: Path, tiny_vit: Path, tiny_bert: Path) -> Path:
    """phase1.yaml and phase2.yaml for small random models on the coloured shapes."""
    folder = tmp_path_factory.mktemp("config")
    (folder / "phase1.yaml").write_text(f"""
data: {{train: {shapes}/phase1.jsonl, val: {shapes}/phase1.jsonl, test: {{same: {shapes}/phase1.jsonl}}}}
model: {{encoders: {{image: {tiny_vit}, text: {tiny_bert}}}, dimension: 16, hidden: 32, dropout: 0.0}}
training: {{max_steps: 6, global_batch_size: 16, learning_rate: 1e-2, warmup_steps: 2, precision: float32, log_every: 2}}
launch: {{cpus_per_worker: 1}}
""")
    (folder / "phase2.yaml").write_text(f"""
data: {{train: {shapes}/phase2.jsonl, val: {shapes}/phase2.jsonl, test: {{same: {shapes}/phase2.jsonl}}}}
model: {{language_model: {tiny_llama}, soft_tokens: 4, lora: {{rank: 4}}}}
training: {{max_steps: 6, global_batch_size: 8, learning_rate: 1e-2, warmup_steps: 2, precision: float32, log_every: 2}}
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
    """An aligner.pt for tiny_vit, as phase 1 writes it; not trained."""
    torch.manual_seed(3)
    aligner = Aligner({"image": 32}, hidden=32, dimension=16)
    path = tmp_path_factory.mktemp("aligner") / "aligner.pt"
    encoders = {"image": {"name": str(tiny_vit), "options": {}, "fingerprint": fingerprint(tiny_vit)}}
    save_artifact(path, ALIGNMENT, {}, encoders, shape=aligner.shape, state_dict=aligner.state_dict())
    return path
