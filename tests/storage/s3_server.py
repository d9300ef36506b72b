"""A real S3 server in a process of its own, on loopback: moto's, with conditional writes one at a time, as S3 has them.

    python -m tests.storage.s3_server PORT [ADDRESS]

`POST /_fault?status=503&seconds=5` makes it answer that, `?refuse=5` makes it refuse connections, `?slow=2` delays each upload.
"""

import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

BUCKET = "runs"


@dataclass(frozen=True)
class S3Server:
    """A running server, and the environment with which commands use it."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        secret = {"AWS_ACCESS_KEY_ID": "test-key-id", "AWS_SECRET_ACCESS_KEY": "s3cret-of-the-test-0123456789"}
        return secret | {"AWS_ENDPOINT_URL": self.url, "AWS_REGION": "us-east-1"}

    def make_bucket(self, name: str = BUCKET) -> None:
        self._send(f"/{name}", "PUT")

    def fault(self, **what: float) -> None:
        self._send("/_fault?" + "&".join(f"{name}={value}" for name, value in what.items()), "POST")

    def requests(self) -> dict[str, int]:
        """How many of each method there were."""
        return {name: int(count) for name, count in (line.split() for line in self._send("/_requests", "POST").split("\n") if line)}

    def _send(self, path: str, method: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, method=method), timeout=10) as answer:
            return str(answer.read().decode())


@contextmanager
def s3_server(folder: Path, port: int = 0) -> Iterator[S3Server]:
    """Within, a server runs that has one bucket; it is stopped by its process ID."""
    log = folder / "s3.log"
    command = [sys.executable, "-m", "tests.storage.s3_server", str(port)]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 30
        while "listens at " not in (said := log.read_text()):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, "the S3 server did not start"
            time.sleep(0.05)
        server = S3Server(said.partition("listens at ")[2].split()[0])
        server.make_bucket()
        yield server
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    pytest.importorskip("moto")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The server that the tests share; this process uses it, and has a scratch directory of its own."""
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAYTRAIN2P_SCRATCH", str(tmp_path / "scratch"))
    return s3_process


class Faulty:
    """moto's application, with faults; one request to it at a time."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.app = DomainDispatcherApplication(create_backend_app)
        self.lock, self.status, self.until, self.slow, self.refused = threading.Lock(), 0, 0.0, 0.0, 0.0
        self.counts: dict[str, int] = {}
        self.stop: Callable[[], None] = lambda: None

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/_requests":
            start("200 OK", [])
            return ["".join(f"{name} {count}\n" for name, count in self.counts.items()).encode()]
        if path == "/_fault":
            asked = {name: float(values[0]) for name, values in parse_qs(environ["QUERY_STRING"]).items()}
            self.status, self.until = int(asked.get("status", 0)), time.monotonic() + asked.get("seconds", 0.0)
            self.slow, self.refused = asked.get("slow", 0.0), asked.get("refuse", 0.0)
            if self.refused:
                threading.Timer(0.1, self.stop).start()
            start("200 OK", [])
            return [b""]
        self.counts[method] = self.counts.get(method, 0) + 1
        if self.status and time.monotonic() < self.until:
            start(f"{self.status} Fault", [])
            return [b"<Error><Code>Fault</Code></Error>"]
        if method == "PUT" and self.slow:
            time.sleep(self.slow)
        with self.lock:
            return [b"".join(self.app(environ, start))]


def main() -> None:
    from werkzeug.serving import make_server

    app, port, address = Faulty(), int(sys.argv[1]), (sys.argv[2:] or ["127.0.0.1"])[0]
    while True:
        server = make_server(address, port, app, threaded=True)
        port, app.stop = server.port, server.shutdown
        print(f"listens at http://{address}:{port}", flush=True)
        server.serve_forever()
        server.server_close()
        time.sleep(app.refused)
        app.refused = 0.0


if __name__ == "__main__":
    main()
