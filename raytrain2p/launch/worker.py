"""What runs on each worker: from the run's identity to its artifact."""

import os
import time
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
from pytorch_lightning.strategies import SingleDeviceStrategy, Strategy
from pytorch_lightning.utilities.exceptions import SIGTERMException
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

from raytrain2p.config import Settings
from raytrain2p.launch.finishing import finish, whole_checkpoint
from raytrain2p.launch.loaders import loaders
from raytrain2p.launch.phases import PHASES
from raytrain2p.launch.plan import Membership, Plan
from raytrain2p.launch.progress import putter
from raytrain2p.launch.recipes import RECIPES, Recipe
from raytrain2p.launch.reporting import RayReports, TrialReports
from raytrain2p.launch.sharding import ShardedStrategy
from raytrain2p.launch.stop_callback import StopOnRequest
from raytrain2p.models.precision import resolve_precision
from raytrain2p.phases.module import PhaseModule
from raytrain2p.phases.survey import TRAIN, planned_steps
from raytrain2p.phases.world import World
from raytrain2p.tracking.checkpoints import (
    Judgement,
    resumable_checkpoint,
)
from raytrain2p.tracking.files import read_json
from raytrain2p.tracking.journal import Point
from raytrain2p.tracking.metrics import StepLog
from raytrain2p.tracking.recorder import Recorder, recording
from raytrain2p.tracking.run import Run, get_or_create_run, resolved_config
from raytrain2p.tracking.saving import BestAndLast, CheckpointFiles
from raytrain2p.tracking.storage import disk_told
from raytrain2p.tracking.sweeps import OBJECTIVE
from raytrain2p.tracking.system_metrics import SystemSampler

LIGHTNING_PRECISION = {"bf16": "bf16-mixed", "float32": "32-true"}


def train(plan: Plan) -> None:
    """What each worker does, from the run's identity to its artifact."""
    os.environ.update(plan.environment)
    settings, recipe, world = plan.settings, RECIPES[plan.phase], World.current()
    artifact, show = PHASES[plan.phase].artifact, putter(plan.board) if world.is_first else None
    torch.set_num_threads(plan.threads)
    pl.seed_everything(settings.seed, verbose=False)

    if plan.membership is not None and world.is_first:
        announce_place(plan.membership)
    run = attach_run(plan, world)
    precision = agree_on_precision(settings, world)
    with ExitStack() as stack:
        recorder = stack.enter_context(recorded(plan, run, precision)) if world.is_first else None
        checkpoint, step = resume_point(run, recorder)
        data = ray.get(plan.data)
        steps = planned_steps(settings.training, len(data[TRAIN]), world.size)
        module = recipe.build(settings, data, steps, precision)
        if settings.data.features == "online":
            data = recipe.online(module, data)

        if settings.tracking.system_metrics:
            stack.callback(watch_system(plan, run, recorder).close)

        train_loader, val_loader = loaders(settings, data, world, step)
        trainer = build_trainer(plan, run, world, precision, steps, train_loader, val_loader, recorder)
        torch.manual_seed(settings.seed)
        try:
            trainer.fit(module, train_loader, ckpt_path=str(checkpoint) if checkpoint else None, weights_only=checkpoint is not None)
        except SIGTERMException:
            trainer.strategy.checkpoint_io.wait()
            if recorder is not None:
                recorder.finish("KILLED")
            return

        trainer.strategy.checkpoint_io.wait()  # not every strategy does so at its end
        best = from_first(whole_checkpoint(run) if recorder is not None else None)
        assert best is not None, "training saves at its end"
        module = restored(recipe.build(settings, data, steps, precision), best, trainer.strategy.root_device)
        if recorder is not None:  # before anything is measured: what has been trained is safe then
            with disk_told(run.path / artifact, size_of(module)):
                recipe.export(module, run.path / artifact, read_json(run.path / "config.json"))
        metrics, tables = evaluate(recipe, module, data, settings, world, precision, show)
        if recorder is not None:
            recorder.write_metrics(metrics, steps)
            with disk_told(run.path / "result.json", 1_000_000):
                finish(recorder, artifact, metrics, tables)


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


def attach_run(plan: Plan, world: World) -> Run:
    """Rank 0 gets or creates the run; every worker then uses the same one."""
    phase = PHASES[plan.phase]
    run = get_or_create_run(plan.settings, phase.name, phase.experiment, plan.launch_id, plan.tags) if world.is_first else None
    shared = ray.train.collective.broadcast_from_rank_zero(run)
    assert isinstance(shared, Run)
    return shared


def announce_place(membership: Membership) -> None:
    """Tell the sweep which placement group the workers are in. When Tune stops a trial, its process is killed, with Ray Train's
    controller in it, and the group would stay: what cleans up behind it asks Ray's dashboard, and a local Ray has none.
    """
    group = ray.util.get_current_placement_group()
    if group is not None:
        ray.get(membership.board.place.remote(membership.number, group.id.hex()))


def recorded(plan: Plan, run: Run, precision: str) -> Any:
    """The context in which rank 0 records the run."""
    config = resolved_config(plan.settings, {"training.precision": precision, "launch.cpus_per_worker": plan.threads})
    return recording(
        run,
        plan.settings.tracking.uri,
        {"config": config, "command": plan.command, "facts": plan.facts},
        plan.board.say.remote,
    )


