"""FSDP: what trains, and the frozen base with it, sharded over Ray's workers."""

import time
from typing import Any

import pytorch_lightning as pl
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, SingleDeviceStrategy, Strategy
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

from raytrain2p.config import Settings
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.tracking.checkpoints import CheckpointScore
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.callbacks.checkpoint import BestAndLastCheckpoints
from raytrain2p.worker.callbacks.step_logger import StepLogger
from raytrain2p.worker.callbacks.stop import StopOnRequest
from raytrain2p.worker.channel import progress_callback
from raytrain2p.worker.checkpoint_io import AsyncCheckpointIO
from raytrain2p.worker.job import OBJECTIVE, TrainJob
from raytrain2p.worker.ray_reports import RayReports, TrialReports


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 under Ray. Ray's own RayFSDPStrategy is FSDP1, which Lightning allows on GPUs alone.

    Checkpoints are gathered on rank 0, so that one file goes on with any number of workers.
    """

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=ray.train.get_context().get_world_size(), tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    @property
    def root_device(self) -> torch.device:
        return ray.train.torch.get_device()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As every other strategy does, through the checkpoint plugin; the state is gathered by now."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options=storage_options)


LIGHTNING_PRECISION = {"bf16": "bf16-mixed", "float32": "32-true"}


def build_trainer(
    plan: TrainJob, run: Run, world: WorkerGroup, precision: str, steps: int, train_loader: Any, val_loader: Any, writer: RunWriter | None
) -> pl.Trainer:
    """Lightning's trainer, with Ray's environment, our step log, and the two checkpoints."""
    settings, training = plan.settings, plan.settings.training
    show = progress_callback(plan.channel) if writer is not None else None
    passes = training.gradient_accumulation_steps(world.size)
    steps_per_epoch = len(train_loader) // passes

    def show_steps(word: dict[str, Any]) -> None:
        show(word | {"steps": steps})  # type: ignore[misc]

    log = StepLogger(
        training.log_every,
        training.global_batch_size,
        steps_per_epoch,
        world.mean,
        writer.write if writer else None,
        show_steps if show else None,
    )

    reports = RayReports(run, settings.checkpoint.mode, world.is_first)
    trial_reports = None
    if plan.membership is not None:
        trial_reports = TrialReports(plan.channel, run, settings.checkpoint.mode, steps, steps_per_epoch, world.is_first)

    def measure(trainer: pl.Trainer, module: Any) -> dict[str, float]:
        since = time.perf_counter()
        metrics = {"train_loss": log.since_scored.take()}
        if val_loader is not None:
            metrics["val/loss"] = module.validate(val_loader)
        log.since += time.perf_counter() - since  # the speed of training is without it
        return metrics

    def judged(metrics: dict[str, float], score: CheckpointScore) -> None:
        if plan.membership is not None:
            metrics[OBJECTIVE] = metrics[plan.membership.objective]
        if writer is not None:
            writer.write_metrics({name: value for name, value in metrics.items() if name != "train_loss"}, score.step)
        reports.add(metrics, score, score.step == steps)

    checkpoints = BestAndLastCheckpoints(
        run.checkpoints,
        settings.checkpoint.monitor,
        settings.checkpoint.mode,
        settings.checkpoint.every_steps,
        settings.checkpoint.best_of,
        steps_per_epoch,
        measure,
        log.hand_over,
        judged,
        trial_reports.add if trial_reports is not None else None,
    )
    return pl.Trainer(
        accelerator="gpu" if settings.launch.use_gpu else "cpu",
        devices="auto",
        strategy=build_strategy(settings, world),
        plugins=[RayLightningEnvironment(), AsyncCheckpointIO()],
        precision=LIGHTNING_PRECISION[precision],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=passes,
        gradient_clip_val=training.gradient_clip,
        callbacks=[log, checkpoints, StopOnRequest(plan.channel if world.is_first else None)],
        default_root_dir=run.directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )


def build_strategy(settings: Settings, world: WorkerGroup) -> Strategy:
    """As set; a single worker has nothing to exchange, and is spared the copies into all-reduce buckets."""
    if world.size == 1:
        return SingleDeviceStrategy(ray.train.torch.get_device())
    return ShardedStrategy() if settings.launch.strategy == "fsdp" else RayDDPStrategy(gradient_as_bucket_view=True)
