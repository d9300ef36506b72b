"""Both phases with the packaged pretrained models on the embedded set, as jobs submitted to a Ray head started by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain2p.data.emoji import EMOJI_FILE
from raytrain2p.data.images import ImageRef
from tests.launch.launching import points, run_command

ROOT = Path(__file__).parents[2]
FEW = "evaluation.max_records=16 evaluation.samples=4 --json"


def submit(command: str) -> dict[str, Any]:
    """Submit a job and return the outcome that it prints."""
    environment = os.environ | {
        "RAY_ADDRESS": "http://127.0.0.1:8299",
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    job = f"ray job submit --working-dir . -- {command} {FEW}"
    done = subprocess.run(job.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    assert "succeeded" in said
    return json.loads(next(line for line in said.splitlines() if line.startswith('{"run_id"')))


@pytest.mark.real
def test_both_phases_run_as_submitted_jobs_the_losses_fall_and_the_result_answers(ray_head: str, tmp_path: Path) -> None:
    first = submit("python -m raytrain2p.train --phase 1 training.max_epochs=4")
    losses = points(first, "train_loss")
    assert losses[-1] < losses[0] / 2
    assert first["metrics"]["test_drawing/recall_at_1"] > 0.1

    second = submit("python -m raytrain2p.train --phase 2 training.max_steps=20")
    losses = points(second, "train_loss")
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) / 1.5
    assert len((Path(second["directory"]) / "answers.jsonl").read_text().splitlines()) == 8

    picture = tmp_path / "picture.png"
    picture.write_bytes(ImageRef(str(EMOJI_FILE), 0).read())
    said = run_command(tmp_path, "raytrain2p.predict", "--run", second["directory"], "--image", str(picture), "What does it show?")
    assert said.code == 0, said.err
    assert said.out.strip()
