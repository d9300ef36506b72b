"""`runs export`: what is said, what the model card says, and what reaches a hub."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml

from raytrain2p.config import Settings
from raytrain2p.runs import __main__ as runs
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.run import Run
from tests.inference.hub import Hub, running
from tests.inference.trained import trained_assistant
from tests.runs.made import printed, trained

TOKEN = "hf_0123456789abcdefghij"
TASK = "</pre>|`x`\n# <script>alert(1)</script>"  # of a record, which may say anything


@pytest.fixture
def made(settings: Settings, tiny_llama: Path, tiny_vit: Path, tmp_path: Path) -> Run:
    """A finished run with a model, inputs and test metrics; a newer one that was stopped before it had a model is beside it."""
    facts = {
        "train_digest": "d" * 64,
        "split_records": {f"data.train=['{tmp_path}/my records/a.jsonl']": 1200, f"data.test.test={tmp_path}/b.jsonl": 40},
        "inputs": {
            f"data.test.test={tmp_path}/b.jsonl": {"records": "e" * 64},
            f"model.aligner={tmp_path}/alignment/{'f' * 32}_20260101_000000/aligner.pt": {"content": "1" * 64},
        },
    }
    run = trained(settings, "a", [1.0], facts=facts)
    data = {"train": f"{tmp_path}/a.jsonl", "test": {"test": f"{tmp_path}/b.jsonl"}}
    model = trained_assistant(tmp_path / "made", tiny_llama, {"image": tiny_vit}, data=data, system_prompt=f"A *prompt*: {TASK}")
    shutil.copy(model, run.path / "model.pt")
    write_json(run.files.test_metrics, {f"test/exact_match/{TASK}": 0.5, f"test/majority/{TASK}": 0.5, "test/exact_match/ok": 0.9})
    trained(settings, "stopped", [1.0], status="KILLED")
    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in that the environment names; the constants were read when transformers was imported."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with running(TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def root_of(run: Run) -> Path:
    return run.path.parent.parent


def test_the_export_is_pushed_as_it_is_and_a_second_push_replaces_it(
    made: Run, hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "exported"
    assert runs.main(["export", "latest", str(target), "--push", "someone/model", f"output.root={root_of(made)}"]) == 0
    out, err = capfd.readouterr()
    assert re.search(rf"^exported run {made.run_id[:8]} to {target}: \d+ kB; README.md in it says how to load it$", out, re.MULTILINE)
    assert f"pushed to {hub.address}/someone/model" in out
    assert TOKEN not in out + err
    held = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
    assert hub.files == held
    assert hub.private
    assert not any(str(tmp_path).encode() in content or TOKEN.encode() in content for content in held.values())

    hub.files["of_an_earlier_version.txt"] = b"more"
    row = printed(root_of(made), capfd, "export", made.run_id, str(target), "--push", "someone/model")
    assert hub.files == held
    assert row == {
        "run_id": made.run_id,
        "directory": str(target),
        "bytes": sum(map(len, held.values())),
        "pushed": f"{hub.address}/someone/model",
    }


def test_a_hub_that_refuses_the_token_is_one_problem_and_the_export_stays(
    made: Run, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong0123456789abcdef")
    words = ["export", "latest", str(tmp_path / "exported"), f"output.root={root_of(made)}", "--push"]
    assert runs.main([*words, "someone/model"]) == 2
    error = capsys.readouterr().err
    assert "cannot be uploaded: the hub answers 401" in error
    assert "hf_wrong" not in error
    assert (tmp_path / "exported" / "model.safetensors").is_file()
    assert runs.main([*words, "some/one/model"]) == 2
    assert "name it as in OWNER/NAME" in capsys.readouterr().err


def test_the_model_card_has_data_settings_metrics_and_lineage_and_nothing_in_it_is_markup(made: Run, tmp_path: Path) -> None:
    assert runs.main(["export", "latest", str(tmp_path / "exported"), f"output.root={root_of(made)}"]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    head = yaml.safe_load(front)
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "image-text-to-text")
    (result,) = head["model-index"][0]["results"]
    assert result["dataset"] == {"type": "b.jsonl", "name": "b.jsonl"}
    assert [(one["name"], one["value"]) for one in result["metrics"]] == [(f"exact match of {TASK}", 0.5), ("exact match of ok", 0.9)]
    assert body.count("It has not learnt this") == 1
    for known in ("a.jsonl", "1,200", "d" * 64, "b.jsonl", "e" * 64, f"`{'f' * 32}`", "1" * 64, made.run_id, "training.max_steps"):
        assert known in body
    assert not [line for line in body.splitlines() if "<script>" in line and not line.startswith("    ") and "`" not in line]
    assert "\n# <script>" not in body
    assert json.loads((tmp_path / "exported" / "raytrain2p.json").read_text())["run_id"] == made.run_id


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["latest"], "takes a run and a directory, not 1 words"),
        (["nothing", "out"], "there is no such run"),
        (["latest", "out", "--adapter", "--llava"], "LoRA is merged"),
        (["latest", "out", "--llava"], "train phase 2 anew with model.projector=linear"),
    ],
)
def test_what_cannot_be_exported_is_said(
    words: list[str], what: str, made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs.main(["export", *words, f"output.root={root_of(made)}"]) == 2
    assert what in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
