"""What all nodes must have, and how it is reported. With real nodes: tests/cluster/test_shared_files.py."""

import shutil
from pathlib import Path

import pytest

from raytrain2p.config import Problem, load_settings
from raytrain2p.launch import nodes
from raytrain2p.launch.nodes import Needed, Node, NodeFindings, needed
from raytrain2p.phases.registry import read_inputs
from tests.packages import needs_bitsandbytes


@pytest.mark.parametrize("features", ["stored", "online"])
def test_nodes_need_the_models_the_aligner_and_the_media_that_are_read_there(
    features: str, tiny_config: Path, untrained_aligner: Path, tiny_llama: Path, tiny_vit: Path, shapes: Path, tmp_path: Path
) -> None:
    store = tmp_path / "features"
    overrides = [f"model.aligner={untrained_aligner}", f"data.features={features}", f"data.feature_store={store}"]
    found = needed([read_inputs(load_settings(2, str(tiny_config / "phase2.yaml"), [*overrides, f"output.root={tmp_path}"]), 2)])
    assert [where for where in found.folders if "store" not in where] == [f"output.root={tmp_path}"]
    assert (f"data.feature_store={store}" in found.folders) == (features == "stored")
    assert set(found.files) == {
        f"model.language_model={tiny_llama}",
        f"model.encoders.image.name={tiny_vit}",
        f"model.aligner={untrained_aligner}",
        "media of the records",
    }
    assert found.files[f"model.aligner={untrained_aligner}"] == {str(untrained_aligner): untrained_aligner.stat().st_size}
    assert str(tiny_llama / "model.safetensors") in found.files[f"model.language_model={tiny_llama}"]
    assert len(found.files["media of the records"]) == 47, "of 48 records one has no image"
    assert set(found.files["media of the records"]) <= {str(path) for path in shapes.iterdir()}
    assert "bitsandbytes" not in found.packages


@needs_bitsandbytes
def test_nodes_need_bitsandbytes_for_a_language_model_in_4_bits(tiny_config: Path, untrained_aligner: Path, tmp_path: Path) -> None:
    given = [f"model.aligner={untrained_aligner}", f"data.feature_store={tmp_path}", "model.quantization=nf4"]
    found = needed([read_inputs(load_settings(2, str(tiny_config / "phase2.yaml"), given), 2)])
    assert "bitsandbytes" in found.packages
    assert NodeFindings(found).versions["bitsandbytes"][0].isdigit()


def test_an_object_storage_is_no_directory_that_nodes_must_share(
    tiny_config: Path, untrained_aligner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTRAIN2P_SCRATCH", str(tmp_path))
    aligner = tmp_path / "s3/b/p/aligner.pt"
    aligner.parent.mkdir(parents=True)
    shutil.copy(untrained_aligner, aligner)
    overrides = [f"model.aligner={aligner}", f"data.feature_store={tmp_path}/features", "output.root=s3://b/p"]
    found = needed([read_inputs(load_settings(2, str(tiny_config / "phase2.yaml"), overrides), 2)])
    assert list(found.folders) == [f"data.feature_store={tmp_path}/features"]
    assert not any(str(aligner) in where for where in found.files)


def test_of_many_files_some_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MOST_FILES", 5)
    for number in range(23):
        (tmp_path / f"{number}").touch()
    found = Needed()
    found.add_files("media", tmp_path.iterdir())
    assert 4 <= len(found.files["media"]) <= 5


def test_a_problem_names_all_of_its_nodes() -> None:
    fleet = [Node(f"{number}", f"gpu-{number} (10.0.0.{number})") for number in range(9)]
    found = NodeFindings(Needed({"output.root=/x": (Path("/x"), "mount it")}, {"model.language_model=/m": {"/m/config.json": 5}}))
    for node in fleet:
        wrong = {"output.root=/x": "does not exist"} if node != fleet[4] else {}
        found.add_answer(node, wrong, {"model.language_model=/m": (1, 1, "/m/config.json")} if node == fleet[4] else {}, found.versions)
    found.add_answer(fleet[1], {}, {}, found.versions | {"raytrain2p": " No module named 'raytrain2p'"})
    every, one, package = found.problems()
    names = ", ".join(node.name for node in fleet if node != fleet[4])
    assert every == Problem("output.root=/x", f"does not exist, on {names}", "mount it")
    assert (one.where, one.what) == ("model.language_model=/m", f"is not there, on {fleet[4].name}")
    assert package.what == f"cannot be imported (No module named 'raytrain2p'), on {fleet[1].name}"
    assert "install the same packages on every node" in package.fix
