"""`runs find`: directory and MLflow run of each other; by sweep, aligner and data."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain2p.config import Settings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION
from raytrain2p.models.artifacts import load_artifact, save_artifact
from raytrain2p.runs import __main__ as runs
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import SWEEP_TAG, Run
from tests.runs.made import printed, sent, trained
from tests.tracking.stores import NOBODY, settings_in

SWEEP = "5" * 32


def warm_starts(parent: Run, folder: Path) -> dict[str, Run]:
    """Runs that began with the weights of a run, from its directory, and from a copy in the folder."""
    model, copy, made = parent.files.artifact(INSTRUCTION), folder / "weights.pt", dict[str, Run]()
    parts: dict[str, Any] = {"shape": {}, "state_dict": {"weight": torch.ones(3)}, "language_model": {}, "system_prompt": None}
    save_artifact(model, INSTRUCTION, {}, {}, **parts)
    shutil.copy(model, copy)
    content = load_artifact(model, INSTRUCTION)["digest"]
    for name, path in (("warm", model), ("far", copy)):
        inputs = {"inputs": {f"model.init={path}": {"content": content}}, "train_digest": "123456ab" * 8}
        made[name] = trained(settings_in(folder, f"model.init={path}", "data.train=w.jsonl"), name, [1.0], facts=inputs)
    return made


@pytest.fixture
def family(settings: Settings, tmp_path: Path) -> dict[str, Run]:
    """An aligner; phase 2 runs that took it from its directory, from a copy elsewhere, and from another aligner; the last is a trial. And
    warm starts."""
    aligner = trained(settings_in(tmp_path, phase=1), "aligner", [1.0], phase="alignment", facts={"train_digest": "abcdef12" * 8})
    artifact, copy = aligner.files.artifact(ALIGNMENT), tmp_path / "copy.pt"
    save_artifact(artifact, ALIGNMENT, {}, {}, shape={}, state_dict={"weight": torch.ones(2)})
    shutil.copy(artifact, copy)
    content = load_artifact(artifact, ALIGNMENT)["digest"]
    made = {"aligner": aligner}
    for name, path, digest in (("direct", artifact, content), ("copied", copy, content), ("other", tmp_path / "other.pt", "0" * 64)):
        if name == "other":
            made |= warm_starts(made["direct"], tmp_path)
        inputs = {"inputs": {f"model.aligner={path}": {"content": digest}}, "train_digest": "123456ab" * 8}
        made[name] = trained(settings_in(tmp_path, f"model.aligner={path}", f"data.train=[{name}.jsonl]"), name, [1.0], facts=inputs)
    made["other"].add_tags({SWEEP_TAG: SWEEP})
    return made


def found(family: dict[str, Run], capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The names of the runs that `find` finds."""
    names = {run.run_id: name for name, run in family.items()}
    return [names[one["run_id"]] for one in printed(family["direct"].path.parent.parent, capsys, "find", *words)]


