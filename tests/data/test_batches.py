"""Which records make up each step: the same on one worker as on many, each at most once per epoch, like lengths together."""

import numpy as np
import pytest

from raytrain2p.data.batches import Ragged, StepSampler

RECORDS = 203


def lengths_of(count: int = RECORDS) -> np.ndarray:
    return np.random.default_rng(0).integers(10, 200, count)


def sampler_of(
    micro_batch_size: int = 4, passes: int = 1, rank: int = 0, world_size: int = 1, seed: int = 0, lengths: np.ndarray | None = None
) -> StepSampler:
    lengths = lengths_of() if lengths is None else lengths
    return StepSampler(lengths, lengths // 3 + 1, micro_batch_size * passes * world_size, micro_batch_size, rank, world_size, seed)


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


def test_ragged_lists_come_back_as_they_went_in() -> None:
    lists = [[1, 2, 3], [], [4], [5, -1, 6, 7]]
    ragged = Ragged(lists)
    assert len(ragged) == 4
    assert [ragged[index].tolist() for index in range(4)] == lists
    assert ragged.lengths.tolist() == [3, 0, 1, 4]


def test_ragged_without_lists_is_empty() -> None:
    assert len(Ragged([])) == 0
