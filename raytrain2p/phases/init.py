"""Warm start: `model.init` names an artifact of the same phase, whose weights a new run begins with."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from raytrain2p.config import InputError, Problem, Settings
from raytrain2p.config.phases import Phase
from raytrain2p.config.settings import INIT
from raytrain2p.models.artifacts import load_artifact

WITHOUT = f"leave out {INIT}"  # what else the user can do than set what the weights need


def facts_of(path: Path, phase: Phase) -> dict[str, Any] | None:
    """An artifact that a run begins with. It must not be changed: it is read once, without memory for the language model's weights,
    which are on the meta device. None if there is no such file, which is reported where the setting is resolved to a path.

    Raises:
        InputError: it is damaged, of the other phase, or has weights that are not finite.
    """
    if not path.is_file():
        return None
    stat = path.stat()
    return _facts(path, phase, (stat.st_ino, stat.st_size, stat.st_ctime_ns))


@lru_cache(maxsize=4)
def _facts(path: Path, phase: Phase, identity: tuple[int, ...]) -> dict[str, Any]:
    artifact = load_artifact(path, phase)
    weights = artifact["state_dict"]
    if infinite := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
        what = f"has weights that are not finite: {', '.join(infinite[:3])}{f' and {len(infinite) - 3} more' if len(infinite) > 3 else ''}"
        raise InputError(Problem(str(path), what, "choose another run"))
    artifact["state_dict"] = {
        name: torch.empty_like(value, device="meta") if name.startswith("language_model.") else value for name, value in weights.items()
    }
    return artifact


def init_facts(settings: Settings) -> dict[str, Any] | None:
    """The artifact of `model.init`, see `facts_of`; None if it is not set."""
    return facts_of(Path(settings.model.init), settings.phase) if settings.model.init is not None else None


def init_content(settings: Settings) -> dict[str, dict[str, str]]:
    """The content of `model.init` among the digests of the inputs; nothing if it is not set."""
    facts = init_facts(settings)
    return {} if facts is None else {f"{INIT}={settings.model.init}": {"content": str(facts["digest"])}}


def load_init(settings: Settings, inputs: Mapping[str, Mapping[str, str]]) -> dict[str, Any] | None:
    """The artifact of `model.init`, with all its weights, on a worker; None if it is not set.

    Args:
        inputs: digests that the driver found.

    Raises:
        InputError: the file is gone, or was replaced since the driver checked it: by its own run, trained on, for example.
    """
    if (init := settings.model.init) is None:
        return None
    artifact = load_artifact(Path(init), settings.phase)
    if artifact["digest"] != inputs.get(f"{INIT}={init}", {}).get("content"):
        raise InputError(Problem(f"{INIT}={init}", "was replaced since this launch was checked", "launch again"))
    return artifact


def differs(setting: str, here: Any, path: str | None, there: Any) -> Problem:
    """The problem of a setting that must be equal to that of the run whose weights are taken."""
    return Problem(f"{setting}={here}", f"{INIT}={path} was trained with {setting}={there}", f"set {setting}={there}, or {WITHOUT}")
