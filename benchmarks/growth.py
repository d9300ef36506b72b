"""How a step grows with batch, record length and soft tokens, and start-up and memory with the number of records.

python -m benchmarks.growth CASE OUT [--turns N]     the steps, in a process of its own
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.case import prepare
from benchmarks.options import Options
from benchmarks.report import Found, Table, median_text, number
from benchmarks.turns import Contestant, python, recorded_steps

USUAL = (16, 64, 16)  # records, tokens of a record, soft tokens among them
SHAPES = {
    "batch": [(records, 64, 16) for records in (4, 16, 64)],
    "tokens of a record": [(16, tokens, 16) for tokens in (32, 64, 128, 256)],
    "soft tokens": [(16, 64, soft) for soft in (1, 4, 16)],
}
VARIES = {"batch": 0, "tokens of a record": 1, "soft tokens": 2}
SUPERVISED = 8  # tokens at the end of each record
TURNS = 4
RECORDS, MANY = (1_000, 10_000, 100_000), 1_000_000
WORDS = ("red", "square", "beside", "small", "circle", "above", "green", "line", "left", "of", "the", "middle")
SECONDS_PER_RECORD = 2e-3  # that are waited for


def measure(options: Options) -> Found:
    found = Found()
    found.tables += step_tables(options)
    counts: tuple[int, ...] = (1_000, 4_000) if options.short else (*RECORDS, *([MANY] if options.long else []))
    rows = []
    for count in counts:
        for workers in (1, 2) if count == counts[1] else (1,):
            try:
                rows.append([f"{count:,}", str(workers), *launched(count, workers, options)])
                options.say(f"{count:,} records, {workers} workers: {rows[-1][2:]}")
            except Exception as error:  # the others are measured all the same
                found.errors.append(f"{count:,} records, {workers} workers: {error}")
    columns = ["records", "workers", "command to first step, s", "driver, MB", "a worker, MB"]
    notes = ["Generated records without images, phase 2, SmolLM2; memory is the resident set after the first step."]
    notes += [] if options.long else ["A million: `python -m benchmarks growth --long`."]
    found.tables.append(Table("Start-up and memory", columns, rows, notes))
    return found


def step_tables(options: Options) -> list[Table]:
    case = options.case.with_aligner(folder=str(options.folder / "growth"), steps=1)
    prepare(case)
    out = case.path / "steps"
    out.mkdir()
    child = Contestant(
        "growth",
        python("-m", "benchmarks.growth", str(case.path), str(out), "--turns", "1" if options.short else str(TURNS)),
        out / "log",
        dict,
    )
    try:
        child.wait_until((out / "result.json").exists, 900)
    finally:
        child.end()
    seconds = {tuple(shape): values for shape, values in json.loads((out / "result.json").read_text())}
    tables = []
    for what, shapes in SHAPES.items():
        ratios = {shape: [one / usual for one, usual in zip(seconds[shape], seconds[USUAL], strict=True)] for shape in shapes}
        rows = [
            [str(shape[VARIES[what]]), median_text(ratios[shape]), number(sum(seconds[shape]) / len(seconds[shape]))] for shape in shapes
        ]
        usual = f"{USUAL[0]} records of {USUAL[1]} tokens, {USUAL[2]} of them soft"
        tables.append(Table(f"A step over {what}", [what, f"time, of a step of {usual}", "s"], rows))
    return tables


def launched(count: int, workers: int, options: Options) -> list[str]:
    """Seconds to the first step, and memory of driver and worker, of a real command."""
    name = f"records{count}x{workers}"
    out, records = options.folder / name, options.folder / f"{count}.jsonl"
    out.mkdir()
    if not records.exists():
        with records.open("w") as stream:
            for number_ in range(count):
                words = [WORDS[(number_ * 7 + place * (1 + number_ % 5)) % len(WORDS)] for place in range(12)]
                stream.write(json.dumps({"instruction": f"{number_}: {' '.join(words[:8])}?", "response": " ".join(words[8:])}) + "\n")
    settings = [one for one in options.case.overrides() if not one.startswith(("data.train", "launch.num_workers"))]
    settings += [f"data.train={records}", f"launch.num_workers={workers}", "training.log_every=1"]
    settings += [f"output.root={out}", f"tracking.uri=sqlite:///{out}/mlflow.db"]
    command = python("-m", "raytrain2p.train", "--phase", "2", *settings)
    contestant = Contestant(name, command, out / "log", lambda: recorded_steps(out), options.environment())
    try:
        contestant.wait_for_step(1, 240 + SECONDS_PER_RECORD * count)
        first = contestant.steps()[1].end
        (status,) = out.glob("phase2/*/status.json")
        worker = psutil.Process(json.loads(status.read_text())["pid"])
        memory = [process.memory_info().rss / 1e6 for process in (contestant.process, worker)]
    finally:
        contestant.end()
    return [f"{first - contestant.started:.1f}", *(f"{one:,.0f}" for one in memory)]


def random_batch(records: int, tokens: int, soft: int, template: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """A batch of this shape, as the program collates it: an image at the beginning of each record."""
    ids = torch.randint(0, vocabulary, (records, tokens))
    places = torch.arange(records * tokens).view(records, tokens)
    learnt = places[:, -SUPERVISED:].flatten()
    images = template["items"]["image"]
    values = images.values[:1].expand(records, -1, -1).contiguous()
    inputs = {"input_ids": ids, "soft": {"image": places[:, 1 : 1 + soft].flatten()}}
    inputs |= {"supervised": learnt - 1, "targets": ids.view(-1)[learnt]}
    return {"tokens": inputs, "items": {"image": images._replace(values=values)}, "step_tokens": SUPERVISED * records}


def main() -> None:
    from benchmarks.case import Case, read_batches
    from benchmarks.contestants import our_module, trained_parameters

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--turns", type=int, default=TURNS)
    options = parser.parse_args()
    case = Case.read(options.case)
    module, template = our_module(case), read_batches(case, 0)[0]
    optimizer = torch.optim.AdamW(trained_parameters(module), lr=1e-4, fused=True)
    vocabulary = module.assistant.language_model.get_input_embeddings().weight.shape[0]
    shapes = list(dict.fromkeys(shape for shapes in SHAPES.values() for shape in shapes))
    batches = {shape: random_batch(*shape, template, vocabulary) for shape in shapes}
    seconds: dict[tuple[int, int, int], list[float]] = {shape: [] for shape in shapes}
    for turn in range(options.turns + 1):
        for shape, batch in batches.items():
            module.assistant.soft_tokens["image"] = shape[2]
            for counts in (False, True):  # the first one is cold
                begin = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bf16"):
                    loss = module(batch) / batch["step_tokens"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if counts and turn:
                    seconds[shape].append(time.perf_counter() - begin)
    (options.out / "part").write_text(json.dumps(list(seconds.items())))
    (options.out / "part").replace(options.out / "result.json")


if __name__ == "__main__":
    main()
