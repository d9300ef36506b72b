"""What each worker does in a run, from its identity to its result."""

import os
from contextlib import ExitStack

import pytorch_lightning as pl
import ray
import ray.train.torch
import torch

from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.parameters import describe_parameters
from raytrain2p.models.precision import agree_on_precision
from raytrain2p.phases.init import load_init
from raytrain2p.phases.inputs import TRAIN, planned_steps
from raytrain2p.phases.registry import phase_functions
from raytrain2p.tracking.run_objects import own_objects
from raytrain2p.worker.finalize import checkpoint_to_export, evaluate, export, failed_if_diverged, finish, restored
from raytrain2p.worker.identity import attach_run, open_writer, precision_setting
from raytrain2p.worker.job import TrainJob
from raytrain2p.worker.lightning_trainer import build_trainer, fit
from raytrain2p.worker.loaders import build_loaders
from raytrain2p.worker.regroup import leaving_together
from raytrain2p.worker.resume import agree_on_resume_point, fetch_artifacts
from raytrain2p.worker.system_metrics import records_system_metrics, system_metrics


def train(job: TrainJob) -> None:
    """Train one run, or the rest of it; rank 0 writes what comes out."""
    os.environ.update(job.environment)
    torch.set_num_threads(job.threads)
    settings, phase, group, channel = job.settings, phase_functions(job.phase), WorkerGroup.current(), job.channel
    pl.seed_everything(settings.seed, verbose=False)

    with ExitStack() as stack:
        stack.enter_context(leaving_together(group))
        lease = stack.enter_context(own_objects(settings.output.root, job.launch_id)) if group.is_first else None
        run = attach_run(job, group)
        precision = agree_on_precision(precision_setting(settings, run, group), ray.train.torch.get_device(), group)
        writer = stack.enter_context(open_writer(job, run, precision, lease)) if group.is_first else None
        stack.enter_context(failed_if_diverged(writer))
        start = agree_on_resume_point(run, group, writer, channel)

        fetch_artifacts(settings)
        data = ray.get(job.data)
        steps = planned_steps(settings.training, len(data[TRAIN]))
        module = phase.build(settings, steps, precision)
        if start.checkpoint is None and (artifact := load_init(settings, job.facts["inputs"])) is not None:
            phase.warm_start(module, artifact)
        if settings.data.features == "online":
            data = phase.online(module, data)
        if group.is_first and start.checkpoint is None:
            channel.say(describe_parameters(module.parameter_counts))
        if records_system_metrics(settings):
            stack.enter_context(system_metrics(run, channel, writer))

        loaders = build_loaders(settings, data, group, start.step)
        trainer = build_trainer(job, run, group, precision, steps, loaders, writer)
        torch.manual_seed(settings.seed)
        if not fit(trainer, module, loaders.train, start):
            if writer is not None:
                writer.finish("KILLED")
            return

        best = checkpoint_to_export(run, group)
        module = restored(module, best, trainer.strategy.root_device, group)
        export(phase, module, run, steps, data[TRAIN], group)  # before anything is measured: the trained weights are safe then
        metrics, answers = evaluate(phase, module, data, job, group, precision)
        if writer is not None:
            writer.write_metrics(metrics, steps)
            finish(writer, metrics, answers, steps)
