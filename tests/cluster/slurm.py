"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, as root, with files, ports and a key of their own."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=0
GresTypes=gpu
KillWait=5
MpiDefault=none
NodeName=first NodeAddr=127.0.0.1 NodeHostname={host} Port={first} CPUs=1 RealMemory=1000 Gres=gpu:1
NodeName=second NodeAddr=127.0.0.1 NodeHostname={host} Port={second} CPUs=1 RealMemory=1000 Gres=gpu:1
PartitionName=all Nodes=first,second Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Slurm:
    """Commands on this Slurm."""

    def __init__(self, folder: Path) -> None:
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def __call__(self, *command: str, **variables: str) -> str:
        """Run a command and return its output."""
        done = subprocess.run(command, env=self.environment | variables, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def idle(self) -> bool:
        """Whether both nodes wait for a job."""
        command = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout.strip() == "2"

    def submit(self, *words: str, **variables: str) -> str:
        """`sbatch`; returns the job's number."""
        return self("sbatch", "--parsable", *words, **variables)

    def state(self, job: str) -> str:
        """The job's state, such as RUNNING."""
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        assert found is not None
        return found[1]


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Within, a Slurm of two nodes, `first` and `second`, with one CPU and one made-up GPU each, is running."""
    with tempfile.TemporaryDirectory(prefix="slurm") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        ports = {"port": free_port(), "first": free_port(), "second": free_port()}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=socket.gethostname().partition(".")[0], **ports))
        (folder / "gres.conf").write_text("NodeName=first,second Name=gpu File=/dev/null\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        ours = Slurm(folder)
        commands = [
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"],
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D", "-N", "first"],
            ["slurmd", "-D", "-N", "second"],
        ]
        commands[0] += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log"]
        for command in commands:
            log = stack.enter_context((folder / f"{command[0]}{len(command)}.log").open("w"))
            daemon = subprocess.Popen(command, env=ours.environment, stdout=log, stderr=log)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        deadline = time.monotonic() + 30
        while not ours.idle():
            assert time.monotonic() < deadline, "\n".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
            time.sleep(0.5)
        yield ours
