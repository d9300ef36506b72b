"""`model.init` in the driver: how it is found, what is refused before anything starts, what a resumed run keeps. Nothing is started."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from raytrain2p import train
from raytrain2p.config import InputError, InstructionSettings, load_settings
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.launch.driver import check, check_artifacts_are_there
from raytrain2p.launch.progress import Console
from raytrain2p.models.artifacts import load_artifact, save_artifact
from raytrain2p.phases.instruction.module import build, export
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.run import SWEEP_TAG, Run
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from raytrain2p.worker.job import Outcome

DryRun = Callable[..., str]


@pytest.fixture
def dry_run(tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> DryRun:
    """Runs the command with `--dry-run`, and returns what it printed on both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(tmp_path / "features"))
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))

    def run(*overrides: str, code: int = 0) -> str:
        capsys.readouterr()
        words = ["--phase", "2", "--config", str(tiny_config / "phase2.yaml"), "--dry-run", "training.learning_rate=1e-4", *overrides]
        assert train.main(words) == code
        assert not ray.is_initialized()
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def finished(dry_run: DryRun, tmp_path: Path, tiny_config: Path, untrained_aligner: Path) -> Callable[..., Run]:
    """Makes a phase 2 run with a model.pt, by the first letter of its ID."""

    def make(letter: str, status: str = "FINISHED", *overrides: str, **tags: str) -> Run:
        settings = load_settings(2, tiny_config / "phase2.yaml", [f"model.aligner={untrained_aligner}", *overrides])
        assert isinstance(settings, InstructionSettings)
        run_id = letter * 32
        directory = f"{tmp_path}/checkpoints/phase2/{run_id}_20260101_00000{ord(letter) - ord('a')}"
        run = Run(run_id, directory, "e", directory[-15:], f"launch-{letter}", "phase2", "x")
        run.checkpoints.mkdir(parents=True)
        describe_run(run, resolved_config(settings, {}), "command", {})
        run.add_tags(tags)
        path = run.files.artifact(INSTRUCTION)
        export(build(settings, 1, "float32"), path, {})
        digest = load_artifact(path, INSTRUCTION)["digest"]
        write_json(run.files.result, asdict(Outcome(run_id, directory, None, None, str(path), {}, 6, digest)))
        run.files.write_status(status)
        return run

    return make


def change(run: Run, value: float) -> None:
    """Write other weights into a model.pt, with a digest of their own."""
    path = run.files.artifact(INSTRUCTION)
    content = {key: value for key, value in load_artifact(path, INSTRUCTION).items() if key not in ("digest", "phase", "format_version")}
    content["state_dict"]["projector.gain"] = torch.full_like(content["state_dict"]["projector.gain"], value)
    save_artifact(path, INSTRUCTION, **content)


def test_a_model_is_found_as_a_run_is_and_needs_no_aligner(finished: Callable[..., Run], dry_run: DryRun) -> None:
    run = finished("a")
    path = run.files.artifact(INSTRUCTION)
    for name in (run.run_id[:6], run.directory, str(path), "latest"):
        said = dry_run(f"model.init={name}")
        assert f"model.init: {path}\n" in said
        assert f"\n  init: {path}\n  aligner: null\n" in said
        assert "nothing was started" in said
    finished("b", "FAILED")
    finished("c", "FINISHED", **{SWEEP_TAG: "d" * 32})
    assert f"\n  init: {path}\n" in dry_run("model.init=latest"), "never a run that failed, or a trial"


def test_all_that_does_not_agree_is_refused_at_once(finished: Callable[..., Run], dry_run: DryRun, tiny_bert: Path) -> None:
    path = finished("a").files.artifact(INSTRUCTION)
    other = (
        "model.soft_tokens=5",
        "model.projector=linear",
        "model.lora.rank=8",
        f"model.encoders.image={tiny_bert}",
        "model.aligner=nowhere",
    )
    said = dry_run(f"model.init={path}", *other, "data.train=nowhere.jsonl", code=2)
    assert "6 problems; nothing was started" in said
    for where in (*other, "model.lora.rank=8", "data.train="):
        assert f"\n  {where}" in said, where
    assert f"model.init={path} was trained with model.soft_tokens=4\n    fix: set model.soft_tokens=4, or leave out model.init" in said


