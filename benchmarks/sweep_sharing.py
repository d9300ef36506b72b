"""Memory and time of N concurrent trials of a sweep, against N concurrent `train` commands.

    python benchmarks/sweep_sharing.py [--trials 2] [--steps 20]

The two are measured one after the other; each trial or command trains phase 2 on the embedded data with one CPU. Memory is
the largest sum, over all processes, of the proportional set size (Pss of /proc/PID/smaps_rollup: a page that several
processes share counts once). Needs a finished phase 1 run in ./checkpoints (`make quickstart` makes one), and computes
missing features first.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

SETTINGS = ["data.test={}", "checkpoint.every_steps=10", "checkpoint.best_of=saves", "launch.cpus_per_worker=1"]


def pss(process: psutil.Process) -> int:
    """Proportional set size of a process and its children, in bytes."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total


def measured(commands: list[list[str]], log: Path) -> tuple[float, float]:
    """Run them at once; returns the seconds until the last one has ended, and the largest memory, in MB.

    Raises:
        SystemExit: one of them failed.
    """
    environment = os.environ | {"RAY_ADDRESS": "local"}
    since, most = time.monotonic(), 0
    with log.open("wb") as stream:
        running = [psutil.Popen([sys.executable, "-m", *command], stdout=stream, stderr=stream, env=environment) for command in commands]
        while any(process.poll() is None for process in running):
            most = max(most, sum(pss(process) for process in running if process.poll() is None))
            time.sleep(1)
    if any(process.returncode for process in running):
        raise SystemExit(log.read_text()[-3000:])
    return time.monotonic() - since, most / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2, help="number of concurrent trials")
    parser.add_argument("--steps", type=int, default=20, help="steps of each")
    options = parser.parse_args()

    from raytrain2p.config.phases import ALIGNMENT
    from raytrain2p.tracking.find import find_artifact

    aligner = find_artifact("checkpoints", ALIGNMENT, "latest", "model.aligner")
    rates = [round(5e-4 * 1.3**number, 6) for number in range(options.trials)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def shared(which: str) -> list[str]:
            where = [f"output.root={folder}/{which}", f"tracking.uri=sqlite:///{folder}/{which}.db", f"model.aligner={aligner}"]
            return [*SETTINGS, *where, f"training.max_steps={options.steps}"]

        config = folder / "sweep.yaml"
        config.write_text(f"sweep: {{search: grid, space: {{training.learning_rate: {{grid: {rates}}}}}}}\n")
        separate = [
            ["raytrain2p.train", "--phase", "2", f"training.learning_rate={rate}", *shared(f"separate{number}")]
            for number, rate in enumerate(rates)
        ]
        measured([[*separate[0], "training.max_steps=1", f"output.root={folder}/first"]], folder / "log")  # features, page cache
        found = {
            "separate": measured(separate, folder / "log"),
            "sweep": measured([["raytrain2p.tune", "--config", str(config), *shared("sweep")]], folder / "log"),
        }
    for name, (seconds, megabytes) in found.items():
        print(f"{options.trials} x {options.steps} steps, {name}: {seconds:.0f} s, {megabytes:.0f} MB")
    (slow, large), (fast, small) = found["separate"], found["sweep"]
    print(f"the sweep took {fast / slow:.2f} of the time and {small / large:.2f} of the memory")


if __name__ == "__main__":
    main()
