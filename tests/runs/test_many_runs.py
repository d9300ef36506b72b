"""The store of many runs, on which the verbs are measured, is one that real runs could have left."""

import shutil
from pathlib import Path

import pytest

from benchmarks import many_runs
from raytrain2p.config.phases import PHASES_BY_NAME, SWEEPS
from raytrain2p.models.artifacts import load_artifact
from raytrain2p.runs import __main__ as runs
from raytrain2p.tracking.checkpoints import damage
from raytrain2p.tracking.find import find_runs
from raytrain2p.tracking.run import SWEEP_TAG


def test_all_of_its_runs_are_whole_and_complete_in_mlflow(tmp_path: Path, made_store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(made_store / "mlflow.db", tmp_path)
    many_runs.main([str(tmp_path), "--runs", "12"])
    root = f"{tmp_path}/checkpoints"
    found = find_runs(root, [])
    ends = [run.files.read_status()["status"] for run in found]
    assert (len(found), ends.count("RUNNING"), ends[-1]) == (12, 1, "RUNNING")
    (sweep,) = (run for run in found if run.phase == SWEEPS)
    assert [run.files.tags().get(SWEEP_TAG) for run in found].count(sweep.run_id) == 4
    for run in found:
        assert all(damage(path) is None for path in run.checkpoints.glob("*.ckpt"))
        if run.phase != SWEEPS and run.files.read_status()["status"] == "FINISHED":
            phase = PHASES_BY_NAME[run.phase]
            load_artifact(run.files.artifact(phase), phase)
    capsys.readouterr()
    assert runs.main(["sync", f"output.root={root}"]) == 1
    orphan = f"phase2 {found[-1].run_id[:8]}"
    assert capsys.readouterr().out.splitlines() == [f"{orphan}  sent, RUNNING", "11 of 12 runs are complete in MLflow"]
    assert runs.main(["reconcile", f"output.root={root}"]) == 0
    assert "12 of 12 runs are complete in MLflow" in capsys.readouterr().out
