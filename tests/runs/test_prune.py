"""`runs prune` and `runs tag`: what goes, what stays and why, in real directories and a real SQLite store; killed at any moment."""

import json
import os
import random
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from raytrain2p.config import InputError, Settings
from raytrain2p.config.phases import SWEEPS
from raytrain2p.launch.resume import check_resumable
from raytrain2p.phases.inputs import InputDigests
from raytrain2p.runs import __main__ as runs
from raytrain2p.runs import prune as prune_module
from raytrain2p.runs.prune_plan import decide
from raytrain2p.runs.removal import freed_by, leftovers
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.tracking.create_run import check_launch_is_free, get_or_create_run
from raytrain2p.tracking.find import find_run, find_runs
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile
from raytrain2p.tracking.mlflow_store import client_of, prepare_store
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import PRUNED_TAG, RUN_FOLDERS, SWEEP_TAG, Run, launch_lock, launch_record
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.tracking.stores import EXPERIMENT, away, create, lock_holder, mlflow_run, mlflow_runs, settings_in

DAY = 86400.0


def made(
    settings: Settings,
    launch_id: str,
    loss: float = 1.0,
    status: str = "FINISHED",
    phase: str = "phase2",
    days: float = 0.0,
    facts: dict[str, Any] | None = None,
    sent: bool = True,
) -> Run:
    """A run that ended some days ago, with checkpoints, an artifact and what Ray records of its launch."""
    run = create(settings, launch_id, phase)
    describe_run(run, resolved_config(settings, {}), "command", facts or {}, None if phase != SWEEPS else lambda run, command: "page\n")
    MetricsFile(run.files.metrics).append([MetricPoint("val/loss", loss, 1, 1.7e9), MetricPoint("train_loss", loss, 1, 1.7e9)])
    if phase != SWEEPS:
        run.checkpoints.mkdir(exist_ok=True)
        run.files.last_checkpoint.write_bytes(bytes(1000))
        os.link(run.files.last_checkpoint, run.checkpoints / f"best-epoch=00-train_loss={loss:.4f}.ckpt")
    (run.path / ("aligner.pt" if phase == "alignment" else "model.pt")).write_bytes(b"weights of " + launch_id.encode())
    (run.path / "plots").mkdir()
    (run.path / "plots" / "training_curve.png").write_bytes(b"png")
    ray = Path(settings.output.root, ".ray", launch_id, "checkpoint_1")
    ray.mkdir(parents=True)
    (ray / "run.json").write_text("{}")
    run.files.write_status(status)
    if days:
        past = time.time() - days * DAY
        stamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(past))
        write_json(run.files.status, read_json(run.files.status) | {"at": past})
        new = run.path.with_name(f"{run.run_id}_{stamp}")
        run.path.rename(new)
        for record in (new / "run.json", launch_record(settings.output.root, launch_id)):
            write_json(record, read_json(record) | {"timestamp": stamp, "directory": str(new)})
        run = find_run(settings.output.root, [phase], run.run_id, "RUN")
    if sent:
        MlflowSync(run, settings.tracking.uri).send()
    return run


def prune(settings: Settings, *words: str) -> int:
    return runs.main(["prune", f"output.root={settings.output.root}", *words])


@pytest.fixture
def why(settings: Settings, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str | None]]:
    """Why each run stays, by launch ID; None if it goes."""

    def ask(*words: str, code: int = 0) -> dict[str, str | None]:
        capsys.readouterr()
        assert prune(settings, "--json", *words) == code
        plan = json.loads(capsys.readouterr().out)
        names = {read_json(path)["run_id"]: path.stem for path in Path(settings.output.root, ".launches").glob("[!.]*.json")}
        return {names[one["run_id"]]: one["stays"] for one in plan["runs"]}

    return ask


