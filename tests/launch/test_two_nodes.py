"""cluster/node.sh joins a second Ray node to the head, and a run spreads over both."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.killing import only_long
from tests.launch.launching import Run, stop

SCRIPT = Path(__file__).parents[2] / "cluster" / "node.sh"


@pytest.fixture
def second_node(ray_head: str, tmp_path: Path) -> Iterator[None]:
    """A node with one CPU; stopped by its process ID."""
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (tmp_path / "node.log").open("w") as log:
        node = subprocess.Popen(
            ["bash", str(SCRIPT), ray_head, "--num-cpus=1", "--object-store-memory=100000000"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (tmp_path / "node.log").read_text():
            assert node.poll() is None, (tmp_path / "node.log").read_text()
            assert time.monotonic() < deadline, "the node did not start"
            time.sleep(0.5)
        yield
    finally:
        stop(node)


@only_long
def test_three_workers_train_on_two_nodes(run: Run, tiny_config: Path, second_node: None) -> None:
    done = run(
        "raytrain2p.train",
        *("--phase", "1", "--config", str(tiny_config / "phase1.yaml"), "--json"),
        *("launch.num_workers=3", "training.batch_size=4"),
    )
    assert done.losses[-1] < done.losses[0]
    assert "starting 3 workers" in done.err
