"""The batches of validation."""

import numpy as np
import pytest

from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.worker.loaders import validation_micro_batches


def batches(lengths: list[int], size: int, rank: int = 0, workers: int = 1) -> list[tuple[list[int], int]]:
    found = validation_micro_batches(np.array(lengths), size, WorkerGroup(rank, workers))
    return [(batch.records.tolist(), batch.step_tokens) for batch in found]


def test_a_batch_has_the_tokens_of_so_many_records_of_mean_length() -> None:
    lengths = [10] * 40 + [200] * 5 + [900]
    found = batches(lengths, 8)
    assert sorted(record for records, _ in found for record in records) == list(range(46)), "each record once"
    for records, _ in found:
        assert len(records) <= 8
        assert len(records) == 1 or len(records) * max(lengths[record] for record in records) <= 8 * np.mean(lengths)
    assert [len(records) for records, _ in found] == [8] * 5 + [2, 2, 1, 1]


@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 4), (5, 4), (12, 5)])
def test_records_of_one_length_fill_batches(count: int, size: int) -> None:
    """As all are in phase 1, whose loss compares the records of a batch."""
    assert [len(records) for records, _ in batches([1] * count, size)] == [min(size, count - start) for start in range(0, count, size)]


def test_workers_share_the_batches_of_one_and_equally_many() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 50).tolist()
    alone = batches(lengths, 8)
    shares = [batches(lengths, 8, rank, 3) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(batch for share in shares for batch in share if batch[1]) == sorted(alone)
