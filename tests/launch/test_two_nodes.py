"""cluster/node.sh adds a second Ray node: runs and trials use both, on one machine and on two."""

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from tests.chaos.killing import Launch, only_long
from tests.chaos.mlflow_server import Server
from tests.launch.launching import DASHBOARD_PORT, PORT, ROOT, Run, head, ray_node
from tests.launch.sockets import METRICS, answers, listeners

pytestmark = only_long
OTHER_MACHINE = "other-machine"


@pytest.fixture(scope="module")
def ray_head_pid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A head that nodes can join: the default one takes none."""
    command = head(PORT + 100, DASHBOARD_PORT + 100, 25_000, "--node-ip-address=127.0.0.2")
    with ray_node(tmp_path_factory.mktemp("head"), command) as pid:
        yield pid


@pytest.fixture(scope="module")
def ray_head(ray_head_pid: int) -> str:
    return f"127.0.0.2:{PORT + 100}"


def node(head: str) -> list[str]:
    """The command that starts a node with one CPU."""
    return ["bash", str(ROOT / "cluster" / "node.sh"), head, "--num-cpus=1", "--object-store-memory=100000000"]


@pytest.fixture
def second_node(ray_head: str, tmp_path: Path) -> Iterator[int]:
    """On this machine; yields its process ID."""
    with ray_node(tmp_path, node(ray_head)) as pid:
        yield pid


@pytest.fixture(scope="module")
def second_machine(ray_head: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Its processes see another host name, as on another machine with the same shared storage."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--uts", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs `unshare --uts`, and so root, to give a node a host name of its own")
    renamed = ["unshare", "--uts", "sh", "-c", f'hostname {OTHER_MACHINE} && exec "$@"', "sh", *node(ray_head)]
    with ray_node(tmp_path_factory.mktemp("machine"), renamed):
        yield


def hosts(folder: Path) -> set[str]:
    """The machines of the processes that wrote to the run directories."""
    return {json.loads(path.read_text())["host"] for path in folder.glob("*/status.json")}


def three_workers(config: Path, *more: str) -> list[str]:
    arguments = ["--phase", "1", "--config", str(config / "phase1.yaml"), "--json"]
    return ["raytrain2p.train", *arguments, "launch.num_workers=3", "training.global_batch_size=12", *more]


def test_three_workers_train_on_two_nodes(run: Run, tiny_config: Path, second_node: int) -> None:
    done = run(*three_workers(tiny_config))
    assert done.losses[-1] < done.losses[0]
    assert "starting 3 workers" in done.err


def test_what_listens_beyond_loopback_demands_a_token_or_shows_metrics_alone(
    workdir: Path, tiny_config: Path, ray_head: str, ray_head_pid: int, second_node: int
) -> None:
    """Of the head, the node, the driver and the workers on both nodes. docs/security.md names the exceptions."""
    arguments = three_workers(tiny_config, "training.max_steps=100000")[1:]
    launch = Launch(workdir / "ports", arguments, {"RAY_ADDRESS": ray_head})
    launch.start()
    launch.wait_for_steps(1)
    assert launch.process is not None
    beyond = {one for pid in (ray_head_pid, second_node, launch.process.pid) for one in listeners(pid) if not one.on_loopback}
    assert {one.process.split()[0].partition("::")[2] for one in beyond} >= {"DashboardAgent", "RayTrainWorker"}
    found = {one: answers(one.port) for one in beyond}
    exceptions = {one for one, answer in found.items() if answer == {METRICS}}
    assert {one: answer for one, answer in found.items() if one not in exceptions and answer != {"refused"}} == {}
    assert len(exceptions) <= 4, "of each node's agent, of the autoscaler, of the dashboard"


def test_a_store_on_one_machines_disk_is_refused_on_two_machines(
    run: Run, tiny_config: Path, sweep_config: Path, second_machine: None, tmp_path: Path
) -> None:
    for command in (three_workers(tiny_config), ["raytrain2p.tune", "--config", str(sweep_config)]):
        done = run(*command, f"output.root={tmp_path}/checkpoints", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
        assert done.code == 2, done.err
        assert "is on one machine's disk, and the cluster has 2 machines" in done.err
        assert "start `mlflow server`" in done.err
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "mlflow.db").exists()


def test_workers_on_two_machines_create_one_run(run: Run, tiny_config: Path, second_machine: None, server: Server, tmp_path: Path) -> None:
    done = run(*three_workers(tiny_config), f"output.root={tmp_path}/checkpoints", f"tracking.uri={server.uri}")
    assert done.losses[-1] < done.losses[0]
    recorded = mlflow.MlflowClient(server.uri).get_run(done.outcome["run_id"])
    assert recorded.info.status == "FINISHED"
    assert [path.name[:32] for path in (tmp_path / "checkpoints" / "alignment").iterdir()] == [recorded.info.run_id]


def test_trials_run_on_two_machines(run: Run, sweep_config: Path, second_machine: None, server: Server, tmp_path: Path) -> None:
    where = [f"output.root={tmp_path}/checkpoints", f"tracking.uri={server.uri}"]
    done = run("raytrain2p.tune", "--config", str(sweep_config), "--json", "sweep.num_trials=3", *where)
    assert (done.outcome["trials"], done.outcome["finished"]) == (3, 3), done.err
    assert "3 trials at once" in done.err
    assert hosts(tmp_path / "checkpoints" / "alignment") == {socket.gethostname(), OTHER_MACHINE}
    runs = mlflow.MlflowClient(server.uri).search_runs(
        [mlflow.MlflowClient(server.uri).get_run(done.outcome["run_id"]).info.experiment_id],
        f"tags.`mlflow.parentRunId` = '{done.outcome['run_id']}'",
    )
    assert [one.info.status for one in runs] == ["FINISHED"] * 3
