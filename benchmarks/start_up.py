"""From the command to the first step, from the last step to the exit, and from a kill to the next step."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import psutil

from benchmarks.case import Case, prepare
from benchmarks.options import Options
from benchmarks.report import Bar, Found, Table, median_text
from benchmarks.step import OURS
from benchmarks.turns import Contestant, Ratio, Steps, python, recorded_steps, written_steps

NAMES = {OURS: "raytrain2p", "torch_trainer": "the smallest TorchTrainer program", "torchrun": "torchrun with the plain loop"}
STEPS, KILLED_AFTER, SAVE_EVERY = 6, 4, 2
ROUNDS, KILLS = 3, 2
SECONDS = 240.0


def measure(options: Options) -> Found:
    """The three, one after another, in several rounds."""
    case = options.case.with_aligner(folder=str(options.folder / "start_up"), steps=STEPS)
    prepare(case)
    times: dict[str, dict[str, list[float]]] = {name: {"start": [], "cpu": [], "end": [], "recovery": []} for name in NAMES}
    found = Found()
    for number in range(1 if options.short else ROUNDS):
        for name, measured in times.items():
            with contextlib.ExitStack() as stack:
                contestant = start(name, case, case.path / f"{name}{number}", options, stack, steps=STEPS)
                contestant.wait_for_step(1, SECONDS)
                measured["cpu"].append(cpu_seconds(contestant))
                contestant.wait_until_ended(SECONDS)
                ended, steps = time.time(), contestant.steps()
                measured["start"].append(steps[1].end - contestant.started)
                measured["end"].append(ended - steps[STEPS].end)
                options.say(f"{name}: first step after {measured['start'][-1]:.1f} s, exit {measured['end'][-1]:.1f} s after the last")
    for number in range(1 if options.short else KILLS):
        for name, measured in times.items():
            try:
                with contextlib.ExitStack() as stack:
                    contestant = start(name, case, case.path / f"{name}killed{number}", options, stack, steps=0)
                    measured["recovery"].append(recovery(contestant, name))
                options.say(f"{name}: next step {measured['recovery'][-1]:.1f} s after a kill")
            except Exception as error:  # the others are measured all the same
                found.errors.append(f"{name}, killed: {error}")
    report(times, found)
    return found


def report(times: dict[str, dict[str, list[float]]], found: Found) -> None:
    titles = {
        "start": "command to first step",
        "end": "last step to exit",
        "recovery": "kill to next step",
        "cpu": "CPU s to the first step",
    }
    rows = []
    for name, measured in times.items():
        rows.append([NAMES[name], *(median_text(measured[key]) if measured[key] else "failed" for key in titles)])
        for key, title in titles.items():
            ours = times[OURS][key]
            if name != OURS and ours and measured[key]:
                both = [one / other for one, other in zip(measured[key], ours, strict=False)]
                found.bars.append(Bar(f"{title}, {NAMES[name]}", Ratio.of(both), "start, end and recovery"))
    title = f"Seconds, phase 2, batch 16, {STEPS} steps, features stored, caches warm"
    notes = [
        "All load SmolLM2 and add LoRA; the two others train the plain loop on ready batches. A killed worker resumes from a checkpoint of"
    ]
    notes += [f"every {SAVE_EVERY} steps."]
    found.tables.append(Table(title, ["who", *titles.values()], rows, notes))


def start(name: str, case: Case, out: Path, options: Options, stack: contextlib.ExitStack, steps: int) -> Contestant:
    """Start one, which makes so many steps; 0: it trains on, and resumes if it is killed."""
    out.mkdir()
    read: Steps = lambda: written_steps(out, 1)  # noqa: E731
    if name == OURS:
        arguments = ["-m", "raytrain2p.train", "--phase", "2", *case.overrides(), f"output.root={out}", "training.log_every=1"]
        arguments += [f"tracking.uri=sqlite:///{out}/mlflow.db"]
        arguments += [f"training.max_steps={steps}"] if steps else ["launch.max_failures=1", f"checkpoint.every_steps={SAVE_EVERY}"]
        read = lambda: recorded_steps(out)  # noqa: E731
    else:
        ends = ["--steps", str(steps)] if steps else ["--save-every", str(SAVE_EVERY)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=1"] if name == "torchrun" else []
        loop = "plain_loop" if name == "torchrun" else name
        arguments = [*launcher, "-m", "benchmarks.contestants", loop, str(case.path), str(out), *ends]
    contestant = Contestant(name, python(*arguments), out / "log", read, options.environment())
    stack.callback(contestant.end)
    return contestant


def cpu_seconds(contestant: Contestant) -> float:
    """Used so far by its processes, of which those that have ended count with their parents."""
    total = 0.0
    for process in contestant.tree():
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


def recovery(contestant: Contestant, name: str) -> float:
    """Seconds from the death of the worker to the next step."""
    contestant.wait_for_step(KILLED_AFTER, SECONDS)
    if name == OURS:
        (status,) = contestant.log.parent.glob("phase2/*/status.json")
        worker = json.loads(status.read_text())["pid"]
    else:
        worker = json.loads((contestant.log.parent / "steps0").read_text().splitlines()[-1])[2]
    os.kill(worker, signal.SIGKILL)
    killed = time.time()
    # a step that was under way may still be recorded: that after it is a new worker's
    contestant.wait_until(lambda: any(step.end > killed + 1 for step in contestant.steps().values()), SECONDS)
    return min(step.end for step in contestant.steps().values() if step.end > killed + 1) - killed
