"""What runs on each worker: from the run's identity to its artifact."""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy, Strategy
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
from torch.utils.data import DataLoader

from raytrain2p.config import Settings
from raytrain2p.data.batches import Share, StepSampler
from raytrain2p.data.images import ImageRef, decode_image
from raytrain2p.launch.phases import PHASES, Phase
from raytrain2p.launch.progress import putter
from raytrain2p.launch.sharding import ShardedStrategy
from raytrain2p.models.precision import resolve_precision
from raytrain2p.phases.module import PhaseModule, planned_steps
from raytrain2p.phases.survey import TRAIN, VAL
from raytrain2p.phases.world import World
from raytrain2p.tracking.checkpoints import best_checkpoint, checkpoint_callbacks, last_checkpoint
from raytrain2p.tracking.files import write_json, write_whole
from raytrain2p.tracking.metrics import MetricsWriter, Point, StepLog
from raytrain2p.tracking.plots import answer_sheet, training_curve
from raytrain2p.tracking.run import Run, describe_run, finish_run, get_or_create_run

LIGHTNING_PRECISION = {"bf16": "bf16-mixed", "float32": "32-true"}
ANSWERS_SHOWN = 20
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Plan:
    """What the driver hands to each worker. `data` is the prepared splits in Ray's object store."""

    settings: Settings
    phase: int
    launch_id: str
    command: str
    storage: str
    threads: int
    data: Any
    board: Any


def train_worker(config: dict[str, Any]) -> None:
    """The training function that Ray runs on each worker."""
    plan: Plan = config["plan"]
    settings, phase, world = plan.settings, PHASES[plan.phase], World.current()
    show = putter(plan.board) if world.is_first else None
    torch.set_num_threads(plan.threads)
    pl.seed_everything(settings.seed, verbose=False)

    run = attach_run(plan, world)
    precision = agree_on_precision(settings, world)
    data = ray.get(plan.data)
    steps = planned_steps(settings.training, len(data[TRAIN]), world.size)
    module = phase.build(settings, data, steps, precision)
    if settings.data.features == "online":
        data = phase.online(module, data)
    writer = None
    if world.is_first:
        resolved = {"training.precision": precision, "launch.cpus_per_worker": plan.threads}
        describe_run(run, settings, resolved, plan.command)
        writer = MetricsWriter(run)

    train_loader, val_loader = loaders(settings, data, world)
    trainer = build_trainer(settings, run, world, precision, (steps, len(train_loader)), writer, show)
    torch.manual_seed(settings.seed * world.size + world.rank)  # dropout differs between workers
    resumed = from_first(last_checkpoint(run.checkpoints))
    trainer.fit(module, train_loader, val_loader, ckpt_path=str(resumed) if resumed else None, weights_only=resumed is not None)

    trained = {name: float(value) for name, value in trainer.callback_metrics.items()}
    validated = validate_end(trainer, module, val_loader)
    best = from_first(best_checkpoint(run.checkpoints))
    module = restored(phase.build(settings, data, steps, precision), best, trainer.strategy.root_device)
    if world.is_first:  # before anything is measured: what has been trained is safe then
        phase.export(module, run.path / phase.artifact, json.loads((run.path / "config.json").read_text()))
    metrics, tables = evaluate(phase, module, data, settings, world, precision, show)
    if writer is not None:
        writer.write([Point(name, value, steps, time.time()) for name, value in (validated | metrics).items()])
        finish(run, phase, metrics, tables)
    report(plan, run, best, metrics | trained | validated, world)


def from_first(path: Path | None) -> Path | None:
    """What rank 0 found, on every worker: listings of shared storage may differ from node to node for a while.

    Raises:
        FileNotFoundError: this worker does not see it: output.root is not on storage that all nodes share.
    """
    found = ray.train.collective.broadcast_from_rank_zero(path)
    if found is not None and not found.is_file():
        raise FileNotFoundError(f"rank 0 found {found}, which this node does not have: output.root must be on shared storage")
    return found


def attach_run(plan: Plan, world: World) -> Run:
    """Rank 0 gets or creates the run; every worker then uses the same one."""
    phase = PHASES[plan.phase]
    run = get_or_create_run(plan.settings, phase.name, phase.experiment, plan.launch_id) if world.is_first else None
    shared = ray.train.collective.broadcast_from_rank_zero(run)
    assert isinstance(shared, Run)
    return shared


def agree_on_precision(settings: Settings, world: World) -> str:
    """The precision that every worker's hardware has: workers in different ones would not train one model."""
    mine = resolve_precision(settings.training.precision, ray.train.torch.get_device())
    return "bf16" if set(world.gather(mine)) == {"bf16"} else "float32"


def loaders(settings: Settings, data: dict[str, Any], world: World) -> tuple[Any, Any]:
    """Training in steps drawn by seed; validation in shares of equal stride."""
    training = settings.training
    sampler = StepSampler(
        data[TRAIN].lengths, data[TRAIN].supervised, training.batch_size, training.accumulate, world.rank, world.size, settings.seed
    )
    options: dict[str, Any] = {"batch_size": None, "num_workers": settings.data.loader_workers, "pin_memory": settings.launch.use_gpu}
    train = DataLoader(data[TRAIN], sampler=sampler, persistent_workers=settings.data.loader_workers > 0, **options)
    if VAL not in data:
        return train, None
    return train, DataLoader(data[VAL], sampler=validation_shares(data[VAL].lengths, settings.evaluation.batch_size, world), **options)


