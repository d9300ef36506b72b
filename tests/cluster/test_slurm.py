"""cluster/slurm/train.sbatch on a real Slurm of two nodes: trains, and is started again where it was stopped."""

import json
import os
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import MISSING, Slurm, slurm
from tests.cluster_files.placeholders import filled

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif("RAYTRAIN2P_CLUSTER_TESTS" not in os.environ, reason="minutes on a real Slurm: make test-cluster"),
    pytest.mark.skipif(bool(MISSING), reason=f"not here: {', '.join(MISSING)} (apt-get install slurm-wlm munge)"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Slurm]:
    with slurm() as ours:
        yield ours


@pytest.fixture
def submit(cluster: Slurm, tmp_path: Path, tiny_config: Path) -> Callable[..., str]:
    """Submits the script with its placeholders filled in; returns the job's number. The job's log is log.txt of `tmp_path`."""
    binaries = tmp_path / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{ROOT}"\n')
    script = tmp_path / "train.sbatch"
    values = {"shared-directory": str(tmp_path), "tracking-uri": "sqlite:///mlflow.db", "partition": "all"}
    text = (ROOT / "cluster/slurm/train.sbatch").read_text()
    script.write_text(filled(text, values | {"cpus-per-node": "1", "gpus-per-node": "1"}))

    def sbatch(*settings: str) -> str:
        arguments = ["--phase", "1", "--config", f"{tiny_config}/phase1.yaml", "launch.num_workers=2", *settings]
        variables = {"RAY_HEAD_IP": "127.0.0.2", "OMP_NUM_THREADS": "1", "RAYTRAIN2P_FEATURES": str(tmp_path / "features")}
        return cluster.submit(f"--output={tmp_path}/log.txt", f"--chdir={tmp_path}", str(script), *arguments, **variables)

    return sbatch


def wait_for(what: Callable[[], bool], cluster: Slurm, job: str, log: Path) -> None:
    deadline = time.monotonic() + 240
    while not what():
        end = log.read_text()[-5000:] if log.exists() else "no log"
        assert time.monotonic() < deadline, end
        assert cluster.state(job) != "FAILED", end
        time.sleep(0.5)


def test_a_job_that_is_stopped_before_its_time_is_over_is_started_again_and_resumes_its_run(
    cluster: Slurm, submit: Callable[..., str], tmp_path: Path
) -> None:
    log, runs = tmp_path / "log.txt", tmp_path / "checkpoints" / "alignment"
    job = submit("training.max_steps=4000", "data.val=null", "data.test={}", "checkpoint.every_steps=100000")

    def steps() -> list[int]:
        lines = [line for path in runs.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]
        return [point["step"] for point in map(json.loads, lines) if point["name"] == "train_loss"]

    wait_for(lambda: len(steps()) > 5, cluster, job, log)
    token = tmp_path / f".slurm-{job}" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() not in log.read_text()
    cluster("scancel", "--batch", "--signal=USR1", job)  # as Slurm does it 180 seconds before the time is over
    wait_for(lambda: cluster.state(job) == "PENDING", cluster, job, log)
    reached = max(steps())
    assert list(runs.glob("*/lightning_checkpoints/last.ckpt"))
    assert not token.exists()
    wait_for(lambda: cluster.state(job) == "COMPLETED", cluster, job, log)
    (run,) = [path for path in runs.iterdir() if path.is_dir()]
    assert (run / "aligner.pt").is_file()
    assert steps() == sorted(set(steps()))
    assert 100 < reached < max(steps()) == 4000
    assert json.loads((run / "run.json").read_text())["launch_id"] == f"slurm-{job}"
