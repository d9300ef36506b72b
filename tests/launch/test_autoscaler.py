"""What an autoscaler may add, and which launches are refused at once. tests/cluster/test_autoscaling.py asks real ones."""

from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as kuberay_config
from ray.train._internal.autoscaling_coordinator_client import build_train_resource_request as bundles

from raytrain2p.config import InputError
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.autoscaler import check_possible, limits_of, node_with, read_limits, request_for, seconds_to_wait
from raytrain2p.launch.capacity import Capacity, Limits, Node

HEAD = Node(2, 0, is_head=True)
L4 = {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}


def group(name: str, most: int, limits: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A group of workers of a RayCluster."""
    container = {"name": "ray", "resources": {"limits": limits, "requests": limits}}
    return {"groupName": name, "minReplicas": 0, "maxReplicas": most, "template": {"spec": {"containers": [container]}}} | more


def test_the_limits_of_a_cluster_launcher_are_those_of_its_file() -> None:
    types = {
        "head": {"resources": {"CPU": 4}, "max_workers": 0},
        "l4": {"resources": L4, "min_workers": 0, "max_workers": 8},
        "cpu": {"resources": {"CPU": 16}},
    }
    limits = limits_of({"max_workers": 3, "head_node_type": "head", "available_node_types": types})
    assert limits == Limits(((Node(8, 1, frozenset({"L4"})), 3), (Node(16, 0), 3)), 3)


def test_the_limits_on_kubernetes_are_those_of_the_rayclusters_groups() -> None:
    head = {"rayStartParams": {}} | group("head", 1, {"cpu": "2", "memory": "4Gi"})
    gpus = group(
        "gpus", 2, {"cpu": "32", "memory": "64Gi", "nvidia.com/gpu": "4"}, rayStartParams={"resources": "'{\"accelerator_type:H100\": 1}'"}
    )
    cluster = {
        "metadata": {"name": "c", "namespace": "n"},
        "spec": {"headGroupSpec": head, "workerGroupSpecs": [gpus | {"numOfHosts": 2}]},
    }
    assert limits_of(kuberay_config(cluster)) == Limits(((Node(32, 4, frozenset({"H100"})), 4),), 4)


def test_a_node_is_read_off_rays_resources() -> None:
    assert node_with({"CPU": 2.0, "node:__internal_head__": 1.0}) == HEAD
    assert node_with(L4) == Node(8, 1, frozenset({"L4"}))


def test_an_autoscaler_that_is_elsewhere_has_limits_that_cannot_be_read() -> None:
    assert read_limits("192.0.2.1:1") is None


def test_what_is_asked_for_is_what_the_workers_take_and_for_one_node_all_of_it() -> None:
    launch = LaunchSettings(num_workers=2, use_gpu=True, accelerator_type="L4", cpus_per_worker=4)
    worker = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:L4": 0.001}
    assert bundles(*request_for(launch)) == ([worker, worker], None)
    whole = {name: 2 * amount for name, amount in worker.items()}
    assert bundles(*request_for(launch.model_copy(update={"placement_strategy": "STRICT_PACK"}))) == ([whole], None)
    assert bundles(*request_for(LaunchSettings(use_gpu=False, cpus_per_worker=3))) == ([{"CPU": 3.0}], None)


@pytest.mark.parametrize(
    ("capacity", "wait", "refused", "seconds"),
    [
        (Capacity((HEAD,)), None, True, 0),
        (Capacity((HEAD,)), 60, False, 60),  # nodes may join by themselves
        (Capacity((HEAD,), started_here=True), 60, True, 0),
        (Capacity((HEAD,), autoscales=True, limits=Limits(((Node(8, 2), 2),), 2)), None, False, 1800),
        (Capacity((HEAD,), autoscales=True, limits=Limits(((Node(8, 2), 1),), 1)), None, True, 1800),  # the limits are too low
        (Capacity((HEAD,), autoscales=True, limits=Limits(((Node(8, 2), 1),), 1)), 60, True, 60),
        (Capacity((HEAD,), autoscales=True), None, False, 1800),  # its limits are not known
        (Capacity((HEAD,), autoscales=True), 0, True, 0),
    ],
)
def test_what_can_never_be_had_is_refused_at_once(capacity: Capacity, wait: int | None, refused: bool, seconds: int) -> None:
    launch = LaunchSettings(num_workers=3, use_gpu=True, wait_for_nodes_s=wait)
    assert seconds_to_wait(launch, capacity) == seconds
    if not refused:
        check_possible(launch, capacity)
        return
    with pytest.raises(InputError, match=r"needs 3 x \(\d CPUs? and a GPU\)"):
        check_possible(launch, capacity)
