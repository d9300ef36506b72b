"""`runs verify`: a clean store gives nothing; each damage, on disk or in MLflow, is one line that names it, and what can be repaired is."""

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import torch
from PIL import Image

from raytrain2p.config import Settings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, PHASES_BY_NAME, SWEEPS
from raytrain2p.models.artifacts import PARTS, load_artifact, save_artifact
from raytrain2p.runs import __main__ as runs
from raytrain2p.runs.checks_in_mlflow import MOVED
from raytrain2p.runs.difference import Difference, readable
from raytrain2p.storage.files import read_json, write_file, write_json
from raytrain2p.tracking.checkpoints import write_checkpoint
from raytrain2p.tracking.create_run import get_or_create_run
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile, write_summary
from raytrain2p.tracking.mlflow_store import client_of, prepare_store
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import LAUNCH_TAG, ROOT_TAG, SWEEP_TAG, Run, launch_lock, launch_record
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.tracking.checkpoint_files import content, tear
from tests.tracking.stores import EXPERIMENT, NOBODY, away, begin, create, lock_holder, note, settings_in

OWN = "tracking.experiment=of this store"  # the artifacts of the experiment in the store that is copied are elsewhere
BEST = "best-epoch=00-train_loss=0.5000.ckpt"
DONE = ("sync", "reconcile", "verify --repair")


@dataclass
class Store:
    """A phase 1 run, a phase 2 run with its aligner, a sweep with a trial that began with the weights of the first, and a run that failed
    at once: all complete in MLflow."""

    settings: Settings
    aligned: Run
    tuned: Run
    sweep: Run
    trial: Run
    failed: Run

    @property
    def root(self) -> str:
        return self.settings.output.root

    @property
    def client(self) -> Any:
        return client_of(self.settings.tracking.uri)

    def sql(self, statement: str, *values: Any) -> None:
        """Change MLflow's database behind its back."""
        with closing(sqlite3.connect(self.settings.tracking.uri.removeprefix("sqlite:///"), timeout=30)) as database:
            assert database.execute(statement, values).rowcount, "it changed nothing"
            database.commit()


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "white").save(stream, "png")
    return stream.getvalue()


def made(settings: Settings, launch_id: str, phase: str, status: str, tags: dict[str, str] | None = None, facts: Any = None) -> Run:
    """A run as training leaves it, with everything sent; points that are not finite, too."""
    run = get_or_create_run(settings, phase, EXPERIMENT, launch_id, tags)
    describe_run(run, resolved_config(settings, {}), "command", facts or {}, lambda run, command: "")
    if status == "FINISHED":
        losses = [MetricPoint("train_loss", 1 / step, step, 1.7e9 + step) for step in (1, 2, 3)]
        odd = [MetricPoint("odd", float(value), step, 1.7e9) for step, value in enumerate(("nan", "inf", "-inf", "1e-300"))]
        MetricsFile(run.files.metrics).append([*losses, *odd])
        write_file(run.files.training_curve, png())
    if status == "FINISHED" and phase in PHASES_BY_NAME:
        of = PHASES_BY_NAME[phase]
        write_checkpoint(content(0.01), run.files.last_checkpoint, BEST)
        kinds = {name: str if name == "system_prompt" else kind for name, kind in PARTS[of].items()}
        parts = {name: kind() for name, kind in kinds.items() if name not in ("config", "encoders")}
        save_artifact(run.files.artifact(of), of, {}, {}, **(parts | {"state_dict": {"weight": torch.ones(3)}}))
        write_json(run.files.test_metrics, {"test/loss": 0.25, "test/odd": float("nan")})
        write_file(run.files.answers, json.dumps({"step": 3, "answer": "a cat"}) + "\n")
        result = {"run_id": run.run_id, "directory": run.directory, "best": str(run.checkpoints / BEST), "steps": 3}
        result |= {"last": str(run.files.last_checkpoint), "artifact": str(run.files.artifact(of))}
        write_json(run.files.result, result | {"metrics": {"test/loss": 0.25, "test/odd": float("nan"), "train_loss": 1 / 3}})
    if phase == SWEEPS:
        write_json(run.files.trials / "000.json", {"number": 0, "values": {}, "launch_id": f"{launch_id}-000"})
        write_file(run.files.trials_table, "trial\n0\n")
        write_json(run.files.best_trial, {"trial": 0})
        write_file(run.files.study, '{"op_code": 0}\n')
    write_summary(run.files.metrics, run.files.metrics_summary)
    run.files.write_status(status)
    MlflowSync(run, settings.tracking.uri).send()
    return run


