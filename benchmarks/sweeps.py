"""Eight trials of a sweep that stops bad ones early, against eight `train` commands: time and memory.

Memory is the largest sum, over all processes, of the proportional set size (Pss of /proc/PID/smaps_rollup: a page that several processes
share counts once).
"""

import time
from pathlib import Path

import psutil

from benchmarks.options import Options
from benchmarks.report import Bar, Found, Table
from benchmarks.turns import Contestant, Ended, Ratio, python

TRIALS, STEPS, GRACE = 8, 24, 6
SECONDS = 1500.0


def measure(options: Options) -> Found:
    trials, steps, grace = (2, 4, 2) if options.short else (TRIALS, STEPS, GRACE)
    rates = [round(3e-4 * 1.5**number, 6) for number in range(trials)]
    shared = [
        setting
        for setting in options.case.overrides()
        if not setting.startswith(("training.max_steps", "training.learning_rate", "checkpoint."))
    ]
    shared += [f"training.max_steps={steps}", f"checkpoint.every_steps={grace}", "checkpoint.best_of=saves"]
    config = options.folder / "sweep.yaml"
    config.write_text(
        f"sweep: {{phase: 2, search: grid, metric: train_loss, scheduler: asha, asha: {{time_attr: step, grace_period: {grace}, "
        f"reduction_factor: 2}}, space: {{training.learning_rate: {{grid: {rates}}}}}}}\nlaunch: {{cpus_per_worker: 1}}\n"
    )
    commands = [["raytrain2p.train", "--phase", "2", *shared, f"training.learning_rate={rate}"] for rate in rates]
    seconds, memory = dict[str, float](), dict[str, float]()
    found = [run(command, options.folder / f"command{number}", options) for number, command in enumerate(commands)]
    seconds["commands"], memory["commands"] = sum(one[0] for one in found), max(one[1] for one in found)
    options.say(f"{trials} commands: {seconds['commands']:.0f} s")
    seconds["sweep"], memory["sweep"] = run(["raytrain2p.tune", "--config", str(config), *shared], options.folder / "sweep", options)
    options.say(f"sweep: {seconds['sweep']:.0f} s")
    made = sum(len(set(steps_of(path))) for path in options.folder.glob("sweep/phase2/*/metrics.jsonl"))
    ratio = Ratio.of([seconds["commands"] / seconds["sweep"]])
    names = {
        "commands": f"{trials} commands, one after another",
        "sweep": f"one sweep of {trials} trials, ASHA, as many at once as there are cores",
    }
    counted = {"commands": trials * steps, "sweep": made}
    rows = [[names[name], f"{seconds[name]:.0f} s", f"{counted[name]}", f"{memory[name]:,.0f} MB"] for name in names]
    notes = [
        f"The sweep takes {1 / ratio.median:.2f} of the time. {steps} steps of 16 at most, reported every {grace}; nothing is evaluated."
    ]
    table = Table("Phase 2, LoRA on all linear layers, learning rates in a grid", ["who", "time", "steps made", "most memory"], rows, notes)
    return Found([table], [Bar(f"{trials} commands against a sweep", ratio, "sweeps")])


def steps_of(path: Path) -> list[str]:
    return [line.split(",")[0] for line in path.read_text().splitlines() if '"train_loss"' in line]


def run(command: list[str], out: Path, options: Options) -> tuple[float, float]:
    """Seconds until it ends, and its largest memory in MB.

    Raises:
        Ended: it failed.
    """
    out.mkdir()
    where = [f"output.root={out}", f"tracking.uri=sqlite:///{out}/mlflow.db"]
    contestant = Contestant(command[0], python("-m", *command, *where), out / "log", dict, options.environment())
    most, deadline = 0, time.time() + SECONDS
    try:
        while (code := contestant.process.poll()) is None:
            most = max(most, pss(contestant.tree()))
            if time.time() > deadline:
                raise Ended(f"{command[0]} took more than {SECONDS:.0f} s: {contestant.last_lines()}")
            time.sleep(1)
    finally:
        ended = time.time()
        contestant.end()
    if code:
        raise Ended(f"{command[0]} ended with {code}: {contestant.last_lines()}")
    return ended - contestant.started, most / 1e6


def pss(processes: list[psutil.Process]) -> int:
    """Proportional set size of processes, in bytes."""
    total = 0
    for one in processes:
        try:
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total
