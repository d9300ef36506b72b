"""Both phases with the packaged models on the embedded set, as jobs submitted to a Ray head."""

import os
from pathlib import Path

import numpy as np
import pytest

import raytrain2p
from raytrain2p.data.embedded import images
from tests.chaos.killing import only_long
from tests.launch.launching import points, run_command, submit

FEW = "evaluation.samples=4 launch.cpus_per_worker=1 --json"
SMALL = "data.train=emoji:val data.test.test_drawing=emoji:val data.test.test_concept=emoji:val"  # 117 images to encode

pytestmark = [pytest.mark.real, pytest.mark.timeout(1200)]


def test_phase_1_runs_as_a_submitted_job_and_its_loss_falls(ray_head: str) -> None:
    hf_home = os.environ.get("HF_HOME", str(Path.home() / ".cache/huggingface"))  # Ray refuses a variable that the job has and we send
    options = f'--submission-id=of-a-test --runtime-env-json={{"env_vars":{{"HF_HOME":"{hf_home}"}}}}'
    first = submit(f"python -m raytrain2p.train --phase 1 training.max_epochs=10 training.global_batch_size=39 {SMALL} {FEW}", options)
    assert (raytrain2p.find(first["directory"]).read_record() or {})["launch_id"].startswith("of-a-test-phase1-")
    losses = points(first, "train_loss")
    assert losses[-1] < losses[0] / 2
    assert first["metrics"]["test_drawing/image_to_text_recall_at_1"] > 0.1


@only_long
def test_phase_2_runs_as_a_submitted_job_after_phase_1_and_the_result_answers(ray_head: str, tmp_path: Path) -> None:
    second = submit(f"python -m raytrain2p.train --phase 2 training.max_steps=20 evaluation.max_records=16 {FEW}")
    losses = points(second, "train_loss")
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 1.5
    assert len((Path(second["directory"]) / "answers.jsonl").read_text().splitlines()) == 8

    image = tmp_path / "image.png"
    image.write_bytes(images("train")[0].ref.read())
    answer = run_command(tmp_path, "raytrain2p.predict", "--run", second["directory"], "--image", str(image), "What does it show?")
    assert answer.code == 0, answer.err
    assert answer.out.strip()
