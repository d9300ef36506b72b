"""`runs register`: into MLflow's Model Registry, once, whatever is killed; and out of it again."""

import base64
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from raytrain2p.config import InputError, Settings
from raytrain2p.inference.predictor import Predictor
from raytrain2p.inference.questions import as_records
from raytrain2p.models.pretrained import model_directory
from raytrain2p.runs import __main__ as runs
from raytrain2p.runs.register import content_of
from raytrain2p.tracking import registry
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.model_package import ModelContent
from raytrain2p.tracking.run import SWEEP_TAG, Run
from tests.inference.tiny import save_tiny_model
from tests.killed_between import KILLED, NEVER, in_child
from tests.packages import needs_bitsandbytes, without_bitsandbytes
from tests.runs.made import printed, trained
from tests.tracking.stores import NOBODY, away

NAME, QUESTION = "assistant", "What is it?"
DRAWN = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
ASK = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
answers = model.predict(json.loads(sys.stdin.read()), params={"max_new_tokens": 8})
import raytrain2p
loaded = [name for name in ("ray", "pytorch_lightning", "lightning") if name in sys.modules]
print(json.dumps({"answers": answers, "code": raytrain2p.__file__, "loaded": loaded}))
"""


@pytest.fixture
def base_models(tmp_path: Path, tiny_llama: Path, tiny_vit: Path) -> tuple[Path, Path]:
    """Local directories of this test's own."""
    copies = tmp_path / "models" / "llama", tmp_path / "models" / "vit"
    for source, copy in zip((tiny_llama, tiny_vit), copies, strict=True):
        shutil.copytree(source, copy)
    return copies


def with_model(settings: Settings, base_models: tuple[Path, Path], launch_id: str = "a", losses: tuple[float, ...] = (2.0, 1.0)) -> Run:
    run = trained(settings, launch_id, list(losses))
    save_tiny_model(run.path / "model.pt", *base_models)
    return run


@pytest.fixture
def run(settings: Settings, base_models: tuple[Path, Path]) -> Run:
    return with_model(settings, base_models)


def written(folder: Path, content: ModelContent) -> str:
    """What stands for `write_package`, which takes a second."""
    folder.mkdir()
    (folder / "MLmodel").write_text("{}")
    return content.digest[:16]


@pytest.fixture
def small(settings: Settings, tmp_path: Path) -> ModelContent:
    """What is registered of a run, without a model in it that loads."""
    run = trained(settings, "small", [1.0])
    (run.path / "model.pt").write_bytes(b"weights")
    return ModelContent(run.run_id, run.path / "model.pt", "0123456789abcdef" * 4, {}, ["image"], "instruction", {"instruction": "?"}, {})


def register(settings: Settings, *words: str, code: int = 0) -> int:
    assert runs.main(["register", *words, f"output.root={settings.output.root}"]) == code
    return code


def versions(settings: Settings, name: str = NAME) -> list[Any]:
    """All versions of a registered model, the oldest first."""
    return sorted(client_of(settings.tracking.uri).search_model_versions(f"name = '{name}'"), key=lambda one: int(one.version))


def aliases(settings: Settings, name: str = NAME) -> dict[str, str]:
    found: dict[str, str] = client_of(settings.tracking.uri).get_registered_model(name).aliases
    return {alias: str(version) for alias, version in found.items()}


def names(settings: Settings) -> list[str]:
    return [model.name for model in client_of(settings.tracking.uri).search_registered_models()]


def loaded(settings: Settings, uri: str = f"models:/{NAME}@champion") -> Any:
    mlflow.set_tracking_uri(settings.tracking.uri)
    try:
        return mlflow.pyfunc.load_model(uri)
    finally:
        mlflow.set_tracking_uri(None)


