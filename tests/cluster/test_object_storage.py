"""Whole launches with `output.root=s3://...`, against a real S3 server: each command on a host whose disk is empty, unless it is named."""

import json
import os
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from raytrain2p.storage.objects import ObjectStore
from tests.launch.launching import Command, run_command, start_command
from tests.storage.s3_server import BUCKET, S3Server

pytestmark = pytest.mark.skipif("RAYTRAIN2P_CLUSTER_TESTS" not in os.environ, reason="takes minutes: run with RAYTRAIN2P_CLUSTER_TESTS=1")
ROOT = f"s3://{BUCKET}/team/project"
STEPS = 30
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
    return {"RAY_ADDRESS": "local", "RAYTRAIN2P_SCRATCH": str(workdir / host)}


def command(workdir: Path, host: str, *arguments: str) -> Command:
    done = run_command(workdir, *arguments, **on(host, workdir))
    print(arguments, done.code, done.out, done.err, sep="\n")
    return done


def train(tiny_config: Path, phase: int, root: str, *more: str) -> list[str]:
    config = str(tiny_config / f"phase{phase}.yaml")
    return ["raytrain2p.train", "--phase", str(phase), "--config", config, "--json", f"output.root={root}", *more]


def points(root: str, phase: str = "alignment") -> list[dict[str, Any]]:
    """The metric points of the only run of a phase."""
    store = ObjectStore(root)
    keys = [one.key for one in store.list(f"{phase}/") if one.key.endswith("/metrics.jsonl")]
    if not keys:
        return []
    assert len(keys) == 1
    found = store.read(keys[0])
    return [json.loads(line) for line in found[0].splitlines()] if found else []


def losses(root: str) -> dict[int, float]:
    """By step; each step is there once."""
    found = [(point["step"], point["value"]) for point in points(root) if point["name"] == "train_loss"]
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
