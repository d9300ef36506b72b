"""`ray job submit` on a Ray head that was started by hand, with the packaged models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.real
def test_both_phases_run_as_submitted_jobs_and_find_each_other(ray_head: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "RAY_ADDRESS": "http://127.0.0.1:8299",
        "RAY_AUTH_MODE": "disabled",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for phase, override in ((1, "training.max_epochs=2"), (2, "training.max_steps=20")):
        job = f"ray job submit --working-dir . -- python -m raytrain2p.train --phase {phase} {override} evaluation.max_records=32"
        done = subprocess.run(job.split(), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-5000:]
        assert "succeeded" in said
        assert f"{'aligner' if phase == 1 else 'model'}.pt" in said
