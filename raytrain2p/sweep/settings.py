"""The settings of a sweep: what varies, how values are searched, and when a bad trial is stopped."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from raytrain2p.config.loading import Settings, settings_of
from raytrain2p.config.settings import PositiveFloat, PositiveInt, SettingsGroup
from raytrain2p.sweep.space import Axis, Values


class AshaSettings(SettingsGroup):
    """Asynchronous successive halving (arXiv:1810.05934): at each rung, only the best share of the trials goes on."""

    time_attr: Literal["step", "epoch"] = Field("step", description="what rungs are counted in")
    grace_period: PositiveInt = Field(1, description="first rung: no trial is stopped before it")
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        3, description="the best 1/FACTOR of a rung goes on to the next, FACTOR times as far"
    )


class PbtSettings(SettingsGroup):
    """Population-based training (arXiv:1711.09846): now and then the worst take over weights and settings of the best."""

    interval: PositiveInt = Field(50, description="steps between two comparisons; all trials wait for each other there")
    quantile: Annotated[float, Field(gt=0, le=0.5)] = Field(0.25, description="share of the trials that is replaced, and that replaces")


class SweepSettings(SettingsGroup):
    """How a sweep searches."""

    phase: Literal[1, 2] = Field(2, description="phase to sweep")
    base: str | None = Field(None, description="YAML file of the trials' settings (default: that of the phase)")
    num_trials: PositiveInt | None = Field(None, description="trials; with search=grid, at most so many (null: every combination)")
    max_concurrent: PositiveInt | None = Field(None, description="trials at once (default: as many as the cluster has room for)")
    time_budget_s: PositiveFloat | None = Field(None, description="seconds after which no trial goes on; null for no limit")
    metric: Literal["val/loss", "train_loss"] = Field("val/loss", description="metric that trials are compared by")
    mode: Literal["min", "max"] = Field("min", description="whether a smaller or a larger metric is better")
    search: Literal["random", "grid", "optuna"] = Field("random", description="where the next trial's settings come from (optuna: TPE)")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="seeds the search")
    try_defaults: bool = Field(False, description="the first trial has the settings as they are, with nothing varied")
    scheduler: Literal["none", "asha", "pbt"] = Field("none", description="how bad trials are dealt with before their end")
    asha: AshaSettings = AshaSettings()
    pbt: PbtSettings = PbtSettings()
    max_failures: Annotated[int, Field(ge=0)] = Field(1, description="restarts of a trial that fails; the others go on meanwhile")
    space: dict[str, dict[str, list[Any]]] = Field(description="setting: {distribution: arguments}, for each setting that varies")


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
        for setting, value in values.items():
            put(tree, setting, value)
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
