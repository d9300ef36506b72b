"""What nodes share, with two more real nodes that see other file systems: each has a mount namespace of its own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

import raytrain2p
from tests.launch.launching import DASHBOARD_PORT, PORT, Command, command_environment, head, ray_node, run_command

pytestmark = pytest.mark.skipif(os.environ.get("RAYTRAIN2P_CLUSTER_TESTS") != "1", reason="minutes of real nodes: make test-cluster")
HEAD = f"127.0.0.2:{PORT + 200}"
SECOND, THIRD, FOURTH = "127.0.0.3", "127.0.0.4", "127.0.0.5"
Launch = Callable[..., Command]
ASK = """
import os, signal, sys
import ray
from pathlib import Path
from raytrain2p.launch.nodes import Needed, node_problems, other_nodes
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
nodes = other_nodes()
for pid in map(int, sys.argv[3:]):
    os.kill(pid, signal.SIGSTOP)
for problem in node_problems(nodes, Needed({"output.root": (Path(sys.argv[2]), "fix it")}), 10.0):
    print(problem)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shapes: Path, tiny_vit: Path) -> dict[str, Path]:
    """`shared` is seen by all nodes, `private` is another directory on each; the third lacks `absent` and cannot write in `locked`."""
    base = tmp_path_factory.mktemp("files")
    made = {name: base / name for name in ("shared", "private", "locked", "absent")}
    for folder in made.values():
        folder.mkdir()
    shutil.copytree(shapes, made["absent"] / "shapes")
    shutil.copytree(tiny_vit, made["absent"] / "vit")
    return made


