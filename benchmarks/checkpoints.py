"""Saving and resuming: the program's checkpoints, Lightning's of the whole module, and those of the HF Trainer.

    python -m benchmarks.checkpoints KIND CASE OUT [--saves N]     one of them, in a process of its own

Each trains on one batch again and again, so that all its steps are equal, and what a save adds to its step and to the next one shows.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.case import CLIP, Case, prepare, read_batches
from benchmarks.clock import Clock
from benchmarks.contestants import hugging_face_trainer, our_module
from benchmarks.options import Options
from benchmarks.report import Bar, Found, Table, number
from benchmarks.turns import Contestant, Ratio, python

NAMES = {
    "ours": "raytrain2p",
    "lightning_full": "Lightning, the whole module (its default)",
    "hf_bf16": "HF Trainer + PEFT, saves adapters and projector",
}
EVERY, SAVED_EVERY = 4, 50  # steps between two saves here, and in the program
SAVES = 6


def measure(options: Options) -> Found:
    case = options.case.with_aligner(folder=str(options.folder / "checkpoints"), steps=1)
    prepare(case)
    results, found = dict[str, dict[str, Any]](), Found()
    for kind in NAMES:
        out = case.path / kind
        out.mkdir()
        arguments = ["-m", "benchmarks.checkpoints", kind, str(case.path), str(out), "--saves", str(1 if options.short else SAVES)]
        contestant = Contestant(kind, python(*arguments), out / "log", dict, options.environment())
        try:
            contestant.wait_until((out / "result.json").exists, 580)
        finally:
            contestant.end()
        results[kind] = json.loads((out / "result.json").read_text())
        options.say(f"{kind}: {results[kind]}")
    ours, rows = results["ours"], []
    for kind, result in results.items():
        stall = Ratio.of([extra / result["step"] for extra in result["extra"]])
        rows.append(
            [
                NAMES[kind],
                f"{statistics.median(result['call']) * 1e3:.0f} ms",
                str(stall),
                f"{stall.median / SAVED_EVERY:.2%}",
                f"{result['bytes'] / 1e6:.1f} MB",
                number(result["bytes"] / results["lightning_full"]["bytes"]),
                f"{result['resumed']:.1f} s",
                f"{result['fresh']:.1f} s",
            ]
        )
        if kind != "ours":
            found.bars.append(Bar(f"bytes, {NAMES[kind]}", Ratio.of([result["bytes"] / ours["bytes"]]), "checkpoints"))
            calls = Ratio.of([statistics.median(result["call"]) / statistics.median(ours["call"])])
            found.bars.append(Bar(f"time of the call, {NAMES[kind]}", calls, "checkpoints"))
    columns = ["who", "the call waits", "added to two steps, in steps", f"share of the time, every {SAVED_EVERY} steps", "bytes"]
    columns += ["of Lightning's", "resumed: to the first step", "fresh: to the first step"]
    notes = [
        "Added: what the step that saves and the next one take beyond two steps, since a thread writes meanwhile. Times to the first step",
        "are those of `fit` or `train` in a process that has imported everything and built the model.",
    ]
    found.tables.append(Table("LoRA on all linear layers, batch 16, one batch again and again", columns, rows, notes))
    return found


def lightning_saves(case: Case, out: Path, saves: int, full: bool) -> dict[str, Any]:
    """Lightning's trainer, with the program's checkpoint plugin or its own.

    Args:
        full: all weights, frozen ones included.
    """
    import pytorch_lightning as pl

    from raytrain2p.worker.checkpoint_io import AsyncCheckpointIO

    path = out / "last.ckpt"
    ends, calls = list[float](), list[float]()

    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            ends.append(time.perf_counter())
            if trainer.global_step % EVERY == 0 and len(calls) < saves:
                begin = time.perf_counter()
                trainer.save_checkpoint(path)
                calls.append(time.perf_counter() - begin)

    def fit(steps: int, callbacks: list[pl.Callback], **options: Any) -> None:
        module = our_module(case)
        if full:
            module.on_save_checkpoint = lambda checkpoint: None
        module.steps_per_epoch = 1000
        trainer = pl.Trainer(
            accelerator="cpu",
            precision="bf16-mixed" if case.precision == "bf16" else "32-true",
            plugins=[] if full else [AsyncCheckpointIO()],
            max_steps=steps,
            gradient_clip_val=CLIP,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        loader = torch.utils.data.DataLoader(cast(Any, read_batches(case, 0) * 1000), batch_size=None)
        begun.append(time.perf_counter())
        trainer.fit(module, loader, **options)

    begun = list[float]()
    fit(EVERY * (saves + 1), [Saves()])
    fresh, made = ends[0] - begun[0], list(ends)
    calls_made = list(calls)
    ends.clear()
    fit(EVERY * saves + 1, [Saves()], ckpt_path=str(path), **({} if full else {"weights_only": True}))
    return result(made, calls_made, path.stat().st_size, fresh, ends[0] - begun[1])


def result(ends: list[float], calls: list[float], size: int, fresh: float, resumed: float) -> dict[str, Any]:
    """Of the ends of all steps, of which every EVERYth is followed by a save: the time of a step, and what each save adds to it and the
    next one.
    """
    durations = [after - before for before, after in itertools.pairwise(ends)]  # that of step n + 2 is at n
    saves = [EVERY * number for number in range(1, len(calls) + 1)]
    plain = [value for place, value in enumerate(durations, 2) if not {place - 1, place - 2} & set(saves)]
    step = statistics.median(plain)
    extra = [durations[save - 1] + (durations[save] if save < len(durations) else step) - 2 * step for save in saves]
    return {"step": step, "extra": extra, "call": calls, "bytes": size, "fresh": fresh, "resumed": resumed}


def hugging_face_saves(case: Case, out: Path, saves: int) -> dict[str, Any]:
    from transformers import TrainerCallback

    ends, calls = list[float](), list[float]()

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ends.append(time.perf_counter())

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            calls.append(time.perf_counter() - ends[-1])

    def train(steps: int, save: bool, resume: str | None) -> float:
        clock = Clock(out, 0, steps)
        arguments = {"save_strategy": "steps" if save else "no", "save_steps": EVERY}
        trainer, _ = hugging_face_trainer(case, clock, out, bf16=True, trl=False, **arguments)
        trainer.add_callback(Saves())
        begin = time.perf_counter()
        trainer.train(resume_from_checkpoint=resume)
        return begin

    begin = train(EVERY * (saves + 1), save=True, resume=None)
    made, calls_made, fresh = list(ends), calls[:saves], ends[0] - begin
    ends.clear()
    last = out / "trainer" / f"checkpoint-{EVERY * saves}"
    size = sum(path.stat().st_size for path in last.rglob("*") if path.is_file())
    begin = train(1, save=False, resume=str(last))
    return result(made, calls_made, size, fresh, ends[0] - begin)


KINDS: dict[str, Callable[[Case, Path, int], dict[str, Any]]] = {
    "ours": lambda case, out, saves: lightning_saves(case, out, saves, full=False),
    "lightning_full": lambda case, out, saves: lightning_saves(case, out, saves, full=True),
    "hf_bf16": hugging_face_saves,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("case", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--saves", type=int, default=SAVES)
    options = parser.parse_args()
    found = KINDS[options.kind](Case.read(options.case), options.out, options.saves)
    (options.out / "part").write_text(json.dumps(found))
    (options.out / "part").replace(options.out / "result.json")


if __name__ == "__main__":
    main()
