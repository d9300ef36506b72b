"""`runs show`: everything that is known of a run."""

from pathlib import Path

import pytest

from raytrain2p.config import Settings
from raytrain2p.config.loading import packaged_tree
from raytrain2p.runs import __main__ as runs
from raytrain2p.tracking.run_directory import ResumeRow
from tests.runs.made import printed, sent, trained
from tests.tracking.stores import settings_in

DEFAULT = packaged_tree(2, {})["training"]["max_steps"]


def test_everything_about_a_run_is_shown(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aligner = trained(settings_in(tmp_path, phase=1), "aligner", [1.0], phase="alignment")
    own = settings_in(tmp_path, "training.max_steps=7", f"model.aligner={aligner.path}/aligner.pt")
    run = trained(own, "own", [3.0, 1.0, 2.0], "FAILED", facts={"train_digest": "abcdef12" * 8})
    run.files.write_status("FAILED", "the loss is not finite")
    run.files.write_changes([ResumeRow(at=1.7e9, command="again", changes={"seed": [0, 1]}, inputs={})])
    run.add_tags({"keep": "true"})
    (one,) = printed(tmp_path / "checkpoints", capsys, "show", "own")
    assert (one["run_id"], one["status"], one["reason"]) == (run.run_id, "FAILED", "the loss is not finite")
    assert one["metrics"]["val/loss"] == {
        "last": 2.0,
        "step": 3,
        "lowest": 1.0,
        "lowest_step": 2,
        "highest": 3.0,
        "highest_step": 1,
        "points": 3,
    }
    assert one["changed_settings"] == {"training.max_steps": [7, DEFAULT]}
    assert one["settings"]["training.max_steps"] == 7
    assert (one["lineage"]["aligner_run"], one["lineage"]["sweep"]) == (aligner.run_id, None)
    assert one["inputs"] == {"data.train=emoji:train": {"records": "abcdef12" * 8}}
    assert {"path": "run.json", "bytes": run.files.record.stat().st_size} in one["files"]
    assert (one["mlflow"]["complete"], one["mlflow"]["page"]) == (False, None)
    sent(run)
    assert printed(tmp_path / "checkpoints", capsys, "show", run.directory)[0]["mlflow"]["complete"] is True
    run.files.write_status("KILLED")
    assert printed(tmp_path / "checkpoints", capsys, "show", run.directory)[0]["mlflow"]["complete"] is False
    warm = trained(settings_in(tmp_path, f"model.init={run.path}/model.pt"), "warm", [1.0])
    (child,) = printed(tmp_path / "checkpoints", capsys, "show", "warm")
    assert child["lineage"] == {
        "sweep": None,
        "init_run": run.run_id,
        "init": f"{run.path}/model.pt",
        "aligner_run": None,
        "aligner": None,
        "runs_of_it": [],
    }
    assert child["changed_settings"] == {}, "it is shown as where the run came from"
    assert printed(tmp_path / "checkpoints", capsys, "show", "own")[0]["lineage"]["runs_of_it"] == [warm.run_id]
    (parent,) = printed(tmp_path / "checkpoints", capsys, "show", "aligner")
    assert parent["lineage"]["runs_of_it"] == [run.run_id]
    run.files.write_status("FAILED", "the loss is not finite")
    assert runs.main(["show", f"output.root={tmp_path}/checkpoints", "own"]) == 0
    text = capsys.readouterr().out
    for line in (
        "status     FAILED: the loss is not finite",
        f"sent       not complete; send the rest: python -m raytrain2p.runs sync {run.run_id[:8]}",
        f"  training.max_steps  7 (default {DEFAULT})",
        "  seed     1, before 0",
        "  abcdef12abcd  data.train=emoji:train (records)",
        "  keep  true",
        f"  aligner run  {aligner.run_id}",
    ):
        assert f"\n{line}\n" in text, line


def test_a_run_whose_directory_is_not_here_is_shown_from_mlflow(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = sent(trained(settings_in(tmp_path, "training.max_steps=7"), "own", [3.0, 2.0]))
    (one,) = printed(tmp_path / "nothing", capsys, "show", f"tracking.uri={settings.tracking.uri}", run.run_id[:8])
    assert (one["status"], one["command"], one["files"]) == ("FINISHED", "command", [])
    assert one["changed_settings"] == {"training.max_steps": [7, DEFAULT]}
    assert one["metrics"]["val/loss"] == {"last": 2.0}


def test_show_needs_a_run_and_a_damaged_one_is_a_line(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad, good = trained(settings, "bad", [1.0]), trained(settings, "good", [1.0])
    assert runs.main(["show", f"output.root={tmp_path}/checkpoints"]) == 2
    assert "needs a run" in capsys.readouterr().err
    bad.files.changes.write_text("{\n")
    (one,) = printed(tmp_path / "checkpoints", capsys, "show", bad.run_id, good.run_id, code=1)
    assert one["run_id"] == good.run_id
