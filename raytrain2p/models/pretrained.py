"""From a model setting (hub ID, local directory or packaged name) to a directory on this machine and its fingerprint."""

import functools
import hashlib
import json
import os
from pathlib import Path

from raytrain2p.config import InputError, Problem, cache_directory
from raytrain2p.models.packaged import PACKAGED_MODELS, packaged_directory

WEIGHTS = ("*.safetensors", "*.bin")
DESCRIPTIONS = ("config.json", "preprocessor_config.json", "tokenizer.json", "chat_template.jinja")


def model_directory(name: str, setting: str = "model") -> Path:
    """A directory that `from_pretrained` takes.

    Args:
        name: a packaged name, an existing local directory, or a hub ID; looked up in that order.
        setting: the dotted path that `name` came from, for the message.

    Raises:
        InputError: it is none of the three, or cannot be fetched.
    """
    if name in PACKAGED_MODELS:
        return packaged_directory(name)
    local = Path(name).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise InputError(
                Problem(f"{setting}={name}", "the directory has no config.json", "give a directory written by save_pretrained()")
            )
        return local.absolute()
    return _from_hub(name, setting)


def _from_hub(name: str, setting: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
    try:
        path = Path(snapshot_download(name, allow_patterns=patterns))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, allow_patterns=[*patterns, "*.bin"]))
    except (OSError, ValueError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            Problem(
                f"{setting}={name}",
                f"is no packaged name ({', '.join(PACKAGED_MODELS)}) and no directory, and the hub did not give it: {reason}",
                "check the spelling, or download the model and give its directory",
            )
        ) from None
    return path


@functools.cache
def fingerprint(directory: Path) -> str:
    """What a model is, wherever it lies: a sha256 over its weights and descriptions.

    Artifacts carry it, so that they are never combined with another model, and stored features are keyed by it.
    Packaged models have the pinned sha256 of their package, whatever a library's version writes around the weights.
    """
    for name, model in PACKAGED_MODELS.items():
        if directory.parent == cache_directory() / "models" and directory.name.startswith(f"{name}-{model.sha256[:12]}"):
            return hashlib.sha256(f"{directory.name}".encode()).hexdigest()
    digest = hashlib.sha256()
    weights = next((found for pattern in WEIGHTS if (found := sorted(directory.glob(pattern)))), [])
    for path in [*(directory / name for name in DESCRIPTIONS if (directory / name).is_file()), *weights]:
        digest.update(f"{path.name}:{_file_sha256(path)}".encode())
    return digest.hexdigest()


def _file_sha256(path: Path) -> str:
    """Remembered by size and time of change: hashing tens of gigabytes at each start would take minutes."""
    stat = path.stat()
    identity = [str(path.absolute()), stat.st_size, stat.st_mtime_ns]
    note = cache_directory() / "fingerprints" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.sha256"
    try:
        return note.read_text()
    except OSError:
        pass
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    note.parent.mkdir(parents=True, exist_ok=True)
    aside = note.with_suffix(f".{os.getpid()}")
    aside.write_text(found)
    aside.rename(note)
    return found
