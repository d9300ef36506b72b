"""Whole launches with `output.root=s3://...`, against a real S3 server: each command on a host whose disk is empty, unless it is named."""

import csv
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

from raytrain2p.storage.objects import ObjectStore
from tests.cluster.test_shared_files import HEAD, SECOND, node
from tests.launch.launching import DASHBOARD_PORT, PORT, SWEEP_STEPS, Command, head, ray_node, run_command, start_command
from tests.storage.s3_server import BUCKET, S3Server

pytestmark = pytest.mark.skipif("RAYTRAIN2P_CLUSTER_TESTS" not in os.environ, reason="takes minutes: run with RAYTRAIN2P_CLUSTER_TESTS=1")
ROOT = f"s3://{BUCKET}/team/project"
STEPS = 30
ASHA = ["sweep.scheduler=asha", "sweep.asha.grace_period=20", "sweep.asha.reduction_factor=2"]
MANY = [f"training.max_steps={STEPS}", "checkpoint.every_steps=5", "training.log_every=1"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("object_storage")


@pytest.fixture(autouse=True)
def reachable(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process reads objects too."""
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)


def on(host: str, workdir: Path) -> dict[str, str]:
    """The environment of commands on a host. The MLflow store is that of all."""
    return {"RAY_ADDRESS": "local", "HOME": str(workdir / f"home-{host}"), "RAYTRAIN2P_SCRATCH": str(workdir / host)}


def command(workdir: Path, host: str, *arguments: str) -> Command:
    done = run_command(workdir, *arguments, **on(host, workdir))
    print(arguments, done.code, done.out, done.err, sep="\n")
    return done


def train(tiny_config: Path, phase: int, root: str, *more: str) -> list[str]:
    config = str(tiny_config / f"phase{phase}.yaml")
    return ["raytrain2p.train", "--phase", str(phase), "--config", config, "--json", f"output.root={root}", *more]


def points(root: str, folder: str = "alignment") -> list[dict[str, Any]]:
    """The metric points of the only run in a folder."""
    store = ObjectStore(root)
    keys = [one.key for one in store.list(f"{folder}/") if one.key.endswith("/metrics.jsonl")]
    if not keys:
        return []
    assert len(keys) == 1
    found = store.read(keys[0])
    return [json.loads(line) for line in found[0].splitlines()] if found else []


def losses(root: str, run: str = "") -> dict[int, float]:
    """By step; each step is there once.

    Args:
        run: its directory, if it is not the only one.
    """
    found = [(point["step"], point["value"]) for point in points(root, f"alignment/{run}".rstrip("/")) if point["name"] == "train_loss"]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_phase_1_and_phase_2_train_and_are_used_from_fresh_hosts(workdir: Path, tiny_config: Path) -> None:
    one = command(workdir, "host-1", *train(tiny_config, 1, ROOT))
    assert one.code == 0
    outcome = json.loads(one.out.strip().splitlines()[-1])
    assert outcome["directory"].startswith(f"{ROOT}/alignment/{outcome['run_id']}")
    assert str(workdir / "host-1") not in one.out + one.err
    two = command(workdir, "host-2", *train(tiny_config, 2, ROOT))
    assert two.code == 0
    assert f"aligner: {outcome['artifact']}" in two.err
    run_id = json.loads(two.out.strip().splitlines()[-1])["run_id"]
    for words in (["list"], ["show", "latest"], ["latest", "--phase", "2"], ["find"], ["verify"]):
        done = command(workdir, "host-3", "raytrain2p.runs", *words, f"output.root={ROOT}")
        assert done.code == 0
        assert run_id[:8] in done.out or "nothing differs" in done.out
        assert str(workdir / "host-3") not in done.out + done.err
    asked = command(workdir, "host-4", "raytrain2p.predict", "--root", ROOT, "Which colour?")
    assert asked.code == 0
    # The same launch again, on a host that has never seen it: its outcome is printed
    again = command(workdir, "host-5", *train(tiny_config, 1, ROOT, "--resume", outcome["run_id"]))
    assert again.code == 0
    assert "is finished already" in again.err
    assert json.loads(again.out.strip().splitlines()[-1]) == outcome


def kill_all(pid: int) -> None:
    """SIGKILL to a launch: driver, Ray, workers, as if its host was lost."""
    launch = psutil.Process(pid)
    for process in [launch, *launch.children(recursive=True)]:
        process.kill()


def test_a_launch_whose_host_is_lost_is_resumed_on_a_fresh_one_and_ends_as_an_undisturbed_one(
    workdir: Path, tiny_config: Path, s3_process: S3Server
) -> None:
    undisturbed, lost = f"{ROOT}-undisturbed", f"{ROOT}-lost"
    done = command(workdir, "host-1", *train(tiny_config, 1, undisturbed, *MANY))
    assert done.code == 0
    s3_process.fault(slow=0.3)  # so that uploads are under way when the host is lost
    words = train(tiny_config, 1, lost, *MANY, "--launch-id", "lost")
    launch = start_command(workdir, workdir / "lost.log", *words, **on("host-6", workdir))
    deadline = time.monotonic() + 120
    while not any(point["step"] >= 10 for point in points(lost)):
        assert launch.poll() is None, (workdir / "lost.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_all(launch.pid)
    launch.wait()
    s3_process.fault(status=503, seconds=5)  # and the storage is overloaded when the resume begins
    resumed = command(workdir, "host-7", *words)
    assert resumed.code == 0
    assert "resuming alignment run" in resumed.err
    assert losses(lost) == losses(undisturbed)
    assert sorted(losses(lost)) == list(range(1, STEPS + 1))
    assert len({one.key.split("/")[1] for one in ObjectStore(lost).list("alignment/")}) == 1


def test_a_storage_that_refuses_connections_for_a_while_delays_a_launch_and_loses_nothing(
    workdir: Path, tiny_config: Path, s3_process: S3Server
) -> None:
    root = f"{ROOT}-refused"
    launch = start_command(workdir, workdir / "refused.log", *train(tiny_config, 1, root, *MANY), **on("host-8", workdir))
    deadline = time.monotonic() + 120
    while not points(root):
        assert launch.poll() is None, (workdir / "refused.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    s3_process.fault(refuse=20)
    assert launch.wait(200) == 0, (workdir / "refused.log").read_text()
    assert losses(root) == losses(f"{ROOT}-undisturbed")


def runs_of(root: str, folder: str) -> list[str]:
    """The directories of the runs in a folder."""
    return sorted({one.key.split("/")[1] for one in ObjectStore(root).list(f"{folder}/")})


def test_a_sweep_whose_host_is_lost_is_resumed_on_a_fresh_one_and_has_each_trial_and_each_step_once(
    workdir: Path, sweep_config: Path, s3_process: S3Server
) -> None:
    root = f"{ROOT}-sweep"
    more = ["sweep.num_trials=3", "sweep.max_concurrent=1", "training.log_every=1", f"output.root={root}"]
    launch = start_command(workdir, workdir / "sweep.log", "raytrain2p.tune", f"--config={sweep_config}", *more, **on("host-9", workdir))
    s3_process.fault(slow=0.1)
    deadline = time.monotonic() + 200
    while len(begun := runs_of(root, "alignment")) < 2 or not all(points(root, f"alignment/{run}") for run in begun):
        assert launch.poll() is None, (workdir / "sweep.log").read_text()
        assert time.monotonic() < deadline, (workdir / "sweep.log").read_text()
        time.sleep(0.05)
    kill_all(launch.pid)
    launch.wait()
    s3_process.fault()
    shutil.rmtree(workdir / "host-9")

    done = command(workdir, "host-10", "raytrain2p.tune", "--resume", "latest", "--json", f"output.root={root}")
    assert done.code == 0
    assert "resuming: 1 trials are over, 1 were begun" in done.err
    outcome = json.loads(done.out.strip().splitlines()[-1])
    assert (outcome["trials"], outcome["finished"]) == (3, 3)
    trials = runs_of(root, "alignment")
    assert len(trials) == 3
    assert {*begun} < {*trials}, "what was begun was resumed"
    assert [sorted(losses(root, run)) for run in trials] == 3 * [list(range(1, SWEEP_STEPS + 1))]
    (sweep,) = runs_of(root, "sweeps")
    assert outcome["directory"] == f"{root}/sweeps/{sweep}"
    table = ObjectStore(root).read(f"sweeps/{sweep}/trials.csv")
    assert table is not None
    lines = list(csv.DictReader(table[0].decode().splitlines()))
    assert sorted(line["directory"] for line in lines) == [f"{root}/alignment/{run}" for run in trials]
    assert {line["state"] for line in lines} == {"finished"}

    client = mlflow.MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`raytrain2p.root` = '{root}'")
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = sorted(run.data.tags.get("mlflow.parentRunId", "") for run in runs)
    assert parents == ["", *3 * [sweep[:32]]]

    best = outcome["best"]
    for words in (["verify"], ["tree"], ["show", best["run_id"]]):
        looked = command(workdir, "host-11", "raytrain2p.runs", *words, f"output.root={root}")
        assert looked.code == 0
        assert str(workdir / "host-11") not in looked.out + looked.err
        assert "nothing differs" in looked.out or best["run_id"][:8] in looked.out
    again = command(workdir, "host-12", *best["command"].split()[2:], "--dry-run")
    assert again.code == 0
    for text in (done.out, done.err, json.dumps(outcome)):
        assert str(workdir / "host-10") not in text


def test_trials_that_train_on_a_node_with_another_disk_are_compared_and_stopped_by_the_driver(
    workdir: Path, sweep_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, scratch = f"{ROOT}-nodes", workdir / "private"
    scratch.mkdir()
    driver = head(PORT + 200, DASHBOARD_PORT + 200, 27_000, "--node-ip-address=127.0.0.2", "--num-cpus=0")
    more = [*ASHA, "training.log_every=1", f"output.root={root}", f"data.feature_store={workdir}/features"]
    with (
        ray_node(tmp_path_factory.mktemp("head"), driver),
        node(SECOND, f"mount -t tmpfs tmpfs {scratch}", tmp_path_factory.mktemp("node")) as second,
    ):
        environment = on("private", workdir) | {"RAY_ADDRESS": HEAD}
        done = run_command(workdir, "raytrain2p.tune", f"--config={sweep_config}", "--json", *more, **environment)
        print(done.code, done.out, done.err, sep="\n")
        there = list(Path(f"/proc/{second}/root{scratch}").rglob("last.ckpt"))
    assert done.code == 0
    assert len(there) == 4
    outcome = json.loads(done.out.strip().splitlines()[-1])
    assert outcome["finished"] + outcome["stopped_early"] == 4
    assert outcome["stopped_early"] >= 1
    trials = runs_of(root, "alignment")
    assert len(trials) == 4
    for run in trials:
        steps = sorted(losses(root, run))
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) in (20, 40, SWEEP_STEPS)
    verified = command(workdir, "host-13", "raytrain2p.runs", "verify", f"output.root={root}")
    assert verified.code == 0
