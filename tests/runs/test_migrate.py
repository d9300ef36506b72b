"""Older directories become runs of this layout, with an MLflow run each, and back again: real checkpoints, a real SQLite store, and
kills between all operations."""

import json
import os
import random
import shutil
import sqlite3
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from mlflow import MlflowClient
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from raytrain2p import train
from raytrain2p.config import InputError, Settings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, Phase
from raytrain2p.launch.resume import check_resumable
from raytrain2p.runs import __main__ as runs
from raytrain2p.runs import migration  # noqa: F401 - imported once, and not in each child
from raytrain2p.runs.old_layouts import find_old_runs, read_checkpoint
from raytrain2p.tracking.find import find_artifact, find_run, find_runs
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import Run
from tests.chaos.killing import LONG
from tests.killed_between import KILLED, NEVER, in_child
from tests.tracking.checkpoint_files import tear
from tests.tracking.stores import NOBODY, create, history, mlflow_run, settings_in

UUID = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"
BEGIN = datetime(2025, 3, 1, 10, 30, 0)
STATE = (
    "ModelCheckpoint{'monitor': 'train_loss', 'mode': 'min', 'every_n_train_steps': 0, 'every_n_epochs': 1, 'train_time_interval': None}"
)


def old_checkpoint(path: Path, epoch: int, step: int, hours: float, scores: dict[str, float], more: dict[str, Any] | None = None) -> None:
    """A checkpoint as Lightning 2 writes it, written some hours after BEGIN."""
    best = min(scores, key=lambda name: scores[name])
    tensors = {f"/gone/{name}": torch.tensor(score) for name, score in scores.items()}
    state = {"monitor": "train_loss", "best_model_score": tensors[f"/gone/{best}"], "best_model_path": f"/gone/{best}"}
    content = {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": {"projector.weight": torch.zeros(64, 8)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {STATE: state | {"best_k_models": tensors, "dirpath": "/gone"}},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.001, "api_key": "hunter2hunter2", "sizes": [1, 2]},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content | (more or {}), path)
    at = BEGIN.timestamp() + 3600 * hours
    os.utime(path, (at, at))


FIRST, SECOND = "phase2-epoch=00-train_loss=2.9476.ckpt", "phase2-epoch=01-train_loss=2.5000.ckpt"


def checkpoints_in(folder: Path) -> Path:
    """Three checkpoints of phase 2; the best is that of epoch 1."""
    old_checkpoint(folder / FIRST, 0, 10, 1, {FIRST: 2.94761})
    old_checkpoint(folder / SECOND, 1, 20, 2, {FIRST: 2.94761, SECOND: 2.50004})
    old_checkpoint(folder / "last.ckpt", 2, 30, 3, {FIRST: 2.94761, SECOND: 2.50004})
    return folder


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with both old layouts, and what belongs to neither."""
    folder = tmp_path / "old"
    checkpoints_in(folder / "flat")
    (folder / "flat" / "notes.txt").write_text("mine")
    whole = folder / f"{UUID}_20250301_103000"
    checkpoints_in(whole / "checkpoints")
    (whole / "events.log").write_text("log")
    (whole / "empty").mkdir(mode=0o700)
    (whole / "newest").symlink_to("checkpoints/last.ckpt")
    (folder / "nothing").mkdir()
    for number, path in enumerate(sorted(folder.rglob("*"), reverse=True)):
        if path.is_dir():
            os.utime(path, ns=(10**18, 10**18 + number))
    return folder


def listing(folder: Path) -> dict[str, Any]:
    """Everything in a folder: kind and mode, time, content."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, path.lstat().st_mtime_ns, content)
    return found


def migrate(settings: Settings, folder: Path, *options: str) -> int:
    return runs.main(["migrate", str(folder), f"output.root={settings.output.root}", f"tracking.uri={settings.tracking.uri}", *options])


def migrated(settings: Settings) -> list[Run]:
    return [run for run in find_runs(settings.output.root, []) if run.launch_id.startswith("migrated-")]


def active_runs(settings: Settings) -> int:
    with closing(sqlite3.connect(settings.tracking.uri.removeprefix("sqlite:///"))) as database:
        (count,) = database.execute("SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'").fetchone()
    return int(count)


# The plan


def test_without_yes_it_is_printed_what_becomes_what_and_nothing_is_changed(
    tmp_path: Path, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(tmp_path)
    assert migrate(settings_in(tmp_path), old) == 0
    assert listing(tmp_path) == before
    text = capsys.readouterr().out
    assert f"{SECOND} -> lightning_checkpoints/best-epoch=01-train_loss=2.5000.ckpt" in text
    assert f"{FIRST} -> migrated_from/{FIRST}" in text
    assert "checkpoints/last.ckpt -> lightning_checkpoints/last.ckpt" in text
    assert f"left alone: {old}/flat/notes.txt" in text
    assert f"left alone: {old}/nothing (is empty)" in text
    assert " kB)" in text
    assert "nothing was changed" in text


def test_the_plan_as_json_is_one_document(tmp_path: Path, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert migrate(settings_in(tmp_path), old, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [one["phase"] for one in plan["runs"]] == ["phase2", "phase2"]
    assert plan["runs"][1]["files"]["last.ckpt"] == "lightning_checkpoints/last.ckpt"
    assert plan["runs"][1]["bytes"] == sum(path.stat().st_size for path in (old / "flat").glob("*.ckpt"))
    assert {one["path"] for one in plan["left_alone"]} == {f"{old}/flat/notes.txt", f"{old}/nothing"}


# Migrating


def test_old_runs_are_migrated_with_their_dates_and_metrics(settings: Settings, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(old)
    assert migrate(settings, old, "--yes") == 0
    whole, flat = sorted(migrated(settings), key=lambda run: run.timestamp)
    assert [run.timestamp for run in (whole, flat)] == ["20250301_103000", "20250301_113000"]
    assert not (old / f"{UUID}_20250301_103000").exists()
    assert sorted(path.name for path in (old / "flat").iterdir()) == ["notes.txt"]
    for run, begin, prefix in ((whole, 0, "checkpoints/"), (flat, 1, "")):
        info, data = mlflow_run(settings, run).info, mlflow_run(settings, run).data
        assert (info.status, info.run_name) == ("FINISHED", f"phase2_{run.timestamp}")
        assert [info.start_time / 3.6e6, info.end_time / 3.6e6] == [BEGIN.timestamp() / 3600 + hours for hours in (begin, 3)]
        assert history(settings, run) == [(10, pytest.approx(2.94761)), (20, pytest.approx(2.50004))]
        assert history(settings, run, "epoch") == [(10, 0), (20, 1), (30, 2)]
        assert history(settings, run, "best_model_score")[-1] == (30, pytest.approx(2.50004))
        assert data.params["hyper_parameters.lr"] == "0.001"
        assert data.params["hyper_parameters.api_key"] == "***"
        assert data.tags["raytrain2p.directory"] == run.directory
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best-epoch=01-train_loss=2.5000.ckpt", "last.ckpt"]
        names = {"lightning_checkpoints/last.ckpt": "last.ckpt", f"migrated_from/{prefix}{FIRST}": FIRST}
        for new, name in {**names, "lightning_checkpoints/best-epoch=01-train_loss=2.5000.ckpt": SECOND}.items():
            old_name = f"flat/{name}" if run is flat else f"{UUID}_20250301_103000/checkpoints/{name}"
            assert (run.path / new).read_bytes() == before[old_name][2]
        assert run.run_id in (run.path / "MLFLOW_RUN_ID.txt").read_text()
        assert "whether it came as far as it should is not known" in (run.path / "README.md").read_text()
    assert (whole.path / "migrated_from/events.log").read_text() == "log"
    assert migrate(settings, old, "--yes") == 0
    assert "was migrated before" in capsys.readouterr().out
    assert active_runs(settings) == 2


def test_other_verbs_work_on_a_migrated_run_and_it_is_never_the_latest(
    settings: Settings, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = create(settings)
    MlflowSync(mine, settings.tracking.uri).send()
    (old / f"{UUID}_20250301_103000" / "model.pt").write_bytes(b"an older format")
    assert migrate(settings, old, "--yes") == 0
    root = f"output.root={settings.output.root}"
    assert find_run(settings.output.root, ["phase2"], "latest", "--resume") == mine
    with pytest.raises(InputError, match=r"no finished run with model\.pt"):
        find_artifact(settings.output.root, INSTRUCTION, "latest", "--run")
    capsys.readouterr()
    assert runs.main(["list", root, "--json", "--status", "finished"]) == 0
    assert [one["best"] for one in json.loads(capsys.readouterr().out)] == [2.5, 2.5]
    assert runs.main(["reconcile", root]) == 0
    assert runs.main(["sync", root]) == 0
    assert [mlflow_run(settings, run).info.status for run in migrated(settings)] == ["FINISHED", "FINISHED"]
    names = [run.run_id for run in migrated(settings)]
    assert runs.main(["verify", root, *names]) == 0
    assert runs.main(["prune", root, *names, "--yes"]) == 0
    assert migrate(settings, old, "--undo", "--yes") == 2, "what was deleted cannot be put back, and is not begun to be"


def test_a_migrated_run_is_not_resumed(settings: Settings, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert migrate(settings, old / "flat", "--yes") == 0
    (run,) = migrated(settings)
    capsys.readouterr()
    assert train.main(["--phase", "2", "--resume", run.run_id, f"output.root={settings.output.root}"]) == 2
    assert f"was migrated from {old}/flat: another program trained it" in capsys.readouterr().err
    with pytest.raises(InputError, match="was migrated from"):  # by its launch ID
        check_resumable(run, settings, None)


def test_a_run_that_mlflow_has_is_left_alone_and_so_is_one_of_this_layout(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = create(settings)
    checkpoints_in(tmp_path / "old" / f"{known.run_id}_20250301_103000")
    (tmp_path / "old" / f"{UUID}_20250301_103000").mkdir()
    before = listing(tmp_path / "old")
    assert migrate(settings, tmp_path / "old", "--yes") == 2
    error = capsys.readouterr().err
    assert "has nothing to migrate" in error
    assert "MLflow has its run" in error
    assert "has no checkpoints" in error
    assert migrate(settings, Path(settings.output.root), "--yes") == 2
    assert "a run of this layout" in capsys.readouterr().err
    assert listing(tmp_path / "old") == before


def test_what_lightning_writes_is_migrated(settings: Settings, tmp_path: Path) -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    names = "phase1-{epoch:02d}-{train_loss:.4f}"
    saving = ModelCheckpoint(tmp_path / "old", filename=names, monitor="train_loss", save_top_k=2, save_last="link")
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    batches = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=2)
    pl.Trainer(max_epochs=3, callbacks=[saving], **options).fit(Module(), batches)
    before = listing(tmp_path / "old")
    assert migrate(settings, tmp_path / "old", "--yes") == 0
    (run,) = migrated(settings)
    best, last = sorted(run.checkpoints.iterdir())
    assert run.phase == "alignment"
    assert best.name == f"best-{Path(saving.best_model_path).name.removeprefix('phase1-')}"
    assert best.samefile(last), "the best was the latest, and last.ckpt a link to it"
    assert history(settings, run)[-1] == (12, pytest.approx(float(saving.best_model_score or 0)))
    assert migrate(settings, tmp_path / "old", "--undo", "--yes") == 0
    assert listing(tmp_path / "old") == before


class Code:
    """Its pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_what_is_damaged_or_holds_code_is_kept_as_a_file_and_its_code_is_not_run(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints_in(tmp_path / "old")
    tear(folder / SECOND)
    code = "phase2-epoch=03-train_loss=1.0000.ckpt"
    old_checkpoint(folder / code, 3, 40, 4, {code: 1.0}, {"extra": Code(tmp_path / "code was run")})
    before = listing(folder)
    assert migrate(settings, folder, "--yes") == 0
    assert not (tmp_path / "code was run").exists()
    (run,) = migrated(settings)
    assert (run.files.old / SECOND).read_bytes() == before[SECOND][2]
    assert (run.files.old / code).read_bytes() == before[code][2]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["best-epoch=00-train_loss=2.9476.ckpt", "last.ckpt"]
    assert history(settings, run) == [(0, pytest.approx(2.94761)), (1, 2.5), (3, 1.0)], "at epochs, as their names say"
    text = capsys.readouterr().out + (run.path / "README.md").read_text()
    assert text.count("which only code of the program that wrote it can read") == 2
    assert text.count("is damaged") == 2


def test_whatever_a_checkpoint_holds_is_no_traceback(settings: Settings, tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    folder = tmp_path / "old"
    values: list[tuple[str, Any]] = [
        ("hyper_parameters", endless),
        ("hyper_parameters", {"a": endless}),
        ("callbacks", {STATE: {"monitor": "\0", "best_model_score": 1}}),
    ]
    values += [("epoch", 10**400), ("global_step", -1), ("callbacks", {STATE: {"best_model_score": torch.ones(2), "best_k_models": 3}})]
    for number, (key, value) in enumerate(values):
        old_checkpoint(folder / f"phase2-epoch={number}-loss=1e300-x={number}.ckpt", 0, 1, number, {"x": 1.0}, {key: value})
    before = listing(folder)
    assert migrate(settings, folder, "--yes") == 0
    (run,) = migrated(settings)
    assert history(settings, run, "x") == [(number, number) for number in range(len(values))]
    assert migrate(settings, folder, "--undo", "--yes") == 0
    assert listing(folder) == before


@pytest.mark.parametrize(
    ("name", "epoch", "metrics"),
    [
        (FIRST, 0, {"train_loss": 2.9476}),
        ("phase1-epoch=12-val_loss=1e-3-v1.ckpt", 12, {"val_loss": 0.001}),
        ("alignment-epoch=3-step=40-acc@1=0.5.ckpt", 3, {"acc@1": 0.5}),
        ("phase2_epoch=03_train_loss_step=0.5.ckpt", 3, {"train_loss_step": 0.5}),
        ("epoch=7-step=100.ckpt", 7, {}),
        ("last.ckpt", None, {}),
    ],
)
def test_epoch_and_metrics_are_read_from_the_name(tmp_path: Path, name: str, epoch: int | None, metrics: dict[str, float]) -> None:
    (tmp_path / name).write_bytes(b"damaged")
    found = read_checkpoint(tmp_path / name, name)
    assert (found.epoch, dict(found.metrics)) == (epoch, metrics)


@pytest.mark.parametrize(
    ("path", "given", "phase"),
    [
        ("phase1-epoch=00-x=1.ckpt", None, ALIGNMENT),
        ("alignment-epoch=00-x=1.ckpt", INSTRUCTION, ALIGNMENT),
        ("phase2_training_with_pretrained_aligner/last.ckpt", None, INSTRUCTION),
        (f"phase2/{UUID.replace('-', '')}_20250301_103000/epoch=0.ckpt", None, INSTRUCTION),
        ("epoch=00.ckpt", ALIGNMENT, ALIGNMENT),
        ("epoch=00.ckpt", None, None),
    ],
)
def test_the_phase_is_that_of_the_name_or_of_the_folder_or_the_one_given(
    tmp_path: Path, path: str, given: Phase | None, phase: Phase | None
) -> None:
    (tmp_path / "old" / path).parent.mkdir(parents=True)
    (tmp_path / "old" / path).write_bytes(b"damaged")
    found = find_old_runs(tmp_path / "old", given, lambda run_id: False)
    assert [run.phase for run in found.runs] == ([phase] if phase else [])
    assert [why for _, why in found.left_alone] == ([] if phase else ["its phase is not known: give --phase"])


# Undoing


def test_undo_puts_everything_back_and_moves_the_runs_to_the_trash(
    settings: Settings, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = listing(old)
    assert migrate(settings, old, "--yes") == 0
    ids = {run.run_id for run in migrated(settings)}
    during = listing(old)
    assert migrate(settings, old, "--undo") == 0
    assert listing(old) == during, "without --yes, nothing is changed"
    assert migrate(settings, old, "--undo", "--yes") == 0
    assert listing(old) == before
    assert list(Path(settings.output.root, "phase2").iterdir()) == []
    client = client_of(settings.tracking.uri)
    assert {client.get_run(run_id).info.lifecycle_stage for run_id in ids} == {"deleted"}
    assert migrate(settings, old, "--undo", "--yes") == 2
    assert "nothing of it was migrated" in capsys.readouterr().err
    assert migrate(settings, old, "--yes") == 0
    assert active_runs(settings) == 2
    assert ids.isdisjoint(run.run_id for run in migrated(settings))


def test_undo_leaves_files_that_came_later(settings: Settings, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(os.fsdecode(os.fsencode(old / "flat") + b"/last\xff.ckpt")).write_text("not UTF-8")
    before = listing(old)
    assert migrate(settings, old / "flat", "--yes") == 0
    assert "its name is not UTF-8" in capsys.readouterr().out
    (run,) = migrated(settings)
    (run.path / "report.txt").write_text("mine")
    (old / "flat" / FIRST).write_text("in the way")
    assert migrate(settings, old, "--undo", "--yes") == 1
    assert f"{FIRST} is there already, and is not {run.path}" in capsys.readouterr().out
    (old / "flat" / FIRST).unlink()
    assert migrate(settings, old, "--undo", "--yes") == 0
    assert listing(old) == before
    assert [path.name for path in run.path.iterdir()] == ["report.txt"]
    assert "has files that were not migrated, and stays" in capsys.readouterr().err


# What is refused


def test_what_cannot_be_migrated_is_bad_input(settings: Settings, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(old)
    assert migrate(settings, old / "absent") == 2
    assert migrate(settings, old / "nothing", "--yes") == 2
    assert runs.main(["migrate", str(old), str(old)]) == 2
    assert runs.main(["migrate", str(old), f"output.root={settings.output.root}", f"tracking.uri={NOBODY}"]) == 2
    assert runs.main(["migrate", str(old), f"output.root={old}/{UUID}_20250301_103000/out", f"tracking.uri={settings.tracking.uri}"]) == 2
    errors = capsys.readouterr().err.split("raytrain2p: ")[1:]
    wanted = ["is not a directory", "has nothing to migrate", "required is one", "MLflow is away", "would be moved into it"]
    assert [part in error for part, error in zip(wanted, errors, strict=True)] == [True] * 5
    assert listing(old) == before


# Kills


@pytest.mark.parametrize("disks", [1, 2])
@pytest.mark.parametrize("undoing", [False, True], ids=["migrate", "undo"])
def test_killed_at_any_moment_nothing_is_lost_and_the_same_command_finishes(
    tmp_path: Path, made_store: Path, old: Path, other_disk: Path, undoing: bool, disks: int
) -> None:
    """`place` has the store and the output root, `there` the old directories."""
    place, there, kept = tmp_path / "place", (other_disk if disks == 2 else tmp_path) / "there", tmp_path / "kept"
    place.mkdir()
    shutil.copy(made_store / "mlflow.db", place)
    old.rename(tmp_path / "old directories")
    shutil.copytree(tmp_path / "old directories", there, symlinks=True)
    before = listing(there)

    def act(kill_at: int, *options: str) -> tuple[int, int]:
        return in_child([place, there], kill_at, lambda: migrate(settings_in(place), there, "--yes", *options), MlflowClient)

    options = ["--undo"] if undoing else []
    assert not undoing or act(NEVER)[0] == 0
    for folder in (place, there):
        shutil.copytree(folder, kept / folder.name, symlinks=True)
    code, operations = act(NEVER, *options)
    assert code == 0
    assert operations > 50
    moments = range(operations) if LONG in os.environ else random.Random(0).sample(range(operations), 10 if disks == 1 else 3)
    for moment in moments:  # each one in `make chaos`
        for folder in (place, there):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(kept / folder.name, folder, symlinks=True)
        when = f"killed before operation {moment} of {operations}"
        assert act(moment, *options)[0] == KILLED
        assert everything_is_there([place, there], before), when
        then_undone = undoing or (moment % 2 and any(place.glob("checkpoints/.migrated/migrated-*.json")))
        if not then_undone:
            assert act(NEVER)[0] == 0, when
            assert active_runs(settings_in(place)) == len(migrated(settings_in(place))) == 2, when
        assert act(NEVER, "--undo")[0] == 0, when
        assert listing(there) == before, when
        assert active_runs(settings_in(place)) == 0
        assert list(place.glob("checkpoints/phase2/*")) == list(place.glob("checkpoints/.migrated/migrated-*")) == [], when


def everything_is_there(folders: list[Path], before: dict[str, Any]) -> bool:
    """Whether all content of the old files is somewhere below these folders."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    contents = {path.read_bytes() for path in files}
    return all(content in contents for _, _, content in before.values() if isinstance(content, bytes))