def test_runs_are_found_by_aligner_sweep_and_data_from_the_directories(
    family: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, names in (
        (("--aligner", family["aligner"].run_id[:9]), ["direct", "copied"]),
        (("--aligner", "latest"), ["direct", "copied"]),
        (("--aligner", str(tmp_path / "copy.pt")), ["direct", "copied"]),
        (("--init", family["direct"].run_id[:9]), ["warm", "far"]),
        (("--init", str(tmp_path / "weights.pt")), ["warm", "far"]),
        (("--init", str(tmp_path / "copy.pt")), []),
        (("--sweep", SWEEP[:5]), ["other"]),
        (("--data", str(Path("direct.jsonl").absolute())), ["direct"]),
        (("--data", "direct.jsonl"), ["direct"]),
        (("--data", "emoji:val"), ["aligner"]),
        (("--data", "abcdef12"), ["aligner"]),
        (("--data", "123456", "latest", "direct"), ["direct", "far"]),  # the newest that is no trial
        (("--data", "123456", "--sweep", SWEEP), ["other"]),
        (("--data", "nothing.jsonl"), []),
    ):
        assert found(family, capsys, "--no-mlflow", *words) == names, words


def test_a_run_is_found_from_its_directory_and_from_its_id_with_what_mlflow_has(
    settings: Settings, family: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, uri = family["direct"].path.parent.parent, f"tracking.uri={settings.tracking.uri}"
    for run in family.values():
        sent(run)
    client_of(settings.tracking.uri).delete_run(family["other"].run_id)
    moved = tmp_path / "elsewhere"
    shutil.move(family["copied"].directory, moved)
    by = {name: printed(root, capsys, "find", uri, run.run_id) for name, run in family.items()}
    assert all([one["run_id"] for one in by[name]] == [run.run_id] for name, run in family.items())
    assert by["direct"][0]["directory"] == family["direct"].directory
    assert by["direct"][0]["mlflow"] == {"experiment": "phase2_training", "status": "FINISHED", "lifecycle": "active"}
    assert by["other"][0]["mlflow"]["lifecycle"] == "deleted"
    assert (by["copied"][0]["directory"], by["copied"][0]["recorded_directory"]) == (None, family["copied"].directory)
    assert runs.main(["find", f"output.root={root}", uri, family["copied"].run_id[:8]]) == 0
    assert f"directory  not here, recorded as {family['copied'].directory}" in capsys.readouterr().out
    pair = printed(root, capsys, "find", uri, "latest", "aligner")
    assert [one["mlflow"]["status"] for one in pair] == ["FINISHED", "FINISHED"]
    nowhere = tmp_path / "nowhere"
    (one,) = printed(nowhere, capsys, "find", uri, family["direct"].directory)  # the directory is of another root
    assert (one["directory"], one["mlflow"]["status"]) == (family["direct"].directory, "FINISHED")
    root.rename(tmp_path / "gone")
    for words, names in (  # from MLflow alone
        (("--aligner", family["aligner"].run_id[:9]), ["direct"]),
        (("--init", family["direct"].run_id[:9]), ["warm"]),
        (("--sweep", SWEEP[:5]), ["other"]),
        (("--data", "direct.jsonl"), ["direct"]),
        ((family["direct"].directory,), ["direct"]),
        (("copied",), ["copied"]),
    ):
        assert found(family, capsys, uri, *words) == names, words


def test_a_store_that_is_away_is_a_line_and_the_directories_are_found(family: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    root = family["direct"].path.parent.parent
    assert runs.main(["find", f"output.root={root}", f"tracking.uri={NOBODY}", "direct"]) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == err.count(f"tracking.uri={NOBODY}: MLflow is away") == 1
    assert out.splitlines()[1:] == [f"  directory  {family['direct'].directory}", "  MLflow     MLflow does not answer"]


def test_what_fits_nothing_is_a_problem_and_a_damaged_run_a_line(family: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    root = f"output.root={family['direct'].path.parent.parent}"
    content = load_artifact(family["aligner"].files.artifact(ALIGNMENT), ALIGNMENT)["digest"]
    for words, problem in (
        (("zz", "yy"), "2 problems"),
        (("--aligner", "zz"), "no run came from it"),
        (("--init", "zz"), "--init zz"),
        (("--aligner", str(family["direct"].files.config)), "is not a valid aligner.pt"),
    ):
        assert runs.main(["find", "--no-mlflow", root, *words]) == 2
        assert problem in capsys.readouterr().err
    artifact, result = family["aligner"].files.artifact(ALIGNMENT), family["aligner"].files.result
    artifact.write_bytes(b"torn")
    write_json(result, {"digest": content})
    assert found(family, capsys, "--no-mlflow", "--aligner", "aligner") == ["direct", "copied"]  # by the digest that the run recorded
    result.unlink()
    assert runs.main(["find", "--no-mlflow", root, "--aligner", "aligner"]) == 0  # by the place alone
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == f"{family['direct'].run_id}  phase2"
    assert out.count("directory") == err.count("copies of the aligner are not found") == 1
    family["copied"].files.config.write_text("{")
    assert runs.main(["find", "--no-mlflow", root]) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if not line.startswith(" ")] == [
        f"{run.run_id}  {run.phase}" for name, run in family.items() if name != "copied"
    ]
    assert err.count(str(family["copied"].files.config)) == 1
