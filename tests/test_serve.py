"""The command `serve`: what is refused before anything starts."""

import socket
import sys
from pathlib import Path

import pytest

from raytrain2p import serve
from raytrain2p.config import InputError

TOKEN = "0123456789abcdef"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints when it ends with exit code 2."""
    assert serve.main([*arguments, "--port", "0"] if "--port" not in arguments else list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.com", ""])
def test_where_others_reach_it_a_token_is_required(host: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.TOKEN_VARIABLE, raising=False)
    error = refused(capsys, "model.pt", "--host", host)
    assert "others can reach it, and there is no token" in error
    assert "set RAYTRAIN2P_SERVE_TOKEN or --token-file" in error


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_on_this_machine_alone_it_is_not(host: str) -> None:
    serve.check_host(host, None)
    serve.check_host("0.0.0.0", TOKEN)


def test_the_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(serve.TOKEN_VARIABLE, TOKEN)
    assert serve.read_token(serve.parse([])) == TOKEN
    (tmp_path / "token").write_text("of the file " * 2)
    options = serve.parse(["--token-file", str(tmp_path / "token")])
    with pytest.raises(InputError, match="holds no token of at least 16 characters without blanks"):
        serve.read_token(options)
    (tmp_path / "token").write_text(f"{TOKEN}-of-the-file\n")
    assert serve.read_token(options) == f"{TOKEN}-of-the-file"
    (tmp_path / "token").unlink()
    with pytest.raises(InputError, match="No such file"):
        serve.read_token(options)
    monkeypatch.setenv(serve.TOKEN_VARIABLE, "short")
    with pytest.raises(InputError, match="at least 16 characters"):
        serve.read_token(serve.parse([]))


def test_all_that_is_wrong_is_reported_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        error = refused(capsys, "nowhere", "--root", str(tmp_path), "--port", port, "--token-file", str(tmp_path / "none"))
    assert "3 problems" in error
    assert f"--host 127.0.0.1 --port {port}\n    cannot be listened on: Address already in use" in error
    assert "RUN=nowhere" in error


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", "70000"), ("127.0.0.1", "-1"), ("no.such.host.invalid", "0"), ("203.0.113.7", "0")]
)
def test_an_address_that_is_none_is_one_line(
    host: str, port: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(serve.TOKEN_VARIABLE, TOKEN)
    assert "cannot be listened on" in refused(capsys, "model.pt", "--host", host, "--port", port)


def test_a_damaged_model_is_found_before_ray_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pt").write_bytes(b"torn")
    assert "is not a valid model.pt" in refused(capsys, str(tmp_path / "model.pt"))


def test_a_missing_extra_is_one_line_with_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    error = refused(capsys, str(tmp_path))
    assert "needs fastapi, which is not installed" in error
    assert "pip install 'raytrain2p[serve]'" in error


def test_more_processes_than_cpus_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--replicas 9000\n    needs as many CPUs; this machine has" in refused(capsys, str(tmp_path), "--replicas", "9000")


@pytest.mark.parametrize("option", ["--replicas", "--batch-size", "--max-queue", "--max-tokens"])
def test_a_number_must_be_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        serve.main([option, "0"])
    assert ended.value.code == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err