def gone(settings: Settings, run: Run) -> bool:
    """Whether nothing is left of a run on disk."""
    root = Path(settings.output.root)
    left = [*root.glob(f"*/*{run.run_id}*"), root / ".ray" / run.launch_id, launch_record(str(root), run.launch_id)]
    return not any(os.path.lexists(path) for path in left)


# which runs go


def test_a_run_goes_if_it_meets_all_conditions_and_no_rule_keeps_it(settings: Settings, why: Callable[..., Any]) -> None:
    made(settings, "a", 3.0, "FAILED", days=40)
    made(settings, "b", 2.0, days=35)
    made(settings, "c", 1.0, days=32)
    made(settings, "d", 4.0, "KILLED", days=3)
    made(settings, "e", 5.0, phase="alignment", days=40)
    assert why("--older-than", "30d") == {"a": None, "b": None, "c": None, "d": "newer", "e": None}
    assert why("--older-than", "864h", "--phase", "2") == {"a": None, "b": "newer", "c": "newer", "d": "newer", "e": "phase"}
    assert why("--status", "FAILED", "--status", "killed") == {"a": None, "b": "status", "c": "status", "d": None, "e": "status"}
    assert why("--keep-last", "1") == {"a": None, "b": None, "c": None, "d": "last", "e": "last"}
    assert why("--keep-best", "1", "--by", "val/loss") == {"a": None, "b": None, "c": "best", "d": None, "e": "best"}
    assert why("--keep-best", "1", "--by", "val/loss", "--max", "--phase", "2") == {
        "a": None,
        "b": "best",
        "c": None,
        "d": None,
        "e": "phase",
    }
    assert why("--older-than", "30d", "--keep-last", "2", "--keep-best", "1", "--by", "train_loss") == {
        "a": None,
        "b": None,
        "c": "last",
        "d": "newer",
        "e": "last",
    }


