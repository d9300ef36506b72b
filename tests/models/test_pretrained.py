"""From a model setting to a directory, or to a message with a fix."""

import ast
import hashlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import raytrain2p
from raytrain2p.config import InputError
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.models.packaged import PACKAGED_MODELS
from raytrain2p.models.pretrained import content_of, fingerprint, is_model, model_directory, pinned
from tests.inference.hub import Hub, reached, running


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTRAIN2P_CACHE", str(tmp_path / "cache"))


def test_a_directory_of_save_pretrained_is_taken_as_it_is(tiny_vit: Path) -> None:
    assert model_directory(str(tiny_vit)) == tiny_vit


def test_a_relative_directory_becomes_absolute(tiny_vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in other directories than the driver."""
    monkeypatch.chdir(tiny_vit.parent)
    assert model_directory(tiny_vit.name) == tiny_vit


def test_a_directory_without_a_config_is_refused_by_its_setting(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        model_directory(str(tmp_path), "model.encoders.image.name")
    assert f"model.encoders.image.name={tmp_path}" in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("name", ["smollm2-135m", "nobody/has-this-model", "not a hub id!", "/no/such/directory"])
def test_an_unknown_name_is_refused_by_its_setting_with_the_packaged_names(name: str) -> None:
    with pytest.raises(InputError) as caught:
        model_directory(name, "model.language_model")
    assert f"model.language_model={name}" in str(caught.value)
    for packaged in PACKAGED_MODELS:
        assert packaged in str(caught.value)


def test_code_that_a_model_brings_is_never_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers would ask on stdin whether to run it."""
    marker = tmp_path / "ran"
    (tmp_path / "configuration_own.py").write_text(
        "import pathlib\nfrom transformers import PretrainedConfig\n"
        f"pathlib.Path({str(marker)!r}).touch()\nclass OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    config = {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}, "architectures": ["Own"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        model_directory(str(tmp_path), "model.language_model")
    assert "needs code of its own (`auto_map` in config.json), which is never run" in str(caught.value)
    with pytest.raises(InputError):
        EncoderSpec("image", str(tmp_path)).width()
    assert not marker.exists()
    assert "trust_remote_code" not in capfd.readouterr().out


def test_foreign_code_is_forbidden_wherever_a_model_is_loaded() -> None:
    """Of a model that transformers has itself, its own code is ignored only if every call says so."""
    calls = re.compile(r"Auto\w+\.from_(?:pretrained|config)\((?!\*\*)")
    for path in Path(raytrain2p.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and calls.match(text := ast.unparse(node)):
                assert "trust_remote_code=False" in text, f"{path.name}:{node.lineno}: {text[:80]}"


def test_the_fingerprint_does_not_depend_on_the_path_of_a_model(tiny_vit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_vit, copy)
    assert fingerprint(copy) == fingerprint(tiny_vit)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_the_fingerprint_changes_with_every_file_that_changes_the_result(tiny_vit: Path, tmp_path: Path, name: str) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_vit, changed)
    content = bytearray((changed / name).read_bytes())
    content[-1] ^= 1
    (changed / name).write_bytes(content)
    assert fingerprint(changed) != fingerprint(tiny_vit)


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "processor_config.json", "spiece.model"],
)
def test_the_fingerprint_changes_with_every_file_of_a_tokenizer_that_changes_or_is_added(
    tiny_llama: Path, tmp_path: Path, name: str
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_llama, changed)
    with (changed / name).open("a") as stream:
        stream.write(" ")
    assert fingerprint(changed) != fingerprint(tiny_llama)
    before, after = content_of(tiny_llama), content_of(changed)
    assert {file for file in after if before.get(file) != after[file]} == {name}


def test_weights_that_were_replaced_with_the_same_size_and_modification_time_are_seen(tiny_vit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_vit, copy)
    before, weights = fingerprint(copy), copy / "model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns, weights.stat().st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert fingerprint(copy) != before


