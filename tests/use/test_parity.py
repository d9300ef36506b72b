"""Every way in which a really trained model is used gives the same answers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(1800)
def test_all_ways_answer(quickstart_model: Path, tmp_path: Path) -> None:
    """In bf16 an answer may differ, where two tokens are nearly as likely; see docs/using_the_model.md."""
    root = quickstart_model.parents[2]
    command = [sys.executable, "-m", "raytrain2p.runs", "parity", quickstart_model.parent.name, "--limit", "20", "--json"]
    done = subprocess.run([*command, f"output.root={root}"], cwd=tmp_path, capture_output=True, text=True, timeout=1700, check=False)
    found = {one["way"]: one for one in json.loads(done.stdout)}
    ways = ("predict", "pyfunc", "mlflow", "transformers", "serve")
    assert [(found[way]["answers"], found[way]["problem"]) for way in ways] == [(20, "")] * 5
    assert [found[way]["differ"] for way in ("predict", "pyfunc", "mlflow")] == [0, 0, 0], "they run the same code, one by one"
    assert all(found[way]["differ"] <= 6 for way in ("transformers", "serve")), found
