"""How many workers a cluster holds, what `auto` and null stand for on it, and what it can never hold."""

from typing import Any

import pytest

from raytrain2p.config import InputError, load_settings
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.capacity import Capacity, Limits, Node, check_capacity, resolved, worker_resources

H100, L4 = frozenset({"H100"}), frozenset({"L4"})
CPUS = Capacity((Node(2, 0, is_head=True),))
GPUS = Capacity((Node(4, 0, is_head=True), Node(64, 8, H100), Node(32, 8, H100), Node(8, 1, L4)))


def launch(**given: Any) -> LaunchSettings:
    return LaunchSettings(**given)


def problem(capacity: Capacity, **given: Any) -> str:
    (found,) = check_capacity(resolved(launch(**given), capacity), capacity)
    return str(found)


def fits(capacity: Capacity, **given: Any) -> bool:
    return not check_capacity(resolved(launch(**given), capacity), capacity)


def test_auto_takes_gpus_where_there_are_any_and_true_and_false_are_as_set() -> None:
    assert resolved(launch(), CPUS).use_gpu is False
    assert resolved(launch(), GPUS).use_gpu is True
    assert resolved(launch(use_gpu=False), GPUS).use_gpu is False
    assert resolved(launch(use_gpu=True), CPUS).use_gpu is True


def test_until_it_is_resolved_auto_takes_none() -> None:
    assert launch().gpus == 0
    assert resolved(launch(gpus_per_worker=0.25), GPUS).gpus == 0.25


def test_auto_takes_gpus_that_an_autoscaler_can_add() -> None:
    growing = Capacity((Node(2, 0, is_head=True),), autoscales=True, limits=Limits(((Node(8, 1), 4),), 4))
    assert resolved(launch(), growing).use_gpu is True
    none_left = Capacity((Node(2, 0, is_head=True),), autoscales=True, limits=Limits(((Node(8, 1), 0),), 4))
    assert resolved(launch(), none_left).use_gpu is False


def test_with_gpus_a_worker_gets_the_cpus_that_belong_to_them_and_without_the_cluster_is_shared_out() -> None:
    assert resolved(launch(num_workers=2), GPUS).cpus_per_worker == 4, "the least of the nodes with GPUs"
    assert resolved(launch(num_workers=2, accelerator_type="L4"), GPUS).cpus_per_worker == 8
    assert resolved(launch(gpus_per_worker=0.25, accelerator_type="L4"), GPUS).cpus_per_worker == 2
    assert resolved(launch(), Capacity((Node(4, 8),))).cpus_per_worker == 1, "at least one"
    assert resolved(launch(num_workers=2, use_gpu=False), Capacity((Node(4, 0), Node(8, 0)))).cpus_per_worker == 4
    assert resolved(launch(), CPUS, trial=True).cpus_per_worker == 1, "trials share the cluster"
    assert resolved(launch(cpus_per_worker=3), GPUS).cpus_per_worker == 3


def test_workers_are_restarted_by_default_on_a_cluster_that_outlives_them() -> None:
    assert resolved(launch(), CPUS).max_failures == 3
    assert resolved(launch(), Capacity(CPUS.nodes, started_here=True)).max_failures == 0
    assert resolved(launch(), CPUS, trial=True).max_failures == 0, "the sweep restarts trials"
    assert resolved(launch(max_failures=1), Capacity(CPUS.nodes, started_here=True)).max_failures == 1


@pytest.mark.parametrize(("share", "workers"), [(1, 8), (0.5, 16), (0.25, 32), (0.3, 24), (0.1, 80), (0.6, 8)])
def test_a_fraction_of_a_gpu_is_a_part_of_one_gpu(share: float, workers: int) -> None:
    assert Node(1000, 8).workers(1, share) == workers


def test_cpus_bound_the_workers_too() -> None:
    assert Node(3, 8).workers(1, 0.25) == 3
    assert Node(3, 8).workers(2, 1) == 1


@pytest.mark.parametrize(
    ("strategy", "groups"),
    [
        ("PACK", 3),  # 5 + 3 + 1 places, in threes
        ("SPREAD", 3),
        ("STRICT_PACK", 2),  # one on the first, one on the second
        ("STRICT_SPREAD", 1),  # the last node is in each
    ],
)
def test_groups_of_three_on_nodes_with_five_three_and_one_place(strategy: str, groups: int) -> None:
    assert Capacity((Node(5, 0), Node(3, 0), Node(1, 0))).groups(3, 1, 0, strategy=strategy) == groups


