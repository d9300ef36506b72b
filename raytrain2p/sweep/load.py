"""From a YAML file and `key=value` overrides to a checked sweep; all problems are reported at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytrain2p.config.loading import Settings, checked, merge_overrides, packaged_tree, path_of, read_tree, read_yaml, settings_of
from raytrain2p.config.problems import Findings, InputError, Problem
from raytrain2p.config.settings import SettingsGroup
from raytrain2p.sweep.settings import Sweep, SweepSettings
from raytrain2p.sweep.space import Axis
from raytrain2p.sweep.validate import fixed_twice, retry_problems, schedule_problems, space_problems

SPACE = "sweep.space."


def load_sweep(config: str | Path | dict[str, Any] | None, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep.

    Args:
        config: YAML file with a `sweep` group and settings that all trials share, or these as a dictionary; None: the packaged one.
        overrides: `dotted.key=value`, of the sweep (`sweep.num_trials=4`) or of the trials (`training.max_steps=60`).

    Raises:
        InputError: every problem.
    """
    path = path_of(config, "sweep")
    tree = read_tree(path if config is None else config)
    with Findings() as findings:
        merge_overrides(tree, [one for one in overrides if not one.startswith(SPACE)])
    with findings:
        merge_space(tree, [one.removeprefix(SPACE) for one in overrides if one.startswith(SPACE)])
    group = tree.pop("sweep", None)
    if not isinstance(group, dict):
        raise InputError(
            [*findings.problems, Problem(f"--config {path}", "has no `sweep` group", "write one; configs/sweep.yaml is an example")]
        )
    own = [override for override in overrides if override.startswith("sweep.")]
    options, base = None, None
    with findings:
        options = checked(_Wrapped, {"sweep": group}, path, own).sweep
    with findings:
        base = base_settings(group, tree, path, overrides)
    findings.raise_any()
    assert options is not None
    assert base is not None
    sweep = Sweep(options, axes_of(options), base, path)
    findings.extend(space_problems(sweep))
    findings.extend(fixed_twice(sweep, overrides))
    findings.extend(schedule_problems(sweep))
    findings.extend(retry_problems(sweep))
    findings.raise_any()
    return sweep


def merge_space(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Merge `sweep.space.SETTING={distribution: arguments}`, where the dots of SETTING do not separate groups.

    Raises:
        InputError: an override does not have that form.
    """
    for override in overrides:
        setting, _, text = override.partition("=")
        read: dict[str, Any] = {}
        merge_overrides(read, [f"distribution={text}"])
        group = tree.setdefault("sweep", {})
        if isinstance(group, dict) and isinstance(group.setdefault("space", {}), dict):
            group["space"][setting] = read["distribution"]


class _Wrapped(SettingsGroup):
    """Makes messages name `sweep.num_trials`, as the user wrote it."""

    sweep: SweepSettings


def base_settings(group: dict[str, Any], tree: dict[str, Any], path: Path, overrides: Sequence[str]) -> Settings:
    """The settings that the trials share: those of the phase's file, replaced by those beside the `sweep` group.

    Args:
        group: the `sweep` group, not checked.
        tree: the settings beside it.
        path: of the file.
        overrides: for messages.

    Raises:
        InputError: a file cannot be read, or a key or a value is wrong.
    """
    phase = 1 if group.get("phase") == 1 else 2
    base, metric, mode = group.get("base"), group.get("metric", "val/loss"), group.get("mode", "min")
    here = Path() if any(override.startswith("sweep.base=") for override in overrides) else path.parent
    merged = merge(read_yaml(here / Path(base).expanduser()) if isinstance(base, str) else packaged_tree(phase, tree), tree)
    data, checkpoint = merged.get("data"), merged.get("checkpoint", {})
    measured = metric == "train_loss" or (isinstance(data, dict) and data.get("val") is not None)
    if measured and isinstance(checkpoint, dict):  # keep the checkpoint that is best by the sweep's metric
        merged["checkpoint"] = checkpoint | {"monitor": metric, "mode": mode}
    return settings_of(phase, merged, path, [one for one in overrides if not one.startswith("sweep.")])


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested groups, with those of the second replacing those of the first. `data.test` is replaced as a whole."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "test"
        merged[key] = merge(merged[key], value) if both else value
    return merged


def axes_of(options: SweepSettings) -> tuple[Axis, ...]:
    """The axes as written: a setting with several distributions appears several times."""
    return tuple(
        Axis(setting, distribution, tuple(arguments))
        for setting, distributions in options.space.items()
        for distribution, arguments in (distributions or {"": []}).items()
    )
