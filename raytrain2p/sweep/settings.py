"""The settings of a sweep: what varies, how values are searched, and when a bad trial is stopped."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from raytrain2p.config.loading import Settings, settings_of
from raytrain2p.config.metadata import FIXED, FREE, SHARED, Metadata, setting
from raytrain2p.config.settings import Count, PositiveFloat, PositiveInt, SettingsGroup, Text
from raytrain2p.sweep.space import Axis, Values

MOST_TRIALS = 10_000  # each is a run with a directory of its own, and the search holds all of them in memory
_SEARCH = Metadata(resume=FREE, splits=False, trial=SHARED, sweep_resume=FIXED)  # no trial has these settings, only the sweep


class AshaSettings(SettingsGroup):
    """Asynchronous successive halving (arXiv:1810.05934): at each rung, only the best share of the trials continues."""

    time_attr: Literal["step", "epoch"] = setting("step", "what rungs are counted in", _SEARCH)
    grace_period: PositiveInt = setting(1, "first rung: no trial is stopped before it", _SEARCH)
    reduction_factor: Annotated[float, Field(ge=1.1)] = setting(
        3, "the best 1/FACTOR of a rung continues to the next, FACTOR times as far", _SEARCH
    )


class PbtSettings(SettingsGroup):
    """Population-based training (arXiv:1711.09846): now and then the worst take over weights and settings of the best."""

    interval: PositiveInt = setting(50, "steps between two comparisons; all trials wait for each other there", _SEARCH)
    quantile: Annotated[float, Field(gt=0, le=0.5)] = setting(0.25, "share of the trials that is replaced, and that replaces", _SEARCH)


class SweepSettings(SettingsGroup):
    """How a sweep searches."""

    phase: Literal[1, 2] = setting(2, "phase to sweep", _SEARCH)
    base: Text | None = setting(None, "YAML file of the trials' settings (default: that of the phase)", _SEARCH)
    num_trials: Annotated[int, Field(gt=0, le=MOST_TRIALS)] | None = setting(
        None, "trials; with search=grid, at most so many (null: every combination)", _SEARCH.but(sweep_resume=FREE)
    )
    max_concurrent: PositiveInt | None = setting(
        None, "trials at once (default: as many as the cluster has room for)", _SEARCH.but(sweep_resume=FREE)
    )
    time_budget_s: PositiveFloat | None = setting(
        None, "seconds after which all trials are stopped; null for no limit", _SEARCH.but(sweep_resume=FREE)
    )
    metric: Literal["val/loss", "train_loss"] = setting("val/loss", "metric that trials are compared by", _SEARCH)
    mode: Literal["min", "max"] = setting("min", "whether a smaller or a larger metric is better", _SEARCH)
    search: Literal["random", "grid", "optuna"] = setting("random", "where the next trial's settings come from (optuna: TPE)", _SEARCH)
    seed: Annotated[int, Field(ge=0, lt=2**32)] = setting(0, "seeds the search", _SEARCH)
    try_defaults: bool = setting(False, "the first trial has the settings as they are, with nothing varied", _SEARCH)
    scheduler: Literal["none", "asha", "pbt"] = setting("none", "how bad trials are dealt with before their end", _SEARCH)
    asha: AshaSettings = AshaSettings()
    pbt: PbtSettings = PbtSettings()
    max_failures: Count = setting(1, "restarts of a trial that fails; the others continue", _SEARCH.but(sweep_resume=FREE))
    space: dict[str, dict[str, list[Any]]] = setting(..., "setting: {distribution: arguments}, for each setting that varies", _SEARCH)


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Args:
        axes: what varies.
        base: the settings that the trials share.
        path: the file that it was read from.
    """

    options: SweepSettings
    axes: tuple[Axis, ...]
    base: Settings
    path: Path

    def settings(self, values: Values) -> Settings:
        """A trial's settings: the base with these values.

        Raises:
            InputError: a value is not valid, or contradicts another setting.
        """
        tree = copy.deepcopy(self.base.model_dump())
        for key, value in values.items():
            put(tree, key, value)
        return settings_of(self.options.phase, tree, self.path)

    def default_values(self) -> Values:
        """The settings that vary, as the base has them."""
        tree = self.base.model_dump()
        return {axis.setting: look_up(tree, axis.setting) for axis in self.axes}


def put(tree: dict[str, Any], setting: str, value: Any) -> None:
    """Write a setting into nested groups."""
    *groups, last = setting.split(".")
    for group in groups:
        tree = tree[group]
    tree[last] = value


def look_up(tree: dict[str, Any], setting: str) -> Any:
    """A setting of nested groups."""
    for key in setting.split("."):
        tree = tree[key]
    return tree
