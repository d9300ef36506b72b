"""Jobs of `ray job submit` on real heads: stopped, submitted again, several launches in one, and several heads on one machine."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobSubmissionClient

from tests.launch.launching import DASHBOARD_PORT, PORT, WORKER_PORTS, head, ray_node

pytestmark = [
    pytest.mark.skipif(not os.environ.get("RAYTRAIN2P_CLUSTER_TESTS"), reason="`make test-cluster` runs them"),
    pytest.mark.timeout(900),
]
STEPS = 3000
LONG = [f"training.max_steps={STEPS}", "checkpoint.every_steps=300", "data.test={}"]


@dataclass(frozen=True)
class Head:
    """A head of the test, with a working directory of its jobs."""

    folder: Path
    dashboard: int
    home: Path

    def job(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray job ...`, sent to this head."""
        environment = os.environ | {"RAY_ADDRESS": f"http://127.0.0.1:{self.dashboard}", "RAY_AUTH_MODE": "token"}
        ray = str(Path(sys.executable).parent / "ray")
        return subprocess.run(
            [ray, "job", *words], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=400, check=False
        )

    def submit(self, submission_id: str, command: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        runtime = json.dumps({"env_vars": variables})
        identified = ["--submission-id", submission_id, "--runtime-env-json", runtime, "--working-dir", str(self.folder), *options]
        return self.job("submit", *identified, "--", "bash", "-c", command)

    def jobs(self) -> dict[str | None, JobDetails]:
        """By submission ID; those of a driver that no job started have none."""
        token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}  # Ray has read RAY_AUTH_MODE when it was imported
        return {job.submission_id: job for job in JobSubmissionClient(f"http://127.0.0.1:{self.dashboard}", headers=token).list_jobs()}

    def wait(self, submission_id: str, over: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not over():
            if self.jobs()[submission_id].status not in ("PENDING", "RUNNING") or time.monotonic() > deadline:
                raise AssertionError(self.job("logs", submission_id).stdout[-4000:])
            time.sleep(0.5)

    def stop(self, submission_id: str) -> None:
        """Stop a job and forget it, so that one of the same submission ID can be submitted."""
        self.job("stop", submission_id)
        assert self.jobs()[submission_id].status == "STOPPED"
        assert self.job("delete", submission_id).returncode == 0

    def records(self, folder: str) -> list[dict[str, Any]]:
        """run.json of each run, the oldest first."""
        found = [json.loads(path.read_text()) for path in self.home.glob(f"checkpoints/{folder}/*/run.json")]
        return sorted(found, key=lambda record: record["sequence"])


@pytest.fixture(scope="module")
def sessions() -> Iterator[str]:
    """A temporary folder of Ray, which two heads share."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield folder


@pytest.fixture(scope="module")
def first_head(sessions: str, tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Iterator[Head]:
    """A head that kills stopped jobs after 3 seconds, as Ray's default is."""
    folder, working = tmp_path_factory.mktemp("head"), tmp_path_factory.mktemp("working_dir")
    for phase in ("phase1.yaml", "phase2.yaml"):
        (working / phase).write_text((tiny_config / phase).read_text())
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "3", "RAYTRAIN2P_FEATURES": str(folder / "features"), "OMP_NUM_THREADS": "1"}
    with ray_node(folder, head(PORT, DASHBOARD_PORT, WORKER_PORTS, f"--temp-dir={sessions}"), **variables):
        yield Head(working, DASHBOARD_PORT, folder / "home")


@pytest.fixture(scope="module")
def second_head(first_head: Head, sessions: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Another head, which was started last: Ray records its address."""
    ports = (PORT + 200, DASHBOARD_PORT + 200, WORKER_PORTS + 10_000)
    folder = tmp_path_factory.mktemp("second")
    with ray_node(folder, head(*ports, f"--temp-dir={sessions}")):
        yield Head(folder, ports[1], folder / "home")


def test_a_stopped_job_has_a_checkpoint_and_one_of_the_same_submission_id_resumes_it(first_head: Head) -> None:
    train = f"python -m raytrain2p.train --phase 1 --config phase1.yaml {' '.join(LONG)} --json"
    stop_slowly = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    assert first_head.submit("again", train, "--no-wait", **stop_slowly).returncode == 0
    first_head.wait("again", lambda: any(first_head.home.glob("checkpoints/alignment/*/lightning_checkpoints/last.ckpt")))
    first_head.stop("again")
    (run,) = first_head.records("alignment")
    directory = Path(run["directory"])
    assert json.loads((directory / "status.json").read_text())["status"] == "KILLED"

    done = first_head.submit("again", train, **stop_slowly)
    assert done.returncode == 0, done.stdout[-4000:]
    assert [one["run_id"] for one in first_head.records("alignment")] == [run["run_id"]]
    points = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    steps = [point["step"] for point in points if point["name"] == "train_loss"]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    assert len((directory / "changes.jsonl").read_text().splitlines()) == 1


def test_one_job_with_several_launches_on_a_head_that_was_not_started_last(first_head: Head, second_head: Head) -> None:
    """And with variables of the job that a launch would send, RAY_ADDRESS among them."""
    train = "python -m raytrain2p.train --config phase{0}.yaml --phase {0} {1} --json"
    commands = [train.format(1, "seed=1"), train.format(1, "seed=2"), train.format(2, "")]
    done = first_head.submit("several", " && ".join(commands), HF_HOME=str(first_head.folder / "hf"), RAY_ADDRESS="auto")
    assert done.returncode == 0, done.stdout[-4000:]
    launches = [record["launch_id"] for folder in ("alignment", "phase2") for record in first_head.records(folder)]
    of_job = [launch for launch in launches if launch.startswith("several-")]
    assert [launch.rsplit("-", 1)[0] for launch in of_job] == ["several-phase1", "several-phase1", "several-phase2"]
    assert len(set(of_job)) == 3
    assert first_head.jobs()["several"].driver_info is not None, "its drivers have connected to the head that it was sent to"
    assert not second_head.jobs()


def test_a_sweep_that_is_submitted_again_resumes(first_head: Head, sweep_config: Path) -> None:
    sweep = f"python -m raytrain2p.tune --config {sweep_config} training.max_steps=1000 sweep.max_concurrent=1 sweep.num_trials=3 --json"
    stop_slowly = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
    before = len(first_head.records("alignment"))
    assert first_head.submit("sweep", sweep, "--no-wait", **stop_slowly).returncode == 0
    first_head.wait("sweep", lambda: len(first_head.records("alignment")) > before + 1)
    first_head.stop("sweep")
    done = first_head.submit("sweep", sweep, **stop_slowly)
    assert done.returncode == 0, done.stdout[-4000:]
    (run,) = first_head.records("sweeps")
    assert run["launch_id"].startswith("sweep-sweep-")
    assert len(first_head.records("alignment")) == before + 3


def test_bad_input_of_a_job_is_said_and_fails_it(first_head: Head) -> None:
    train = "python -m raytrain2p.train --phase 1 --config phase1.yaml output.root=out"
    done = first_head.submit("refused", train, RAYTRAIN2P_HOME="")
    assert done.returncode == 1
    assert "output.root=out" in done.stdout
    assert first_head.jobs()["refused"].driver_exit_code == 2
