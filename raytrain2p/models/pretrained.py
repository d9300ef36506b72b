"""From a model setting (hub ID, local directory or packaged name) to a directory on this machine and its fingerprint."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from logging import ERROR, getLogger
from pathlib import Path
from types import MappingProxyType
from typing import Any

from raytrain2p.config import InputError, Problem, cache_directory
from raytrain2p.config.paths import is_kind
from raytrain2p.config.secrets import one_line
from raytrain2p.models.packaged import PACKAGED_MODELS, packaged_directory
from raytrain2p.storage.files import write_file

WEIGHTS = ("*.safetensors", "*.bin")
# What transformers reads of a directory beside the weights, and what this program does with it depends on.
CONFIGURATION = ("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json")
TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
SENTENCEPIECE = "*.model"
EARLIER = ("config.json", "preprocessor_config.json", "tokenizer.json", "chat_template.jinja")  # what fingerprints once covered, in order
FROM_HUB = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
COMMIT = re.compile(r"[0-9a-f]{40}")
Progress = Callable[[int, int], None]
_COPIES: ContextVar[Mapping[str, Path]] = ContextVar("_COPIES", default=MappingProxyType({}))


@contextmanager
def copies_of_models(places: Mapping[str, Path]) -> Iterator[None]:
    """Within, in this thread, models that were local directories in training are where they were copied to.

    Args:
        places: of the copies, by the path that the model had.
    """
    token = _COPIES.set(places)
    try:
        yield
    finally:
        _COPIES.reset(token)


def model_directory(name: str, setting: str = "model", progress: Progress | None = None) -> Path:
    """A directory that `from_pretrained` takes.

    Args:
        name: a packaged name, an existing local directory, or a hub ID, perhaps with `@` and a branch, tag or commit; looked up in that
            order. The hub is asked about a commit only until its files are here, and about all else each time.
        setting: the dotted path that `name` came from, for the message.
        progress: called with (done, total) in megabytes while a hub model is downloaded.

    Raises:
        InputError: it is none of the three, or cannot be downloaded.
    """
    if name in PACKAGED_MODELS:
        try:
            return packaged_directory(name)
        except OSError as error:
            raise InputError(cache_problem(error)) from None
    directory = local_directory(name) or _from_hub(name, setting, progress)
    if not (directory / "config.json").is_file():
        raise InputError(Problem(f"{setting}={name}", "the directory has no config.json", "give a directory written by save_pretrained()"))
    _refuse_foreign_code(directory, f"{setting}={name}")
    return directory


def local_directory(name: str) -> Path | None:
    """Where a model is that is neither packaged nor of the hub; None if it is one of them, or not there."""
    path = _COPIES.get().get(name, Path(name).expanduser())
    return path.absolute() if name not in PACKAGED_MODELS and is_kind(path, Path.is_dir) else None


def hub_id(name: str) -> tuple[str, str] | None:
    """The repository of a hub model and its revision, which may be empty; None for a packaged model and a local directory."""
    if name in PACKAGED_MODELS or local_directory(name) is not None:
        return None
    repository, _, revision = name.partition("@")
    return repository, revision


def pinned(name: str, setting: str = "model", progress: Progress | None = None) -> str:
    """The name of a hub model with the commit that its branch or tag is at now. Its files are here then. Other names stay.

    Args:
        setting, progress: as of `model_directory`.

    Raises:
        InputError: as of `model_directory`.
    """
    of_hub, directory = hub_id(name), model_directory(name, setting, progress)
    return name if of_hub is None else f"{of_hub[0]}@{directory.name}"  # a snapshot's directory has the name of its commit


def files_of(directory: Path) -> list[Path]:
    """The files of a model that another machine needs: those that would come from the hub."""
    return sorted({*(path for pattern in FROM_HUB for path in directory.glob(pattern) if path.is_file()), *_weights(directory)})


def _refuse_foreign_code(directory: Path, where: str) -> None:
    """A model may bring Python files that its configuration names. They are never run: `trust_remote_code=False` everywhere."""
    try:
        config = json.loads((directory / "config.json").read_text())
    except (ValueError, RecursionError):
        return  # transformers says what is wrong
    if isinstance(config, dict) and "auto_map" in config:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if config.get("model_type") not in CONFIG_MAPPING_NAMES:
            what = "needs code of its own (`auto_map` in config.json), which is never run"
            raise InputError(Problem(where, what, "take a model that this version of transformers has itself"))


def _from_hub(name: str, setting: str, progress: Progress | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    repository, at, revision = name.partition("@")
    if at and (repository in PACKAGED_MODELS or local_directory(repository) is not None):
        what = f"names the revision {revision}, and models of the hub alone have revisions"
        raise InputError(Problem(f"{setting}={name}", what, f"set {setting}={repository}"))
    options: dict[str, Any] = {"ignore_patterns": "*/*"}  # folders have the same weights in other forms
    if progress is not None:
        options["tqdm_class"] = _bar_of(progress)
    try:
        path = Path(snapshot_download(repository, revision=revision or None, allow_patterns=[*FROM_HUB], **options))
        if not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(repository, revision=path.name, allow_patterns=[*FROM_HUB, "*.bin"], **options))
    except (OSError, ValueError, HFValidationError) as error:
        reason = one_line(error, 400) or type(error).__name__
        raise InputError(
            Problem(
                f"{setting}={name}",
                f"is neither a packaged model ({', '.join(PACKAGED_MODELS)}) nor a directory, and the hub did not provide it: {reason}",
                "check the spelling and HF_TOKEN, or download the model and give its directory",
            )
        ) from None
    return path


def _bar_of(progress: Progress) -> type:
    """A class of bars for huggingface_hub, which shows nothing and passes on the megabytes that are written."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})
            self.done, self.counts_bytes = 0, options.get("unit") == "B"

        def update(self, count: float | None = 1) -> None:
            self.done += int(count or 0)
            if self.counts_bytes and (total := int(self.total or 0) // 10**6):
                progress(self.done // 10**6, total)

    return Bar


def load_pretrained(kind: Any, directory: Path, where: str, **options: Any) -> tuple[Any, list[str]]:
    """A model, and the names of its weights that the directory lacks.

    With `device_map="meta"` only the heads of the files are read: all is checked, and no weight takes memory.

    Args:
        kind: AutoModel or the like.
        where: the setting and its value, for messages.

    Raises:
        InputError: the weights are cut off, not there, or of other shapes than config.json says.
    """
    fix = "download it again, or take another model"
    try:
        model, found = kind.from_pretrained(
            directory, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except Exception as error:  # foreign code and foreign files: anything
        raise InputError(Problem(where, f"transformers cannot load it: {first_line(error)}", fix)) from None
    if mismatched := sorted(found["mismatched_keys"], key=lambda one: str(one[0])):
        (name, stored, configured), more = mismatched[0], len(mismatched) - 1
        what = f"its weight {name} is {tuple(stored)}, by its config.json it would be {tuple(configured)}"
        raise InputError(Problem(where, what + (f", and {more:,} more like it" if more else ""), fix))
    return model, sorted(found["missing_keys"])


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def context_length(directory: Path) -> int:
    """Tokens that a language model takes at most; a million if its configuration does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 0) or 1_000_000)


def content_of(directory: Path) -> dict[str, str]:
    """What a model is: the sha256 of each file that its results depend on, by name.

    Of a packaged model, that of its pinned package: what else is in its directory depends on the version of transformers.
    """
    if (package := _package_sha256(directory)) is not None:
        return {"package": package}
    names = [directory / name for name in (*CONFIGURATION, *TOKENIZER) if (directory / name).is_file()]
    return {path.name: _file_sha256(path) for path in [*names, *sorted(directory.glob(SENTENCEPIECE)), *_weights(directory)]}


def fingerprint(directory: Path) -> str:
    """Identifies a model by its content. Artifacts hold it, so that they are never combined with another model, and stored features
    are keyed by it."""
    if (package := _package_sha256(directory)) is not None:
        return package
    return hashlib.sha256(json.dumps(content_of(directory), sort_keys=True).encode()).hexdigest()


def is_model(directory: Path, known: str) -> bool:
    """Whether a directory holds the model of a fingerprint. Earlier versions of this program left out some files of the tokenizer."""
    if known == fingerprint(directory):
        return True
    digest = hashlib.sha256()
    for path in [*(directory / name for name in EARLIER if (directory / name).is_file()), *_weights(directory)]:
        digest.update(f"{path.name}:{_file_sha256(path)}".encode())
    return known == digest.hexdigest()


def _weights(directory: Path) -> list[Path]:
    return next((found for pattern in WEIGHTS if (found := sorted(directory.glob(pattern)))), [])


def _package_sha256(directory: Path) -> str | None:
    """The fingerprint of a packaged model; None if it is another one."""
    for name, model in PACKAGED_MODELS.items():
        if directory.parent == cache_directory() / "models" and directory.name.startswith(f"{name}-{model.sha256[:12]}"):
            return hashlib.sha256(f"{directory.name}".encode()).hexdigest()
    return None


def cache_problem(error: OSError) -> Problem:
    """The cache of models and fingerprints cannot be written to."""
    return Problem(f"RAYTRAIN2P_CACHE={cache_directory()}", f"cannot be written to: {error.strerror}", "set it to a directory that can be")


def _file_sha256(path: Path) -> str:
    """Cached: hashing tens of gigabytes at each start would take minutes. A file that was replaced or changed has another inode or
    time of change, which no copy keeps, though its size and modification time may be the same."""
    stat = path.stat()
    identity = [str(path.absolute()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    cached = cache_directory() / "fingerprints" / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()}.sha256"
    try:
        return cached.read_text()
    except OSError:
        pass
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        write_file(cached, found)
    except OSError as error:
        raise InputError(cache_problem(error)) from None
    return found


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Within, transformers prints errors only; a program that has it loaded keeps its own choice."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    quiet_transformers()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def quiet_transformers() -> None:
    """Errors only, also of bitsandbytes, which peft imports if it can, and no progress bars: there is one for each model that loads."""
    from transformers.utils import logging

    getLogger("bitsandbytes").setLevel(ERROR)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
