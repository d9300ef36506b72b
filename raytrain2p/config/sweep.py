"""What a sweep is: which settings vary and how, how trials are searched, and when a bad one is stopped."""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from raytrain2p.config.loading import Settings, checked, known_keys, merge_overrides, nearest_key, packaged_config, read_yaml, settings_of
from raytrain2p.config.problems import Findings, InputError, Problem
from raytrain2p.config.settings import SETTINGS_OF_PHASE, PositiveFloat, PositiveInt, SettingsGroup

NUMBERS = (int, float)
SPACE = "sweep.space."
# Distribution: its arguments, as they are written, and what they must be
DISTRIBUTIONS = {
    "choice": "[VALUE, ...]",
    "grid": "[VALUE, ...]",
    "uniform": "[LOWEST, HIGHEST]",
    "loguniform": "[LOWEST, HIGHEST], both above 0",
    "quniform": "[LOWEST, HIGHEST, STEP]",
    "randint": "[LOWEST, ABOVE HIGHEST], whole numbers",
}
# These belong to the sweep as a whole: what a trial is compared by, where it goes, and what it may use.
SHARED = ("output.", "tracking.", "launch.", "checkpoint.", "evaluation.", "data.feature_store", "data.val", "data.test")
# What may change while weights stay: everything else is built into them, or into the position in the data.
CHANGEABLE = (
    "training.learning_rate",
    "training.weight_decay",
    "training.gradient_clip",
    "model.dropout",
    "model.soft_token_dropout",
    "model.lora.dropout",
)


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
class Axis:
    """One setting that varies.

    Args:
        setting: dotted path.
        distribution: key of DISTRIBUTIONS.
        arguments: as written.
    """

    setting: str
    distribution: str
    arguments: tuple[Any, ...]

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All of them, where they can be told."""
        if self.distribution in ("choice", "grid"):
            return self.arguments
        return None

    def probes(self) -> tuple[Any, ...]:
        """Values that are checked before anything starts: all, or the outermost, of the type that is drawn."""
        if self.distribution == "randint":
            return (self.arguments[0], self.arguments[1] - 1)
        if self.distribution == "quniform":
            return tuple(self.rounded(end) for end in self.arguments[:2])
        return self.values or tuple(map(float, self.arguments))

    def sample(self, draw: random.Random) -> Any:
        """A value drawn at random."""
        if self.values is not None:
            return draw.choice(self.values)
        low, high = self.arguments[:2]
        if self.distribution == "randint":
            return draw.randrange(low, high)
        if self.distribution == "loguniform":
            return math.exp(draw.uniform(math.log(low), math.log(high)))
        value = draw.uniform(low, high)
        return self.rounded(value) if self.distribution == "quniform" else value

    def rounded(self, value: float) -> Any:
        """The nearest of LOWEST, LOWEST + STEP, ..., up to the highest: as Optuna has them."""
        low, high, step = self.arguments
        nearest = low + min(max(round((value - low) / step), 0), math.floor((high - low) / step + 1e-9)) * step
        return int(nearest) if all(isinstance(one, int) for one in self.arguments) else float(f"{nearest:.12g}")

    def problem(self) -> str | None:
        """What is wrong with the arguments."""
        wanted = f"required: {self.distribution}: {DISTRIBUTIONS.get(self.distribution, '')}"
        if self.distribution not in DISTRIBUTIONS:
            return f"there is no distribution {self.distribution}; required is one of {', '.join(DISTRIBUTIONS)}"
        if self.values is not None:
            return None if self.arguments else f"has no values; {wanted}"
        count = 3 if self.distribution == "quniform" else 2
        numeric = all(isinstance(one, NUMBERS) and not isinstance(one, bool) and math.isfinite(one) for one in self.arguments)
        if len(self.arguments) != count or not numeric:
            return wanted
        if self.distribution == "randint" and not all(isinstance(one, int) for one in self.arguments):
            return wanted
        if self.arguments[0] >= self.arguments[1]:
            return f"the lowest value must be below the highest; {wanted}"
        if self.distribution == "loguniform" and self.arguments[0] <= 0:
            return wanted
        if self.distribution == "quniform" and self.arguments[2] <= 0:
            return f"the step must be above 0; {wanted}"
        return None


@dataclass(frozen=True)
class Sweep:
    """A sweep, checked.

    Args:
        options: how it searches.
        axes: what varies.
        base: the settings that the trials share.
        path: the file that it came from.
    """

    options: SweepSettings
    axes: tuple[Axis, ...]
    base: Settings
    path: Path

    def settings(self, values: dict[str, Any]) -> Settings:
        """A trial's settings.

        Args:
            values: by dotted path; what is not in it is as in the base.

        Raises:
            InputError: they do not go together.
        """
        tree = copy.deepcopy(self.base.model_dump())
        for setting, value in values.items():
            put(tree, setting, value)
        return settings_of(self.options.phase, tree, self.path)

    def default_values(self) -> dict[str, Any]:
        """The settings that vary, as the base has them."""
        tree = self.base.model_dump()
        return {axis.setting: look_up(tree, axis.setting) for axis in self.axes}


def load_sweep(config: str | Path | None, overrides: Sequence[str] = ()) -> Sweep:
    """Read and check a sweep.

    Args:
        config: YAML file: a `sweep` group, and beside it settings that all trials share; None takes the packaged one.
        overrides: `dotted.key=value` pairs, of the sweep (`sweep.num_trials=4`) or of the trials (`training.max_steps=60`).

    Raises:
        InputError: everything that is wrong, at once.
    """
    path = Path(config) if config is not None else packaged_config("sweep")
    tree = read_yaml(path)
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
    findings.raise_any()
    return sweep


def fixed_twice(sweep: Sweep, overrides: Sequence[str]) -> list[Problem]:
    """Overrides of settings that vary: they would reach the first trial alone, if any."""
    varying = {axis.setting for axis in sweep.axes}
    return [
        Problem(override, "varies: it is in sweep.space", f"to fix it, sweep.space.{setting}='{{choice: [{value}]}}'")
        for override in overrides
        for setting, _, value in [override.partition("=")]
        if setting in varying
    ]


def merge_space(tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """`sweep.space.SETTING={distribution: arguments}`: the dots of the setting make no groups.

    Raises:
        InputError: one is not of that form.
    """
    for override in overrides:
        setting, _, text = override.partition("=")
        read: dict[str, Any] = {}
        merge_overrides(read, [f"distribution={text}"])
        group = tree.setdefault("sweep", {})
        if isinstance(group, dict) and isinstance(group.setdefault("space", {}), dict):
            group["space"][setting] = read["distribution"]


class _Wrapped(SettingsGroup):
    """So that messages name `sweep.num_trials`, as the user wrote it."""

    sweep: SweepSettings


def base_settings(group: dict[str, Any], tree: dict[str, Any], path: Path, overrides: Sequence[str]) -> Settings:
    """The phase's file, over it what stands beside the `sweep` group, checked.

    Args:
        group: the `sweep` group, which may be wrong itself.
        tree: what stands beside it.
        path: of the file.
        overrides: for messages.

    Raises:
        InputError: a file cannot be read, or a key or a value is wrong.
    """
    phase = 1 if group.get("phase") == 1 else 2
    base, metric, mode = group.get("base"), group.get("metric", "val/loss"), group.get("mode", "min")
    here = Path() if any(override.startswith("sweep.base=") for override in overrides) else path.parent
    under = (here / Path(base).expanduser()) if isinstance(base, str) else packaged_config(f"phase{phase}")
    merged = merge(read_yaml(under), tree)
    data, checkpoint = merged.get("data"), merged.get("checkpoint", {})
    measured = metric == "train_loss" or (isinstance(data, dict) and data.get("val") is not None)
    if measured and isinstance(checkpoint, dict):  # the checkpoint that is kept is the best by what trials are compared by
        merged["checkpoint"] = checkpoint | {"monitor": metric, "mode": mode}
    return settings_of(phase, merged, path, [one for one in overrides if not one.startswith("sweep.")])


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested groups, the second over the first. A mapping of records' files (`data.test`) is replaced as a whole."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "test"
        merged[key] = merge(merged[key], value) if both else value
    return merged


def axes_of(options: SweepSettings) -> tuple[Axis, ...]:
    """As written; a setting with more than one distribution appears as often."""
    return tuple(
        Axis(setting, distribution, tuple(arguments))
        for setting, distributions in options.space.items()
        for distribution, arguments in (distributions or {"": []}).items()
    )


def space_problems(sweep: Sweep) -> list[Problem]:
    """What is wrong with the settings that vary, and with the values that they may take."""
    options = sweep.options
    findings = Findings()
    if not sweep.axes:
        findings.add(Problem("sweep.space", "is empty: nothing varies", "name at least one setting, such as training.learning_rate"))
    known = known_keys(SETTINGS_OF_PHASE[options.phase])
    for axis in sweep.axes:
        where = f"sweep.space.{axis.setting}"
        if axis.setting not in known:
            nearest = nearest_key(SETTINGS_OF_PHASE[options.phase], axis.setting)
            findings.add(Problem(where, "no such setting", f"did you mean {nearest}?" if nearest else ""))
        elif axis.setting.startswith(SHARED):
            findings.add(Problem(where, "is shared by all trials", f"set it beside the `sweep` group, as {axis.setting}"))
        elif len(options.space[axis.setting]) != 1:
            findings.add(Problem(where, "has more than one distribution, or none", "give one"))
        elif found := axis.problem():
            findings.add(Problem(f"{where} = {{{axis.distribution}: {list(axis.arguments)}}}", found))
        else:
            for value in axis.probes():
                try:
                    sweep.settings({axis.setting: value})
                except InputError as error:
                    what = "; ".join(problem.what for problem in error.problems)
                    findings.add(Problem(f"{where}, value {value!r}", what))
    grids = [axis.setting for axis in sweep.axes if axis.distribution == "grid"]
    if options.search == "grid" and (rest := [axis.setting for axis in sweep.axes if axis.values is None]):
        findings.add(
            Problem("sweep.search=grid", f"{', '.join(rest)} has no list of values", "give it `grid: [VALUE, ...]`, or search at random")
        )
    if options.search != "grid" and grids:
        findings.add(Problem(f"sweep.search={options.search}", f"{', '.join(grids)} is a grid", "set sweep.search=grid, or write `choice`"))
    if options.search != "grid" and options.num_trials is None:
        findings.add(Problem("sweep.num_trials", "is missing", "set it: only a grid has an end of its own"))
    return findings.problems


def schedule_problems(sweep: Sweep) -> list[Problem]:
    """What does not go with the scheduler."""
    options, base = sweep.options, sweep.base
    findings = Findings()
    if options.metric == "val/loss" and base.data.val is None:
        findings.add(
            Problem("sweep.metric=val/loss", "is measured on validation records, but data.val is not set", "set it, or take train_loss")
        )
    every = base.checkpoint.every_steps
    by_step = options.scheduler == "pbt" or (options.scheduler == "asha" and options.asha.time_attr == "step")
    if by_step and (base.checkpoint.best_of != "saves" or every is None):
        findings.add(
            Problem(
                f"sweep.scheduler={options.scheduler}",
                "compares trials by step, but they are measured at epochs' ends alone",
                "set checkpoint.best_of=saves and checkpoint.every_steps",
            )
        )
    if options.scheduler == "asha" and options.asha.time_attr == "step" and every is not None and options.asha.grace_period % every:
        findings.add(
            Problem(
                f"sweep.asha.grace_period={options.asha.grace_period}",
                f"must be a multiple of checkpoint.every_steps={every}: trials are measured when they save",
                f"set it to {math.ceil(options.asha.grace_period / every) * every}",
            )
        )
    if options.scheduler == "pbt":
        findings.extend(pbt_problems(sweep))
    return findings.problems


def pbt_problems(sweep: Sweep) -> list[Problem]:
    """Population-based training changes settings while weights stay."""
    options, every = sweep.options, sweep.base.checkpoint.every_steps
    findings = Findings()
    if every is not None and options.pbt.interval % every:
        findings.add(
            Problem(
                f"sweep.pbt.interval={options.pbt.interval}",
                f"must be a multiple of checkpoint.every_steps={every}: weights are taken over from a checkpoint",
                f"set it to {math.ceil(options.pbt.interval / every) * every}",
            )
        )
    for axis in sweep.axes:
        if axis.setting not in CHANGEABLE:
            findings.add(
                Problem(
                    f"sweep.space.{axis.setting}",
                    f"cannot change while weights stay; with sweep.scheduler=pbt these can: {', '.join(CHANGEABLE)}",
                    "leave it out, or take another scheduler",
                )
            )
    if options.search != "random":
        findings.add(Problem(f"sweep.search={options.search}", "population-based training searches by itself", "set sweep.search=random"))
    if options.try_defaults and (unset := [key for key, value in sweep.default_values().items() if value is None]):
        findings.add(
            Problem("sweep.try_defaults=true", f"{', '.join(unset)} has no default to be changed a little", "set it, or leave that out")
        )
    if (options.num_trials or 2) < 2:
        findings.add(Problem(f"sweep.num_trials={options.num_trials}", "is no population", "set 2 or more"))
    return findings.problems


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
