"""Steady speed of phase 2 through Ray and Lightning, against a bare torch loop with the same tricks, in one run.

    python benchmarks/phase2_speed.py [--slices 10] [--seconds 20]

Both use the same model code, stored features, batches and precision, so the ratio is the cost of Ray and Lightning. Both
are started at once and take turns: while one runs, every process of the other is suspended (SIGSTOP). The speed of a shared
machine drifts by a tenth and more within a minute, and consecutive runs would measure that. Both make the same steps in the
same order, and steps differ in length, so the time of each step is compared with that of the same step of the other. Steps
across the end of a slice, or in its first seconds, are left out. Needs a finished phase 1 run in ./checkpoints (`make
quickstart` makes one).
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SETTLING_SECONDS = 2.0  # at the beginning of a slice: caches are cold
WARM_UP_STEPS = 10
BATCH = 16  # training.global_batch_size of configs/phase2.yaml


def bare_loop(steps: int, aligner: str, times: Path) -> None:
    """A plain torch loop; writes the time at the end of each step."""
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    from raytrain2p.config import InstructionSettings, load_settings
    from raytrain2p.data.batches import StepSampler
    from raytrain2p.models.precision import resolve_precision
    from raytrain2p.phases.instruction import data as instruction_data
    from raytrain2p.phases.instruction import module as instruction

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    settings = load_settings(2, None, [f"model.aligner={aligner}"])
    assert isinstance(settings, InstructionSettings)
    data = instruction_data.read_inputs(settings).prepare()["train"]
    precision = resolve_precision(settings.training.precision, torch.device("cpu"))
    module = instruction.build(settings, steps, precision)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.training.learning_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    size = settings.training.global_batch_size
    sampler = StepSampler(data.lengths, data.supervised, size, size, 0, 1, settings.seed)
    module.train()
    done = 0
    with times.open("a", buffering=1) as stream:
        while done < steps:
            sampler.set_epoch(done // sampler.steps)
            for micro_batch in sampler:
                batch = data[micro_batch]
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = module(batch) / micro_batch.step_tokens
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, settings.training.gradient_clip or float("inf"))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                stream.write(f"{time.time()}\n")
                done += 1


class Contestant:
    """A process and its children, which can be suspended and resumed; `times` reads the end of each step so far."""

    def __init__(self, arguments: list[str], log: Path, times: Callable[[], list[float]]) -> None:
        with log.open("wb") as stream:
            self.process = psutil.Popen([sys.executable, *arguments], stdout=stream, stderr=stream)
        self.log, self.times = log, times

    def each(self, action: str) -> None:
        """Call a method of psutil.Process on each process."""
        for process in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, action)()

    def warm_up(self) -> None:
        while len(self.times()) < WARM_UP_STEPS:
            if self.process.poll() is not None:
                raise SystemExit(f"it ended too early:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)

    def slice(self, seconds: float) -> tuple[float, float]:
        """Run it alone for so long; returns the time span in which its steps count."""
        self.each("resume")
        begin = time.time() + SETTLING_SECONDS
        time.sleep(seconds)
        end = time.time()
        self.each("suspend")
        return begin, end

    def durations(self, slices: list[tuple[float, float]]) -> dict[int, float]:
        """Seconds of each step that lies entirely within a slice, by its number."""
        times = self.times()
        whole = [
            number for number in range(1, len(times)) if any(begin <= times[number - 1] and times[number] <= end for begin, end in slices)
        ]
        return {number: times[number] - times[number - 1] for number in whole}


def recorded_times(root: Path) -> list[float]:
    """End of each step in the run's metrics.jsonl."""
    points = [json.loads(line) for path in root.glob("phase2/*/metrics.jsonl") for line in path.read_bytes().split(b"\n")[:-1]]
    return [point["time"] for point in points if point["name"] == "train_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=10, help="slices of each contestant")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a slice")
    parser.add_argument("--bare", nargs=2, metavar=("ALIGNER", "TIMES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare_loop(100_000, options.bare[0], Path(options.bare[1]))
        return

    from raytrain2p.config.phases import ALIGNMENT
    from raytrain2p.tracking.find import find_artifact

    aligner = find_artifact("checkpoints", ALIGNMENT, "latest", "model.aligner")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        times = folder / "times"
        times.touch()
        bare = Contestant(
            [__file__, "--bare", str(aligner), str(times)],
            folder / "bare.log",
            lambda: [float(at) for at in times.read_text().split("\n")[:-1]],
        )
        bare.warm_up()
        bare.each("suspend")
        settings = [f"model.aligner={aligner}", f"output.root={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db"]
        settings += ["training.max_steps=100000", "data.test={}", "data.val=null"]
        ours = Contestant(["-m", "raytrain2p.train", "--phase", "2", *settings], folder / "ours.log", lambda: recorded_times(folder))
        try:
            ours.warm_up()
            ours.each("suspend")
            slices = []
            for number in range(1, options.slices + 1):
                slices.append((bare.slice(options.seconds), ours.slice(options.seconds)))
                print(f"slice {number} of {options.slices}", end="\r", flush=True)
        finally:
            for contestant in (bare, ours):
                contestant.each("resume")
                contestant.process.terminate()
            for contestant in (bare, ours):
                contestant.process.wait(120)  # ours writes its last steps before it ends
        theirs = bare.durations([of_bare for of_bare, _ in slices])
        mine = ours.durations([of_ours for _, of_ours in slices])
    both = sorted(theirs.keys() & mine.keys())
    seconds = [sum(durations[number] for number in both) for durations in (theirs, mine)]
    ratios = [theirs[number] / mine[number] for number in both]
    lower, middle, upper = statistics.quantiles(ratios, n=4)
    print(f"{len(both)} steps that both made: bare loop {BATCH * len(both) / seconds[0]:.1f} samples/s,")
    print(f"through Ray and Lightning {BATCH * len(both) / seconds[1]:.1f} samples/s: ratio {seconds[0] / seconds[1]:.3f}")
    print(f"of a step: median {middle:.3f}, middle half {lower:.3f} to {upper:.3f}")


if __name__ == "__main__":
    main()
