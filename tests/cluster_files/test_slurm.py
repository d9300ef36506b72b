"""cluster/slurm/train.sbatch with programs in place of Slurm's, Ray's and Python: what it starts, and what it does with signals.
tests/cluster/test_slurm.py runs it on a real Slurm.
"""

import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster_files.placeholders import CLUSTER, filled

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then printf "one\\ntwo\\nthree\\n"; else echo "scontrol $*" >> "$CALLS"; fi',
    "srun": 'echo "srun $*" >> "$CALLS"; exec sleep 100',
    "python": """
case "$1" in
-c) echo secret ;;
-) cat > /dev/null ;;
*)
    trap 'echo stopped >> "$CALLS"; exit 143' TERM
    sleep 0.3 # the script sets its own traps meanwhile
    echo "python $*" >> "$CALLS"
    if [ -n "$RESULT" ]; then exit "$RESULT"; fi
    while :; do sleep 0.05; done
    ;;
esac
""",
}


@dataclass
class Job:
    """The script as it runs, and the calls that it has made."""

    process: subprocess.Popen[str]
    folder: Path

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()

    def wait_for_training(self) -> None:
        deadline = time.monotonic() + 20
        while len(self.calls) < 3:  # in any order: two of the programs run in the background
            assert time.monotonic() < deadline, self.calls
            time.sleep(0.02)

    def end(self) -> int:
        """Wait for its end; returns the exit code."""
        return self.process.wait(timeout=20)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts the script as Slurm does on the first of three nodes."""
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    for name, body in STAND_INS.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "calls").touch()
    script = tmp_path / "train.sbatch"
    script.write_text(filled((CLUSTER / "slurm" / "train.sbatch").read_text(), {"shared-directory": str(tmp_path)}))
    jobs = []

    def started(*arguments: str, result: str = "", port: int) -> Job:
        slurm = {"SLURM_JOB_ID": str(port - 20_000), "SLURM_JOB_NODELIST": "one,two,three"}
        environment = os.environ | slurm | {"SLURM_CPUS_PER_TASK": "4", "RAY_HEAD_IP": "127.0.0.1"}
        environment |= {"CALLS": str(tmp_path / "calls"), "RESULT": result}
        process = subprocess.Popen(["bash", str(script), *arguments], env=environment, start_new_session=True, text=True)
        jobs.append(process)
        return Job(process, tmp_path)

    yield started
    for process in jobs:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def port() -> Iterator[int]:
    """One of 20000 to 29999 that is in use, as that of the head is once it runs."""
    with socket.socket() as listener:
        for number in range(20_000 + os.getpid() % 9000, 30_000):
            try:
                listener.bind(("127.0.0.1", number))
            except OSError:
                continue
            listener.listen()
            yield number
            return


def test_the_head_starts_on_the_first_node_and_ray_on_the_others_with_a_token_in_a_private_file(
    start: Callable[..., Job], port: int, tmp_path: Path
) -> None:
    job = start("--phase", "2", "data.train=my records.jsonl", port=port)
    job.wait_for_training()
    token = tmp_path / f".slurm-{port - 20_000}" / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    training, head, others = sorted(job.calls)
    assert head.startswith(
        "srun --nodes=1 --ntasks=1 --cpus-per-task=4 --nodelist=one ray start --head --block --node-ip-address=127.0.0.1"
    )
    assert f"--port={port} --num-cpus=4" in head
    assert others.startswith(
        f"srun --nodes=2 --ntasks=2 --cpus-per-task=4 --nodelist=two,three ray start --block --address=127.0.0.1:{port}"
    )
    launch_id = f"--launch-id=slurm-{port - 20_000}"
    assert training == f"python -m raytrain2p.train {launch_id} tracking.uri=tracking-uri --phase 2 data.train=my records.jsonl"
    job.process.terminate()
    assert job.end() == 143
    assert not token.parent.exists()


@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_training_is_stopped_with_a_checkpoint_and_the_job_queued_again_only_if_its_time_is_nearly_over(
    start: Callable[..., Job], port: int, number: signal.Signals, again: bool
) -> None:
    job = start("--phase", "2", port=port)
    job.wait_for_training()
    job.process.send_signal(number)
    assert job.end() == 143
    assert "stopped" in job.calls
    assert (f"scontrol requeue {port - 20_000}" in job.calls) == again


@pytest.mark.parametrize("result", ["0", "1", "2"])
def test_the_exit_code_is_that_of_the_training_and_a_training_that_ended_is_not_queued_again(
    start: Callable[..., Job], port: int, result: str
) -> None:
    job = start("--phase", "2", result=result, port=port)
    assert job.end() == int(result)
    assert not any("requeue" in call for call in job.calls)
