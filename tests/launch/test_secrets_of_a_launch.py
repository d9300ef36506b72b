"""A password in the tracking URI reaches MLflow, and nothing else: no file, log, tag, parameter, Ray record, title or message.
For credentials in the environment see tests/test_third_modality.py.
"""

import os
from pathlib import Path

import mlflow

from tests.chaos.killing import only_long
from tests.chaos.mlflow_server import Server
from tests.launch.launching import Command, run_command
from tests.launch.sockets import Seen, files_with, watched

pytestmark = only_long
SECRET = "hunt-er2.pass"


def launched(folder: Path, tiny_config: Path, *arguments: str, **environment: str) -> tuple[Command, Seen]:
    """A launch on a Ray cluster of its own."""
    command = ["raytrain2p.train", "--phase", "1", "--config", str(tiny_config / "phase1.yaml"), "launch.num_workers=2", "--json"]
    with watched() as seen:
        done = run_command(folder, *command, *arguments, RAY_ADDRESS="local", **environment)
    return done, seen


def check_hidden(done: Command, seen: Seen, *folders: Path) -> None:
    """Check output, titles, files of the run, Ray's session and MLflow's store."""
    assert SECRET not in done.out + done.err
    assert seen.ray_sessions
    assert files_with([SECRET, os.environ["RAY_AUTH_TOKEN"]], *folders, *seen.ray_sessions) == []
    assert [title for title in seen.titles.values() if SECRET in title] == []


def test_a_password_in_the_tracking_uri_is_nowhere(tmp_path: Path, tiny_config: Path, server: Server) -> None:
    uri = server.uri.replace("//", f"//me:{SECRET}@")
    done, seen = launched(tmp_path, tiny_config, f"tracking.uri={uri}")
    assert done.code == 0, done.err
    check_hidden(done, seen, tmp_path, server.folder)
    found = mlflow.MlflowClient(server.uri).get_run(done.outcome["run_id"])
    assert found.data.params["tracking.uri"] == server.uri.replace("//", "//me:***@")
    assert len(found.inputs.dataset_inputs) == 3, "a server has what its pages show, too"
    assert len(found.outputs.model_outputs) == 1
    assert "//me:***@" in found.data.tags["raytrain2p.command"]


def test_a_worker_whose_error_has_the_password_hides_it(tmp_path: Path, tiny_config: Path, server: Server) -> None:
    uri = server.uri.replace("//", f"//me:{SECRET}@")
    (tmp_path / "sitecustomize.py").write_text("""
import os, sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "raytrain2p.worker.train_loop":
            raise RuntimeError("cannot reach " + os.environ["WHERE"])

sys.meta_path.insert(0, Broken())
""")
    folder = tmp_path / "run"
    folder.mkdir()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    arguments = [f"tracking.uri={uri}", "launch.max_failures=0"]
    done, seen = launched(folder, tiny_config, *arguments, PYTHONPATH=path, WHERE=uri)
    assert done.code == 1, done.err
    assert "cannot reach http://me:***@" in done.err
    check_hidden(done, seen, folder, server.folder)
