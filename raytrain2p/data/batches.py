"""Which records make up each step, and each worker's part of it."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BUCKET_STEPS = 16  # records are sorted by length within this many steps' worth: little padding, still a random order
# Lengths are rounded up to this many tokens before sorting: answers of one length are often equal ones, and would fill whole steps.
BUCKET_TOKENS = 8
GOLDEN = (5**0.5 - 1) / 2  # its multiples, without their whole parts, are spread evenly


@dataclass(frozen=True)
class MicroBatch:
    """One worker's part of one forward pass: record numbers, and the supervised tokens of the *whole* step.

    The mean over a step's tokens is not the mean of the workers' means if answers differ in length. The order is known in
    advance, so the divisor is too, without communication.
    """

    records: np.ndarray
    step_tokens: int


class StepSampler:
    """The order of records: each step's global batch is drawn first, then divided among passes and workers.

    The same seed and global batch give the same steps on any number of workers. The order follows from (seed, epoch)
    alone, so resuming at a step needs no saved state.

    Args:
        lengths: tokens per record, (N,): records of similar length are batched; all equal if length does not matter.
        supervised: supervised tokens per record, (N,).
        global_batch_size: records per step, over all workers.
        micro_batch_size: records per worker and pass; times `world_size`, it divides `global_batch_size`.
        first_step: optimizer steps that were done before; the order continues after them.
        sources: records and weight of each source, in the order of the records. An epoch, as long as without weights, takes
            records of a source in proportion to its weight: all of them as often as they fit, and a random part.
        tasks: of each record, (N,); None: all have one. A step has tasks in the proportions of the records around it: the
            prompts of a task are often of one length, so that records sorted by length would fill steps with one task.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        supervised: np.ndarray,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        first_step: int = 0,
        sources: Sequence[tuple[int, float]] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        assert sources is None or sum(count for count, _ in sources) == len(lengths), "each record is of one source"
        self.lengths, self.supervised = lengths, supervised
        self.global_batch_size, self.rank, self.world_size, self.seed = global_batch_size, rank, world_size, seed
        self.sources = sources
        self.tasks = np.zeros(len(lengths), np.int64) if tasks is None else np.unique(tasks, return_inverse=True)[1]
        self.passes = global_batch_size // (micro_batch_size * world_size)
        self.first_epoch, self.skipped = divmod(first_step, max(1, self.steps))
        self.epoch = self.first_epoch

    @property
    def steps(self) -> int:
        """Steps per epoch. Records that do not fill a last step are left out; the next epoch draws anew."""
        return len(self.lengths) // self.global_batch_size

    def __len__(self) -> int:
        return self.steps * self.passes

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[MicroBatch]:
        stride = self.passes * self.world_size
        skipped = self.skipped if self.epoch == self.first_epoch else 0
        for step in self.step_records()[skipped:]:
            tokens = int(self.supervised[step].sum())
            for index in range(self.passes):
                yield MicroBatch(step[index * self.world_size + self.rank :: stride], tokens)

    def records_of(self, step: int) -> np.ndarray:
        """Record numbers of one step of the run, over all workers; the first step is 1."""
        other = copy.copy(self)
        other.epoch, index = divmod(step - 1, self.steps)
        return other.step_records()[index]

    def step_records(self) -> np.ndarray:
        """Record numbers of this epoch's steps, (steps, global batch)."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = self._drawn(random)  # before sorting: no record is always last
        bucket = self.global_batch_size * BUCKET_STEPS
        for start in range(0, len(order), bucket):
            order[start : start + bucket] = self._sorted(order[start : start + bucket])
        return random.permutation(order.reshape(self.steps, self.global_batch_size))

    def _sorted(self, records: np.ndarray) -> np.ndarray:
        """Records by length: each at the place in the whole that it has among those of its task, as a share of their number."""
        by_length = records[np.argsort(-(-self.lengths[records] // BUCKET_TOKENS), kind="stable")]
        tasks, places = self.tasks[by_length], np.empty(len(records))
        for task in np.unique(tasks):
            of_task = np.flatnonzero(tasks == task)
            offset = (1 + task) * GOLDEN % 1  # rare tasks are not all in the middle
            places[of_task] = (np.arange(len(of_task)) + offset) / len(of_task)
        return by_length[np.argsort(places, kind="stable")]

    def _drawn(self, random: np.random.Generator) -> np.ndarray:
        """This epoch's records in random order."""
        total = self.steps * self.global_batch_size
        if self.sources is None or not total:
            return random.permutation(len(self.lengths))[:total]
        counts, shares = np.array([count for count, _ in self.sources]), drawn_records(self.sources, total)
        firsts = np.cumsum(counts) - counts
        # resize repeats a random order as often as it fits, and then its beginning
        parts = [first + np.resize(random.permutation(count), share) for first, count, share in zip(firsts, counts, shares, strict=True)]
        return random.permutation(np.concatenate(parts))


def drawn_records(sources: Sequence[tuple[int, float]], total: int) -> np.ndarray:
    """Of `total` records of an epoch, how many are of each source (records, weight)."""
    weights = np.array([weight if count else 0.0 for count, weight in sources])
    weights /= weights.max()  # the sum of the largest numbers would be infinite
    return np.diff(np.rint(np.cumsum(weights) / weights.sum() * total).astype(np.int64), prepend=0)


class Ragged:
    """Lists of numbers of different lengths in two flat arrays: each is sent and shared as one block."""

    def __init__(self, lists: Iterable[Sequence[int] | np.ndarray], dtype: npt.DTypeLike = np.int32) -> None:
        arrays = [np.asarray(one, dtype) for one in lists]
        self.lengths = np.array([len(one) for one in arrays], np.int64)
        self.ends = np.cumsum(self.lengths)
        self.flat = np.concatenate([np.empty(0, dtype), *arrays])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.flat[self.ends[index] - self.lengths[index] : self.ends[index]]

    @property
    def starts(self) -> np.ndarray:
        """Where each list begins in `flat`, (N,)."""
        return self.ends - self.lengths