def encoded() -> bytes:
    DRAWN.save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def test_a_registered_model_answers_as_the_run_does_with_an_image_in_every_form(
    settings: Settings, run: Run, base_models: tuple[Path, Path], tmp_path: Path
) -> None:
    register(settings, run.run_id[:8], "--name", NAME, "--alias", "champion")
    asked = as_records([{"instruction": QUESTION, "image": DRAWN}, {"instruction": QUESTION}])
    with_image, without = Predictor(run.path / "model.pt").answers(asked, max_new_tokens=8)
    assert with_image != without
    base_models[0].parent.rename(tmp_path / "gone")  # the base models were local directories: the registered model has its own
    model = loaded(settings)
    (tmp_path / "drawn.png").write_bytes(encoded())
    text = base64.b64encode(encoded()).decode()
    forms = [text, f"data:image/png;base64,{text}", str(tmp_path / "drawn.png"), (tmp_path / "drawn.png").as_uri(), None]
    rows = [{"instruction": QUESTION, "image": form} for form in forms]
    assert model.predict(rows, params={"max_new_tokens": 8}) == [with_image] * 4 + [without]
    assert model.predict(rows, params={"max_new_tokens": 8, "batch_size": 1}) == [with_image] * 4 + [without]
    with pytest.raises(InputError, match="neither"):
        model_directory(str(base_models[0]))  # the copies are the registered model's alone
    with pytest.raises(mlflow.MlflowException, match=r"(?s)item 1.*no such image: no\.png.*item 2.*`instruction` is empty"):
        model.predict([{"instruction": QUESTION, "image": "no.png"}, {"instruction": " ", "image": text}])
    with pytest.raises(mlflow.MlflowException, match="at least 1"):
        model.predict(rows, params={"max_new_tokens": 0})
    for file, what in (("base_1/preprocessor_config.json", "its fingerprint is"), ("model.pt", "damaged")):  # both are checked as it loads
        with Path(versions(settings)[0].source.removeprefix("file://"), "artifacts", file).open("r+b") as stream:
            stream.seek(-1000 if file == "model.pt" else 0, os.SEEK_END)
            stream.write(b" ")
        with pytest.raises(InputError, match=what):
            loaded(settings)


@needs_bitsandbytes
def test_a_language_model_in_4_bits_needs_its_package(
    settings: Settings, run: Run, base_models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(run.path / "model.pt", *base_models, quantization="nf4")
    register(settings, "latest", "--name", NAME, "--alias", "champion")
    folder = Path(versions(settings)[0].source.removeprefix("file://"))
    assert f"bitsandbytes=={version('bitsandbytes')}" in (folder / "requirements.txt").read_text().split()
    expected = list(Predictor(run.path / "model.pt").answers(as_records([{"instruction": QUESTION, "image": DRAWN}]), max_new_tokens=8))
    row = {"instruction": QUESTION, "image": base64.b64encode(encoded()).decode()}
    assert loaded(settings).predict([row], params={"max_new_tokens": 8}) == expected
    without_bitsandbytes(monkeypatch)
    with pytest.raises(InputError, match=r"(?s)model\.pt\n    needs the package bitsandbytes.*raytrain2p\[quantization\]"):
        content_of(run)


def test_it_loads_in_another_process_from_its_own_code_without_what_trains(settings: Settings, run: Run, tmp_path: Path) -> None:
    register(settings, "latest", "--name", NAME, "--alias", "champion")
    (version,) = versions(settings)
    folder = Path(version.source.removeprefix("file://"))
    assert not list(folder.rglob("*.pkl")) + list(folder.rglob("*.parquet")) + list(folder.rglob("__pycache__"))
    rows = [{"instruction": QUESTION, "image": base64.b64encode(encoded()).decode()}]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ASK, str(folder)]
    done = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    found = json.loads(done.stdout)
    assert found["code"] == str(folder / "code" / "raytrain2p" / "__init__.py")
    assert found["loaded"] == []
    assert found["answers"] == list(Predictor(run.path / "model.pt").answers(as_records([rows[0] | {"image": DRAWN}]), max_new_tokens=8))
    required = (folder / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in required)
    assert not {"ray", "pytorch-lightning", "optuna"} & {line.partition("==")[0] for line in required}


