"""What one step does, counted: figures that do not depend on the speed of the machine."""

import json
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.case import prepare
from benchmarks.clock import PROFILED
from benchmarks.options import Options
from benchmarks.report import Found, Table
from benchmarks.step import NAMES, command
from benchmarks.turns import written_steps

COUNTED = ("module_loop", "plain_loop", "hf_float32", "hf_bf16")
COLUMNS = {
    "operations": "torch operations",
    "matrix products": "matrix products",
    "copies": "copies",
    "output layer rows": "positions whose logits are computed",
    "encoder calls": "encoder calls",
}
MESSAGE_STEPS = 100


def measure(options: Options) -> Found:
    case = options.case.with_aligner(folder=str(options.folder / "counts"), steps=PROFILED)
    prepare(case)
    rows, found = [], Found()
    for name in COUNTED[:2] if options.short else COUNTED:
        out = case.path / name
        contestant = command(name, case, out, options, "--profile", "--steps", str(PROFILED))
        try:
            contestant.wait_until((out / "counts").exists, 400)
            contestant.wait_until(lambda out=out: len(written_steps(out, 1)) == PROFILED, 60)  # type: ignore[misc]
        finally:
            contestant.end()
        counts = json.loads((out / "counts").read_text())
        rows.append([NAMES[name], *(f"{counts.get(key, 0):,}" for key in COLUMNS)])
        options.say(f"counts of {name}: {counts}")
    title = f"One step (the {PROFILED}th), LoRA on all linear layers, batch {case.batch}, by torch.profiler"
    notes = ["Operations are those of the profiler's list that begin with `aten::`, nested ones included; copies are `aten::copy_`."]
    found.tables.append(Table(title, ["who", *COLUMNS.values()], rows, notes))
    written, shown, points = messages()
    found.tables.append(
        Table(
            f"Messages of raytrain2p in {MESSAGE_STEPS} steps, training.log_every=10",
            ["writes to metrics.jsonl", "metric points in them", "messages to the driver"],
            [[str(written), str(points), str(shown)]],
        )
    )
    return found


def messages() -> tuple[int, int, int]:
    """Writes, messages to the driver, and metric points of the real step logger."""
    import pytorch_lightning as pl

    from raytrain2p.worker.callbacks.nonfinite import NonFinite
    from raytrain2p.worker.callbacks.step_logger import StepLogger

    class Module(pl.LightningModule):
        pass_loss = gradient_norm = torch.ones(())
        pass_tokens = 1

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.weight.sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    writes, shown = list[Sequence[Any]](), list[Any]()
    logger = StepLogger(10, 16, MESSAGE_STEPS, lambda mean: mean, writes.append, shown.append, NonFinite(3, lambda step: [], None))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[logger],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.zeros(MESSAGE_STEPS, 1), batch_size=1))  # type: ignore[arg-type]
    return len(writes), len(shown), sum(len(points) for points in writes)
