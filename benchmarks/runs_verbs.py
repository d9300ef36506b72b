"""Time and memory of the verbs of `runs` on stores of many runs.

    python -m benchmarks.runs_verbs FOLDER [FOLDER ...] [--repeat 3] [--verbs list find ...]

Each FOLDER was made by `python -m benchmarks.many_runs`; the server of one that has one is started meanwhile. Each command is a process
of its own, as a person starts it; of several repetitions the fastest counts, since the speed of a shared machine drifts. Nothing
is changed: `prune` prints its plan alone. Printed as a table of Markdown: seconds beside those that were aimed at, runs per second, the
largest memory, and its ratio to that in the first folder, which does not grow with the number of runs where a verb's memory is flat.
Exit code 1 is right where a verb reports the one run that is RUNNING without a process.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.runs.summary import size_of
from raytrain2p.tracking.find import run_directories
from raytrain2p.tracking.run import RUN_FOLDERS
from raytrain2p.tracking.run_directory import RUN_ID_LENGTH
from tests.chaos.mlflow_server import Server

AIMED = 5.0  # seconds, on a store of 1,000 runs; a full verification takes what it takes
COLUMNS = ("store", "runs", "command", "exit", "seconds", f"of {AIMED:.0f} s", "CPU, s", "runs/s", "MB/s", "memory, MB", "of the first")


def commands(root: str) -> dict[str, list[str]]:
    """What is measured, by name."""
    aligner, run = (run_directories(root, [phase.name])[0].name[:RUN_ID_LENGTH] for phase in (ALIGNMENT, INSTRUCTION))
    return {
        "(start)": ["--help"],  # Python alone
        "list": ["list"],
        "list --where": ["list", "--where", "val/loss<2", "--sort", "val/loss"],
        "show": ["show", run],
        "find RUN": ["find", run],
        "find --aligner": ["find", "--aligner", aligner],
        "tree": ["tree"],
        "verify --fast": ["verify", "--fast"],
        "verify": ["verify"],
        "prune": ["prune", "--keep-last", "100", "--older-than", "7d"],
    }


def measured(words: list[str], log: Path) -> tuple[int, float, float, float]:
    """Run a verb. Returns its exit code, the seconds that it took, those of a CPU, and the largest memory of its process, in MB."""
    begin = time.monotonic()
    with log.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-m", "raytrain2p.runs", *words], stdout=stream, stderr=stream)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="made by `python -m benchmarks.many_runs`")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each command (a full verification: one)")
    parser.add_argument("--verbs", nargs="+", help="these alone, as in the table's column `command`")
    options = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    first: dict[str, float] = {}
    for folder in map(Path.absolute, options.folders):
        with ExitStack() as stack:
            root, where, store = f"{folder}/checkpoints", [f"output.root={folder}/checkpoints"], "SQLite"
            if (folder / "server.db").is_file():
                recorded = json.loads((run_directories(root, RUN_FOLDERS)[0] / "run.json").read_text())["tracking_uri"]
                # At another address its runs would be those of another store
                server, store = Server(folder, urlsplit(recorded).port or 0), "server"
                server.start()
                stack.callback(server.stop)
                where.append(f"tracking.uri={server.uri}")
            count, megabytes = len(run_directories(root, RUN_FOLDERS)), size_of(Path(root)) / 1e6
            for name, words in commands(root).items():
                if options.verbs and name not in options.verbs:
                    continue
                given = [] if words == ["--help"] else where
                tries = [measured([*words, *given], folder / "verb.log") for _ in range(1 if name == "verify" else options.repeat)]
                code, seconds, cpu, memory = min(tries, key=lambda one: one[1])
                ratio = memory / first.setdefault(name, memory)
                rates = [f"{count / seconds:.0f}", f"{megabytes / seconds:.1f}"] if name == "verify" else ["", ""]
                row = [store, f"{count:,}", f"`{name}`", code, f"{seconds:.2f}", f"{seconds / AIMED:.2f}", f"{cpu:.1f}", *rates]
                print(f"| {' | '.join(map(str, [*row, f'{memory:.0f}', f'{ratio:.2f}']))} |", flush=True)


if __name__ == "__main__":
    main()
