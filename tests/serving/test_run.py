"""The command `serve` from start to end, once, with a real Ray Serve and a small model."""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from raytrain2p.inference.predictor import Predictor
from raytrain2p.inference.questions import as_records
from tests.launch.launching import start_command
from tests.launch.sockets import files_with, listeners, watched
from tests.serving.serving import Server, image_url, png, with_image

TOKEN = "a-token-of-the-tests-0123456789"
COLOURS = ("red", "green", "blue", "black", "white", "orange")


def test_a_server_answers_as_the_predictor_does_and_ends_without_a_trace(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "serve.log"
    with watched() as seen:
        command = ["raytrain2p.serve", str(tiny_model), "--port", "0", "--max-tokens", "12"]
        started = start_command(tmp_path, log, *command, RAY_ADDRESS="local", RAYTRAIN2P_SERVE_TOKEN=TOKEN)
        while (address := re.search(r"at http://127\.0\.0\.1:(\d+)", log.read_text())) is None:
            assert started.poll() is None, log.read_text()
            time.sleep(0.1)
        server = Server(int(address[1]), token=TOKEN)
        assert [server.get(path).status for path in ("/", "/healthz", "/readyz", "/v1/models")] == [200] * 4
        stranger = Server(server.port)
        assert [stranger.get(path).status for path in ("/v1/models", "/metrics")] == [401, 401]

        records = as_records([{"instruction": "Which?", "image": png(colour)} for colour in COLOURS])
        expected = list(Predictor(tiny_model, device="cpu").answers(records, 1, 12))
        questions = [with_image("Which?", image_url(png(colour)))[::-1] for colour in COLOURS]  # the image first, as above
        with ThreadPoolExecutor(len(COLOURS)) as pool:
            assert [reply.text for reply in pool.map(server.ask, questions)] == expected
        assert server.ask(questions[0], stream=True).text == expected[0]
        assert server.ask("x" * 3000).error["code"] == "context_length_exceeded"
        metrics = server.get("/metrics").content.decode()
        batches = {name: float(value) for name, value in re.findall(r"raytrain2p_batch_size_(sum|count) (\S+)", metrics)}
        assert batches["sum"] > batches["count"] == len(COLOURS) + 1, "some were answered together"

        processes = psutil.Process(started.pid).children(recursive=True)
        assert [one for one in listeners(started.pid) if not one.on_loopback] == []
        with ThreadPoolExecutor(20) as pool:
            last = [pool.submit(server.ask, question) for question in questions * 3]
            while not re.search(r"raytrain2p_queue [1-9]", server.get("/metrics").content.decode()):
                assert not all(one.done() for one in last), "too quick for this test"
            started.send_signal(signal.SIGTERM)
            statuses = {one.result().status for one in last}
        assert started.wait(60) == 0, log.read_text()
    assert statuses <= {200, 503}
    assert 200 in statuses
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    text = log.read_text()
    assert "stopping after the answers in flight" in text
    assert len(text.splitlines()) == 3, text
    assert files_with([TOKEN, os.environ["RAY_AUTH_TOKEN"]], *seen.ray_sessions) == []
