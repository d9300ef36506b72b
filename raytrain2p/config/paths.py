"""Resolves the paths of outputs, records, models and caches, and finds the packaged settings files."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from raytrain2p.config.scratch import cache_directory, local_path
from raytrain2p.config.secrets import masked
from raytrain2p.config.settings import NAMES_A_MODEL, OutputSettings, Settings, SettingsGroup, Source, TrackingSettings

Group = TypeVar("Group", bound=SettingsGroup)

PACKAGE = Path(__file__).resolve().parent.parent


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
    """
    if home := os.environ.get("RAYTRAIN2P_HOME"):
        return Path(home).expanduser().absolute()
    here = Path.cwd()
    return Path.home() / "raytrain2p" if "runtime_resources" in here.parts else here


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
            "model": _absolute_models(settings.model),
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


def _absolute_models(group: Group) -> Group:
    """A local directory becomes absolute; hub IDs and packaged names stay."""
    changed: dict[str, Any] = {}
    for key, value in group:
        if isinstance(value, SettingsGroup):
            changed[key] = _absolute_models(value)
        elif NAMES_A_MODEL in type(group).model_fields[key].metadata and is_kind(Path(value).expanduser(), Path.is_dir):
            changed[key] = str(Path(value).expanduser().absolute())
    return group.model_copy(update=changed)