@pytest.fixture(scope="module")
def nodes(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    """A head and two nodes with a CPU each; yields the process IDs of the latter by address."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs `unshare --mount`, and so root, to give a node file systems of its own")
    private, locked, absent = (folders[name] for name in ("private", "locked", "absent"))
    second = f"mount -t tmpfs tmpfs {private}"
    third = f"{second}; mount -t tmpfs tmpfs {absent}; mount --bind {locked} {locked}; mount -o remount,bind,ro {locked}"
    command = head(PORT + 200, DASHBOARD_PORT + 200, 27_000, "--node-ip-address=127.0.0.2", "--num-cpus=1")
    with ExitStack() as stack:
        stack.enter_context(ray_node(tmp_path_factory.mktemp("head"), command))
        yield {
            address: stack.enter_context(node(address, mounts, tmp_path_factory.mktemp("node")))
            for address, mounts in ((SECOND, second), (THIRD, third))
        }


@contextmanager
def node(address: str, mounts: str, folder: Path, **variables: str) -> Iterator[int]:
    """A node with an address and mounts of its own."""
    start = f"ray start --block --address={HEAD} --node-ip-address={address} --num-cpus=1 --object-store-memory=100000000"
    start += " --dashboard-agent-listen-port=0 --disable-usage-stats"
    command = ["unshare", "--mount", "sh", "-ec", f"{mounts}; exec {start}"]
    variables |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    with ray_node(folder, command, **variables) as pid:
        yield pid


@pytest.fixture
def launch(nodes: dict[str, int], folders: dict[str, Path], tiny_config: Path, tmp_path: Path) -> Launch:
    """A launch of phase 1 with two workers, whose outputs are in `shared` unless set otherwise."""

    def launched(*overrides: str) -> Command:
        shared = folders["shared"]
        places = [
            f"output.root={shared}/checkpoints",
            f"data.feature_store={shared}/features",
            f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        ]
        arguments = ["raytrain2p.train", "--phase", "1", "--config", str(tiny_config / "phase1.yaml"), "--json"]
        return run_command(tmp_path, *arguments, *places, "launch.num_workers=2", *overrides, RAY_ADDRESS=HEAD)

    return launched


def ask(folder: Path, *stopped: int) -> str:
    """What `node_problems` finds, in a process of its own, while processes are stopped."""
    command = [sys.executable, "-c", ASK, HEAD, str(folder), *map(str, stopped)]
    environment = command_environment(folder) | {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def probes(folder: Path) -> list[Path]:
    return list(folder.rglob(".probe-*"))


def test_what_is_not_the_same_on_every_node_is_named_all_at_once_before_encoding(
    launch: Launch, nodes: dict[str, int], folders: dict[str, Path]
) -> None:
    absent, private, locked = folders["absent"], folders["private"], folders["locked"]
    places = [f"output.root={private}", f"data.feature_store={locked}/features"]
    records = [f"data.train={absent}/shapes/phase1.jsonl", "data.val=null", "data.test={}"]
    done = launch(*places, *records, f"model.encoders.image={absent}/vit")
    assert done.code == 2, done.err
    assert "4 problems; nothing was started" in done.err
    both = [f"{os.uname().nodename} ({address})" for address in (SECOND, THIRD)]
    assert (
        f"output.root={private}\n    is not the directory that the driver sees, on {both[0]}, {both[1]}\n    fix: mount the same"
        in done.err
    )
    assert f"data.feature_store={locked}/features\n    cannot be written to: Read-only file system, on {both[1]}\n    fix: " in done.err
    assert f"model.encoders.image.name={absent}/vit\n    is not there, on {both[1]}\n" in done.err
    assert f"media of the records\n    is not there, on {both[1]}\n" in done.err
    assert list(locked.iterdir()) == [], "the feature store was made for the probe alone"
    for root in (Path("/"), *(Path(f"/proc/{pid}/root") for pid in nodes.values())):
        assert [path for folder in (private, locked) for path in probes(root / folder.relative_to("/"))] == []


def test_nodes_that_share_all_train_and_nothing_is_left_behind(launch: Launch, folders: dict[str, Path]) -> None:
    done = launch()
    assert done.losses[-1] < done.losses[0]
    assert "starting 2 workers" in done.err
    assert probes(folders["shared"]) == []


def test_a_sweep_is_refused_before_its_first_trial(
    nodes: dict[str, int], folders: dict[str, Path], sweep_config: Path, tmp_path: Path
) -> None:
    private, shared = folders["private"], folders["shared"]
    places = [f"output.root={private}", f"data.feature_store={shared}/features", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]
    done = run_command(tmp_path, "raytrain2p.tune", "--config", str(sweep_config), *places, RAY_ADDRESS=HEAD)
    assert done.code == 2, done.err
    assert "1 problem; nothing was started" in done.err
    assert f"output.root={private}\n    is not the directory that the driver sees" in done.err


def test_other_versions_of_packages_are_named(nodes: dict[str, int], folders: dict[str, Path], tmp_path: Path) -> None:
    """The fourth node has not even the module that looks at it."""
    (tmp_path / "raytrain2p").mkdir()
    (tmp_path / "raytrain2p" / "__init__.py").write_text("__version__ = '0.0.9'")
    (tmp_path / "torch-2.12.0.dist-info").mkdir()
    (tmp_path / "torch-2.12.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    with node(FOURTH, f"mount -t tmpfs tmpfs {Path(raytrain2p.__file__).parent}", tmp_path, PYTHONPATH=str(tmp_path)):
        found = ask(folders["shared"])
    assert f"raytrain2p {raytrain2p.__version__}\n    is 0.0.9, on {os.uname().nodename} ({FOURTH})\n    fix: install the same" in found
    assert f"\n    is 2.12.0, on {os.uname().nodename} ({FOURTH})\n" in found


def test_a_node_that_does_not_answer_is_named(nodes: dict[str, int], folders: dict[str, Path]) -> None:
    """The last test: the node is not used again."""
    processes = [process.pid for process in psutil.Process(nodes[THIRD]).children(recursive=True)]
    found = ask(folders["shared"], *processes)
    assert f"on {os.uname().nodename} ({THIRD})\n    fix: see `ray status`" in found
    assert SECOND not in found
    assert probes(folders["shared"]) == []
