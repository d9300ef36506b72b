"""Launches on a cluster with an autoscaler of Ray that starts real nodes, on this machine, and ends those that are idle for 6 seconds.

Its GPUs are logical: Ray counts them, and PyTorch finds none.
"""

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain2p.config import InputError
from raytrain2p.config.console import Console
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.autoscaler import check_possible, cluster_capacity, nodes_held
from raytrain2p.launch.capacity import Capacity, Limits, Node, resolved
from raytrain2p.launch.cluster import connected
from tests.launch.launching import DASHBOARD_PORT, PORT, WORKER_PORTS, head, ray_node, run_command

pytestmark = pytest.mark.skipif(os.environ.get("RAYTRAIN2P_CLUSTER_TESTS") != "1", reason="takes minutes: part of `make test-cluster`")
L4 = {"CPU": 2, "GPU": 2, "accelerator_type:L4": 1}
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "f" * 51 + "00000"  # by which Ray's provider for tests knows the head
V2 = {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}


def configuration(version: int) -> dict[str, Any]:
    """Of an autoscaler, as a file for `ray start --autoscaling-config`: a head with 2 CPUs, and up to two nodes."""
    lists = "initialization_commands setup_commands head_setup_commands worker_setup_commands head_start_ray_commands "
    lists += "worker_start_ray_commands cluster_synced_files rsync_exclude rsync_filter"
    provider: dict[str, Any] = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{PORT}"}
    provider |= dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True)
    if version == 2:
        provider |= {"launch_multiple": True, "head_node_id": HEAD_ID}
        provider |= {"type": "external", "module": PROVIDER}  # for its own type Ray wants a file that is not in its wheel
    return {
        "cluster_name": "test",
        "max_workers": 2,
        "upscaling_speed": 100,
        "idle_timeout_minutes": 0.1,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            "l4": {"resources": dict(L4), "node_config": {}, "min_workers": 0, "max_workers": 2},
        },
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "auth": {},
        "docker": {},
        **{name: [] for name in lists.split()},
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["v1", "v2"])
def autoscaling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head with an autoscaler, in both of Ray's versions."""
    folder = tmp_path_factory.mktemp("autoscaling")
    (folder / "autoscaler.yaml").write_text(yaml.safe_dump(configuration(request.param)))
    variables = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"} | (V2 if request.param == 2 else {})
    with tempfile.TemporaryDirectory(prefix="ray") as sessions:
        command = head(PORT, DASHBOARD_PORT, WORKER_PORTS, f"--temp-dir={sessions}", f"--autoscaling-config={folder / 'autoscaler.yaml'}")
        with ray_node(folder, command, **variables):
            time.sleep(3)  # the autoscaler's first report
            yield f"127.0.0.1:{PORT}"


@pytest.fixture
def capacity(autoscaling: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Capacity]:
    monkeypatch.setenv("RAY_ADDRESS", autoscaling)
    with connected(LaunchSettings(), verbose=False) as capacity:
        yield capacity


def within(seconds: float, true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def only_the_head_is_left() -> bool:
    return len(cluster_capacity().nodes) == 1


def test_what_it_may_add_is_known_and_what_it_cannot_is_refused_at_once(capacity: Capacity) -> None:
    assert capacity.autoscales
    assert capacity.limits == Limits(((Node(2, 2, frozenset({"L4"})), 2),), 2)
    wanted = resolved(LaunchSettings(num_workers=2), capacity)
    assert (wanted.use_gpu, wanted.cpus_per_worker) == (True, 1)
    with pytest.raises(InputError, match="the cluster has 6 CPUs and 4 GPUs on 3 node"):
        check_possible(LaunchSettings(num_workers=5), capacity)
    with pytest.raises(InputError, match="take L4"):
        check_possible(LaunchSettings(accelerator_type="H100"), capacity)
    assert only_the_head_is_left()


def test_nodes_are_asked_for_kept_while_they_are_needed_and_given_back(capacity: Capacity) -> None:
    log, launch = io.StringIO(), LaunchSettings(num_workers=2, placement_strategy="STRICT_SPREAD", accelerator_type="L4")
    check_possible(launch, capacity)
    with nodes_held(launch, capacity, Console(log)) as grown:
        assert sorted(node.gpus for node in grown.nodes) == [0, 2, 2], "one node would have two GPUs"
        time.sleep(12)  # twice the time after which an idle node ends
        assert sum(node.gpus for node in cluster_capacity().nodes) >= 2, "no node is needed for the request, and none is kept"
    assert "needs 2 x (1 CPU and a GPU (L4)); the cluster has 0 CPUs and 0 GPUs on 0 node(s): asked its autoscaler" in log.getvalue()
    assert "the nodes are there after" in log.getvalue()
    assert within(40, only_the_head_is_left)


@pytest.mark.parametrize("end", [KeyboardInterrupt, None])
def test_a_request_ends_with_ctrl_c_and_with_the_time(end: type[BaseException] | None, capacity: Capacity) -> None:
    launch = LaunchSettings(num_workers=4, wait_for_nodes_s=0 if end is None else 60)
    with suppress(InputError, KeyboardInterrupt), nodes_held(launch, capacity, Console(io.StringIO())):
        assert end is not None
        raise end
    assert within(40, only_the_head_is_left)
    time.sleep(5)
    assert only_the_head_is_left()


def test_a_launch_trains_on_nodes_that_were_added(autoscaling: str, tiny_config: Path, tmp_path: Path) -> None:
    arguments = ["--phase=1", f"--config={tiny_config}/phase1.yaml", "launch.num_workers=4", "launch.use_gpu=false", "--json"]
    done = run_command(tmp_path, "raytrain2p.train", *arguments, RAY_ADDRESS=autoscaling)
    assert done.code == 0, done.err[-4000:]
    assert "needs 4 x 1 CPUs; the cluster has 2 on 1 node(s): asked its autoscaler for them" in done.err
    assert done.outcome["steps"] == 6
