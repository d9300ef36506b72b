"""aligner.pt and model.pt: complete or refused."""

import pickle
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain2p.config import InputError
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, Phase
from raytrain2p.models.artifacts import FORMAT_VERSION, check_fingerprint, check_weights, load_artifact, save_artifact
from raytrain2p.models.pretrained import fingerprint

PARTS: dict[str, Any] = {"shape": {"dimension": 2}, "state_dict": {}}
ENCODERS = {"image": {"name": "some-encoder", "options": {"size": 64}, "fingerprint": "a" * 64}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "aligner.pt"
    save_artifact(path, ALIGNMENT, {"training": {"seed": 1}}, ENCODERS, **PARTS | {"state_dict": {"w": torch.arange(6.0)}})
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
    save_artifact(saved, ALIGNMENT, {}, ENCODERS, **PARTS)
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
    save_artifact(path, INSTRUCTION, {}, {}, language_model={}, system_prompt=None, **PARTS)
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


def test_no_flipped_bit_is_used(tmp_path: Path) -> None:
    """Each is refused, or is in a place of the file that nothing is read from: the content is what was written."""
    path, lots = tmp_path / "aligner.pt", random.Random(3)
    weights = {"w": torch.randn(3, 4), "b": torch.randn(4).bfloat16(), "n": torch.tensor(7), "none": torch.zeros(0, 2)}
    save_artifact(path, ALIGNMENT, {"seed": 1}, ENCODERS, **PARTS | {"state_dict": weights})
    content, written, refused = path.read_bytes(), load_artifact(path, ALIGNMENT), 0
    for place in range(lots.randrange(4), len(content), 4):
        damaged = bytearray(content)
        damaged[place] ^= 1 << lots.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_artifact(path, ALIGNMENT)
        except InputError as error:
            said = str(error)
        else:
            said = ""
            assert all(torch.equal(found["state_dict"][name], value) for name, value in weights.items()), place
            assert {**found, "state_dict": None} == {**written, "state_dict": None}, place
        refused += bool(said)
        assert not said or said.startswith(f"1 problem; nothing was started\n  {path}\n")
    assert refused > 300


def test_a_flipped_bit_of_the_weights_is_reported_with_the_file_and_a_fix(saved: Path) -> None:
    content = saved.read_bytes()
    place = content.index(torch.arange(6.0).numpy().tobytes()) + 9
    saved.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    message = problem_of(saved)
    assert "is damaged: its content is not what was written" in message
    assert "fix: restore it from a copy, or train it anew" in message


def test_an_artifact_of_the_version_before_digests_is_read_and_gets_the_digest_of_its_content(saved: Path) -> None:
    older = torch.load(saved, weights_only=True)
    del older["digest"]
    torch.save(older | {"format_version": 2}, saved)
    assert len(load_artifact(saved, ALIGNMENT)["digest"]) == 64
    torch.save(older, saved)
    assert "is damaged" in problem_of(saved), "one of this version must have a digest"


def test_an_artifact_that_lacks_parts_is_refused_with_all_of_them_named(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    save_artifact(path, INSTRUCTION, {}, {}, shape={}, state_dict=None)
    assert "lacks parts of a model.pt: state_dict, language_model, system_prompt" in problem_of(path, INSTRUCTION)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, "lacks weights: a, b, c and 1 more"),
        (dict.fromkeys("abcd", (2, 2)) | {"e": (2, 2)}, "has unknown weights: e"),
        (dict.fromkeys("abcd", (2, 2)) | {"b": (2,)}, "has other shapes of weights: b"),
    ],
)
def test_weights_that_do_not_fit_the_model_are_refused(tmp_path: Path, found: dict[str, tuple[int, ...]], said: str) -> None:
    required = {name: torch.empty(2, 2, device="meta") for name in "abcd"}
    with pytest.raises(InputError) as caught:
        check_weights(tmp_path / "model.pt", {name: torch.zeros(shape) for name, shape in found.items()}, required)
    assert said in str(caught.value)
    check_weights(tmp_path / "model.pt", dict.fromkeys("abcd", torch.zeros(2, 2)), required)


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


def test_another_frozen_model_is_refused_with_both_models_named(saved: Path, tiny_vit: Path) -> None:
    artifact = load_artifact(saved, ALIGNMENT)
    with pytest.raises(InputError) as caught:
        check_fingerprint(saved, artifact["encoders"]["image"], "new-encoder", tiny_vit, "model.encoders.image")
    for needed in ("model.encoders.image=new-encoder", fingerprint(tiny_vit)[:12], "some-encoder", "a" * 12, str(saved)):
        assert needed in str(caught.value)


def test_the_same_frozen_model_is_accepted_under_another_name(saved: Path, tiny_vit: Path) -> None:
    needed = {"name": "some-encoder", "fingerprint": fingerprint(tiny_vit)}
    check_fingerprint(saved, needed, "renamed", tiny_vit, "model.encoders.image")