def watch_system(plan: Plan, run: Run, recorder: Recorder | None) -> SystemSampler:
    """One worker of each node samples it; rank 0 notes what all of them found."""

    def deliver(points: Sequence[Point]) -> None:
        if ray.train.get_context().get_local_rank() == 0:
            ray.get(plan.board.put_points.remote(points))
        if recorder is not None and (gathered := ray.get(plan.board.take_points.remote())):
            recorder.write(gathered)

    return SystemSampler(run.timestamp, deliver)


def resume_point(run: Run, recorder: Recorder | None) -> tuple[Path | None, int]:
    """The checkpoint to go on from and its step, as rank 0 finds them; (None, 0) to begin with."""
    found: tuple[Path | None, int] = (None, 0)
    if recorder is not None:
        path, complaints = resumable_checkpoint(run.checkpoints)
        step = int(torch.load(path, map_location="meta", weights_only=True, mmap=True)["global_step"]) if path else 0
        recorder.resume_from(step)
        for complaint in complaints:
            recorder.mirror.tell(f"{complaint}; going on from {path.name if path else 'the beginning'} at step {step}")
        if path is not None:
            recorder.mirror.tell(f"resuming {run.phase} run {run.run_id[:8]} at step {step}")
        found = (path, step)
    path, step = ray.train.collective.broadcast_from_rank_zero(found)
    return from_first(path), step


def agree_on_precision(settings: Settings, world: World) -> str:
    """The precision that every worker's hardware has: workers in different ones would not train one model."""
    mine = resolve_precision(settings.training.precision, ray.train.torch.get_device())
    return "bf16" if set(world.gather(mine)) == {"bf16"} else "float32"


def build_trainer(
    plan: Plan, run: Run, world: World, precision: str, steps: int, train_loader: Any, val_loader: Any, recorder: Recorder | None
) -> pl.Trainer:
    """Lightning's trainer, with Ray's environment, our step log, and the two checkpoints."""
    settings, training = plan.settings, plan.settings.training
    show = putter(plan.board) if recorder is not None else None
    steps_per_epoch = len(train_loader) // training.accumulate

    def show_steps(word: dict[str, Any]) -> None:
        show(word | {"steps": steps})  # type: ignore[misc]

    log = StepLog(
        training.log_every,
        training.batch_size * training.accumulate * world.size,
        steps_per_epoch,
        world.mean,
        recorder.write if recorder else None,
        show_steps if show else None,
    )

    reports = RayReports(run, settings.checkpoint.mode, world.is_first)
    trial_reports = None
    if plan.membership is not None:
        trial_reports = TrialReports(plan.board, run, settings.checkpoint.mode, steps, steps_per_epoch, world.is_first)

    def measure(trainer: pl.Trainer, module: Any) -> dict[str, float]:
        since = time.perf_counter()
        metrics = {"train_loss": log.since_judged.take()}
        if val_loader is not None:
            metrics["val/loss"] = module.validate(val_loader)
        log.since += time.perf_counter() - since  # the speed of training is without it
        return metrics

    def judged(metrics: dict[str, float], judgement: Judgement) -> None:
        if plan.membership is not None:
            metrics[OBJECTIVE] = metrics[plan.membership.objective]
        if recorder is not None:
            recorder.write_metrics({name: value for name, value in metrics.items() if name != "train_loss"}, judgement.step)
        reports.add(metrics, judgement, judgement.step == steps)

    checkpoints = BestAndLast(
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
        plugins=[RayLightningEnvironment(), CheckpointFiles()],
        precision=LIGHTNING_PRECISION[precision],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=training.accumulate,
        gradient_clip_val=training.gradient_clip,
        callbacks=[log, checkpoints, StopOnRequest(plan.board if world.is_first else None)],
        default_root_dir=run.directory,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )


def build_strategy(settings: Settings, world: World) -> Strategy:
    """As set; a single worker has nothing to exchange, and is spared the copies into all-reduce buckets."""
    if world.size == 1:
        return SingleDeviceStrategy(ray.train.torch.get_device())
    return ShardedStrategy() if settings.launch.strategy == "fsdp" else RayDDPStrategy(gradient_as_bucket_view=True)


def restored(module: PhaseModule, checkpoint: Path, device: torch.device) -> PhaseModule:
    """A fresh module with a checkpoint's trained weights, whole on this worker, in evaluation mode."""
    module.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"], strict=False)
    return module.to(device).eval()


def evaluate(
    recipe: Recipe, module: PhaseModule, data: dict[str, Any], settings: Settings, world: World, precision: str, show: Any
) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics of the best checkpoint on every test split."""
    if settings.data.features == "online":
        data = recipe.online(module, data)
    tests = list(settings.data.test)
    if show:
        show({"stage": f"evaluating on {', '.join(tests) or 'nothing (data.test is empty)'}"})
    with torch.autocast(module.device.type, torch.bfloat16, enabled=precision == "bf16"):
        metrics, tables = recipe.evaluate(module, data, tests, world)
    return metrics, tables
