"""Steady speed of phase 2 through Ray and Lightning, against a bare torch loop with the same tricks, in one run.

    python benchmarks/phase2_speed.py [--rounds 3] [--steps 60]

Both use the same model code, stored features, batches and precision, so what the ratio shows is what Ray and Lightning
cost. The two take turns, because a shared machine's speed drifts; a round's figure is the median over windows of ten
steps, the first window left out. Needs a finished phase 1 run in ./checkpoints (`make quickstart` makes one).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WINDOW = 10


def bare_loop(steps: int) -> list[float]:
    """Samples per second in each window of a plain torch loop."""
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    from raytrain2p.config import InstructionSettings, load_settings
    from raytrain2p.data.batches import StepSampler
    from raytrain2p.launch.driver import resolve_aligner
    from raytrain2p.launch.progress import Console
    from raytrain2p.models.precision import resolve_precision
    from raytrain2p.phases import dialogues, instruction

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    settings = resolve_aligner(load_settings(2), Console())
    assert isinstance(settings, InstructionSettings)
    data = dialogues.survey(settings).prepare()["train"]
    precision = resolve_precision(settings.training.precision, torch.device("cpu"))
    module = instruction.build(settings, {}, steps, precision)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.training.learning_rate, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    batch_size = settings.training.batch_size
    sampler = StepSampler(data.lengths, data.supervised, batch_size, 1, 0, 1, settings.seed)
    module.train()
    speeds, since = [], time.perf_counter()
    for step, share in enumerate(sampler, 1):
        batch = data[share]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = module(batch) / share.step_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.training.gradient_clip or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % WINDOW == 0:
            now = time.perf_counter()
            speeds.append(WINDOW * batch_size / (now - since))
            since = now
        if step == steps:
            break
    return speeds


def through_ray(steps: int) -> list[float]:
    """The same figure out of metrics.jsonl of a real run."""
    settings = [f"training.max_steps={steps}", f"training.log_every={WINDOW}", "data.test={}", "data.val=null"]
    outcome = json.loads(last_line("-m", "raytrain2p.train", "--phase", "2", "--json", *settings))
    metrics = Path(outcome["directory"]) / "metrics.jsonl"
    points = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [point["value"] for point in points if point["name"] == "samples_per_second"]


def last_line(*arguments: str) -> str:
    """Of what a Python process prints."""
    done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare_loop(options.steps)))
        return
    ratios = []
    for number in range(1, options.rounds + 1):
        bare = statistics.median(json.loads(last_line(__file__, "--bare", "--steps", str(options.steps)))[1:])
        ours = statistics.median(through_ray(options.steps)[1:])
        ratios.append(ours / bare)
        print(f"round {number}: bare loop {bare:.1f} samples/s, through Ray and Lightning {ours:.1f}, ratio {ours / bare:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} (least {min(ratios):.3f}, greatest {max(ratios):.3f})")


if __name__ == "__main__":
    main()