def validation_shares(lengths: np.ndarray, size: int, world: World) -> list[Share]:
    """This worker's batches: whole ones, so that any number of workers measures the same, and equally many on each.

    What is missing to that is filled up with a batch that does not count (no step tokens).
    """
    order = np.argsort(lengths, kind="stable")
    shares = [Share(order[start : start + size], 1) for start in range(0, len(order), size)]
    shares += [Share(shares[0].records, 0)] * (-len(shares) % world.size)
    return world.share(shares)


def build_trainer(
    settings: Settings, run: Run, world: World, precision: str, length: tuple[int, int], writer: MetricsWriter | None, show: Any
) -> pl.Trainer:
    """Lightning's trainer, with Ray's environment, our step log, and the two checkpoints.

    `length` is the whole run's steps and the passes of one epoch. A run that is shorter than an epoch is told to
    Lightning as a short epoch: at an epoch's end it validates, in the middle of one it does not.
    """
    training = settings.training
    steps, passes = length

    def show_steps(word: dict[str, Any]) -> None:
        show(word | {"steps": steps})

    log = StepLog(
        training.log_every,
        training.batch_size * training.accumulate * world.size,
        world.mean,
        writer.write if writer else None,
        show_steps if show else None,
    )
    return pl.Trainer(
        accelerator="gpu" if settings.launch.use_gpu else "cpu",
        devices="auto",
        strategy=build_strategy(settings, world),
        plugins=[RayLightningEnvironment()],
        precision=LIGHTNING_PRECISION[precision],
        max_steps=steps,
        max_epochs=-1,
        limit_train_batches=min(passes, steps * training.accumulate),
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=training.gradient_clip,
        callbacks=[log, *checkpoint_callbacks(run.checkpoints, settings.checkpoint.monitor, settings.checkpoint.mode)],
        default_root_dir=run.directory,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def build_strategy(settings: Settings, world: World) -> Strategy:
    """As set; a single worker has nothing to exchange, and is spared the copies into all-reduce buckets."""
    if world.size == 1:
        return SingleDeviceStrategy(ray.train.torch.get_device())
    return ShardedStrategy() if settings.launch.strategy == "fsdp" else RayDDPStrategy(gradient_as_bucket_view=True)


def validate_end(trainer: pl.Trainer, module: PhaseModule, loader: Any) -> dict[str, float]:
    """Validation metrics at the last step, if training ended in the middle of an epoch."""
    if loader is None or trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
        return {}
    (metrics,) = trainer.validate(module, loader, verbose=False)
    return metrics


def restored(module: PhaseModule, checkpoint: Path | None, device: torch.device) -> PhaseModule:
    """A fresh module with a checkpoint's trained weights, whole on this worker, in evaluation mode."""
    if checkpoint is not None:
        module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"], strict=False)
    return module.to(device).eval()


def evaluate(
    phase: Phase, module: PhaseModule, data: dict[str, Any], settings: Settings, world: World, precision: str, show: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of the best checkpoint on every test split."""
    if settings.data.features == "online":
        data = phase.online(module, data)
    tests = list(settings.data.test)
    if show:
        show({"stage": f"evaluating on {', '.join(tests) or 'nothing (data.test is empty)'}"})
    with torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16"):
        metrics, tables = phase.evaluate(module, data, tests, world)
    return metrics, tables


def finish(run: Run, phase: Phase, metrics: dict[str, float], tables: dict[str, Any]) -> None:
    """Tables and pictures into the run directory, and all of it into MLflow; then the run is FINISHED."""
    training_curve(run.path / "metrics.jsonl", run.path / "plots" / "training_curve.png", f"{run.phase} run {run.run_id[:8]}")
    if answers := tables.get("answers"):
        write_whole(run.path / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
        title = f"run {run.run_id[:8]}: answers on test pictures, drawn at random"
        answer_sheet(spread(answers, ANSWERS_SHOWN), _image_of, run.path / "plots" / "answers.png", title)
        run.client.log_artifact(run.run_id, str(run.path / "answers.jsonl"))
    write_json(run.path / "test_metrics.json", metrics)
    run.client.log_artifact(run.run_id, str(run.path / phase.artifact), Path(phase.artifact).stem)
    run.client.log_artifacts(run.run_id, str(run.path / "plots"), "plots")
    finish_run(run, "FINISHED")


def spread(rows: list[Any], most: int) -> list[Any]:
    """At most so many of them, evenly from the whole list."""
    return rows if len(rows) <= most else [rows[index * len(rows) // most] for index in range(most)]


def _image_of(row: dict[str, Any]) -> Any:
    return decode_image(ImageRef(row["image"], row["image_row"]).read()) if row["image"] else None


def report(plan: Plan, run: Run, best: Path | None, metrics: dict[str, float], world: World) -> None:
    """Hand the driver a pointer to what is on disk. Ray's own checkpoint is that pointer, nothing more."""
    last = last_checkpoint(run.checkpoints)
    pointer = {
        "run_id": run.run_id,
        "directory": run.directory,
        "best": str(best) if best else None,
        "last": str(last) if last else None,
        "artifact": str(run.path / PHASES[plan.phase].artifact),
        "metrics": metrics,
    }
    checkpoint = None
    if world.is_first:
        folder = Path(tempfile.mkdtemp())
        write_json(folder / "run.json", pointer)
        checkpoint = ray.train.Checkpoint.from_directory(str(folder))
    ray.train.report(metrics, checkpoint=checkpoint)
    if world.is_first:
        shutil.rmtree(folder, ignore_errors=True)
