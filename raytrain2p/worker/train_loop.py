"""What runs on each worker: from the run's identity to its artifact."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException

from raytrain2p.config import Settings
from raytrain2p.config.phases import PHASES
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.precision import resolve_precision
from raytrain2p.phases.base import PhaseModule
from raytrain2p.phases.inputs import TRAIN, planned_steps
from raytrain2p.phases.registry import PhaseFunctions, phase_functions
from raytrain2p.storage.errors import reporting_disk_errors
from raytrain2p.tracking.checkpoints import resumable_checkpoint
from raytrain2p.tracking.metrics_file import MetricPoint
from raytrain2p.tracking.run import Run, get_or_create_run
from raytrain2p.tracking.run_writer import RunWriter, open_run_writer, resolved_config
from raytrain2p.worker.channel import progress_callback
from raytrain2p.worker.finalize import finish, whole_checkpoint
from raytrain2p.worker.job import TrainJob, TrialContext
from raytrain2p.worker.lightning_trainer import build_trainer
from raytrain2p.worker.loaders import loaders
from raytrain2p.worker.system_metrics import SystemSampler


def train(plan: TrainJob) -> None:
    """What each worker does, from the run's identity to its artifact."""
    os.environ.update(plan.environment)
    settings, phase, world = plan.settings, phase_functions(plan.phase), WorkerGroup.current()
    artifact, show = PHASES[plan.phase].artifact, progress_callback(plan.channel) if world.is_first else None
    torch.set_num_threads(plan.threads)
    pl.seed_everything(settings.seed, verbose=False)

    if plan.membership is not None and world.is_first:
        announce_place(plan.membership)
    run = attach_run(plan, world)
    precision = agree_on_precision(settings, world)
    with ExitStack() as stack:
        writer = stack.enter_context(recorded(plan, run, precision)) if world.is_first else None
        checkpoint, step = resume_point(run, writer)
        data = ray.get(plan.data)
        steps = planned_steps(settings.training, len(data[TRAIN]), world.size)
        module = phase.build(settings, data, steps, precision)
        if settings.data.features == "online":
            data = phase.online(module, data)

        if settings.tracking.system_metrics:
            stack.callback(watch_system(plan, run, writer).close)

        train_loader, val_loader = loaders(settings, data, world, step)
        trainer = build_trainer(plan, run, world, precision, steps, train_loader, val_loader, writer)
        torch.manual_seed(settings.seed)
        try:
            trainer.fit(module, train_loader, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=checkpoint is not None)
        except SIGTERMException:
            trainer.strategy.checkpoint_io.wait()
            if writer is not None:
                writer.finish("KILLED")
            return

        trainer.strategy.checkpoint_io.wait()  # not every strategy does so at its end
        best = from_first(whole_checkpoint(run) if writer is not None else None)
        assert best is not None, "training saves at its end"
        module = restored(phase.build(settings, data, steps, precision), best, trainer.strategy.root_device)
        if writer is not None:  # before anything is measured: what has been trained is safe then
            with reporting_disk_errors(run.path / artifact, size_of(module)):
                phase.export(module, run.path / artifact, run.files.read_config())
        metrics, tables = evaluate(phase, module, data, settings, world, precision, show)
        if writer is not None:
            writer.write_metrics(metrics, steps)
            with reporting_disk_errors(run.files.result, 1_000_000):
                finish(writer, artifact, metrics, tables)


def size_of(module: torch.nn.Module) -> int:
    """Bytes of what is trained, which an artifact holds."""
    return sum(weights.numel() * weights.element_size() for weights in module.parameters() if weights.requires_grad)


def from_first(path: Path | None) -> Path | None:
    """What rank 0 found, on every worker: listings of shared storage may differ from node to node for a while.

    Raises:
        FileNotFoundError: this worker does not see it: output.root is not on storage that all nodes share.
    """
    found = ray.train.collective.broadcast_from_rank_zero(path)
    if found is not None and not found.is_file():
        raise FileNotFoundError(f"rank 0 found {found}, which this node does not have: output.root must be on shared storage")
    return found


def attach_run(plan: TrainJob, world: WorkerGroup) -> Run:
    """Rank 0 gets or creates the run; every worker then uses the same one."""
    phase = PHASES[plan.phase]
    run = get_or_create_run(plan.settings, phase.name, phase.experiment, plan.launch_id, plan.tags) if world.is_first else None
    shared = ray.train.collective.broadcast_from_rank_zero(run)
    assert isinstance(shared, Run)
    return shared


def announce_place(membership: TrialContext) -> None:
    """Tell the sweep which placement group the workers are in. When Tune stops a trial, its process is killed, with Ray Train's
    controller in it, and the group would stay: what cleans up behind it asks Ray's dashboard, and a local Ray has none.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        ray.get(membership.channel.place.remote(membership.number, group.id.hex()))


def recorded(plan: TrainJob, run: Run, precision: str) -> Any:
    """The context in which rank 0 records the run."""
    config = resolved_config(plan.settings, {"training.precision": precision, "launch.cpus_per_worker": plan.threads})
    return open_run_writer(
        run,
        plan.settings.tracking.uri,
        {"config": config, "command": plan.command, "facts": plan.facts},
        plan.channel.say.remote,
    )


def watch_system(plan: TrainJob, run: Run, writer: RunWriter | None) -> SystemSampler:
    """One worker of each node samples it; rank 0 notes what all of them found."""

    def deliver(points: Sequence[MetricPoint]) -> None:
        if ray.train.get_context().get_local_rank() == 0:
            ray.get(plan.channel.put_points.remote(points))
        if writer is not None and (gathered := ray.get(plan.channel.take_points.remote())):
            writer.write(gathered)

    return SystemSampler(run.timestamp, deliver)


def resume_point(run: Run, writer: RunWriter | None) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step, as rank 0 finds them; (None, 0) to begin with."""
    found: tuple[Path | None, int] = (None, 0)
    if writer is not None:
        path, complaints = resumable_checkpoint(run.checkpoints)
        step = int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["global_step"]) if path else 0
        writer.resume_from(step)
        for complaint in complaints:
            writer.mlflow_sync.report(f"{complaint}; going on from {path.name if path else 'the beginning'} at step {step}")
        if path is not None:
            writer.mlflow_sync.report(f"resuming {run.phase} run {run.run_id[:8]} at step {step}")
        found = (path, step)
    path, step = ray.train.collective.broadcast_from_rank_zero(found)
    return from_first(path), step


def agree_on_precision(settings: Settings, world: WorkerGroup) -> str:
    """The precision that every worker's hardware has: workers in different ones would not train one model."""
    mine = resolve_precision(settings.training.precision, ray.train.torch.get_device())
    return "bf16" if set(world.gather(mine)) == {"bf16"} else "float32"


def restored(module: PhaseModule, checkpoint: Path, device: torch.device) -> PhaseModule:
    """A fresh module with a checkpoint's trained weights, whole on this worker, in evaluation mode."""
    module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"], strict=False)
    return module.to(device).eval()


def evaluate(
    phase: PhaseFunctions, module: PhaseModule, data: dict[str, Any], settings: Settings, world: WorkerGroup, precision: str, show: Any
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
