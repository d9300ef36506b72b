"""A resumed run has the inputs that it began with, by content. Real files, the real command; nothing is started."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import ray
import torch
from PIL import Image

from raytrain2p import train
from raytrain2p.config import InputError, Settings, load_settings
from raytrain2p.config.console import Console
from raytrain2p.config.phases import ALIGNMENT, PHASES
from raytrain2p.launch.driver import check
from raytrain2p.models.artifacts import load_artifact, save_artifact
from raytrain2p.phases.registry import read_inputs
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.run import Run, launch_record
from raytrain2p.tracking.run_writer import describe_run, resolved_config

FIRST = "python -m raytrain2p.train --phase 2"
Begin = Callable[[int], tuple[Run, Settings]]


@pytest.fixture
def begin(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shapes: Path,
    tiny_config: Path,
    tiny_llama: Path,
    tiny_vit: Path,
    tiny_bert: Path,
    untrained_aligner: Path,
) -> Begin:
    """Begins a run of a phase on own copies of all inputs, which lie under `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(tmp_path / "features"))
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    for name, source in {"shapes": shapes, "llama": tiny_llama, "vit": tiny_vit, "bert": tiny_bert}.items():
        shutil.copytree(source, tmp_path / name)
    shutil.copy(tmp_path / "shapes" / "phase2.jsonl", tmp_path / "shapes" / "test.jsonl")
    shutil.copy(untrained_aligner, tmp_path / "aligner.pt")

    def run(phase: int) -> tuple[Run, Settings]:
        overrides = [f"output.root={tmp_path}/checkpoints", f"data.train={tmp_path}/shapes/phase{phase}.jsonl"]
        if phase == 1:
            overrides += ["model.encoders.image=vit", "model.encoders.text=bert", "data.val=null", "data.test={}"]
        else:
            overrides += ["model.encoders.image=vit", "model.language_model=llama", "model.aligner=aligner.pt"]
            overrides += ["data.val=shapes/phase2.jsonl", "data.test={same: shapes/test.jsonl}"]
        settings, _ = check(load_settings(phase, tiny_config / f"phase{phase}.yaml", overrides), phase, Console())
        name = PHASES[phase].name
        run = Run("a" * 32, f"{tmp_path}/checkpoints/{name}/{'a' * 32}_20260101_000000", "e", "20260101_000000", "first", name, "x")
        run.checkpoints.mkdir(parents=True)
        launch_record(settings.output.root, "any").parent.mkdir()
        write_json(launch_record(settings.output.root, "first"), asdict(run))
        describe_run(run, resolved_config(settings, {}), FIRST, asdict(read_inputs(settings, phase).digests))
        return run, settings

    return run


def resume(capsys: pytest.CaptureFixture[str], phase: int, *arguments: str) -> str:
    """The refusal of the command."""
    capsys.readouterr()
    code = train.main(["--phase", str(phase), *arguments])
    output = capsys.readouterr().err
    assert code == 2, output
    assert not ray.is_initialized()
    return output


def edit(path: Path, old: str, new: str) -> None:
    """In place; size and modification time stay."""
    assert len(old) == len(new)
    text, stat = path.read_text(), path.stat()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_weights(directory: Path) -> None:
    """One bit, with the size and the modification time as they were."""
    path = directory / "model.safetensors"
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_all_that_changed_is_named_in_one_go(begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = begin(2)
    Image.new("RGB", (32, 32), "green").save(tmp_path / "shapes" / "7.png")  # the records name it as before
    edit(tmp_path / "shapes" / "test.jsonl", "red", "RED")
    change_weights(tmp_path / "llama")
    edit(tmp_path / "llama" / "chat_template.jinja", "assistant", "Assistant")
    aligner = load_artifact(tmp_path / "aligner.pt", ALIGNMENT)
    weights = {name: value + 1 for name, value in aligner["state_dict"].items()}
    save_artifact(tmp_path / "aligner.pt", ALIGNMENT, {}, aligner["encoders"], shape=aligner["shape"], state_dict=weights)

    for how in (
        ["--resume", run.run_id[:8], f"output.root={tmp_path}/checkpoints"],
        ["--launch-id", "first", "--config", str(run.files.config)],
    ):
        said = resume(capsys, 2, *how)
        assert "5 problems" in said
        assert f"data.train={tmp_path}/shapes/phase2.jsonl\n    has other records or media" in said
        assert f"data.val={tmp_path}/shapes/phase2.jsonl\n    has other content (records) than run aaaaaaaa began with" in said
        assert f"data.test.same={tmp_path}/shapes/test.jsonl\n    has other content (records)" in said
        assert f"model.language_model={tmp_path}/llama\n    has other content (chat_template.jinja, model.safetensors)" in said
        assert f"model.aligner={tmp_path}/aligner.pt\n    has other content (content)" in said
        assert "--accept-changed-inputs" in said


def test_a_dry_run_of_a_resume_checks_the_inputs(begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, settings = begin(2)
    again = ["--resume", run.run_id, f"output.root={settings.output.root}", "--dry-run"]
    assert train.main(["--phase", "2", *again]) == 0
    change_weights(tmp_path / "llama")
    assert f"model.language_model={tmp_path}/llama\n    has other content (model.safetensors)" in resume(capsys, 2, *again)
    assert train.main(["--phase", "2", *again, "--accept-changed-inputs"]) == 0


def test_other_encoders_are_refused_in_phase_1(begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, settings = begin(1)
    change_weights(tmp_path / "vit")
    edit(tmp_path / "vit" / "preprocessor_config.json", "true", "true")  # written again as it was
    (tmp_path / "bert" / "special_tokens_map.json").write_text("{}")
    said = resume(capsys, 1, "--resume", run.run_id, f"output.root={settings.output.root}")
    assert "2 problems" in said
    assert f"model.encoders.image.name={tmp_path}/vit\n    has other content (model.safetensors) than run aaaaaaaa began with" in said
    assert f"model.encoders.text.name={tmp_path}/bert\n    has other content (special_tokens_map.json)" in said


def test_inputs_that_are_the_same_in_other_files_are_accepted(begin: Begin, tmp_path: Path) -> None:
    run, settings = begin(2)
    for name in ("shapes", "llama"):
        shutil.copytree(tmp_path / name, tmp_path / "copy")
        shutil.rmtree(tmp_path / name)
        (tmp_path / "copy").rename(tmp_path / name)
    check(settings, 2, Console(), run)


def test_accepted_inputs_are_recorded_with_the_time_and_the_command(begin: Begin, tmp_path: Path) -> None:
    run, settings = begin(2)
    edit(tmp_path / "shapes" / "phase2.jsonl", "red", "RED")
    (tmp_path / "llama" / "spiece.model").write_bytes(b"new")
    with pytest.raises(InputError):
        check(settings, 2, Console(), run)
    _, inputs = check(settings, 2, Console(), run, accept_changed_inputs=True)

    again = f"{FIRST} --resume latest --accept-changed-inputs"
    lines = describe_run(run, resolved_config(settings, {}), again, asdict(inputs.digests), launched=1_800_000_000.0)
    where = f"model.language_model={tmp_path}/llama"
    assert "data.train: other content (records), accepted" in lines
    assert f"{where}: other content (spiece.model), accepted" in lines
    accepted = {"data.train": ["records"], f"data.val={tmp_path}/shapes/phase2.jsonl": ["records"], where: ["spiece.model"]}
    (row,) = [json.loads(line) for line in run.files.changes.read_text().splitlines()]
    assert row == {"at": 1_800_000_000.0, "command": again, "changes": {}, "inputs": accepted}
    assert f"2027-01-15 08:00:00+00:00: {where} (spiece.model)" in run.files.tags()["raytrain2p.accepted_inputs"]
    page = run.files.readme.read_text()
    assert f"- other content accepted: `{where}` (`spiece.model`)" in page
    check(settings, 2, Console(), run)  # it has these inputs now


def test_the_digests_of_a_run_of_an_earlier_version_are_not_required(begin: Begin, tmp_path: Path) -> None:
    run, settings = begin(2)
    record = run.files.read_record() or {}
    run.files.write_record({key: value for key, value in record.items() if key not in ("inputs", "train_digest")})
    change_weights(tmp_path / "llama")
    edit(tmp_path / "shapes" / "phase2.jsonl", "red", "RED")
    check(settings, 2, Console(), run)


def test_a_test_split_that_the_settings_replace_is_a_changed_setting(begin: Begin, tmp_path: Path) -> None:
    run, _ = begin(2)
    shutil.copy(tmp_path / "shapes" / "test.jsonl", tmp_path / "shapes" / "other.jsonl")
    edit(tmp_path / "shapes" / "other.jsonl", "red", "RED")
    other = load_settings(2, run.files.config, ["data.test={same: shapes/other.jsonl}"])
    check(other, 2, Console(), run)


def test_an_end_before_the_last_checkpoint_is_refused_with_both_steps(begin: Begin, capsys: pytest.CaptureFixture[str]) -> None:
    run, settings = begin(2)
    torch.save({"global_step": 6}, run.files.last_checkpoint)
    root = f"output.root={settings.output.root}"
    said = resume(capsys, 2, "--resume", "latest", root, "training.max_steps=5")
    assert (
        "training.max_steps=5\n    ends at step 5, but run aaaaaaaa is at step 6 already\n    fix: set training.max_steps=6 or more" in said
    )
    run.files.last_checkpoint.write_bytes(b"torn")
    check(load_settings(2, run.files.config, ["training.max_steps=5"]), 2, Console(), run)
