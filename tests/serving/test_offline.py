"""Many records are answered on the workers of a real cluster, and a kill loses little."""

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from raytrain2p import predict
from raytrain2p.config import InputError
from raytrain2p.inference.predictor import Predictor
from raytrain2p.inference.questions import as_records
from raytrain2p.launch.capacity import Capacity, Node
from raytrain2p.serving.offline import Answerer, check_workers
from tests.data.files import write_lines
from tests.launch.launching import start_command


def test_each_worker_has_a_gpu_where_there_are_any_and_too_many_are_refused() -> None:
    assert check_workers(3, Capacity((Node(2, 0), Node(1, 0)))) == 0
    assert check_workers(2, Capacity((Node(8, 1), Node(8, 1)))) == 1
    with pytest.raises(InputError, match=r"(?s)--workers=4.*needs as many CPUs; the cluster has 3"):
        check_workers(4, Capacity((Node(2, 0), Node(1, 0))))
    with pytest.raises(InputError, match=r"(?s)--workers=3.*needs as many GPUs; the cluster has 2"):
        check_workers(3, Capacity((Node(8, 1), Node(8, 1))))


def test_a_worker_answers_a_batch_and_says_what_it_cannot_load(tiny_model: Path, drawings: Path, tmp_path: Path) -> None:
    records = as_records([drawings / "0.png", drawings / "1.png"], "Who?")
    rows = {"start": np.array([8]), "records": np.array([None])}
    rows["records"][0] = records
    found = Answerer(tiny_model, "cpu", 6)(rows)
    assert found["start"].tolist() == [8]
    assert [json.loads(answers) for answers in found["answers"]] == [Predictor(tiny_model)(records, max_new_tokens=6)]
    assert found["problem"] == [""]
    (tmp_path / "model.pt").write_bytes(b"torn")
    found = Answerer(tmp_path / "model.pt", "cpu", 6)(rows)
    assert "is not a valid model.pt" in found["problem"][0]
    assert found["answers"] == ["[]"]


def test_a_killed_command_continues_and_the_answers_are_those_of_one_process(
    tiny_model: Path, drawings: Path, tmp_path: Path, ray_head: str
) -> None:
    questions = [f"What is number {number}?" for number in range(20)]
    rows = [{"instruction": question, "image": f"{drawings}/{number}.png"} for question in questions for number in range(6)]
    records = write_lines(tmp_path / "records.jsonl", *rows)
    words = ["--root", str(tiny_model.parents[2]), "--file", str(records), "--batch-size", "4", "--max-new-tokens", "40"]
    path, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"

    command = ["raytrain2p.predict", *words, "--workers", "2", "--output", str(path)]
    process = start_command(tmp_path, tmp_path / "log", *command, RAY_ADDRESS=ray_head)
    wait_for_lines(path, 8, process, tmp_path / "log")
    process.kill()
    process.wait()
    kept = path.read_bytes().splitlines()
    assert 8 <= len(kept) < len(rows), "it was killed half way"

    assert predict.main([*words, "--output", str(path)]) == 0
    assert predict.main([*words, "--output", str(alone)]) == 0
    assert path.read_bytes() == alone.read_bytes(), "none lost, none twice, and each as in one process"
    assert len(path.read_bytes().splitlines()) == len(rows)
    whole = {json.loads(line)["key"] for line in kept if line.endswith(b"}")}
    assert whole <= {json.loads(line)["key"] for line in path.read_bytes().splitlines()}


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.is_file() or len(path.read_bytes().splitlines()) < count:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