def test_a_phase_without_the_metric_is_kept(settings: Settings, why: Callable[..., Any]) -> None:
    first, second = made(settings, "a"), made(settings, "b", phase="alignment")
    write_json(second.files.test_metrics, {"test/image_to_text_recall_at_1": 0.5})
    assert why("--keep-best", "1", "--by", "test/image_to_text_recall_at_1", "--without-mlflow") == {
        "a": "no test/image_to_text_recall_at_1",
        "b": "best",
    }
    assert first.path.is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing says which runs are to go"),
        (["--phase", "2"], "nothing says which runs are to go"),
        (["--keep-best", "2"], "need each other"),
        (["--keep-best", "2", "--by", "val/los"], "is not a metric of a finished run; there are train_loss, val/loss"),
        (["--max", "--status", "FAILED"], "--max"),
        (["--mlflow", "--without-mlflow", "--status", "FAILED"], "contradicts --without-mlflow"),
        (["nonsense"], "there is no such run"),
    ],
)
def test_bad_input_is_refused_and_deletes_nothing(
    settings: Settings, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    run = made(settings, "a")
    assert prune(settings, *words, "--yes") == 2
    assert message in capsys.readouterr().err
    assert run.path.is_dir()


# what never goes


def test_what_never_goes(settings: Settings, why: Callable[..., Any]) -> None:
    plain, tagged, registered, orphaned, elsewhere = (made(settings, name, days=9) for name in ("a", "b", "c", "d", "e"))
    there = made(settings, "f", days=9)
    tagged.add_tags({"keep": "true"})
    client = client_of(settings.tracking.uri)
    client.set_tag(there.run_id, "keep", "yes")
    client.create_registered_model("assistant")
    client.create_model_version("assistant", f"runs:/{registered.run_id}/model", registered.run_id)
    orphaned.files.write_status("RUNNING")
    write_json(elsewhere.files.status, read_json(elsewhere.files.status) | {"status": "RUNNING", "host": f"not-{socket.gethostname()}"})
    elsewhere.files.lock.path.touch()
    damaged, unsent = made(settings, "g", days=9), made(settings, "h", days=9, sent=False)
    damaged.files.status.write_text("{")
    link = made(settings, "i", days=9)
    outside = Path(settings.output.root).with_name("other disk")
    link.path.rename(outside)
    link.path.symlink_to(outside)
    busy = made(settings, "j", days=9)
    words = ("--older-than", "0d")
    expected = {"a": None, "b": "tag", "c": "registered", "d": "orphaned", "e": "running", "f": "tag", "g": "damaged", "h": "unsent"}
    with lock_holder(launch_lock(settings.output.root, "j").path):
        assert why(*words, code=1) == expected | {"i": "link", "j": "running"}
        assert prune(settings, *words, "--yes") == 1
    kept = (tagged, registered, orphaned, elsewhere, there, damaged, unsent, link, busy)
    assert [run.path.is_dir() for run in kept] == [True] * len(kept)
    assert gone(settings, plain)
    assert (outside / "model.pt").is_file()
    assert why(*words, "--mlflow", code=1)["h"] is None, "the run in MLflow goes, too"


@pytest.mark.parametrize("phase", ["alignment", "phase2"])
def test_no_artifact_goes_while_a_launch_begins_which_may_take_it(
    settings: Settings, why: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    first, second = made(settings, "a", phase=phase), made(settings, "b", phase=phase)
    with lock_holder(launch_lock(settings.output.root, "begins").path):
        assert why(first.run_id) == {"a": "parent of launch begins?", "b": "not named"}
    assert why(first.run_id) == {"a": None, "b": "not named"}
    whole = prune_module.Pruning.all

    def late(pruning: Any, *plan: Any) -> int:
        made(settings, "c")
        return whole(pruning, *plan)

    monkeypatch.setattr(prune_module.Pruning, "all", late)
    assert prune(settings, first.run_id, "--yes") == 0
    assert first.path.is_dir()
    assert second.path.is_dir()


def test_what_a_kept_run_needs_is_kept(settings: Settings, tmp_path: Path, why: Callable[..., Any]) -> None:
    used, copied, unused = (made(settings, name, phase="alignment", days=9) for name in ("used", "copied", "unused"))
    torch.save({"digest": "d1g35t"}, copied.path / "aligner.pt")
    MlflowSync(copied, settings.tracking.uri).send()
    child = settings_in(tmp_path, f"model.aligner={used.path}/aligner.pt")
    other = settings_in(tmp_path, "model.aligner=/somewhere/else.pt")
    made(child, "child")
    made(other, "other", facts={"inputs": {"model.aligner=/somewhere/else.pt": {"content": "d1g35t"}}})
    sweep = made(settings, "sweep", phase=SWEEPS, days=9)
    trials = [made(settings, f"sweep-{number}", days=9 * (number < 2)) for number in range(3)]
    for trial in trials:
        trial.add_tags({SWEEP_TAG: sweep.run_id})
        MlflowSync(trial, settings.tracking.uri).send()
    write_json(sweep.files.best_trial, {"run_id": trials[1].run_id, "objective": 1.0})
    MlflowSync(sweep, settings.tracking.uri).send()
    found = why("--older-than", "5d")
    children = {name: read_json(launch_record(settings.output.root, name))["run_id"][:8] for name in ("child", "other", "sweep-2")}
    assert found == {
        "used": f"parent of {children['child']}",
        "copied": f"parent of {children['other']}",
        "unused": None,
        "child": "newer",
        "other": "newer",
        "sweep": f"parent of {children['sweep-2']}",
        "sweep-0": None,
        "sweep-1": f"best of {sweep.run_id[:8]}",
        "sweep-2": "newer",
    }
    assert unused.path.is_dir()
    assert set(why("--older-than", "0d").values()) == {None}, "with all that needs them, they go"


def test_the_run_whose_weights_a_kept_run_began_with_is_kept(settings: Settings, tmp_path: Path, why: Callable[..., Any]) -> None:
    aligner = made(settings, "aligner", phase="alignment", days=9)
    used = made(settings_in(tmp_path, f"model.aligner={aligner.path}/aligner.pt"), "used", days=9)
    copied, again = made(settings, "copied", days=9), made(settings, "again", phase="alignment", days=9)
    write_json(copied.files.result, {"digest": "d1g35t"})
    MlflowSync(copied, settings.tracking.uri).send()
    made(settings, "unused", days=9)
    warm = made(settings_in(tmp_path, f"model.init={used.path}/model.pt"), "warm")
    far = made(settings_in(tmp_path, "model.init=/w.pt"), "far", facts={"inputs": {"model.init=/w.pt": {"content": "d1g35t"}}})
    first = made(settings_in(tmp_path, f"model.init={again.path}/aligner.pt", phase=1), "first", phase="alignment")
    assert why("--older-than", "5d") == {
        "aligner": f"parent of {used.run_id[:8]}",
        "used": f"parent of {warm.run_id[:8]}",
        "copied": f"parent of {far.run_id[:8]}",
        "again": f"parent of {first.run_id[:8]}",
        "unused": None,
        "warm": "newer",
        "far": "newer",
        "first": "newer",
    }


def test_what_a_damaged_run_may_need_is_kept(settings: Settings, tmp_path: Path, why: Callable[..., Any]) -> None:
    first, _ = (made(settings, name, phase="alignment", days=9) for name in ("a", "b"))
    child = made(settings_in(tmp_path, f"model.aligner={first.path}/aligner.pt"), "child")
    child.files.config.write_text("{")
    assert why("--older-than", "5d", code=1) == {"a": f"parent of {child.run_id[:8]}", "b": None, "child": "damaged"}
    doubt = f"parent of {child.run_id[:8]}?"
    assert why("--older-than", "5d", "--without-mlflow", code=1) == {"a": doubt, "b": doubt, "child": "damaged"}


@pytest.mark.parametrize(("phase", "name"), [("alignment", "model.aligner={}/aligner.pt"), ("phase2", "model.init={}/model.pt")])
def test_what_another_root_uses_is_kept(settings: Settings, tmp_path: Path, why: Callable[..., Any], phase: str, name: str) -> None:
    used = made(settings, "a", phase=phase, days=9)
    child = made(settings_in(tmp_path, name.format(used.path), f"output.root={tmp_path}/other"), "child")
    assert why("--older-than", "5d") == {"a": f"parent of {child.run_id[:8]}"}


@pytest.mark.parametrize("name", ["..", ".", ".launches"])
def test_a_launch_id_that_leads_elsewhere_is_damage(settings: Settings, why: Callable[..., Any], name: str) -> None:
    run = made(settings, "a")
    write_json(run.files.record, read_json(run.files.record) | {"launch_id": name})
    assert why("--older-than", "0d", "--without-mlflow", code=1) == {"a": "damaged"}


# MLflow


def test_without_mlflow_nothing_is_deleted_unless_that_is_wanted(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(settings, "a", status="FAILED")
    client_of(settings.tracking.uri).search_model_versions()  # opened only now, the registry would make the missing table anew
    with away(settings):
        assert prune(settings, "--status", "FAILED", "--yes") == 2
        captured = capsys.readouterr()
        assert "cannot be asked what is tagged `keep` or registered" in captured.err
        assert "--without-mlflow" in captured.err
        assert run.path.is_dir()
        assert prune(settings, "--status", "FAILED", "--yes", "--without-mlflow") == 0
    assert gone(settings, run)


def test_another_store_than_that_of_the_runs_is_refused(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(settings, "a", status="FAILED")
    (tmp_path / "other").mkdir()
    prepare_store(other := settings_in(tmp_path / "other", store="file"), EXPERIMENT)
    assert prune(settings, "--status", "FAILED", "--yes", f"tracking.uri={other.tracking.uri}") == 2
    assert f"does not have 1 of these runs, such as {run.run_id}" in capsys.readouterr().err
    assert run.path.is_dir()


def test_the_run_in_mlflow_stays_with_a_tag_or_is_deleted(settings: Settings) -> None:
    stays, goes = made(settings, "a", status="FAILED"), made(settings, "b", status="KILLED")
    assert prune(settings, "--status", "FAILED", "--yes") == 0
    assert prune(settings, "--status", "KILLED", "--yes", "--mlflow") == 0
    found = [mlflow_run(settings, run) for run in (stays, goes)]
    assert [run.info.lifecycle_stage for run in found] == ["active", "deleted"]
    assert [run.data.tags[PRUNED_TAG] for run in found] == ["directory"] * 2
    assert len(client_of(settings.tracking.uri).get_metric_history(stays.run_id, "val/loss")) == 1
    assert Path(found[1].info.artifact_uri.removeprefix("file://"), "model", "model.pt").is_file(), "`mlflow gc` removes artifacts"


def test_the_logged_model_of_a_run_that_is_deleted_in_mlflow_goes_with_it(settings: Settings) -> None:
    run, client = made(settings, "a"), client_of(settings.tracking.uri)
    experiment = mlflow_run(settings, run).info.experiment_id
    assert len(client.search_logged_models([experiment])) == 1
    assert prune(settings, run.run_id, "--yes", "--mlflow") == 0
    assert client.search_logged_models([experiment]) == []


@pytest.mark.parametrize("words", [(), ("--mlflow",), ("--without-mlflow",)])
def test_a_launch_id_of_a_pruned_run_begins_a_new_run_or_is_refused(settings: Settings, words: tuple[str, ...]) -> None:
    run = made(settings, "a", status="FAILED")
    assert prune(settings, "--status", "FAILED", "--yes", *words) == 0
    if "--without-mlflow" in words:
        with pytest.raises(InputError, match="take another launch ID"):
            check_launch_is_free(settings, "phase2", "a")
        return
    check_launch_is_free(settings, "phase2", "a")
    again = get_or_create_run(settings, "phase2", EXPERIMENT, "a")
    assert again.run_id != run.run_id
    assert again.path.is_dir()
    assert len(mlflow_runs(settings)) == (1 if words else 2)


def test_a_store_that_goes_away_meanwhile_leaves_what_the_next_prune_finishes(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(settings, "a", status="FAILED")

    def refuse(*_: object) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_tag", refuse)
        assert prune(settings, "--status", "FAILED", "--yes", "--json") == 1
    printed = capsys.readouterr()
    assert "repeat the command to finish" in printed.err
    assert "away" in json.loads(printed.out)["runs"][0]["stays"]
    assert len(leftovers(settings.output.root)) == 1
    assert find_runs(settings.output.root, []) == []
    assert prune(settings, run.run_id[:8], "--yes") == 0
    assert gone(settings, run)
    assert mlflow_run(settings, run).data.tags[PRUNED_TAG] == "directory"


def test_a_run_that_was_resumed_or_deleted_since_the_plan_was_made_is_left_alone(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    going, resumed, deleted = (made(settings, name, status="FAILED") for name in "abc")

    def then(*arguments: Any) -> None:
        decide(*arguments)
        resumed.files.write_status("FAILED")
        shutil.rmtree(deleted.path)

    monkeypatch.setattr("raytrain2p.runs.prune.decide", then)
    assert prune(settings, "--status", "FAILED", "--yes") == 0
    captured = capsys.readouterr()
    assert captured.err == f"raytrain2p: phase2 {resumed.run_id[:8]}  stays: it was resumed meanwhile\n"
    assert "1 runs were deleted" in captured.out
    assert gone(settings, going)
    assert resumed.files.last_checkpoint.is_file()


# roots and links


def test_a_run_of_a_moved_root_is_deleted_where_it_is_now(settings: Settings, tmp_path: Path) -> None:
    run = made(settings, "a", status="FAILED")
    Path(settings.output.root).rename(tmp_path / "moved")
    moved = settings_in(tmp_path, f"output.root={tmp_path}/moved")
    assert prune(moved, "--status", "FAILED", "--yes", "--mlflow") == 0
    assert gone(moved, run)
    assert mlflow_run(settings, run).info.lifecycle_stage == "deleted"


def test_deleting_a_copy_leaves_the_run_itself_and_that_in_mlflow(settings: Settings, tmp_path: Path) -> None:
    run = made(settings, "a", status="FAILED")
    shutil.copytree(settings.output.root, tmp_path / "copy")
    assert prune(settings_in(tmp_path, f"output.root={tmp_path}/copy"), "--status", "FAILED", "--yes", "--mlflow") == 0
    assert not [*(tmp_path / "copy" / "phase2").iterdir()]
    assert run.path.is_dir()
    assert mlflow_run(settings, run).info.lifecycle_stage == "active"
    assert PRUNED_TAG not in mlflow_run(settings, run).data.tags


def test_no_link_is_followed(settings: Settings, tmp_path: Path) -> None:
    run = made(settings, "a", status="FAILED")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("data")
    (run.path / "folder").symlink_to(outside)
    (run.path / "file").symlink_to(outside / "precious")
    ray = Path(settings.output.root, ".ray")
    ray.rename(tmp_path / "ray")
    ray.symlink_to(tmp_path / "ray")
    assert prune(settings, "--status", "FAILED", "--yes") == 0
    assert not run.path.exists()
    assert (outside / "precious").read_text() == "data"
    assert (tmp_path / "ray" / "a").is_dir()


# what is printed, and freed


def test_the_plan_is_what_is_done(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    made(settings, "a", status="FAILED"), made(settings, "b"), made(settings, "c", status="FAILED")
    before = {*Path(settings.output.root).rglob("*")}
    assert prune(settings, "--status", "FAILED", "--keep-last", "1") == 0
    printed = capsys.readouterr().out
    assert "A run goes if it is FAILED and is not one of the last 1 of its phase" in printed
    assert "1 of 3 runs would be deleted, which frees" in printed
    assert [line.rstrip().rpartition("  ")[2] for line in printed.splitlines()[2:5]] == ["delete", "stays: status", "stays: last"]
    assert {*Path(settings.output.root).rglob("*")} == before, "it only looks"
    assert prune(settings, "--json", "--status", "FAILED", "--keep-last", "1") == 0
    plan = json.loads(capsys.readouterr().out)
    going = [Path(one["directory"]) for one in plan["runs"] if one["stays"] is None]
    assert prune(settings, "--json", "--status", "FAILED", "--keep-last", "1", "--yes") == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes"] == plan["bytes"] > 1000
    assert [path for path in before if path.parent.name == "phase2" and not path.exists()] == going


def test_bytes_that_have_a_name_elsewhere_are_not_freed(tmp_path: Path) -> None:
    for name, size in (("a", 100), ("b", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(size))
    os.link(tmp_path / "a" / "file", tmp_path / "a" / "second name")
    os.link(tmp_path / "b" / "file", tmp_path / "elsewhere")
    assert freed_by([tmp_path / "a"]) == 100
    assert freed_by([tmp_path / "b"]) == 0
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert freed_by([tmp_path / "link"]) == 0, "what a link leads to stays"
    assert freed_by([tmp_path / "b", tmp_path / "elsewhere", tmp_path / "missing"]) == 10


# checkpoints alone


def test_checkpoints_alone_are_deleted_and_the_run_says_so(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = made(settings, "a", status="KILLED"), made(settings, "b")
    assert prune(settings, "--checkpoints-only", "--status", "KILLED", "--yes") == 0
    assert not run.checkpoints.exists()
    assert {path.name for path in other.path.iterdir()} - {path.name for path in run.path.iterdir()} == {"lightning_checkpoints"}
    assert "cannot be resumed" in run.files.readme.read_text()
    assert run.files.tags()[PRUNED_TAG] == mlflow_run(settings, run).data.tags[PRUNED_TAG] == "checkpoints"
    digests = InputDigests(4, "0" * 64, {})
    with pytest.raises(InputError, match="has no checkpoints any more"):
        check_resumable(run, settings, digests, accept_changed_inputs=True)
    capsys.readouterr()
    assert prune(settings, "--json", "--checkpoints-only", "--status", "KILLED") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["stays"] == "no checkpoints"


# killed at any moment

WORDS = {
    "whole runs": ("--status", "FAILED", "--yes"),
    "runs and MLflow": ("--status", "FAILED", "--yes", "--mlflow"),
    "checkpoints": ("--status", "FAILED", "--yes", "--checkpoints-only"),
}


class Snapshot:
    """The state of an output root and its store, to which it can be set again."""

    def __init__(self, settings: Settings, tmp_path: Path) -> None:
        self.root, self.saved = Path(settings.output.root), tmp_path / "saved"
        self.database = settings.tracking.uri.removeprefix("sqlite:///")
        shutil.copytree(self.root, self.saved)
        self._copy(self.database, f"{self.saved}.db")

    def restore(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.saved, self.root)
        self._copy(f"{self.saved}.db", self.database)

    def _copy(self, source: str, target: str) -> None:
        with closing(sqlite3.connect(source)) as one, closing(sqlite3.connect(target)) as other:
            one.backup(other)

    def files(self, run: Run, root: Path) -> dict[str, bytes]:
        folder = root / run.phase / run.path.name
        names = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", ".mirror.json")]
        return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def killed_at(moment: int | None, settings: Settings, words: tuple[str, ...]) -> int:
    """Prune in a child process that ends before its n-th change, as by SIGKILL. Returns how many changes there were."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        made_changes = 0

        def counted(change: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal made_changes
                if made_changes == moment:
                    os._exit(9)
                made_changes += 1
                return change(*arguments, **options)

            return call

        for name in ("unlink", "rmdir", "rename"):
            setattr(os, name, counted(getattr(os, name)))
        for name in ("set_tag", "delete_run", "log_batch"):
            setattr(MlflowClient, name, counted(getattr(MlflowClient, name)))
        code = prune(settings, *words)
        os.write(write, str(made_changes).encode())
        os._exit(code)
    os.close(write)
    with os.fdopen(read) as stream:
        changes = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if changes else 9)
    return int(changes or 0)


@pytest.mark.parametrize(("kind", "moments"), [("whole runs", 7), ("runs and MLflow", 7), ("checkpoints", 6)])
def test_killed_at_any_moment_nothing_else_is_lost_and_the_repeated_command_finishes(
    settings: Settings, tmp_path: Path, kind: str, moments: int
) -> None:
    going = [made(settings, "a", status="FAILED"), made(settings, "b", status="FAILED")]
    kept = [made(settings, "c"), made(settings, "d", phase="alignment")]
    snapshot, words, root = Snapshot(settings, tmp_path), WORDS[kind], settings.output.root
    changes = killed_at(None, settings, words)
    for moment in random.Random(kind).sample(range(changes), moments):
        snapshot.restore()
        killed_at(moment, settings, words)
        for run in find_runs(root, []):  # whatever is seen is whole
            checkpoints = run.files.tags().get(PRUNED_TAG) != "checkpoints"
            before, now = snapshot.files(run, snapshot.saved), snapshot.files(run, snapshot.root)
            missing = {name for name in before if name not in now and (checkpoints or not name.startswith("lightning_checkpoints"))}
            assert not missing, moment
        assert find_run(root, RUN_FOLDERS, "latest", "RUN").run_id in {run.run_id for run in [*kept, *going]}
        killed_at(None, settings, words)  # repeated
        for run in kept:
            assert snapshot.files(run, snapshot.root) == snapshot.files(run, snapshot.saved), moment
            assert PRUNED_TAG not in mlflow_run(settings, run).data.tags
        for run in going:
            found = mlflow_run(settings, run)
            if kind == "checkpoints":
                assert not [path for path in run.path.iterdir() if "checkpoints" in path.name], moment
                assert found.data.tags[PRUNED_TAG] == "checkpoints", moment
            else:
                assert gone(settings, run), moment
                stage = "deleted" if kind == "runs and MLflow" else "active"
                assert (found.data.tags[PRUNED_TAG], found.info.lifecycle_stage) == ("directory", stage), moment


# tag


def tag(settings: Settings, *words: str) -> int:
    return runs.main(["tag", f"output.root={settings.output.root}", *words])


def test_tags_are_set_and_removed_on_disk_and_in_mlflow(settings: Settings) -> None:
    run, other = made(settings, "a"), made(settings, "b")
    assert tag(settings, run.run_id[:8], "--set", "keep", "--set", "note=a = b") == 0
    assert {"keep": "true", "note": "a = b"}.items() <= run.files.tags().items()
    assert {"keep": "true", "note": "a = b"}.items() <= mlflow_run(settings, run).data.tags.items()
    assert "keep" not in other.files.tags()
    assert tag(settings, run.run_id[:8], "--remove", "keep", "--set", "note=c") == 0
    for tags in (run.files.tags(), mlflow_run(settings, run).data.tags):
        assert ("keep" in tags, tags["note"]) == (False, "c")
    assert tag(settings, run.run_id[:8], "--set", "keep=2") == 0
    assert mlflow_run(settings, run).data.tags["keep"] == "2"
    assert tag(settings, run.run_id[:8], "--set", "from=postgresql://me:hunter2@db/x", "--set", "token=hunter2hunter2") == 0
    for tags in (run.files.tags(), mlflow_run(settings, run).data.tags):
        assert (tags["from"], tags["token"]) == ("postgresql://me:***@db/x", "***")


def test_tags_are_on_disk_while_mlflow_is_away_and_sent_later(settings: Settings) -> None:
    run = made(settings, "a")
    client_of(settings.tracking.uri).set_tag(run.run_id, "old", "true")
    with away(settings):
        assert tag(settings, run.run_id, "--set", "keep", "--remove", "old") == 0
    assert run.files.tags()["keep"] == "true"
    describe_run(run, resolved_config(settings, {}), "command", {})  # a resume does not forget what is to be removed
    assert runs.main(["sync", f"output.root={settings.output.root}"]) == 0
    tags = mlflow_run(settings, run).data.tags
    assert (tags["keep"], "old" in tags) == ("true", False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "keep"], "name a run"),
        (["latest"], "nothing says which tag"),
        (["latest", "--set", "raytrain2p.root=/"], "is written by the program itself"),
        (["latest", "--set", "version.data=3"], "is written by the program itself"),
        (["latest", "--set", "what?"], "is not a name for a tag"),
        (["latest", "--set", "keep", "--remove", "keep"], "leave one out"),
        (["latest", "--set", f"keep={'x' * 8001}"], "take at most 8000"),
    ],
)
def test_what_is_no_tag_is_refused(settings: Settings, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    run = made(settings, "a")
    before = run.files.tags()
    assert tag(settings, *words) == 2
    assert message in capsys.readouterr().err
    assert run.files.tags() == before


def test_a_run_under_way_is_not_tagged(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(settings, "a")
    with lock_holder(run.files.lock.path):
        assert tag(settings, "latest", "--set", "keep") == 1
    assert "under way" in capsys.readouterr().err
    assert "keep" not in run.files.tags()