def store_of(settings: Settings, folder: Path, kind: str = "sqlite") -> Store:
    begin(settings)
    aligned = made(settings, "aligned", "alignment", "FINISHED")
    path = aligned.files.artifact(ALIGNMENT)
    second, third = (settings_in(folder, OWN, f"model.{setting}={path}", store=kind) for setting in ("aligner", "init"))
    content = {"content": load_artifact(path, ALIGNMENT)["digest"]}
    tuned = made(second, "tuned", "phase2", "FINISHED", facts={"inputs": {f"model.aligner={path}": content}})
    sweep = made(settings, "sweep", SWEEPS, "FINISHED")
    tags = {SWEEP_TAG: sweep.run_id, "mlflow.parentRunId": sweep.run_id}
    trial = made(third, "sweep-000", "alignment", "FINISHED", tags, {"inputs": {f"model.init={path}": content}})
    return Store(settings, aligned, tuned, sweep, trial, made(settings, "failed", "phase2", "FAILED"))


@pytest.fixture(scope="module")
def template(made_store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """A store, and a copy of all its files."""
    folder = tmp_path_factory.mktemp("verify") / "store"
    folder.mkdir()
    shutil.copy(made_store / "mlflow.db", folder)
    settings = settings_in(folder, OWN)
    prepare_store(settings, EXPERIMENT)
    store = store_of(settings, folder)
    shutil.copytree(folder, folder.with_name("copy"), symlinks=True)
    return store, folder


@pytest.fixture
def store(template: tuple[Store, Path]) -> Store:
    """The store as it was made: the files are put back where they were, and the content of the database, which stays open."""
    store, folder = template
    for name in ("checkpoints", "mlruns"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(folder.with_name("copy") / name, folder / name)
    with closing(sqlite3.connect(folder.with_name("copy") / "mlflow.db")) as kept, closing(sqlite3.connect(folder / "mlflow.db")) as now:
        kept.backup(now)
    return store


def verify(settings: Settings, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """Exit code, and what `--json` prints."""
    code = runs.main(["verify", "--json", f"output.root={settings.output.root}", *words])
    return code, json.loads(capsys.readouterr().out)


def lines(found: Any) -> list[str]:
    return [f"{one['run_id']} {one['where']} {one['what']}; {one['fix']}" for one in found["differences"]]


def edit(path: Path, **changes: Any) -> None:
    write_json(path, read_json(path) | changes)


def unborn(store: Store) -> None:
    """A run in MLflow whose launch was killed before it made a directory."""
    experiment = store.client.get_experiment_by_name("of this store").experiment_id
    store.client.create_run(experiment, tags={LAUNCH_TAG: "unborn", ROOT_TAG: store.root}, run_name="phase2_20260101_120000")


def without(path: Path, *more: Path) -> None:
    """Remove a directory of a run, and files."""
    shutil.rmtree(path)
    for file in more:
        file.unlink()


def without_sweep(store: Store) -> None:
    without(store.sweep.path, launch_record(store.root, "sweep"))
    store.client.delete_run(store.sweep.run_id)


def copied(store: Store) -> None:
    shutil.copytree(store.tuned.path, store.tuned.path.with_name(f"{store.tuned.run_id}_20200101_000000"))
    edit(store.tuned.path.with_name(f"{store.tuned.run_id}_20200101_000000") / "run.json", timestamp="20200101_000000")


def flip(path: Path) -> None:
    """Change one byte of the weight; the file keeps its size and its time."""
    found, raw = path.stat(), bytearray(path.read_bytes())
    raw[raw.index(torch.ones(3).numpy().tobytes())] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def mlruns(store: Store, run: Run) -> Path:
    return Path(unquote(store.client.get_run(run.run_id).info.artifact_uri.removeprefix("file://")))


Damage = Callable[[Store], object]
# What is done, what the line says of it, and whether `--fast` finds it and `--repair` repairs it
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    # on disk
    "run.json is torn": (lambda s: tear(s.tuned.files.record), "run.json is not JSON", "fast"),
    "run.json of another run": (lambda s: edit(s.tuned.files.record, run_id="0" * 32), "run.json is that of run 0000", "fast"),
    "status.json is empty": (lambda s: s.tuned.files.status.write_bytes(b""), "status.json is empty", "fast"),
    "config.json is zeros": (lambda s: s.tuned.files.config.write_bytes(bytes(9)), "config.json has zero bytes alone", "fast"),
    "config.json is gone": (lambda s: s.failed.files.config.unlink(), "config.json is missing", "fast"),
    "MLFLOW_RUN_ID.txt is another's": (lambda s: s.tuned.files.mlflow_run_id.write_text("x"), "RUN_ID.txt does not name", "fast"),
    "result.json is torn": (lambda s: tear(s.tuned.files.result), "result.json is not JSON", "fast"),
    "result.json is gone": (lambda s: s.tuned.files.result.unlink(), "result.json is missing, and the run is FINISHED", "fast"),
    "result.json of another run": (lambda s: edit(s.tuned.files.result, run_id="0" * 32), "result.json is that of run 0000", "fast"),
    "test_metrics.json differs": (lambda s: edit(s.tuned.files.test_metrics, **{"test/loss": 0.5}), "another value of test/loss", "fast"),
    "changes.jsonl": (lambda s: s.tuned.files.changes.write_text("{}\n"), "changes.jsonl lacks", "fast"),
    "lineage.jsonl": (lambda s: s.trial.files.lineage.write_bytes(b"{\n"), "lineage.jsonl has a line that is not", "fast"),
    "the artifact is gone": (lambda s: s.tuned.files.artifact(INSTRUCTION).unlink(), "model.pt is missing", "fast"),
    "the best checkpoint is gone": (lambda s: (s.tuned.checkpoints / BEST).unlink(), f"{BEST} is missing, which result.json", "fast"),
    "another best checkpoint": (
        lambda s: shutil.copy(s.tuned.checkpoints / BEST, s.tuned.checkpoints / "best-epoch=09-x=1.ckpt"),
        "best-epoch=09-x=1.ckpt is not the best checkpoint",
        "fast",
    ),
    "a file half written": (lambda s: (s.tuned.path / ".model.pt.aside-1").touch(), "aside-1 was left half written", "fast"),
    "the sweep's table is gone": (lambda s: s.sweep.files.trials_table.unlink(), "trials.csv is missing", "fast"),
    "the study is torn": (lambda s: tear(s.sweep.files.study), "study.jsonl has a line that is not", "fast"),
    "a trial's record is torn": (lambda s: tear(s.sweep.files.trials / "000.json"), "000.json is not JSON", "fast"),
    "a line of metrics.jsonl is zeros": (lambda s: zero_line(s.tuned.files.metrics), "metrics.jsonl has damaged lines: 1", ""),
    "metrics_summary.json is another": (lambda s: edit(s.tuned.files.metrics_summary, metrics={}), "is not the summary", ""),
    "last.ckpt is torn": (lambda s: tear(s.tuned.files.last_checkpoint), "last.ckpt is damaged", ""),
    "a checkpoint is a link to nowhere": (
        lambda s: (s.tuned.checkpoints / "a.ckpt").symlink_to("b"),
        "a.ckpt cannot be read: No such file",
        "",
    ),
    "a bit of the artifact flipped": (lambda s: flip(s.tuned.files.artifact(INSTRUCTION)), "the digest in it differs", ""),
    "another whole artifact": (
        lambda s: edit(s.tuned.files.result, digest="0" * 64),
        f"result.json has {'0' * 12}",
        "",
    ),
    # between runs
    "a launch's record is torn": (lambda s: tear(launch_record(s.root, "failed")), "failed.json is not JSON", "fast"),
    "a launch's record is gone": (lambda s: launch_record(s.root, "failed").unlink(), "failed.json does not record this run", "fast"),
    "a directory is gone": (lambda s: shutil.rmtree(s.failed.path), "is gone, where launch failed has its run", "fast"),
    "a directory and its launch are gone": (
        lambda s: without(s.failed.path, launch_record(s.root, "failed")),
        "has this run (FAILED), and there is no directory",
        "fast",
    ),
    "a run is copied": (copied, "is a copy; the run itself is", "fast"),
    "the aligner is another": (
        lambda s: edit(s.tuned.files.record, inputs={"model.aligner=x": {"content": "0"}}),
        "aligner.pt has another content than the aligner",
        "",
    ),
    "the initial weights are others": (
        lambda s: edit(s.trial.files.record, inputs={"model.init=x": {"content": "0"}}),
        "aligner.pt has another content than the weights that this run began with",
        "",
    ),
    "the sweep is gone": (lambda s: without_sweep(s), "has no directory of sweep", "fast"),
    "a trial has no run": (
        lambda s: write_json(s.sweep.files.trials / "001.json", {"number": 1, "values": {}, "launch_id": "x"}),
        "001.json is the record of a trial that has no run",
        "fast",
    ),
    # in MLflow
    "orphaned": (lambda s: s.failed.files.write_status("RUNNING"), "status.json has RUNNING, and no process works on it", "fast repaired"),
    "unborn": (unborn, "has this run as RUNNING; launch unborn was killed before", "fast repaired"),
    "not sent": (lambda s: note(s.tuned, 4), "does not have yet: points", "fast repaired"),
    "a tag was added": (lambda s: s.tuned.add_tags({"keep": "true"}), "does not have yet: settings and tags", "fast repaired"),
    "the record of what was sent is torn": (lambda s: tear(s.tuned.files.sync_state), ".mirror.json is damaged", "fast repaired"),
    "deleted in MLflow": (lambda s: s.client.delete_run(s.tuned.run_id), "has this run as deleted; restore it", "fast"),
    "another status in MLflow": (lambda s: s.client.set_terminated(s.tuned.run_id, "KILLED"), "has the status KILLED", "fast repaired"),
    "another end in MLflow": (lambda s: s.client.set_terminated(s.tuned.run_id, "FINISHED", 1), "another time at which", "fast repaired"),
    "a tag in MLflow": (
        lambda s: s.client.set_tag(s.trial.run_id, "mlflow.parentRunId", "x"),
        "has the tag mlflow.parentRunId as 'x'",
        "fast repaired",
    ),
    "a tag is gone in MLflow": (
        lambda s: s.client.delete_tag(s.trial.run_id, SWEEP_TAG),
        f"lacks tags that were sent: {SWEEP_TAG}",
        "fast repaired",
    ),
    "parameters are gone in MLflow": (
        lambda s: s.sql("DELETE FROM params WHERE run_uuid = ? AND key = 'seed'", s.tuned.run_id),
        "lacks parameters that were sent: seed",
        "fast repaired",
    ),
    "another parameter in MLflow": (
        lambda s: s.sql("UPDATE params SET value = 'x' WHERE run_uuid = ? AND key = 'seed'", s.tuned.run_id),
        "lacks tags that were sent: raytrain2p.changed.seed",
        "fast repaired",
    ),
    "points are gone in MLflow": (
        lambda s: s.sql("DELETE FROM metrics WHERE run_uuid = ? AND key = 'train_loss' AND step = 2", s.tuned.run_id),
        "metric train_loss, lacks 1 of 3 points, the first at step 2",
        "repaired",
    ),
    "another value in MLflow": (
        lambda s: s.sql("UPDATE metrics SET value = 9 WHERE run_uuid = ? AND key = 'train_loss' AND step = 2", s.tuned.run_id),
        "has 1 other points, the first at step 2: value 9.0, here 0.5",
        "",
    ),
    "another point in MLflow": (
        lambda s: s.client.log_metric(s.tuned.run_id, "train_loss", 1.0, step=7),
        "has 1 points that metrics.jsonl lacks, the first at step 7",
        "",
    ),
    "another metric in MLflow": (lambda s: s.client.log_metric(s.tuned.run_id, "theirs", 1.0, step=7), "metric theirs, has 1 points", ""),
    "an artifact is gone in MLflow": (
        lambda s: (mlruns(s, s.tuned) / "model/model.pt").unlink(),
        "lacks the artifact model/model.pt",
        "repaired",
    ),
    "an artifact in MLflow is damaged": (
        lambda s: flip(mlruns(s, s.tuned) / "model/model.pt"),
        "another content of the artifact model/",
        "repaired",
    ),
}


def zero_line(path: Path) -> None:
    """As a power failure leaves it."""
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(bytes(len(first)) + b"\n" + rest)


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_one_line_that_names_it(damage: str, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    do, words, properties = DAMAGES[damage]
    do(store)
    code, found = verify(store.settings, capsys)
    assert (code, len(found["differences"])) == (1, 1), lines(found)
    assert words in lines(found)[0]
    if "fast" in properties:
        assert verify(store.settings, capsys, "--fast")[1]["differences"] == found["differences"]
    if "repaired" in properties:
        assert re.search("|".join(DONE), lines(found)[0]), "it names what repairs it"
        code, found = verify(store.settings, capsys, "--repair")
        assert (code, lines(found)) == (0, [])


# what is no difference


@pytest.mark.parametrize("words", [(), ("--fast",)])
def test_a_whole_store_gives_nothing(store: Store, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, found = verify(store.settings, capsys, *words)
    assert (code, lines(found), found["refused"], found["runs"]) == (0, [], [], 5)
    if not words:
        assert found["points"] == 4 * 7
        assert found["bytes"] > 10_000
    assert runs.main(["verify", f"output.root={store.root}", *words]) == 0
    assert re.fullmatch(r"5 runs(, 28 points, [0-9.]+ kB)? in [0-9.]+ s: nothing differs\n", capsys.readouterr().out)


def test_the_plain_file_store_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_in(tmp_path, OWN, store="file")
    prepare_store(settings, EXPERIMENT)
    store = store_of(settings, tmp_path, "file")
    assert verify(settings, capsys)[1]["differences"] == []
    path = mlruns(store, store.tuned).parent / "metrics" / "train_loss"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    assert [one["what"] for one in verify(settings, capsys)[1]["differences"]] == ["has 1 points more than once, such as step 2"]


def test_a_run_under_way_is_checked_as_far_as_it_is(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.tuned.files.write_status("RUNNING")
    note(store.tuned, 4)
    (store.tuned.path / ".model.pt.aside-1").touch()
    with lock_holder(store.tuned.files.lock.path):
        code, found = verify(store.settings, capsys)
        assert (code, lines(found), found["under_way"]) == (0, [], 1)
        tear(store.tuned.files.result)
        assert [one["where"] for one in verify(store.settings, capsys)[1]["differences"]] == [str(store.tuned.files.result)]


def test_a_launch_that_is_about_to_make_its_directory_is_no_difference(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    unborn(store)
    with lock_holder(launch_lock(store.root, "unborn").path):
        assert verify(store.settings, capsys)[0] == 0


def test_what_mlflow_will_never_take_is_listed_and_is_no_difference(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsFile(store.tuned.files.metrics).append([MetricPoint("what?", 1.0, 1, 1.7e9)])
    MlflowSync(store.tuned, store.settings.tracking.uri).send()
    code, found = verify(store.settings, capsys)
    assert (code, lines(found)) == (0, [])
    assert ["metric `what?`" in line for line in found["refused"]] == [True]


def test_a_description_that_was_edited_in_mlflow_is_no_difference(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.tuned.add_tags({"mlflow.note.content": "ours"})
    MlflowSync(store.tuned, store.settings.tracking.uri).send()
    store.client.set_tag(store.tuned.run_id, "mlflow.note.content", "theirs")
    assert verify(store.settings, capsys)[0] == 0


def test_a_setting_that_a_resume_changed_is_no_difference(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    describe_run(store.failed, resolved_config(store.settings, {"training.max_steps": 7}), "command", {})
    store.failed.files.write_status("FAILED")
    assert ["settings and tags, files, status" in line for line in lines(verify(store.settings, capsys)[1])] == [True]
    assert verify(store.settings, capsys, "--repair")[0] == 0
    assert store.client.get_run(store.failed.run_id).data.tags["raytrain2p.changed.training.max_steps"] == "7"


# when something is away, or was moved


def test_the_disk_is_verified_while_mlflow_is_away(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with away(store.settings):
        code, found = verify(store.settings, capsys)
        assert (code, ["was not compared: " in line for line in lines(found)]) == (1, [True])
        tear(store.tuned.files.last_checkpoint)
        assert ["last.ckpt is damaged" in line for line in lines(verify(store.settings, capsys)[1])] == [False, True]
    code, found = verify(store.settings, capsys, store.aligned.run_id, f"tracking.uri={NOBODY}")
    assert (code, ["MLflow is away" in line for line in lines(found)]) == (1, [True])


def test_a_moved_root_is_told_and_repaired(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = settings_in(tmp_path)
    Path(store.root).rename(moved.output.root)
    store.client.create_run("1", tags={LAUNCH_TAG: "gone", ROOT_TAG: store.root, "raytrain2p.command": "x"}, run_name="phase2_2_3")
    _, found = verify(moved, capsys)
    told = lines(found)
    assert [MOVED in line for line in told] == [True] * 5 + [False]
    assert "there is no directory of it under" in told[-1], "a run of the root that was moved"
    assert lines(verify(moved, capsys, "--repair")[1]) == []


def test_runs_are_verified_by_name(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    tear(store.tuned.files.result)
    assert verify(store.settings, capsys, store.aligned.run_id[:8])[0] == 0
    assert verify(store.settings, capsys, store.tuned.run_id[:8])[0] == 1
    assert runs.main(["verify", f"output.root={store.root}", "nonsense"]) == 2


def test_without_any_run_the_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["verify", f"output.root={tmp_path}/none"]) == 2
    assert "has no runs" in capsys.readouterr().err


def test_fast_loads_no_torch(store: Store) -> None:
    code = "import sys; from raytrain2p.runs.__main__ import main; main(); sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "verify", "--fast", f"output.root={store.root}"], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_file_that_cannot_be_read_is_a_difference_of_its_run_and_ends_nothing_else(settings: Settings) -> None:
    run = create(settings)

    def check(error: OSError) -> Iterator[Difference]:
        raise error
        yield

    (found,) = readable(run, check(PermissionError(13, "Permission denied", str(run.files.metrics))))
    assert (found.run_id, found.where, found.what) == (run.run_id, str(run.files.metrics), "cannot be read: Permission denied")
    gone = FileNotFoundError(2, "No such file or directory", str(run.files.status))
    assert [*readable(run, check(gone), alive=True)] == [], "it was replaced just now"
    assert len([*readable(run, check(gone))]) == 1
