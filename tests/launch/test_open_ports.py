"""The head of cluster/head.sh listens on loopback alone, and takes nothing without its token. For a local launch see
tests/test_third_modality.py, for several nodes tests/cluster/test_two_nodes.py.
"""

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import grpc
import pytest

from raytrain2p.config import InputError
from raytrain2p.launch.cluster import check_token
from raytrain2p.launch.ray_token import ensure_token
from tests.chaos.killing import only_long
from tests.launch.launching import DASHBOARD_PORT, PORT, ROOT, ray_job
from tests.launch.sockets import answers, listeners

CONNECT = """
from raytrain2p.config.cli import exit_code
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.config import InputError
from raytrain2p.launch.cluster import connected

def connect():
    with connected(LaunchSettings(), False):
        return 0

raise SystemExit(exit_code(connect))
"""


def connect(address: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Connect to a cluster as a launch does."""
    variables = os.environ | {"RAY_ADDRESS": address, "HOME": str(home)} | environment
    return subprocess.run([sys.executable, "-c", CONNECT], env=variables, capture_output=True, text=True, timeout=120, check=False)


def test_the_head_listens_on_loopback_alone_and_refuses_strangers(ray_head_pid: int) -> None:
    found = listeners(ray_head_pid)
    assert {PORT, DASHBOARD_PORT} <= {one.port for one in found}
    assert [one for one in found if not one.on_loopback] == []
    assert answers(PORT) == {"refused"}
    assert "refused" in answers(DASHBOARD_PORT)
    assert answers(DASHBOARD_PORT) & {"GET /api/jobs/", "GET /nodes"} == set()


def test_a_launch_without_the_token_is_refused_with_what_to_do(ray_head: str, tmp_path: Path) -> None:
    assert connect(ray_head, tmp_path).returncode == 0
    refused = connect(ray_head, tmp_path, RAY_AUTH_TOKEN="")
    assert refused.returncode == 2, refused.stderr
    assert "no authentication token was found" in refused.stderr
    assert "give the token of that cluster" in refused.stderr


def test_a_job_needs_the_token_and_then_uses_the_cluster(ray_head_pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    done = ray_job("submit -- ray status")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2.0 CPU" in done.stdout + done.stderr
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another" * 8)
    refused = ray_job("submit -- ray status")
    assert refused.returncode != 0
    assert "Invalid authentication token" in refused.stdout + refused.stderr or "403" in refused.stdout + refused.stderr


@pytest.mark.parametrize("demands", [True, False], ids=["with a token", "open"])
def test_an_open_cluster_is_refused_before_connecting(demands: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real gRPC server in the place of a head."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if demands and "authorization" not in dict(context.invocation_metadata()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return b""

    class AnyService(grpc.GenericRpcHandler):
        def service(self, call: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(1), [AnyService()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with nullcontext() if demands else pytest.raises(InputError, match="demands no token"):
            check_token(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


@only_long
@pytest.mark.parametrize("environment", [{"RAY_AUTH_TOKEN": "another" * 8}, {"RAY_AUTH_MODE": "disabled"}], ids=["wrong", "none"])
def test_a_launch_with_another_token_is_refused(ray_head: str, tmp_path: Path, environment: dict[str, str]) -> None:
    refused = connect(ray_head, tmp_path, **environment)
    assert refused.returncode == 2, refused.stderr
    assert "cannot be used" in refused.stderr
    assert "another" not in refused.stderr


def test_a_token_is_made_once_and_its_owner_alone_can_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    ensure_token()
    path = tmp_path / ".ray" / "auth_token"
    token = path.read_text()
    assert len(token) == 64
    path.chmod(0o644)  # as `ray get-auth-token --generate` leaves it
    ensure_token()
    assert path.read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["auth_token"]


def test_a_token_that_cannot_be_made_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".ray").write_text("not a directory")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    with pytest.raises(InputError, match="set RAY_AUTH_TOKEN"):
        check_token(None)


def test_a_token_of_the_environment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ensure_token()
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_ours_switches_authentication_off() -> None:
    ours = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kinds = (".py", ".sh", ".md", ".yaml", ".toml", "Makefile")
    texts = {name: (ROOT / name).read_text() for name in ours if name.endswith(kinds) and not name.startswith("tests/launch/test_open")}
    assert len(texts) > 100
    assert [name for name, text in texts.items() if "disabled" in text and "RAY_AUTH_MODE" in text] == []
