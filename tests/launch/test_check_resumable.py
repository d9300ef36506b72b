"""Which settings and inputs may resume a run, without a launch."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from raytrain2p import train
from raytrain2p.config import InputError, load_settings
from raytrain2p.launch.resume import check_resumable, finished_outcome
from raytrain2p.phases.inputs import InputDigests
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.run import Run, launch_record
from raytrain2p.tracking.run_writer import describe_run, resolved_config

DIGESTS = InputDigests(60, "a" * 64)
TRAINING = ("training.global_batch_size=8", "training.micro_batch_size=4")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run("0" * 32, str(tmp_path / "run"), "experiment", "20260101_000000", "launch", "phase2", "sqlite:///mlflow.db")
    run.path.mkdir()
    describe_run(run, resolved_config(load_settings(2, None, TRAINING), {}), "command", asdict(DIGESTS))
    return run


def refused(run: Run, *overrides: str, digests: InputDigests | None = DIGESTS) -> str:
    with pytest.raises(InputError) as caught:
        check_resumable(run, load_settings(2, None, [*TRAINING, *overrides]), digests)
    return str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [[], ["launch.num_workers=2"], ["training.micro_batch_size=8"], ["training.micro_batch_size=null", "launch.num_workers=4"]],
)
def test_workers_and_passes_may_change(run: Run, overrides: list[str]) -> None:
    check_resumable(run, load_settings(2, None, [*TRAINING, *overrides]), DIGESTS)


def test_sharded_states_are_those_of_one_number_of_workers(run: Run) -> None:
    sharded = (*TRAINING, "launch.strategy=fsdp", "launch.num_workers=1")
    describe_run(run, resolved_config(load_settings(2, None, sharded), {}), "command", asdict(DIGESTS))
    check_resumable(run, load_settings(2, None, sharded), DIGESTS)
    assert "launch.num_workers=2\n    cannot change: run 00000000 began with 1" in refused(
        run, "launch.strategy=fsdp", "launch.num_workers=2"
    )


def test_a_run_of_an_older_version_is_refused(run: Run) -> None:
    config = json.loads(run.files.config.read_text())
    config["training"] |= {"batch_size": 8, "accumulate": 2}
    del config["training"]["global_batch_size"]
    run.files.write_config(config)
    assert "this version does not have: training.batch_size, training.accumulate" in refused(run)


def test_the_global_batch_is_fixed(run: Run) -> None:
    said = refused(run, "training.global_batch_size=16")
    assert "training.global_batch_size=16\n    cannot change: run 00000000 began with 8\n    fix: set training.global_batch_size=8" in said


def test_an_encoder_cannot_be_added_or_taken_away(run: Run) -> None:
    said = refused(run, "model.encoders.audio=whisper-tiny.en")
    assert "model.encoders.audio.name=whisper-tiny.en\n    cannot change: run 00000000 began with None" in said
    config = json.loads(run.files.config.read_text())
    config["model"]["encoders"]["image"] = {"name": "efficientnet-lite0", "size": None}
    run.files.write_config(config)
    assert "model.encoders.image.name=None\n    cannot change: run 00000000 began with efficientnet-lite0" in refused(run)


def test_a_setting_that_the_runs_version_did_not_have_stays_at_its_default(run: Run) -> None:
    """Such a run trained as the default says: other rates in the middle of it would be accepted silently."""
    config = json.loads(run.files.config.read_text())
    del config["model"]["rate_factors"], config["model"]["projector"]
    run.files.write_config(config)
    check_resumable(run, load_settings(2, None, TRAINING), DIGESTS)
    said = refused(run, "model.rate_factors={projector: 2}", "model.projector=linear")
    assert "model.rate_factors.projector=2.0\n    cannot change: run 00000000 began with {}" in said
    assert "fix: set model.projector=mlp" in said


def test_a_mapping_that_began_with_entries_is_not_taken_for_its_default(run: Run) -> None:
    config = json.loads(run.files.config.read_text())
    config["model"]["soft_tokens"] = {"image": 32}
    run.files.write_config(config)
    for same in ("model.soft_tokens={image: 32}", "model.soft_tokens=32"):
        check_resumable(run, load_settings(2, None, [*TRAINING, same]), DIGESTS)
    assert "model.soft_tokens.image=16\n    cannot change: run 00000000 began with 32" in refused(run, "model.soft_tokens={image: 16}")


def test_an_encoder_that_the_runs_version_did_not_have_cannot_be_added(run: Run) -> None:
    config = json.loads(run.files.config.read_text())
    del config["model"]["encoders"]["audio"]
    run.files.write_config(config)
    check_resumable(run, load_settings(2, None, TRAINING), DIGESTS)
    assert "model.encoders.audio.name=whisper-tiny.en\n    cannot change: run 00000000 began with None" in refused(
        run, "model.encoders.audio=whisper-tiny.en"
    )


def test_another_number_of_records_is_refused(run: Run) -> None:
    assert "has 61 records; run 00000000 began with 60" in refused(run, digests=InputDigests(61, "b" * 64))


def test_other_records_of_the_same_number_are_refused(run: Run) -> None:
    said = refused(run, "seed=3", digests=InputDigests(60, "b" * 64))
    assert "2 problems" in said
    assert (
        "data.train=emoji:train\n    has other records or media, or the same in another order, than the 60 that run 00000000 began with"
        in said
    )
    assert "fix: give what it began with, begin a new run, or resume with --accept-changed-inputs" in said


def test_a_run_without_a_digest_is_compared_by_the_number_of_records(run: Run) -> None:
    recorded = json.loads((run.path / "run.json").read_text())
    del recorded["train_digest"]
    (run.path / "run.json").write_text(json.dumps(recorded))
    check_resumable(run, load_settings(2, None, TRAINING), InputDigests(60, "b" * 64))
    assert "has 61 records" in refused(run, digests=InputDigests(61, "b" * 64))


def test_a_run_with_models_and_records_in_a_jobs_working_directory_is_resumed_by_another_job(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = [tmp_path / session / "runtime_resources/working_dir_files/_ray_pkg_1" for session in ("before", "now")]
    for copy in copies:
        (copy / "model").mkdir(parents=True)
    config = json.loads(run.files.config.read_text())
    config["model"]["language_model"], config["data"]["train"] = f"{copies[0]}/model", f"{copies[0]}/records.jsonl"
    run.files.write_config(config)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(Path.cwd()))
    monkeypatch.chdir(copies[1])
    check_resumable(run, load_settings(2, None, [*TRAINING, "model.language_model=model", "data.train=records.jsonl"]), DIGESTS)
    settings = load_settings(2, run.files.config, run.files.moved_settings())
    assert settings.data.train[0].path == f"{copies[1]}/records.jsonl"


@pytest.mark.parametrize("name", ["run.json", "config.json", "status.json"])
def test_a_damaged_run_is_refused_with_its_file(run: Run, name: str) -> None:
    (run.path / name).write_bytes(bytes(10))
    assert f"{run.path / name}\n    has zero bytes alone" in refused(run)


def test_a_damaged_result_is_refused_with_how_to_make_it_again(run: Run) -> None:
    run.files.write_status("FINISHED")
    settings = load_settings(2, None, TRAINING)
    for content in ("", "[]", '{"run_id": 1}', '{"run_id": "a", "directory": "b"}'):
        run.files.result.write_text(content)
        with pytest.raises(InputError, match="remove it: the run is then evaluated again"):
            finished_outcome(run, settings, 60)
    run.files.result.unlink()
    assert finished_outcome(run, settings, 60) is None


@pytest.mark.parametrize("option", ["--resume", "--launch-id"])
def test_the_command_refuses_a_damaged_run_in_a_dry_run(
    tmp_path: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    folder = tmp_path / "checkpoints" / "alignment" / f"{'0' * 32}_20260101_000000"
    folder.mkdir(parents=True)
    run = Run("0" * 32, str(folder), "experiment", "20260101_000000", "launch", "alignment", "sqlite:///mlflow.db")
    settings = load_settings(1, tiny_config / "phase1.yaml")
    describe_run(run, resolved_config(settings, {}), "command", asdict(DIGESTS))
    record = launch_record(str(tmp_path / "checkpoints"), "launch")
    record.parent.mkdir()
    write_json(record, asdict(run))
    wanted = run.run_id[:8] if option == "--resume" else "launch"
    for path in (record, run.files.config):
        whole = path.read_bytes()
        path.write_bytes(whole[:40])
        assert train.main(["--phase", "1", option, wanted, "--dry-run", "--config", str(tiny_config / "phase1.yaml")]) == 2
        assert f"{path}\n    is not JSON" in capsys.readouterr().err
        path.write_bytes(whole)
