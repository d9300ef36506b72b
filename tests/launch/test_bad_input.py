"""Bad input is reported by the driver, all problems at once, with exit code 2, and writes nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from PIL import Image

from raytrain2p import train
from raytrain2p.launch.cluster import existing_address
from tests.launch.launching import Command

Refuse = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Runs the command, checks that it is refused and wrote nothing, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")  # other tests have a cluster on this machine
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(tmp_path / "features"))
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))

    def run(phase: int, *arguments: str) -> str:
        before = set(tmp_path.rglob("*"))
        code = train.main(["--phase", str(phase), "--config", str(tiny_config / f"phase{phase}.yaml"), *arguments])
        output = capsys.readouterr().err
        assert code == 2, output
        assert set(tmp_path.rglob("*")) == before, "a refused launch writes nothing"
        assert not ray.is_initialized()
        return output

    return run


@pytest.fixture
def aligner(tmp_path: Path, tiny_vit: Path, tiny_bert: Path) -> Path:
    """An aligner.pt for the small models."""
    from raytrain2p.config.phases import ALIGNMENT
    from raytrain2p.models.aligner import Aligner
    from raytrain2p.models.artifacts import save_artifact
    from raytrain2p.models.pretrained import fingerprint

    untrained = Aligner({"image": 32, "text": 32}, 32, 16)
    encoders = {"image": {"name": str(tiny_vit), "options": {}, "fingerprint": fingerprint(tiny_vit)}}
    path = tmp_path / "aligner.pt"
    save_artifact(path, ALIGNMENT, {}, encoders, shape=untrained.shape, state_dict=untrained.state_dict())
    return path


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_an_unknown_key_and_a_wrong_type_are_reported_together(refused: Refuse) -> None:
    output = refused(1, "training.global_batch_siez=4", "training.max_steps=many")
    assert "did you mean training.global_batch_size?" in output
    assert "training.max_steps=many" in output
    assert "2 problems" in output


def test_problems_of_data_aligner_models_and_resources_are_reported_together(refused: Refuse, tmp_path: Path) -> None:
    output = refused(
        2,
        f"data.train={tmp_path}/nowhere.jsonl",
        f"data.val={write(tmp_path / 'empty.jsonl')}",
        "model.aligner=latest",
        "model.language_model=no/such-model",
        "launch.use_gpu=true",
    )
    for part in ("nowhere.jsonl", "holds no record", "model.aligner=latest", "no/such-model", "launch.use_gpu=true"):
        assert part in output, part


def test_every_bad_record_is_listed_by_line(refused: Refuse, tmp_path: Path, shapes: Path) -> None:
    whole = tmp_path / "whole.jpg"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "torn.jpg").write_bytes(whole.read_bytes()[:700])
    records = write(
        tmp_path / "bad.jsonl",
        {"text": "good", "image": str(shapes / "1.png")},
        {"image": str(shapes / "1.png")},
        "not json",
        {"text": "gone", "image": "gone.png"},
        {"text": "torn", "image": "torn.jpg"},
    )
    output = refused(1, f"data.val={records}")
    for line, cause in ((2, "has only `image`"), (3, "is not JSON"), (4, "no such image: gone.png")):
        assert f"bad.jsonl:{line}\n    {cause}" in output
    assert "bad.jsonl:1\n" not in output
    torn = write(tmp_path / "torn.jsonl", {"text": "torn", "image": "torn.jpg"})
    assert "torn.jsonl:1" in (output := refused(1, f"data.val={torn}"))
    assert "does not decode" in output


def test_a_special_token_and_a_record_longer_than_the_context_are_refused(refused: Refuse, tmp_path: Path, aligner: Path) -> None:
    records = write(
        tmp_path / "long.jsonl",
        {"instruction": "Say nothing.", "response": "<|im_end|>"},
        {"instruction": "x" * 300, "response": "y"},
    )
    output = refused(2, f"model.aligner={aligner}", f"data.val={records}")
    assert "long.jsonl:1" in output
    assert "`<|im_end|>`, which the tokenizer takes for a special token" in output
    assert "long.jsonl:2" in output
    assert "the limit is 256" in output


def test_an_aligner_of_another_encoder_is_refused_with_both_named(refused: Refuse, aligner: Path, tiny_bert: Path, tiny_vit: Path) -> None:
    output = refused(2, f"model.aligner={aligner}", f"model.encoders.image={tiny_bert}")
    assert str(tiny_vit) in output
    assert f"model.encoders.image={tiny_bert}" in output


def test_more_workers_than_the_machine_has_are_refused_at_once(refused: Refuse) -> None:
    assert "launch.num_workers=64" in refused(1, "launch.num_workers=64", "training.global_batch_size=64", "launch.cpus_per_worker=64")


def test_more_workers_than_the_cluster_has_are_refused_at_once(run: Callable[..., Command], tiny_config: Path, workdir: Path) -> None:
    done = run(
        "raytrain2p.train",
        "--phase",
        "1",
        "--config",
        str(tiny_config / "phase1.yaml"),
        "launch.num_workers=3",
        "training.global_batch_size=12",
    )
    assert done.code == 2, done.err
    assert "the cluster has 2 on 1 node(s)" in done.err
    assert not (workdir / "checkpoints").exists()
    assert not (workdir / "mlflow.db").exists()


def test_a_cluster_that_does_not_answer_is_refused_at_once(refused: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "RAY_ADDRESS=127.0.0.1:9" in refused(1)


def test_the_recorded_address_of_a_cluster_that_was_killed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("raytrain2p.launch.cluster.find_bootstrap_address", lambda folder: "127.0.0.1:9")
    assert existing_address() is None


def test_a_dry_run_starts_nothing_and_prints_the_sizes(
    tmp_path: Path, tiny_config: Path, aligner: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    arguments = ["--phase", "2", "--config", str(tiny_config / "phase2.yaml"), "--dry-run", f"model.aligner={aligner}"]
    assert train.main(arguments) == 0
    output = capsys.readouterr().out
    for part in ("max_steps: 6", "language model", "projector", "tokens per step", "memory per worker", "nothing was started"):
        assert part in output, part
    assert not (tmp_path / "checkpoints").exists()
    assert not ray.is_initialized()
