"""Lightning's trainer for Ray's workers: strategy, precision, callbacks."""

from typing import Any

import pytorch_lightning as pl
import ray.train
import ray.train.torch
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, SingleDeviceStrategy, Strategy
from pytorch_lightning.utilities.exceptions import SIGTERMException
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment
from torch.utils.data import DataLoader

from raytrain2p.config import Settings
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.phases.base import Batch, PhaseModule, whole_on_first
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import RunWriter
from raytrain2p.worker.callbacks.checkpoint import BestAndLastCheckpoints
from raytrain2p.worker.callbacks.checkpoint_metrics import CheckpointMetrics
from raytrain2p.worker.callbacks.nonfinite import NonFinite
from raytrain2p.worker.callbacks.step_logger import StepLogger
from raytrain2p.worker.callbacks.stop import Regroup, StopOnRequest
from raytrain2p.worker.checkpoint_io import AsyncCheckpointIO
from raytrain2p.worker.job import TrainJob
from raytrain2p.worker.loaders import Loaders
from raytrain2p.worker.ray_reports import RayReports, TrialReports
from raytrain2p.worker.regroup import RegroupError
from raytrain2p.worker.resume import ResumePoint

LIGHTNING_PRECISION = {"bf16": "bf16-mixed", "float32": "32-true"}


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 under Ray. Ray's own RayFSDPStrategy is FSDP1, which Lightning allows on GPUs alone.

    Checkpoints are gathered on rank 0, so that any number of workers can resume from the one file.
    """

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=ray.train.get_context().get_world_size(), tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    @property
    def root_device(self) -> torch.device:
        return ray.train.torch.get_device()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What trains, whole, on rank 0, and nothing on the others. Frozen weights are not gathered: a checkpoint does not hold them."""
        assert self.lightning_module is not None
        return whole_on_first((name, value) for name, value in self.lightning_module.named_parameters() if value.requires_grad)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As every other strategy does, through the checkpoint plugin; the state is gathered by now."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options=storage_options)


def build_trainer(
    job: TrainJob, run: Run, group: WorkerGroup, precision: str, steps: int, loaders: Loaders, writer: RunWriter | None
) -> pl.Trainer:
    """Lightning's trainer with Ray's environment and our callbacks."""
    settings, training = job.settings, job.settings.training
    trainer = pl.Trainer(
        accelerator="gpu" if settings.launch.gpus else "cpu",
        devices="auto",
        strategy=build_strategy(settings, group),
        plugins=[RayLightningEnvironment(), AsyncCheckpointIO(writer.upload if writer else lambda: None)],
        precision=LIGHTNING_PRECISION[precision],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=training.gradient_accumulation_steps(group.size),
        gradient_clip_val=training.gradient_clip,
        callbacks=build_callbacks(job, run, group, steps, loaders, writer),
        default_root_dir=run.directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    # Lightning's own word that rank 0 got a SIGTERM: each pass would wait for it, and so for the GPU. StopOnRequest does that.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def build_strategy(settings: Settings, group: WorkerGroup) -> Strategy:
    """As set; a single worker has nothing to exchange, and needs no copies into all-reduce buckets."""
    if group.size == 1:
        return SingleDeviceStrategy(ray.train.torch.get_device())
    return ShardedStrategy() if settings.launch.strategy == "fsdp" else RayDDPStrategy(gradient_as_bucket_view=True)


def build_callbacks(
    job: TrainJob, run: Run, group: WorkerGroup, steps: int, loaders: Loaders, writer: RunWriter | None
) -> list[pl.Callback]:
    """In the order in which Lightning must call them: losses are logged, then saved, and only then may training stop."""
    training, checkpoint, trial = job.settings.training, job.settings.checkpoint, job.trial
    steps_per_epoch = len(loaders.train) // training.gradient_accumulation_steps(group.size)
    log = StepLogger(
        training.log_every,
        training.global_batch_size,
        steps_per_epoch,
        group.mean,
        writer.write if writer else None,
        job.channel.put if writer else None,
        NonFinite(training.max_nonfinite_steps, loaders.places, job.channel.say if writer else None),
    )
    metrics = CheckpointMetrics(log, loaders.val, trial.objective if trial else None, writer)
    ray_reports = RayReports(run, checkpoint.mode, steps, group)
    trial_reports = TrialReports(job.channel, run, checkpoint.mode, steps, steps_per_epoch, group) if trial else None
    checkpoints = BestAndLastCheckpoints(
        run.checkpoints, checkpoint, steps_per_epoch, metrics, ray_reports.add, trial_reports.add if trial_reports else None
    )
    return [log, checkpoints, StopOnRequest(job.channel if group.is_first else None, group, preempted)]


def preempted() -> bool:
    """Whether a node of the worker group is taken away, as all workers see it; a collective."""
    return ray.train.get_preemption_info() is not None


def fit(trainer: pl.Trainer, module: PhaseModule, batches: "DataLoader[Batch]", start: ResumePoint) -> bool:
    """Train to the end, with all checkpoints on disk; False if a request stopped it before.

    Raises:
        DivergedError: losses or weights are not finite.
        RegroupError: the workers are to start again.
    """
    module.steps_per_epoch = len(batches) // module.training_settings.gradient_accumulation_steps(trainer.world_size)
    path, stopped = str(start.checkpoint) if start.checkpoint else None, False
    try:
        trainer.fit(module, batches, ckpt_path=path, weights_only=path is not None)
    except Regroup as request:
        raise RegroupError(request.preempted) from None
    except SIGTERMException:
        stopped = True
    finally:
        trainer.strategy.checkpoint_io.wait()  # not every strategy does so at its end
    return not stopped
