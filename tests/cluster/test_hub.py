"""Models of a hub on two Ray nodes, each with a cache of its own, as two hosts have."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.inference.hub import Hub, running
from tests.launch.launching import DASHBOARD_PORT, PORT, Command, head, ray_node, run_command, second_node

pytestmark = [
    pytest.mark.skipif(os.environ.get("RAYTRAIN2P_CLUSTER_TESTS") != "1", reason="in `make test-cluster`"),
    pytest.mark.timeout(900),
]
ADDRESS = f"127.0.0.2:{PORT + 200}"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_vit: Path, tiny_bert: Path) -> Iterator[Hub]:
    with running("the-token-of-a-hub-1") as hub:
        for name, folder in {"llama": tiny_llama, "vit": tiny_vit, "bert": tiny_bert}.items():
            hub.publish(f"someone/{name}", folder)
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, hub: Hub) -> Iterator[Path]:
    """Where the launches run; within, a head with one CPU and a node with two have caches in `head` and `node`, and logs in `sessions`."""
    folder = tmp_path_factory.mktemp("hub")
    node = second_node(ADDRESS, "--num-cpus=2", "--object-store-memory=100000000")
    with ExitStack() as stack:
        sessions = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray"))  # not pytest's: sockets have short paths
        (folder / "sessions").symlink_to(sessions)
        options = ["--node-ip-address=127.0.0.2", "--num-cpus=1", f"--temp-dir={sessions}"]
        first = head(PORT + 200, DASHBOARD_PORT + 200, 25_000, *options)
        for name, command in {"head": first, "node": node}.items():
            (folder / name).mkdir()
            variables = {"HF_HOME": str(folder / name), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
            stack.enter_context(ray_node(folder / name, command, **variables))
        yield folder


def launch(folder: Path, hub: Hub, config: Path, *more: str, **environment: str) -> Command:
    """Phase 1 with three workers. The driver has the head's cache; HF_HOME is not set, else each node would get it from here."""
    (folder / "home" / ".cache").mkdir(parents=True, exist_ok=True)
    if not (cache := folder / "home" / ".cache" / "huggingface").is_symlink():
        cache.symlink_to(folder / "head")
    arguments = ["--phase", "1", "--config", str(config / "phase1.yaml"), "--json", "data.features=online"]
    arguments += ["launch.num_workers=3", "training.global_batch_size=12", *more]
    variables = {"HOME": str(folder / "home"), "RAY_ADDRESS": ADDRESS, "HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token}
    variables |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    return run_command(folder, "raytrain2p.train", *arguments, **variables)


def test_each_node_fetches_each_file_once_and_all_workers_have_one_commit(folder: Path, hub: Hub, tiny_config: Path) -> None:
    done = launch(folder, hub, tiny_config, "model.encoders.image=someone/vit", "model.encoders.text=someone/bert")
    assert done.code == 0, done.err[-4000:]
    commit = hub.branches["someone/vit@main"]
    config = json.loads((Path(done.outcome["directory"]) / "config.json").read_text())
    assert config["model"]["encoders"]["image"]["name"] == f"someone/vit@{commit}"
    assert "on 1 other node" in done.err
    counts = Counter(hub.downloads())
    assert set(counts.values()) == {2}, "by the driver for the head's node, and by the other node; not by each of three workers"
    assert sum("/revision/" in request for request in hub.requests) == 2, "of each model, by the driver"
    assert (folder / "node" / "hub" / "models--someone--vit" / "snapshots" / commit / "config.json").is_file()
    assert hub.token not in done.out + done.err
    logs = [path for path in (folder / "sessions").resolve().rglob("*") if path.is_file() and "logs" in path.parts]
    assert logs
    assert not any(hub.token in path.read_text(errors="replace") for path in logs)


def test_a_node_that_does_not_reach_the_hub_is_named_before_anything_starts(
    folder: Path, hub: Hub, tiny_config: Path, tiny_vit: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "vit"
    shutil.copytree(tiny_vit, changed)
    (changed / "config.json").write_text((changed / "config.json").read_text() + "\n")
    commit = hub.publish("someone/vit", changed)
    here = launch(folder, hub, tiny_config, "model.encoders.image=someone/vit", "--dry-run")
    assert f"someone/vit@{commit}" in here.out, here.err[-4000:]
    done = launch(folder, hub, tiny_config, "model.encoders.image=someone/vit", HF_HUB_OFFLINE="1")
    assert done.code == 2, done.err[-4000:]
    assert f"model=someone/vit@{commit} on node" in done.err
    assert "(127.0.0.3)" in done.err
    assert "set HF_HOME to a directory on storage that all nodes share" in done.err
