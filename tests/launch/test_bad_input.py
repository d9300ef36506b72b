"""Bad input is reported by the driver, all problems at once, with exit code 2, and writes nothing."""

import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, Mamba2Config, Mamba2ForCausalLM, MambaConfig, MixtralConfig, MixtralForCausalLM

from raytrain2p import predict, train
from raytrain2p.config import InputError
from raytrain2p.data.features import FeatureStore
from raytrain2p.launch.cluster import existing_address
from tests.conftest import byte_tokenizer
from tests.disks import Disk
from tests.launch.launching import Command
from tests.packages import needs_bitsandbytes, without_bitsandbytes

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
    for part in (
        "max_steps: 6",
        "feature store      0.",
        " MB more; ",
        "language model",
        "projector",
        "tokens per step",
        "memory per worker",
        "nothing was started",
    ):
        assert part in output, part
    assert not (tmp_path / "checkpoints").exists()


def test_a_dry_run_says_so_if_a_pass_over_the_model_needs_numbers(
    tmp_path: Path, tiny_config: Path, aligner: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which experts of a mixture work depends on what they are given."""
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(tmp_path))
    tokenizer, folder = byte_tokenizer(), tmp_path / "mixtral"
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=len(tokenizer), num_local_experts=4, max_position_embeddings=256, **size)
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    more = [f"model.aligner={aligner}", f"model.language_model={folder}", "model.lora.target_modules=[q_proj]"]
    arguments = ["--phase", "2", "--config", str(tiny_config / "phase2.yaml"), "--dry-run", *more]
    assert train.main([*arguments, "--calibrate"]) == 2
    assert "what a pass takes cannot be told" in capsys.readouterr().err
    assert train.main(arguments) == 0
    assert "memory per worker  more than 93" in (output := capsys.readouterr().out)
    assert "cannot be told of this language model" in output
    assert not ray.is_initialized()


def place(tmp_path: Path, kind: str) -> str:
    """A directory that cannot be made or written to, whoever the user is."""
    (tmp_path / "file").write_text("")
    return {"file": f"{tmp_path}/file", "below a file": f"{tmp_path}/file/below", "virtual": "/proc/nowhere", "long": "x" * 300}[kind]


@pytest.mark.parametrize("kind", ["file", "below a file", "virtual", "long"])
@pytest.mark.parametrize("setting", ["output.root", "data.feature_store", "tracking.uri", "RAYTRAIN2P_CACHE"])
def test_a_place_that_cannot_be_written_to_is_refused(
    refused: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, kind: str
) -> None:
    folder = place(tmp_path, kind)
    if setting == "RAYTRAIN2P_CACHE":
        monkeypatch.setenv(setting, folder)
        output = refused(1)
    else:
        output = refused(1, f"{setting}={f'sqlite:///{folder}/mlflow.db' if setting == 'tracking.uri' else folder}")
    assert "1 problem;" in output
    assert setting in output
    assert folder[:100] in output


def test_a_read_only_feature_store_is_refused_only_if_something_must_be_encoded(
    refused: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "features").mkdir()
    real = tempfile.TemporaryFile

    def read_only(dir: Path) -> Any:
        if dir.name == "features":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))  # root may write anywhere else
        return real(dir=dir)

    monkeypatch.setattr("raytrain2p.launch.places.tempfile.TemporaryFile", read_only)
    assert "Read-only file system" in refused(1)
    monkeypatch.setattr(FeatureStore, "missing", lambda self, items: [])
    assert "features" not in refused(1, "launch.cpus_per_worker=4096")


def test_features_that_do_not_fit_the_disk_are_refused_before_they_are_computed(refused: Refuse, disk: Disk) -> None:
    with (disk.folder / "filler").open("wb") as stream:
        stream.truncate(0)
        os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(disk.folder).free - 40_000)
    output = refused(1, f"data.feature_store={disk.folder}/features")
    assert (
        f"data.feature_store={disk.folder}/features\n    no space left for the features: about 0.1 MB are needed, 0.0 MB are free" in output
    )
    assert "fix: set data.features=online" in output


def test_a_pipe_or_a_device_in_place_of_records_is_refused_and_never_read(refused: Refuse, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    output = refused(1, "data.train=pipe.jsonl", "data.val=device.jsonl")
    assert output.count("is a pipe or a device") == 2


def test_a_name_that_no_file_system_takes_is_refused(refused: Refuse, capsys: pytest.CaptureFixture[str]) -> None:
    for setting in ("data.train", "output.root", "model.encoders.image", "tracking.experiment"):
        assert "more than 255 bytes in one name" in refused(1, f"{setting}={'x' * 300}")
    assert "there is no such run" in refused(1, "--resume", "x" * 300)
    assert predict.main(["--run", "x" * 300, "What is it?"]) == 2
    assert "no file system takes so long a name" in capsys.readouterr().err


def test_a_latest_aligner_that_is_not_there_is_the_only_problem(refused: Refuse) -> None:
    output = refused(2)
    assert "1 problem;" in output
    assert "model.aligner=latest" in output


def test_an_object_store_larger_than_memory_is_refused_before_ray_starts(refused: Refuse) -> None:
    assert "MB of memory that this machine has" in refused(1, "launch.object_store_mb=1000000000")


def test_a_source_that_is_never_drawn_is_refused(refused: Refuse, shapes: Path) -> None:
    sources = f"[{{path: {shapes}/phase1.jsonl}}, {{path: {shapes}/phase1.jsonl, weight: 1.0e-9}}]"
    assert "its weight 1e-09 is so small beside the others that no record of it is ever drawn" in refused(1, f"data.train={sources}")


def test_ray_address_auto_is_the_cluster_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("raytrain2p.launch.cluster.find_bootstrap_address", lambda folder: address)
        assert existing_address() == address
    with pytest.raises(InputError, match="no Ray cluster runs on this machine"):
        existing_address()


@pytest.fixture
def spoilt(tmp_path: Path) -> Callable[[Path, str], Path]:
    """A copy of a model with something wrong in its files."""

    def copied(model: Path, what: str) -> Path:
        folder = tmp_path / "spoilt"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(model, folder)
        weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
        tensors = load_file(weights)
        if what == "cut off":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif what == "not there":
            weights.unlink()
        elif what == "another shape":
            (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
        elif what == "a layer less":
            (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))
        elif what == "a shard less":
            names = sorted(tensors)
            save_file({name: tensors[name] for name in names[1:]}, folder / "model-1.safetensors", {"format": "pt"})
            weights.unlink()
            index = {name: f"model-{int(name != names[0])}.safetensors" for name in names}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        elif what == "deep":
            (folder / "config.json").write_text("[" * 100_000)
        return folder

    return copied


SPOILT = {
    "cut off": "cannot load it",
    "not there": "cannot load it: Error no file named model.safetensors",
    "another shape": "by its config.json it would be",
    "a layer less": "weights",
    "a shard less": "cannot load it: No such file or directory",
    "deep": "recursion",
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_language_model_with_spoilt_files_is_refused(
    refused: Refuse, aligner: Path, spoilt: Callable[[Path, str], Path], tiny_llama: Path, what: str
) -> None:
    folder = spoilt(tiny_llama, what)
    output = refused(2, f"model.aligner={aligner}", f"model.language_model={folder}")
    assert f"model.language_model={folder}" in output
    assert SPOILT[what] in output
    assert "1 problem;" in output


@pytest.mark.parametrize("what", SPOILT)
def test_an_encoder_with_spoilt_files_is_refused(refused: Refuse, spoilt: Callable[[Path, str], Path], tiny_vit: Path, what: str) -> None:
    folder = spoilt(tiny_vit, what)
    output = refused(1, f"model.encoders.image={folder}")
    assert f"model.encoders.image.name={folder}" in output
    assert SPOILT[what] in output
    assert "1 problem;" in output


def test_flash_attention_without_its_package_is_refused(refused: Refuse, aligner: Path) -> None:
    output = refused(2, f"model.aligner={aligner}", "model.attention=flash_attention_2")
    assert "the package flash-attn is not installed" in output


def test_quantization_without_its_package_is_refused(refused: Refuse, aligner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bitsandbytes(monkeypatch)
    output = refused(2, f"model.aligner={aligner}", "model.quantization=nf4")
    assert "model.quantization=nf4\n    needs the package bitsandbytes, which is not installed" in output
    assert "1 problem;" in output


QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SMALL = {"vocab_size": len(byte_tokenizer()), "bos_token_id": 1, "eos_token_id": 2}
NOT_IN_4_BITS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "GPT-2": (GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **SMALL), {}, "which have 0 of the 25,"),
    "Mamba": (MambaConfig(hidden_size=32, num_hidden_layers=1, **SMALL), {}, "does more with its linear modules than call them: "),
    "quantized": (GPT2Config(n_embd=32, n_layer=2, n_head=2, **SMALL), {"quantization_config": QUANTIZED}, "is quantized already"),
}


@needs_bitsandbytes
@pytest.mark.parametrize("model", NOT_IN_4_BITS)
def test_a_language_model_whose_weights_cannot_be_in_4_bits_is_refused(refused: Refuse, aligner: Path, tmp_path: Path, model: str) -> None:
    (config, more, said), folder = NOT_IN_4_BITS[model], tmp_path / "model"
    AutoModelForCausalLM.from_config(config, trust_remote_code=False).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    arguments = [f"model.aligner={aligner}", f"model.language_model={folder}", "model.tuning=frozen"]
    output = refused(2, *arguments, "model.quantization=nf4")
    assert "model.quantization=nf4\n" in output
    assert said in output
    assert "1 problem;" in output


@pytest.mark.parametrize("targets", ["[nothing]", "[]", "[q_proj, nothing]", "'['", "[input_layernorm]"])
def test_adapters_that_fit_no_module_are_refused_with_the_names_that_would(refused: Refuse, aligner: Path, targets: str) -> None:
    output = refused(2, f"model.aligner={aligner}", f"model.lora.target_modules={targets}")
    assert "model.lora.target_modules=" in output
    assert "linear modules of this language model: down_proj, gate_proj" in output


def test_adapters_that_peft_refuses_for_an_architecture_are_refused(refused: Refuse, aligner: Path, tmp_path: Path) -> None:
    tokenizer, folder = byte_tokenizer(), tmp_path / "mamba2"
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    Mamba2ForCausalLM(Mamba2Config(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    output = refused(2, f"model.aligner={aligner}", f"model.language_model={folder}")
    assert "peft refuses it" in output
    assert "out_proj" in output