def test_a_run_that_failed_or_has_another_model_than_it_recorded_is_refused(
    finished: Callable[..., Run], dry_run: DryRun, untrained_aligner: Path
) -> None:
    failed, replaced, diverged = finished("a", "FAILED"), finished("b"), finished("c")
    assert f"model.init={'a' * 8}\n    run aaaaaaaa FAILED after it wrote" in dry_run(f"model.init={'a' * 8}", code=2)
    assert "FAILED after it wrote" in dry_run(f"model.init={failed.files.artifact(INSTRUCTION)}", code=2)
    change(replaced, 1.0)
    assert "is not the one that run bbbbbbbb recorded" in dry_run(f"model.init={'b' * 8}", code=2)
    diverged.files.result.unlink()
    change(diverged, torch.inf)
    assert "has weights that are not finite: projector.gain" in dry_run(f"model.init={'c' * 8}", code=2)
    for name in ("nothing", str(untrained_aligner)):
        assert "1 problem;" in dry_run(f"model.init={name}", code=2), name


@pytest.fixture
def warm(finished: Callable[..., Run], tiny_config: Path, tmp_path: Path) -> tuple[Run, Run, Any]:
    """A run, one that began with its weights when it was the latest, and the settings of that as they were typed."""
    parent = finished("a")
    asked = load_settings(2, tiny_config / "phase2.yaml", ["model.init=latest"])
    settings, inputs = check(asked, 2, Console())
    run = Run("e" * 32, f"{tmp_path}/checkpoints/phase2/{'e' * 32}_20260102_000000", "e", "20260102_000000", "warm", "phase2", "x")
    run.checkpoints.mkdir(parents=True)
    describe_run(run, resolved_config(settings, {}), "command", asdict(inputs.digests))
    return parent, run, asked


def test_a_resumed_run_keeps_the_weights_that_it_began_with(warm: tuple[Run, Run, Any], finished: Callable[..., Run]) -> None:
    parent, run, asked = warm
    path = parent.files.artifact(INSTRUCTION)
    assert (run.files.read_record() or {})["inputs"][f"model.init={path}"] == {"content": load_artifact(path, INSTRUCTION)["digest"]}
    finished("b")
    parent.files.write_status("FAILED")  # it was resumed, and diverged
    settings, _ = check(asked, 2, Console(), run)
    assert (settings.model.init, settings.model.aligner) == (str(path), None)  # type: ignore[union-attr]
    without = asked.model_copy(update={"model": asked.model.model_copy(update={"init": None})})
    with pytest.raises(InputError, match=rf"model.init=None\n    cannot change: run eeeeeeee began with {path}"):
        check(without, 2, Console(), run)
    change(parent, 0.5)
    with pytest.raises(InputError, match=rf"model.init={path}\n    has other content \(content\) than run eeeeeeee began with"):
        check(asked, 2, Console(), run)
    check(asked, 2, Console(), run, accept_changed_inputs=True)


def test_a_model_that_was_deleted_since_the_checks_is_refused(warm: tuple[Run, Run, Any]) -> None:
    parent, run, asked = warm
    settings, _ = check(asked, 2, Console(), run)
    check_artifacts_are_there(settings)
    parent.files.artifact(INSTRUCTION).unlink()
    with pytest.raises(InputError, match=r"model.init=.*\n    was deleted just now"):
        check_artifacts_are_there(settings)
    with pytest.raises(InputError, match=r"model.init=.*\n    is neither a file"):
        check(asked, 2, Console(), run)
