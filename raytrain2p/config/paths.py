"""Resolves the paths of outputs, records, models and caches, and finds the packaged settings files."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from raytrain2p.config.problems import InputError, Problem
from raytrain2p.config.scratch import cache_directory, local_path
from raytrain2p.config.secrets import masked
from raytrain2p.config.settings import NAMES_A_MODEL, OutputSettings, Settings, SettingsGroup, Source, TrackingSettings

Group = TypeVar("Group", bound=SettingsGroup)

PACKAGE = Path(__file__).resolve().parent.parent
HOME = "RAYTRAIN2P_HOME"
# Ray's copy of `ray job submit --working-dir`. It has another name in each Ray session and for each content.
COPY = re.compile(r"/[^\"]*/runtime_resources/working_dir_files/[^/\"]+")


def packaged_config(stem: str) -> Path:
    """The YAML file that a command uses without `--config`: inside the installed package, or beside it in a checkout."""
    name = f"{stem}.yaml"
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{name} is not in {PACKAGE} or beside it: the installation is incomplete")


def base_directory() -> Path:
    """The base of relative paths: `$RAYTRAIN2P_HOME` if set, else the working directory.

    A job submitted with `--working-dir` runs in a copy that Ray deletes later, with everything in it. There, without
    the variable, the base is `~/raytrain2p`.

    Raises:
        InputError: the variable is relative in such a copy.
    """
    copy = copy_of_working_dir()
    if home := os.environ.get(HOME):
        if copy is not None and _is_relative(home):
            raise InputError(_lost(HOME, home))
        return Path(home).expanduser().absolute()
    return Path.cwd() if copy is None else Path.home() / "raytrain2p"


def copy_of_working_dir() -> str | None:
    """Ray's copy of a job's `--working-dir`, if this process runs in one."""
    with suppress(FileNotFoundError):  # the working directory was deleted
        if (found := COPY.match(str(Path.cwd()))) is not None:
            return found[0]
    return None


def in_this_copy(text: str) -> str:
    """A text in which paths in the copy of an earlier job are those in the copy of this job, if it has one."""
    copy = copy_of_working_dir()
    return text if copy is None else COPY.sub(lambda _: copy, text)


def outputs_line(settings: Settings) -> str | None:
    """Where outputs go, if that is not the working directory of a job and nothing says so."""
    base = base_directory()
    if os.environ.get(HOME) or copy_of_working_dir() is None or settings.output.root != str(base / OutputSettings().root):
        return None
    return f"outputs go to {base} ({HOME} is not set)"


def relative_outputs(settings: Settings) -> list[Problem]:
    """Relative paths of outputs that were set for a job and would be in another directory than outside it: in the copy of the working
    directory, or in `~/raytrain2p`.

    Args:
        settings: with the paths as written.
    """
    if copy_of_working_dir() is None:
        return []
    given = {"RAYTRAIN2P_CACHE": os.environ.get("RAYTRAIN2P_CACHE")}
    if not os.environ.get(HOME):
        uri = settings.tracking.uri
        given["RAYTRAIN2P_FEATURES"] = os.environ.get("RAYTRAIN2P_FEATURES") if settings.data.feature_store is None else None
        given["data.feature_store"] = settings.data.feature_store
        given["output.root"] = settings.output.root if settings.output.root != OutputSettings().root else None
        given["tracking.uri"] = uri if uri not in (TrackingSettings().uri, _absolute_store(uri, Path("/"))) else None
    return [_lost(name, path) for name, path in given.items() if path and (name == "tracking.uri" or _is_relative(path))]


def absolute_output(setting: str, path: str) -> Path:
    """An output that is not a setting.

    Raises:
        InputError: it is relative in a job whose working directory is a copy.
    """
    if copy_of_working_dir() is not None and not os.environ.get(HOME) and _is_relative(path):
        raise InputError(_lost(setting, path))
    return base_directory() / Path(path).expanduser()


def _is_relative(path: str) -> bool:
    return "://" not in path and not Path(path).expanduser().is_absolute()


def _lost(setting: str, path: str) -> Problem:
    what = "is relative, and this job runs in a copy of its working directory, which Ray deletes"
    fix = f"give an absolute path on storage that all nodes share{'' if setting == HOME else f', or set {HOME} to one'}"
    return Problem(f"{setting}={masked(path)}", what, fix)


def absolute_paths(settings: Settings) -> Settings:
    """Make every path absolute, in the driver: a worker has another working directory."""
    base = base_directory()

    def resolve(text: str) -> str:
        return local_path(text) if "://" in text else str(base / Path(text).expanduser())

    data = settings.data
    store = data.feature_store or os.environ.get("RAYTRAIN2P_FEATURES") or str(cache_directory() / "features")
    uri = _absolute_store(settings.tracking.uri, base)
    return settings.model_copy(
        update={
            "data": data.model_copy(
                update={
                    "train": _absolute_sources(data.train),
                    "val": _absolute_sources(data.val) if data.val else None,
                    "test": {name: _absolute_sources(sources) for name, sources in data.test.items()},
                    "feature_store": resolve(store),
                }
            ),
            "model": with_models(settings.model, lambda setting, name: _absolute_model(name)),
            "output": settings.output.model_copy(update={"root": resolve(settings.output.root)}),
            "tracking": settings.tracking.model_copy(update={"uri": uri}),
        }
    )


def _absolute_store(uri: str, base: Path) -> str:
    for scheme in ("sqlite:///", "file:"):
        if uri.startswith(scheme) and not uri.startswith((f"{scheme}/", f"{scheme}//")):
            return f"{scheme}{quote(str(base))}/{uri.removeprefix(scheme)}"
    return uri


def where_runs_are(root: str, uri: str, base: Path) -> dict[str, str]:
    """`output.root` and `tracking.uri`, if a command that is typed in `base` must be given them; without passwords."""
    usual = {"output.root": str(base / OutputSettings().root), "tracking.uri": _absolute_store(TrackingSettings().uri, base)}
    return {key: masked(value) for key, value in {"output.root": root, "tracking.uri": uri}.items() if value != usual[key]}


def is_embedded(path: str) -> bool:
    """Whether a source of records is one of the embedded sets, such as `emoji:train`."""
    return re.fullmatch(r"\w+:\w+", path) is not None


def _absolute_sources(sources: list[Source]) -> list[Source]:
    """Records are input: relative to the working directory, not to the base of outputs."""
    return [
        one if is_embedded(one.path) else one.model_copy(update={"path": str(Path(one.path).expanduser().absolute())}) for one in sources
    ]


def is_kind(path: Path, kind: Callable[[Path], bool]) -> bool:
    """`Path.is_file` or `Path.is_dir`; False also for what cannot be a path: a name that is too long, or with a zero byte."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def with_models(group: Group, change: Callable[[str, str], str], prefix: str = "") -> Group:
    """The settings with `change(SETTING, NAME)` in place of each name of a model."""
    changed: dict[str, Any] = {}
    for key, value in group:
        if isinstance(value, SettingsGroup):
            changed[key] = with_models(value, change, f"{prefix}{key}.")
        elif NAMES_A_MODEL in type(group).model_fields[key].metadata:
            changed[key] = change(f"{prefix}{key}", value)
    return group.model_copy(update=changed)


def _absolute_model(name: str) -> str:
    """A local directory becomes absolute; hub IDs and packaged names stay."""
    path = Path(name).expanduser()
    return str(path.absolute()) if is_kind(path, Path.is_dir) else name
