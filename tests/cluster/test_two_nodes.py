"""Jobs on a head and a second node with addresses of their own, submitted with a token, and a real MLflow server: both phases and a
sweep. And what listens there.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest

from tests.cluster.local_nodes import Job, LocalNodes, job_in, submitted
from tests.launch.sockets import METRICS
from tests.storage.s3_server import BUCKET

pytestmark = pytest.mark.timeout(600)


@dataclass
class Sweep(Job):
    """A sweep in the place of a training."""

    def command(self) -> list[str]:
        return ["raytrain2p.tune", *self.arguments, "--json"]


def finished(job: Job) -> mlflow.entities.Run:
    """The one run of a job that has succeeded, which has one directory and nothing that differs."""
    assert job.wait() == 0, job.log[-5000:]
    (run,) = job.mlflow_runs()
    (directory,) = job.directories()
    assert directory.name[:32] == run.info.run_id
    assert run.info.status == "FINISHED"
    assert job.differences() == []
    return run


def nodes_with_workers(nodes: LocalNodes) -> set[str]:
    logs = (nodes.folder / "state").glob("*/ray/session_2*/logs/worker-*.out")
    return {log.relative_to(nodes.folder / "state").parts[0] for log in logs if "actor_name:RayTrainWorker" in log.read_text()}


def test_both_phases_train_on_both_nodes(nodes: LocalNodes, undisturbed: Job, tiny_config: Path, tmp_path: Path) -> None:
    assert finished(undisturbed).data.params["launch.num_workers"] == "2"
    assert nodes_with_workers(nodes) == {"1", "2"}

    (aligner,) = undisturbed.directories()
    arguments = ["--phase=2", f"--config={tiny_config}/phase2.yaml", f"model.aligner={aligner}/aligner.pt", "launch.num_workers=2"]
    second = submitted(nodes, tmp_path / "phase2", arguments, undisturbed.environment)
    second.start()
    finished(second)
    assert second.steps() == list(range(1, 7))


def test_both_phases_and_a_sweep_train_on_both_nodes_with_objects(
    nodes: LocalNodes, undisturbed: Job, tiny_config: Path, sweep_config: Path, tmp_path: Path
) -> None:
    """Each node has a scratch directory of its own."""
    s3 = nodes.start_s3().environment | {"RAYTRAIN2P_SCRATCH": "/tmp/ray/scratch"}
    root = f"s3://{BUCKET}/nodes"

    def trained(name: str, *arguments: str, kind: type[Job] = Job) -> tuple[Job, dict[str, Any]]:
        job = kind(**vars(submitted(nodes, tmp_path / name, arguments, undisturbed.environment | s3)))
        job.arguments = [*job.arguments, f"output.root={root}"]
        job.start()
        assert job.wait() == 0, job.log[-5000:]
        assert {run.info.status for run in job.mlflow_runs()} == {"FINISHED"}
        assert {path.name for path in job.folder.iterdir()} == {"log1"}
        outcome = json.loads(job.log[job.log.rindex('{"run_id"') :].splitlines()[0])
        assert outcome["directory"].startswith(f"{root}/")
        return job, outcome

    def trained_phase(name: str, *arguments: str) -> str:
        job, outcome = trained(name, *arguments, "launch.num_workers=2")
        (run,) = job.mlflow_runs()
        assert [point.step for point in job.client.get_metric_history(run.info.run_id, "train_loss")] == list(range(1, 7))
        return str(outcome["artifact"])

    aligner = trained_phase("s3-phase1", "--phase=1", f"--config={tiny_config}/phase1.yaml")
    assert aligner.endswith("/aligner.pt")
    trained_phase("s3-phase2", "--phase=2", f"--config={tiny_config}/phase2.yaml", f"model.aligner={aligner}")
    sweep, outcome = trained("s3-sweep", f"--config={sweep_config}", "sweep.num_trials=3", kind=Sweep)
    assert (outcome["trials"], outcome["finished"]) == (3, 3)
    assert "2 trials at once" in sweep.log
    assert len(sweep.mlflow_runs()) == 4
    variables = [f"{name}={value}" for name, value in s3.items()]
    nodes.check("exec", "0", "env", *variables, "python", "-m", "raytrain2p.runs", "verify", f"output.root={root}")


def test_trials_train_on_both_nodes(nodes: LocalNodes, sweep_config: Path, undisturbed: Job, tmp_path: Path) -> None:
    job = submitted(nodes, tmp_path / "sweep", [f"--config={sweep_config}", "sweep.num_trials=3"], undisturbed.environment)
    sweep = Sweep(**vars(job))
    sweep.start()
    assert sweep.wait() == 0, sweep.log[-5000:]
    assert "2 trials at once" in sweep.log
    runs = sweep.mlflow_runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = [run for run in runs if run is not parent]
    assert [run.data.tags["mlflow.parentRunId"] for run in trials] == [parent.info.run_id] * 3
    assert {run.info.status for run in trials} == {"FINISHED"}
    statuses = [json.loads(path.read_text()) for path in (sweep.folder / "checkpoints" / "alignment").glob("*/status.json")]
    assert len(statuses) == 3
    assert {status["host"] for status in statuses} == {"node1", "node2"}
    assert sweep.differences() == []


def test_a_store_on_one_machines_disk_is_refused(nodes: LocalNodes, undisturbed: Job, tmp_path: Path) -> None:
    job = submitted(nodes, tmp_path / "sqlite", undisturbed.arguments, undisturbed.environment)
    job.arguments = [*job.arguments, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "tracking.experiment=null"]
    job.start()
    assert job.wait() != 0
    assert "is on one machine's disk, and the cluster has 2 machines" in job.log
    assert "start `mlflow server`" in job.log
    assert job.directories() == []
    assert not (tmp_path / "mlflow.db").exists()


def test_what_listens_demands_a_token_or_shows_metrics_alone(nodes: LocalNodes, tiny_config: Path, tmp_path: Path) -> None:
    """All of the head, the node, the driver and the workers. docs/security.md names the exceptions."""
    job = job_in(tmp_path / "ports", tiny_config, nodes)
    job.arguments = [*job.arguments, "training.max_steps=100000"]
    job.start()
    job.wait_for_steps(1)
    try:
        check_sockets(nodes)
    finally:  # else it would keep the CPUs from the next test
        nodes.run("exec", "0", "ray", "job", "stop", "--no-wait", job_id(job))
        job.wait()


def check_sockets(nodes: LocalNodes) -> None:
    for node in ("1", "2"):
        found = json.loads(nodes.check("exec", node, "python", "-m", "tests.cluster.ask_sockets", f"10.77.0.1{node}").splitlines()[0])
        assert {title.split()[0].partition("::")[2] for title, _ in found} >= {"DashboardAgent", "RayTrainWorker"}
        of_workers = [answers for title, answers in found if title.startswith("ray::RayTrainWorker")]
        assert [] in of_workers, "the process group, which asks nobody"
        odd = [(title, answers) for title, answers in found if answers not in (["refused"], [METRICS])]
        odd = [one for one in odd if not ("dashboard.py" in one[0] and one[1] == ["GET /", "refused"])]  # its page, without data
        assert [one for one in odd if not (one[0].startswith("ray::RayTrainWorker") and one[1] == [])] == []
        assert sum(answers == [METRICS] for _, answers in found) <= 4, "of each node's agent, of the autoscaler, of the dashboard"


def job_id(job: Job) -> str:
    return next(line.split("'")[1] for line in job.log.splitlines() if "submitted successfully" in line)


def test_a_cluster_that_is_up_is_not_started_twice(nodes: LocalNodes) -> None:
    for words in (("up", "1"), ("start", "2")):
        refused = nodes.run(*words)
        assert refused.returncode == 2
        assert "up" in refused.stderr


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, nodes: LocalNodes) -> None:
    other = LocalNodes(tmp_path)
    refused = other.run("up", "1", "--no-such-option")
    assert refused.returncode == 2
    assert "node 1 did not start" in refused.stderr
    assert other.run("exec", "0", "true").returncode == 2
    running = subprocess.run(["ps", "ax"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running