def test_a_fingerprint_of_an_earlier_version_is_that_of_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    """It covered config.json, preprocessor_config.json, tokenizer.json, chat_template.jinja and the weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        digest.update(f"{name}:{hashlib.sha256((tiny_llama / name).read_bytes()).hexdigest()}".encode())
    assert is_model(tiny_llama, digest.hexdigest())
    assert is_model(tiny_llama, fingerprint(tiny_llama))
    changed = tmp_path / "changed"
    shutil.copytree(tiny_llama, changed)
    (changed / "tokenizer.json").write_text("{}")
    assert not is_model(changed, digest.hexdigest())
    assert not is_model(changed, fingerprint(tiny_llama))


def test_the_fingerprint_does_not_depend_on_the_readme(tiny_vit: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_vit, copy)
    (copy / "README.md").write_text("A model.")
    assert fingerprint(copy) == fingerprint(tiny_vit)


def test_a_file_is_hashed_once_and_again_after_it_changed(tiny_vit: Path, tmp_path: Path) -> None:
    copy, notes = tmp_path / "copy", tmp_path / "cache" / "fingerprints"
    shutil.copytree(tiny_vit, copy)
    before = fingerprint(copy)
    count = len(list(notes.iterdir()))
    assert fingerprint(copy) == before
    assert len(list(notes.iterdir())) == count
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(copy) != before
    assert len(list(notes.iterdir())) == count + 1


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running("the-token-of-a-hub-1") as hub:
        reached(hub, tmp_path / "hub", monkeypatch)
        yield hub


@pytest.fixture
def published(hub: Hub, tiny_vit: Path, tmp_path: Path) -> Path:
    """What `someone/vit` has on its branch `main`, and what nobody needs."""
    folder = tmp_path / "published"
    shutil.copytree(tiny_vit, folder)
    (folder / "onnx").mkdir()
    for name in ("README.md", "pytorch_model.bin", "tf_model.h5", "onnx/config.json"):
        (folder / name).write_text("not needed")
    hub.publish("someone/vit", folder)
    return folder


def test_a_branch_becomes_the_commit_that_it_is_at_and_a_commit_never_changes(hub: Hub, published: Path, tiny_vit: Path) -> None:
    first = hub.branches["someone/vit@main"]
    assert pinned("someone/vit") == pinned("someone/vit@main") == f"someone/vit@{first}"
    before = fingerprint(model_directory(f"someone/vit@{first}"))
    assert before == fingerprint(tiny_vit)
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    second = hub.publish("someone/vit", published)
    assert pinned("someone/vit") == f"someone/vit@{second}"
    assert fingerprint(model_directory(f"someone/vit@{first}")) == before != fingerprint(model_directory("someone/vit"))


def test_what_is_needed_of_a_hub_model_is_fetched_once_and_then_nothing_is_asked(hub: Hub, published: Path, tiny_vit: Path) -> None:
    commit = hub.branches["someone/vit@main"]
    name = pinned("someone/vit")
    assert sorted(hub.downloads()) == sorted(f"someone/vit/resolve/{commit}/{path.name}" for path in tiny_vit.iterdir())
    hub.requests.clear()
    assert pinned(name) == name
    model_directory(name)
    assert hub.requests == []


def test_a_download_shows_its_megabytes(hub: Hub, published: Path) -> None:
    (published / "spiece.model").write_bytes(os.urandom(3 * 10**6))
    hub.publish("someone/vit", published)
    seen = list[tuple[int, int]]()
    name = pinned("someone/vit", "model", lambda done, total: seen.append((done, total)))
    assert seen[-1] == (3, 3)
    seen.clear()
    pinned(name, "model", lambda done, total: seen.append((done, total)))
    assert not seen


def test_files_that_an_interrupted_download_left_out_are_fetched(hub: Hub, published: Path) -> None:
    name = pinned("someone/vit")
    weights = model_directory(name) / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    hub.requests.clear()
    assert (model_directory(name) / "model.safetensors").is_file()
    assert [path.rpartition("/")[2] for path in hub.downloads()] == ["model.safetensors"]


def test_processes_that_need_a_model_at_once_fetch_each_file_once(hub: Hub, published: Path, tiny_vit: Path) -> None:
    """As the nodes of a cluster do that have a cache in common."""
    name = f"someone/vit@{hub.branches['someone/vit@main']}"
    with multiprocessing.get_context("fork").Pool(3) as processes:
        (found,) = set(processes.map(model_directory, [name] * 3))
    assert fingerprint(found) == fingerprint(tiny_vit)
    assert len(hub.downloads()) == len(set(hub.downloads())) == len([*tiny_vit.iterdir()])


def test_weights_in_pytorchs_form_are_fetched_where_there_are_no_others(hub: Hub, published: Path) -> None:
    (published / "model.safetensors").unlink()
    commit = hub.publish("someone/vit", published)
    assert (model_directory(pinned("someone/vit")) / "pytorch_model.bin").is_file()
    assert f"someone/vit/resolve/{commit}/tf_model.h5" not in hub.downloads()


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "LOCAL"])
def test_a_revision_of_what_is_not_of_the_hub_is_refused(name: str, tiny_vit: Path) -> None:
    name = name.replace("LOCAL", str(tiny_vit))
    assert pinned(str(tiny_vit)) == str(tiny_vit)
    with pytest.raises(InputError) as caught:
        model_directory(f"{name}@main", "model.language_model")
    (problem,) = caught.value.problems
    assert problem.where == f"model.language_model={name}@main"
    assert problem.what == "names the revision main, and models of the hub alone have revisions"
    assert problem.fix == f"set model.language_model={name}"


def test_a_revision_that_the_hub_does_not_have_is_refused_by_its_setting(hub: Hub, published: Path) -> None:
    with pytest.raises(InputError) as caught:
        pinned("someone/vit@v9", "model.encoders.image.name")
    assert "model.encoders.image.name=someone/vit@v9" in str(caught.value)
    assert "Revision Not Found" in str(caught.value)
    assert hub.token not in str(caught.value)
