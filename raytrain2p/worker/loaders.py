"""Which batches each worker reads, in training and in validation."""

from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from raytrain2p.config import Settings
from raytrain2p.data.batches import MicroBatch, StepSampler
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.phases.inputs import TRAIN, VAL


def loaders(settings: Settings, data: dict[str, Any], world: WorkerGroup, first_step: int) -> tuple[Any, Any]:
    """Training in steps drawn by seed, after those that were done before; validation in shares of equal stride."""
    training = settings.training
    sampler = StepSampler(
        data[TRAIN].lengths,
        data[TRAIN].supervised,
        training.global_batch_size,
        training.micro_batch(world.size),
        world.rank,
        world.size,
        settings.seed,
        first_step,
    )
    options: dict[str, Any] = {"batch_size": None, "num_workers": settings.data.loader_workers, "pin_memory": settings.launch.use_gpu}
    train = DataLoader(data[TRAIN], sampler=sampler, persistent_workers=settings.data.loader_workers > 0, **options)
    if VAL not in data:
        return train, None
    return train, DataLoader(
        data[VAL], sampler=validation_micro_batches(data[VAL].lengths, settings.evaluation.batch_size, world), **options
    )


def validation_micro_batches(lengths: np.ndarray, size: int, world: WorkerGroup) -> list[MicroBatch]:
    """This worker's batches: whole ones, so that any number of workers measures the same, and equally many on each.

    What is missing to that is filled up with a batch that does not count (no step tokens).
    """
    order = np.argsort(lengths, kind="stable")
    shares = [MicroBatch(order[start : start + size], 1) for start in range(0, len(order), size)]
    shares += [MicroBatch(shares[0].records, 0)] * (-len(shares) % world.size)
    return world.share(shares)