def test_too_many_workers_are_refused_with_what_there_is() -> None:
    assert "needs 3 x 1 CPUs, each worker on one node; the cluster has 2 on 1 node(s)" in problem(CPUS, num_workers=3)
    refusal = problem(GPUS, num_workers=20)
    assert "launch.num_workers=20 with launch.use_gpu=true" in refusal
    assert "needs 20 x (4 CPUs and a GPU)" in refusal
    assert "has 108 CPUs and 17 GPUs on 4 node(s)" in refusal
    assert "launch.use_gpu=false" in refusal


def test_gpus_that_no_node_has_enough_cpus_for_do_not_count() -> None:
    assert fits(GPUS, num_workers=3, cpus_per_worker=16)  # 4 on the first, 2 on the second
    assert not fits(GPUS, num_workers=7, cpus_per_worker=16)


def test_an_unknown_type_of_accelerator_is_refused_with_those_that_there_are() -> None:
    refusal = problem(GPUS, accelerator_type="A100")
    assert "launch.accelerator_type=A100" in refusal
    assert "take H100 or L4" in refusal
    assert "`ray start --resources`" in problem(CPUS, accelerator_type="A100"), "auto does not fall back to CPUs"
    assert fits(GPUS, accelerator_type="L4")
    assert "needs 2 x (8 CPUs and a GPU (L4))" in problem(GPUS, accelerator_type="L4", num_workers=2)


@pytest.mark.parametrize(
    ("strategy", "most", "how"), [("STRICT_PACK", 8, "all on one node"), ("STRICT_SPREAD", 3, "each on a node of its own")]
)
def test_a_strategy_that_no_nodes_satisfy_is_refused(strategy: str, most: int, how: str) -> None:
    assert fits(GPUS, num_workers=most, placement_strategy=strategy)
    refusal = problem(GPUS, num_workers=most + 1, placement_strategy=strategy)
    assert f"launch.num_workers={most + 1} with launch.use_gpu=true with launch.placement_strategy={strategy}" in refusal
    assert how in refusal
    assert fits(GPUS, num_workers=most + 1)


def test_what_an_autoscaler_may_add_counts_up_to_its_limits() -> None:
    limits = Limits(((Node(8, 1), 4), (Node(64, 8), 2)), most=3)  # 2 large ones and a small one
    growing = Capacity((Node(2, 0, is_head=True),), autoscales=True, limits=limits)
    assert fits(growing, num_workers=17, cpus_per_worker=8)
    assert "with all that its autoscaler may add" in problem(growing, num_workers=18, cpus_per_worker=8)
    assert fits(growing, num_workers=3, placement_strategy="STRICT_SPREAD")
    assert not fits(growing, num_workers=4, placement_strategy="STRICT_SPREAD")


def test_what_is_reserved_for_a_worker() -> None:
    assert worker_resources(resolved(launch(gpus_per_worker=0.5, accelerator_type="L4"), GPUS)) == {
        "CPU": 4.0,
        "GPU": 0.5,
        "accelerator_type:L4": 0.001,
    }
    assert worker_resources(resolved(launch(), CPUS)) == {"CPU": 2.0}


def test_settings_that_contradict_each_other_about_gpus_are_refused_together() -> None:
    with pytest.raises(InputError) as refusal:
        load_settings(1, None, ["launch.use_gpu=false", "launch.accelerator_type=L4", "training.global_batch_size=0"])
    assert {one.where for one in refusal.value.problems} >= {"launch.accelerator_type=L4"}
    with pytest.raises(InputError, match=r"gpus_per_worker=0.5 with launch.num_workers=2\n.*NCCL refuses"):
        load_settings(1, None, ["launch.gpus_per_worker=0.5", "launch.num_workers=2"])
    load_settings(1, None, ["launch.gpus_per_worker=0.5", "launch.num_workers=2", "launch.use_gpu=false"])
    with pytest.raises(InputError, match=r"launch.gpus_per_worker=2"):
        load_settings(1, None, ["launch.gpus_per_worker=2"])
