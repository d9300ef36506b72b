"""Which batches each worker reads, in training and in validation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset

from raytrain2p.config import Settings
from raytrain2p.data.batches import MicroBatch, StepSampler
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.phases.inputs import TRAIN, VAL, Batch, Split, weighted

WORKERS_BESIDE_A_GPU = 2  # so that it never waits for a batch


@dataclass(frozen=True)
class Loaders:
    """Of one worker; without a validation split there is no `val`. `places`: where the records of a step are, over all workers."""

    train: "DataLoader[Batch]"
    val: "DataLoader[Batch] | None"
    places: Callable[[int], list[str]]


def build_loaders(settings: Settings, data: Mapping[str, Split], group: WorkerGroup, first_step: int) -> Loaders:
    """Training in steps drawn by seed, beginning after `first_step`; validation in shares of equal stride."""
    sampler = train_sampler(settings, data[TRAIN], group, first_step)
    on_gpu, workers = settings.launch.gpus > 0, settings.data.loader_workers
    if workers is None:
        workers = WORKERS_BESIDE_A_GPU if on_gpu else 0  # a CPU computes the step, and would have to wait for itself
    options: dict[str, Any] = {"batch_size": None, "num_workers": workers, "pin_memory": on_gpu}
    train = DataLoader(_as_dataset(data[TRAIN]), sampler=sampler, persistent_workers=workers > 0, **options)

    def places(step: int) -> list[str]:
        return [data[TRAIN].places[record] for record in sorted(sampler.records_of(step))]

    if VAL not in data:
        return Loaders(train, None, places)
    batches = validation_micro_batches(data[VAL].lengths, settings.evaluation.batch_size, group)
    return Loaders(train, DataLoader(_as_dataset(data[VAL]), sampler=batches, **options), places)


def train_sampler(settings: Settings, split: Split, group: WorkerGroup, first_step: int = 0) -> StepSampler:
    training = settings.training
    return StepSampler(
        split.lengths,
        split.supervised,
        training.global_batch_size,
        training.micro_batch(group.size),
        group.rank,
        group.size,
        settings.seed,
        first_step,
        weighted(split.shares),
        split.tasks,
    )


def _as_dataset(split: Split) -> "Dataset[Batch]":
    """Torch's class is nominal, but takes whatever has a length and items."""
    return cast("Dataset[Batch]", split)


def validation_micro_batches(lengths: np.ndarray, size: int, group: WorkerGroup) -> list[MicroBatch]:
    """This worker's batches: whole ones, so that any number of workers measures the same, and equally many on each.

    Where the number does not divide, a batch that does not count (no step tokens) is added.

    Args:
        size: records of a batch at most; with padding it has no more tokens than so many records of mean length, or one record.
    """
    order = np.random.default_rng(0).permutation(len(lengths))  # a batch has records of every source: phase 1 compares them
    order = order[np.argsort(lengths[order], kind="stable")]
    ends, most = list[int](), size * lengths.mean()
    for place, length in enumerate(lengths[order]):
        begun = place - (ends[-1] if ends else 0)
        if begun == size or (begun and (begun + 1) * length > most):
            ends.append(place)
    batches = [MicroBatch(records, 1) for records in np.split(order, ends)]
    batches += [MicroBatch(batches[0].records, 0)] * (-len(batches) % group.size)
    return group.share(batches)
