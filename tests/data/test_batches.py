"""Which records make up each step: the same on one worker as on many, each as often as its source says, like lengths together."""

import hashlib
from typing import Any

import numpy as np
import pytest

from raytrain2p.data.batches import Ragged, StepSampler

RECORDS = 203


def lengths_of(count: int = RECORDS) -> np.ndarray:
    return np.random.default_rng(0).integers(10, 200, count)


def sampler_of(
    micro_batch_size: int = 4,
    passes: int = 1,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    lengths: np.ndarray | None = None,
    **more: Any,
) -> StepSampler:
    lengths = lengths_of() if lengths is None else lengths
    batch = micro_batch_size * passes * world_size
    return StepSampler(lengths, lengths // 3 + 1, batch, micro_batch_size, rank, world_size, seed, **more)


def steps_of(samplers: list[StepSampler]) -> list[list[int]]:
    """The records of each step, of all workers and passes together, sorted."""
    steps: list[list[int]] = [[] for _ in range(samplers[0].steps)]
    for sampler in samplers:
        for number, share in enumerate(sampler):
            steps[number // sampler.passes] += share.records.tolist()
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(("micro_batch_size", "passes", "world_size"), [(8, 1, 2), (4, 2, 2), (2, 4, 2), (2, 2, 4), (1, 1, 16), (16, 1, 1)])
def test_workers_and_passes_share_exactly_the_step_of_one_worker(micro_batch_size: int, passes: int, world_size: int) -> None:
    alone = steps_of([sampler_of(micro_batch_size=16)])
    shared = steps_of([sampler_of(micro_batch_size, passes, rank, world_size) for rank in range(world_size)])
    assert shared == alone


@pytest.mark.parametrize(("passes", "world_size"), [(1, 1), (2, 2), (3, 2)])
def test_every_share_has_the_batch_size_and_the_length_is_the_number_of_shares(passes: int, world_size: int) -> None:
    for rank in range(world_size):
        sampler = sampler_of(4, passes, rank, world_size)
        shares = list(sampler)
        assert {len(share.records) for share in shares} == {4}
        assert len(shares) == len(sampler) == sampler.steps * passes
        assert sampler.steps == RECORDS // (4 * passes * world_size)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_record_comes_at_most_once_per_epoch(epoch: int) -> None:
    samplers = [sampler_of(4, 2, rank, 2) for rank in range(2)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    drawn = [record for step in steps_of(samplers) for record in step]
    assert len(drawn) == len(set(drawn)) == RECORDS // 16 * 16
    assert set(drawn) <= set(range(RECORDS))


@pytest.mark.parametrize("records", [37, RECORDS])
def test_what_one_epoch_leaves_out_comes_in_another(records: int) -> None:
    sampler = sampler_of(8, lengths=100 * np.arange(1, 1 + records))
    seen: set[int] = set()
    for epoch in range(60):
        sampler.set_epoch(epoch)
        seen |= set(sampler.step_records().ravel().tolist())
    assert seen == set(range(records))


def test_another_epoch_has_another_order() -> None:
    sampler = sampler_of()
    first = [share.records.tolist() for share in sampler]
    sampler.set_epoch(1)
    assert [share.records.tolist() for share in sampler] != first
    sampler.set_epoch(0)
    assert [share.records.tolist() for share in sampler] == first


def test_the_records_of_any_step_are_those_that_its_workers_read() -> None:
    workers = [sampler_of(8, rank=rank, world_size=2) for rank in range(2)]
    for epoch in range(2):
        for sampler in workers:
            sampler.set_epoch(epoch)
        shares = [[share.records for share in sampler] for sampler in workers]
        first = epoch * workers[0].steps + 1
        for index in range(workers[0].steps):
            read = np.concatenate([mine[index] for mine in shares])
            assert sorted(read) == sorted(workers[0].records_of(first + index))


def test_the_same_seed_gives_the_same_order_and_another_seed_another() -> None:
    assert np.array_equal(sampler_of(seed=3).step_records(), sampler_of(seed=3).step_records())
    assert not np.array_equal(sampler_of(seed=3).step_records(), sampler_of(seed=4).step_records())


def test_two_neighbouring_seeds_do_not_share_their_epochs() -> None:
    later = sampler_of(seed=0)
    later.set_epoch(1)
    assert not np.array_equal(later.step_records(), sampler_of(seed=1).step_records())


def padding_of(steps: np.ndarray, lengths: np.ndarray) -> int:
    return int(sum(lengths[step].max() * len(step) - lengths[step].sum() for step in steps))


def test_records_of_like_length_are_batched_so_that_little_is_padding() -> None:
    lengths = lengths_of(1000)
    steps = sampler_of(8, lengths=lengths).step_records()
    random = np.random.default_rng(1).permutation(1000).reshape(-1, 8)
    assert padding_of(steps, lengths) < padding_of(random, lengths) / 3


def test_a_step_has_each_task_in_its_proportion_whatever_the_lengths_of_their_prompts() -> None:
    """Short records of one task, long ones of another: sorted by length alone, each step would have one of them."""
    tasks = np.random.default_rng(2).permutation(np.repeat([0, 1, 1, 2], 200))
    lengths = np.array([20, 40, 90])[tasks] + np.random.default_rng(3).integers(0, 16, 800)
    steps = sampler_of(8, lengths=lengths, tasks=tasks).step_records()
    shares = np.stack([(tasks[steps] == task).sum(axis=1) for task in range(3)])
    assert np.all(abs(shares - np.array([[2], [4], [2]])) <= 2)
    assert sorted(steps.ravel()) == list(range(800))
    alone = np.stack([(tasks[sampler_of(8, lengths=lengths).step_records()] == task).sum(axis=1) for task in range(3)])
    assert np.median(alone.max(axis=0)) == 8


def test_bucketing_does_not_train_from_short_to_long() -> None:
    lengths = lengths_of(1000)
    means = lengths[sampler_of(8, lengths=lengths).step_records()].mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_equal_lengths_still_give_a_random_order() -> None:
    steps = sampler_of(8, lengths=np.full(800, 5)).step_records()
    assert not np.array_equal(steps.ravel(), np.sort(steps.ravel()))
    assert abs(steps.mean(axis=1).std() - 800 / np.sqrt(12 * 8)) < 25  # as for means of 8 uniform draws


def test_step_tokens_are_the_supervised_tokens_of_the_whole_step() -> None:
    passes = 2
    samplers = [sampler_of(4, passes, rank, 2) for rank in range(2)]
    told = [[share.step_tokens for share in sampler] for sampler in samplers]
    supervised = samplers[0].supervised
    for number, step in enumerate(steps_of(samplers)):
        expected = int(supervised[step].sum())
        for worker in told:
            assert worker[number * passes : (number + 1) * passes] == [expected] * passes


def test_fewer_records_than_a_step_needs_give_no_step() -> None:
    sampler = sampler_of(8, lengths=np.arange(1, 6))
    assert len(sampler) == 0
    assert list(sampler) == []


def test_the_order_without_sources_is_the_same_in_every_version() -> None:
    """A run that is resumed after an update sees the records that it has not seen."""
    steps = [sampler_of(8, seed=7).step_records().tolist()]
    assert hashlib.sha256(repr(steps).encode()).hexdigest()[:16] == "5bbed40d661c6c45"


SOURCES = ((150, 1.0), (40, 1.0), (13, 2.0))  # of 203 records, 200 an epoch: 50 of the first, 50 of the second, 100 of the third


def counts_of(sampler: StepSampler, epoch: int = 0) -> np.ndarray:
    """How often each record comes in an epoch."""
    sampler.set_epoch(epoch)
    return np.bincount(sampler.step_records().ravel(), minlength=RECORDS)


def test_sources_contribute_records_by_weight_and_an_epoch_is_as_long_as_without() -> None:
    weighted = sampler_of(8, sources=SOURCES)
    assert weighted.steps == sampler_of(8).steps == 25
    counts = counts_of(weighted)
    assert [int(part.sum()) for part in np.split(counts, [150, 190])] == [50, 50, 100]


def test_records_of_a_source_come_equally_often_but_for_a_random_rest() -> None:
    first, second, third = np.split(counts_of(sampler_of(8, sources=SOURCES)), [150, 190])
    assert np.bincount(first).tolist() == [100, 50]
    assert np.bincount(second).tolist() == [0, 30, 10]
    assert np.bincount(third).tolist() == [0] * 7 + [4, 9]


def test_the_rest_of_a_source_is_drawn_anew_each_epoch() -> None:
    seen = np.sum([counts_of(sampler_of(8, sources=SOURCES), epoch)[:150] for epoch in range(30)], axis=0)
    assert seen.min() > 0
    assert seen.max() < 25


def test_a_step_holds_records_of_every_source() -> None:
    steps = sampler_of(16, lengths=np.full(1600, 5), sources=((800, 1.0), (800, 1.0))).step_records()
    assert ((steps < 800).any(axis=1) & (steps >= 800).any(axis=1)).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_share_the_steps_of_weighted_sources(world_size: int) -> None:
    alone = steps_of([sampler_of(16, sources=SOURCES)])
    shared = steps_of([sampler_of(16 // world_size, 1, rank, world_size, sources=SOURCES) for rank in range(world_size)])
    assert shared == alone


@pytest.mark.parametrize("sources", [None, SOURCES])
@pytest.mark.parametrize("done", [1, 24, 25, 30])
def test_resuming_at_a_step_continues_the_order(sources: Any, done: int) -> None:
    straight, resumed = sampler_of(8, sources=sources), sampler_of(8, sources=sources, first_step=done)
    steps = []
    for epoch in range(3):
        straight.set_epoch(epoch)
        steps += [share.records.tolist() for share in straight]
    assert resumed.first_epoch == done // 25
    for epoch in range(resumed.first_epoch, 3):
        resumed.set_epoch(epoch)
        assert [share.records.tolist() for share in resumed] == steps[max(done, 25 * epoch) : 25 * (epoch + 1)]


def test_the_largest_weights_are_still_numbers() -> None:
    even, largest = (counts_of(sampler_of(8, sources=((150, weight), (53, weight)))) for weight in (1.0, 1.7e308))
    assert (even == largest).all()


def test_a_source_without_records_has_no_share() -> None:
    counts = counts_of(sampler_of(8, sources=((0, 5.0), (150, 1.0), (53, 1.0))))
    assert [int(part.sum()) for part in np.split(counts, [150])] == [100, 100]


def test_fewer_weighted_records_than_a_step_needs_give_no_step() -> None:
    assert list(sampler_of(8, lengths=np.arange(1, 6), sources=((2, 1.0), (3, 1.0)))) == []


def test_ragged_lists_come_back_as_they_went_in() -> None:
    lists = [[1, 2, 3], [], [4], [5, -1, 6, 7]]
    ragged = Ragged(lists)
    assert len(ragged) == 4
    assert [ragged[index].tolist() for index in range(4)] == lists
    assert ragged.lengths.tolist() == [3, 0, 1, 4]


def test_ragged_without_lists_is_empty() -> None:
    assert len(Ragged([])) == 0


@pytest.mark.parametrize(("dtype", "lists"), [(np.int32, [[1], [-2, 3]]), (bool, [[True, False], [True]])])
def test_ragged_lists_keep_their_type(dtype: Any, lists: list[list[int]]) -> None:
    ragged = Ragged((one for one in lists), dtype)
    assert ragged.flat.dtype == ragged[0].dtype == dtype
    assert [ragged.starts.tolist(), ragged.ends.tolist()] == [[0, len(lists[0])], [len(lists[0]), 3]]
