"""The quickstart's model, registered: it loads in a clean virtual environment from what it declares, `mlflow models serve` serves it, and
both answer as `Predictor` does, on images that it has never seen."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import Settings
from raytrain2p.data.reading import read_records
from raytrain2p.inference.predictor import Predictor
from raytrain2p.runs import __main__ as runs
from raytrain2p.tracking.mlflow_store import client_of
from tests.runs.made import trained
from tests.runs.test_register import ASK

IMAGES, TOKENS = 100, 8  # of answers; ASK has the same
URI = "models:/assistant@champion"

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def registered(quickstart_model: Path, settings: Settings) -> Settings:
    """The store in which the quickstart's model is registered."""
    run = trained(settings, "quickstart", [1.0])
    shutil.copy(quickstart_model, run.path / "model.pt")
    words = [run.run_id, "--name", "assistant", "--alias", "champion", f"output.root={settings.output.root}"]
    assert runs.main(["register", *words]) == 0
    return settings


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Questions about held-out images, as a client sends them."""
    records = [record for record in read_records("emoji:test_concept", 2) if record.task == "group"][:IMAGES]
    return [{"instruction": one.question, "image": base64.b64encode(next(one.media()).read()).decode()} for one in records]


@pytest.fixture
def expected(quickstart_model: Path, rows: list[dict[str, str]]) -> list[str]:
    records = [record for record in read_records("emoji:test_concept", 2, answered=False) if record.task == "group"][:IMAGES]
    return list(Predictor(quickstart_model).answers(records, 32, TOKENS))


def test_it_loads_in_a_clean_virtual_environment(
    registered: Settings, rows: list[dict[str, str]], expected: list[str], tmp_path: Path
) -> None:
    version = client_of(registered.tracking.uri).get_model_version_by_alias("assistant", "champion")
    folder, clean = Path(version.source.removeprefix("file://")), tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", clean], check=True)
    subprocess.run([clean / "bin" / "pip", "install", "--quiet", "-r", folder / "requirements.txt"], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"MLFLOW_TRACKING_URI": registered.tracking.uri}
    command = [str(clean / "bin" / "python"), "-c", ASK, URI]
    done = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["code"] == str(folder / "code" / "raytrain2p" / "__init__.py")
    assert found["answers"] == expected


def test_mlflow_serves_it(registered: Settings, rows: list[dict[str, str]], expected: list[str], tmp_path: Path) -> None:
    with serving(registered, tmp_path) as address:
        assert asked(address, {"dataframe_records": rows, "params": {"max_new_tokens": TOKENS}}) == (200, {"predictions": expected})
        split = {"columns": ["instruction", "image"], "data": [[*row.values()] for row in rows[:3]]}
        for form in ({"dataframe_split": split}, {"inputs": rows[:3]}):
            assert asked(address, form | {"params": {"max_new_tokens": TOKENS}}) == (200, {"predictions": expected[:3]})
        status, answer = asked(address, {"inputs": [{"instruction": "What?", "image": "no.png"}]})
        assert (status, "no such image: no.png" in answer["message"]) == (400, True)


@contextmanager
def serving(settings: Settings, folder: Path) -> Iterator[str]:
    """`mlflow models serve`, until it answers; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", URI, "--env-manager", "local", "--port", str(port)]
    path = str(Path(sys.executable).parent)
    environment = os.environ | {"MLFLOW_TRACKING_URI": settings.tracking.uri, "PATH": f"{path}:{os.environ['PATH']}"}
    environment |= {"MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "600"}  # for a hundred images in a request
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                ended = process.poll() is not None or time.monotonic() > deadline
                assert not ended, (folder / "serve.log").read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def asked(address: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