def test_a_version_says_what_it_is_and_the_verbs_on_runs_see_it(settings: Settings, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(settings.output.root, capsys, "register", run.run_id, "--name", NAME, "--alias", "champion")
    assert (found["version"], found["is_new"], found["uri"]) == (1, True, f"models:/{NAME}@champion")
    (version,) = versions(settings)
    assert version.run_id == run.run_id
    assert version.tags["raytrain2p.digest"] == found["digest"]
    assert (version.tags["raytrain2p.run_id"], version.tags["raytrain2p.directory"]) == (run.run_id, run.directory)
    assert (version.tags["raytrain2p.metric.val/loss"], version.tags["raytrain2p.metric.best/train_loss"]) == ("1.0", "1.0")
    assert run.directory in version.description
    (tree,) = printed(settings.output.root, capsys, "tree")
    assert tree["registered"] == [f"{NAME}/1"]
    (plan,) = printed(settings.output.root, capsys, "prune", run.run_id)["runs"]
    assert plan["stays"] == "registered"


def test_the_same_model_is_one_version_of_a_name_and_one_copy_of_its_files(
    settings: Settings, base_models: tuple[Path, Path], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for alias in ("champion", "old"):
        register(settings, run.run_id, "--name", NAME, "--alias", alias)
    assert "was already version 1 of assistant, and has the alias old" in capsys.readouterr().out
    save_tiny_model(run.path / "model.pt", *base_models, seed=1)  # as if it had been trained for longer
    register(settings, run.run_id, "--name", NAME, "--alias", "champion")
    register(settings, run.run_id, "--name", "Bob's own")
    first, second = versions(settings)
    (other,) = client_of(settings.tracking.uri).search_model_versions('name = "Bob\'s own"')
    assert aliases(settings) == {"old": "1", "champion": "2"}
    assert other.source == second.source != first.source
    assert sorted(Path(first.source.removeprefix("file://")).parent.iterdir()) == sorted(
        Path(one.source.removeprefix("file://")) for one in (first, second)
    )


def test_a_kill_at_any_moment_leaves_nothing_half_made_once_the_command_is_repeated(
    settings: Settings, small: ModelContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "write_package", written)  # before the first request

    def command() -> None:
        scratch = tmp_path / f"scratch_{os.getpid()}_{len(list(tmp_path.iterdir()))}"
        scratch.mkdir()
        registry.register(settings.tracking.uri, small, NAME, ["champion"], {}, "", scratch)

    client, kills = client_of(settings.tracking.uri), 0
    while True:
        code, _ = in_child([], kills, command, MlflowClient)
        if code == 0:
            break
        assert code == KILLED
        kills += 1
        if found := versions(settings):
            assert Path(found[0].source.removeprefix("file://"), "artifacts", "model.pt").read_bytes() == b"weights"
        command()
        assert len(versions(settings)) == 1
        assert (aliases(settings), client.get_registered_model(NAME).tags) == ({"champion": "1"}, {})
        client.delete_registered_model(NAME)
    assert kills >= 6
    assert in_child([], NEVER, command)[0] == 0


def test_what_a_kill_left_empty_is_deleted_by_the_next_registration(
    settings: Settings, small: ModelContent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(settings.tracking.uri)
    client.create_registered_model("somebody else's")
    client.create_registered_model("killed", {registry.PENDING_TAG: small.run_id})
    (tmp_path / "1").mkdir()
    registry.register(settings.tracking.uri, small, NAME, [], {}, "", tmp_path / "1")
    assert sorted(names(settings)) == [NAME, "killed", "somebody else's"], "it may be under way"
    monkeypatch.setattr(registry, "ABANDONED_MS", -1000)
    registry.register(settings.tracking.uri, small, NAME, [], {}, "", tmp_path / "2")
    assert sorted(names(settings)) == [NAME, "somebody else's"]


def test_a_refused_version_leaves_no_registered_model(settings: Settings, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(settings.tracking.uri.removeprefix("sqlite:///"))) as database:
        database.execute("CREATE TRIGGER no BEFORE INSERT ON model_versions BEGIN SELECT RAISE(ABORT, 'not today'); END")
    register(settings, run.run_id, "--name", NAME, code=1)
    assert "raytrain2p: not registered: tracking.uri=" in capsys.readouterr().err
    assert names(settings) == []


def test_mlflow_away_or_without_the_run_is_one_line(settings: Settings, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    register(settings, run.run_id, "--name", NAME, f"tracking.uri={NOBODY}", code=1)
    with away(settings):
        register(settings, run.run_id, "--name", NAME, code=1)
    client = client_of(settings.tracking.uri)
    client.register_prompt("greeting", "Hello")
    register(settings, run.run_id, "--name", "greeting", code=1)
    client.delete_run(run.run_id)
    register(settings, run.run_id, "--name", NAME, code=1)
    away_line, broken_line, prompt_line, deleted_line = capsys.readouterr().err.splitlines()
    assert "MLflow is away" in away_line
    assert "not registered" in broken_line
    assert "MLflow has a prompt of this name" in prompt_line
    assert "was deleted in MLflow" in deleted_line
    assert names(settings) == []


MISTAKES = [
    (["latest"], "--name"),
    (["latest", "--name", "a/b"], "is not a name for a registered model"),
    (["latest", "--name", " "], "is not a name for a registered model"),
    (["latest", "--name", "a@b"], "is not a name for a registered model"),
    (["latest", "--name", "a", "--alias", "v3"], "is reserved by MLflow"),
    (["latest", "--name", "a", "--alias", "ü!"], "is not a name for an alias"),
    (["--name", "a"], "0 were given, required is one"),
    (["latest", "--name", "a", "--best", "val/loss"], "contradicts --best"),
    (["latest", "--name", "a", "--sweep", "latest"], "is about the best run"),
    (["--name", "a", "--best", "accuracy"], "is not a metric of a finished run"),
    (["--name", "a", "--best", "val/loss", "--experiment", "x"], "no finished run of phase 2 there has a model.pt"),
]


def test_what_cannot_be_meant_is_refused_in_words(settings: Settings, small: ModelContent, capsys: pytest.CaptureFixture[str]) -> None:
    for words, what in MISTAKES:
        register(settings, *words, code=2)
        assert what in capsys.readouterr().err, words


def test_a_run_without_a_model_to_answer_is_refused_in_words(
    settings: Settings, base_models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    failed = with_model(settings, base_models, "failed")
    failed.files.write_status("FAILED")
    orphaned = with_model(settings, base_models, "orphaned")
    orphaned.files.status.unlink()
    copied = with_model(settings, base_models, "copied")
    copy = shutil.copytree(copied.path, copied.path.parents[2] / "copy" / copied.path.name)
    damaged = with_model(settings, base_models, "damaged")
    with (damaged.path / "model.pt").open("r+b") as stream:
        stream.seek(2000)
        stream.write(b"\xff" * 100)
    moved = with_model(settings, base_models, "moved")
    refused = {
        trained(settings, "aligner", [1.0], phase="alignment").run_id: "is a run of phase 1",
        trained(settings, "sweep", [1.0], phase="sweeps").run_id: "is a sweep",
        trained(settings, "empty", [1.0]).run_id: "has no model.pt",
        failed.run_id: "is FAILED, required is FINISHED",
        orphaned.run_id: "required is FINISHED",
        str(copy): "is a copy",
        damaged.run_id: "model.pt",
    }
    for name, what in refused.items():
        register(settings, name, "--name", NAME, code=2)
        assert what in capsys.readouterr().err
    (base_models[1] / "preprocessor_config.json").write_text("{}")  # another base model than in training
    register(settings, moved.run_id, "--name", NAME, code=2)
    assert "its fingerprint is" in capsys.readouterr().err
    assert names(settings) == []


def test_the_best_is_that_of_an_experiment_or_of_a_sweep_trials_included(
    settings: Settings, base_models: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "write_package", written)
    sweep = trained(settings, "sweep", [1.0], phase="sweeps")
    alone, trial, worse = (with_model(settings, base_models, name, (loss,)) for name, loss in (("a", 0.5), ("b", 1.0), ("c", 2.0)))
    trained(settings, "no model", [0.1])
    with_model(settings, base_models, "failed", (0.2,)).files.write_status("FAILED")
    for one in (trial, worse):
        one.add_tags({SWEEP_TAG: sweep.run_id})
    best = {"": alone, f"--sweep {sweep.run_id[:8]}": trial, "--max": worse, f"--experiment {alone.experiment}": alone}
    for words, run in best.items():
        found = printed(settings.output.root, capsys, "register", "--name", NAME, "--best", "val/loss", *words.split())
        assert found["run_id"] == run.run_id, words
