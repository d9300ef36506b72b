"""aligner.pt and model.pt: complete or refused."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raytrain2p.config import InputError
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, Phase
from raytrain2p.models.artifacts import FORMAT_VERSION, check_fingerprint, load_artifact, save_artifact

ENCODERS = {"image": {"name": "some-encoder", "options": {"size": 64}, "fingerprint": "a" * 64}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "aligner.pt"
    save_artifact(path, ALIGNMENT, {"training": {"seed": 1}}, ENCODERS, state_dict={"w": torch.arange(6.0)})
    return path


def problem_of(path: Path, phase: Phase = ALIGNMENT) -> str:
    with pytest.raises(InputError) as caught:
        load_artifact(path, phase)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_an_artifact_comes_back_as_it_was_saved(saved: Path) -> None:
    artifact = load_artifact(saved, ALIGNMENT)
    assert artifact["config"] == {"training": {"seed": 1}}
    assert artifact["encoders"] == ENCODERS
    assert torch.equal(artifact["state_dict"]["w"], torch.arange(6.0))


def test_an_artifact_loads_without_running_code(saved: Path) -> None:
    assert torch.load(saved, weights_only=True)["phase"] == "alignment"


def test_saving_leaves_the_artifact_alone_in_its_directory(saved: Path) -> None:
    save_artifact(saved, ALIGNMENT, {}, ENCODERS, state_dict={})
    assert [path.name for path in saved.parent.iterdir()] == ["aligner.pt"]
    assert load_artifact(saved, ALIGNMENT)["config"] == {}


def test_a_failed_save_keeps_the_earlier_artifact_and_leaves_no_other_file(saved: Path) -> None:
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        save_artifact(saved, ALIGNMENT, {}, ENCODERS, state_dict={"w": lambda: None})
    assert load_artifact(saved, ALIGNMENT)["config"] == {"training": {"seed": 1}}
    assert [path.name for path in saved.parent.iterdir()] == ["aligner.pt"]


def test_a_kill_while_saving_leaves_no_partial_artifact(tmp_path: Path) -> None:
    """The process dies when all is written but not yet on disk for certain: the worst moment for a file written in place."""
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from raytrain2p.config.phases import INSTRUCTION\n"
        "from raytrain2p.models.artifacts import save_artifact\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_artifact(Path(sys.argv[1]), INSTRUCTION, {}, {}, state_dict={'w': torch.zeros(1000)})\n"
    )
    path = tmp_path / "model.pt"
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -signal.SIGKILL
    assert not path.exists()
    assert list(tmp_path.iterdir()), "the process died too early to show anything"
    assert not list(tmp_path.glob("[!.]*")), "what is left must not look like an artifact"
    save_artifact(path, INSTRUCTION, {}, {}, state_dict={})
    assert load_artifact(path, INSTRUCTION)["phase"] == "phase2"


def test_an_artifact_of_the_other_phase_is_refused_with_both_phases_named(saved: Path) -> None:
    message = problem_of(saved, INSTRUCTION)
    assert "`alignment`" in message
    assert "`phase2`" in message
    assert "model.pt" in message


def test_an_artifact_of_another_format_version_is_refused_with_both_versions_named(tmp_path: Path) -> None:
    path = tmp_path / "aligner.pt"
    torch.save({"format_version": FORMAT_VERSION + 41, "phase": "alignment"}, path)
    message = problem_of(path)
    assert str(FORMAT_VERSION + 41) in message
    assert f"reads {FORMAT_VERSION}" in message


@pytest.mark.parametrize("part", [0.5, 0.0])
def test_a_truncated_artifact_is_refused(saved: Path, part: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * part)])
    assert "torn" in problem_of(saved)


class Spy:
    """Unpickled, it would write a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.target, "code was run")


def test_a_foreign_pickle_is_refused_without_running_it(tmp_path: Path) -> None:
    path, trace = tmp_path / "aligner.pt", tmp_path / "trace"
    path.write_bytes(pickle.dumps(Spy(trace)))
    problem_of(path)
    torch.save({"format_version": FORMAT_VERSION, "phase": "alignment", "state_dict": Spy(trace)}, path)
    problem_of(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {"weights": 1}, torch.zeros(3)])
def test_a_torch_file_that_is_not_an_artifact_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "aligner.pt"
    torch.save(content, path)
    assert "not written by raytrain2p" in problem_of(path)


def test_a_missing_artifact_is_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    message = problem_of(tmp_path / "aligner.pt")
    assert "no such file" in message
    assert "run ID" in message


def test_another_frozen_model_is_refused_with_both_models_named(saved: Path) -> None:
    artifact = load_artifact(saved, ALIGNMENT)
    with pytest.raises(InputError) as caught:
        check_fingerprint(saved, artifact["encoders"]["image"], "new-encoder", "b" * 64, "model.encoders.image")
    for needed in ("model.encoders.image=new-encoder", "b" * 12, "some-encoder", "a" * 12, str(saved)):
        assert needed in str(caught.value)


def test_the_same_frozen_model_is_accepted_under_another_name(saved: Path) -> None:
    check_fingerprint(saved, load_artifact(saved, ALIGNMENT)["encoders"]["image"], "renamed", "a" * 64, "model.encoders.image")
