"""Ray nodes of cluster/local/nodes.sh, and launches submitted to them as jobs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.killing import Launch, launch_in
from tests.launch.launching import ROOT, STARTED
from tests.storage.s3_server import S3Server

MLFLOW = "http://10.77.0.1:5000"
SCRIPT = str(ROOT / "cluster" / "local" / "nodes.sh")


class LocalNodes:
    """Nodes of their own, whatever else runs on this machine.

    Args:
        folder: of their logs and of MLflow's store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "RAYTRAIN2P_NODES": str(folder / "state"),
            "RAYTRAIN2P_HOME": str(folder / "home"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`cluster/local/nodes.sh WORDS` in the project's directory."""
        command = [SCRIPT, *words]
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=240, check=False)

    def check(self, *words: str) -> str:
        """The same, which must succeed. Returns its output."""
        done = self.run(*words)
        assert done.returncode == 0, (words, done.stdout[-3000:], done.stderr[-3000:])
        return done.stdout + done.stderr

    def start(self, log: Path, *words: str) -> subprocess.Popen[bytes]:
        """The same in the background, to be ended after the test at the latest."""
        with log.open("wb") as stream:
            started = subprocess.Popen([SCRIPT, *words], cwd=ROOT, env=self.environment, stdout=stream, stderr=stream)
        STARTED.append(started)
        return started

    def start_mlflow(self) -> None:
        """`mlflow server` beside the nodes, until they are taken down."""
        store = [f"--backend-store-uri={self.store}", f"--artifacts-destination={self.folder}/artifacts"]
        server = ["mlflow", "server", "--workers=1", "--host=10.77.0.1", "--port=5000", *store]
        self._serve(5000, self.folder / "server.log", *server)

    def start_s3(self) -> S3Server:
        """A server of objects beside the nodes, with one bucket, until they are taken down."""
        server = S3Server("http://10.77.0.1:5001")
        self._serve(5001, self.folder / "s3.log", "python", "-m", "tests.storage.s3_server", "5001", "10.77.0.1")
        make_bucket = f"from tests.storage.s3_server import S3Server; S3Server('{server.url}').make_bucket()"
        self.check("exec", "0", "python", "-c", make_bucket)
        return server

    def _serve(self, port: int, log: Path, *command: str) -> None:
        self.start(log, "exec", "0", *command)
        STARTED.pop()  # for all tests
        reached = f"import socket; socket.create_connection(('10.77.0.1', {port}), 1)"
        deadline = time.monotonic() + 90
        while self.run("exec", "0", "python", "-c", reached).returncode:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)

    @property
    def store(self) -> str:
        """The database of the server, which the tests read: they do not reach its address."""
        return f"sqlite:///{self.folder}/server.db"


@dataclass
class Job(Launch):
    """A launch that is submitted as a job, from beside the nodes."""

    nodes: LocalNodes = field(kw_only=True)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.starts += 1
        runtime = json.dumps({"env_vars": self.variables})
        submit = ["ray", "job", "submit", "--working-dir", ".", "--runtime-env-json", runtime, "--", "python", "-m"]
        self.process = self.nodes.start(self.folder / f"log{self.starts}", "exec", "0", *submit, *self.command())

    def differences(self) -> list[str]:
        found = self.nodes.run("exec", "0", "python", "-m", "raytrain2p.runs", "verify", f"output.root={self.folder}/checkpoints")
        return [] if found.returncode == 0 else [found.stdout + found.stderr]


def job_in(folder: Path, tiny_config: Path, nodes: LocalNodes) -> Job:
    """400 steps of phase 1 on both nodes, as those that `make chaos` disturbs."""
    launch = launch_in(folder, tiny_config, workers=2, HF_HOME=str(folder.parent / "hf"))
    return submitted(nodes, folder, launch.arguments, launch.environment)


def submitted(nodes: LocalNodes, folder: Path, arguments: Sequence[str], environment: dict[str, str]) -> Job:
    """A launch with an experiment of its own on the server."""
    where = [f"output.root={folder}/checkpoints", f"tracking.uri={MLFLOW}", f"tracking.experiment={folder.name}"]
    return Job(folder, [*arguments, *where], environment, nodes.store, folder.name, nodes=nodes)
