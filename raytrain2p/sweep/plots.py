"""Plots of a sweep, drawn by Optuna from the results of its trials."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.ticker import MaxNLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState, create_trial
from optuna.visualization import matplotlib as optuna_plots

from raytrain2p.config.escaping import plot_text
from raytrain2p.sweep.live_table import short_name
from raytrain2p.sweep.results import EARLY, TrialResult, best_result
from raytrain2p.sweep.space import NUMBERS, Axis
from raytrain2p.tracking.plots import BLUE, ORANGE, save
from raytrain2p.tracking.run_directory import RunDirectory

LEAST_FOR_IMPORTANCES = 8  # trials: with fewer, chance decides which setting comes first
TRIALS_ON_TOP = 5  # so many of the best are compared with all, as Optuna recommends; but at most half
DARK_GREY = "#718096"


def draw_sweep(directory: Path, results: Sequence[TrialResult], axes: Sequence[Axis], mode: str, metric: str) -> None:
    """Draw all plots into `plots/`; none if no trial has reported."""
    if all(result.best(mode) is None for result in results):
        return
    metric = plot_text(metric)
    study = study_of(results, axes, mode)
    plots: dict[str, Callable[[], object]] = {
        "objective_by_trial": lambda: plot_history(study, results, mode, metric),
        "learning_curves": lambda: plot_learning_curves(study, results, mode, metric),
        "parallel_coordinates": lambda: optuna_plots.plot_parallel_coordinate(study, target_name=metric),
        "each_setting": lambda: plot_each_setting(study, metric),
        "importances": lambda: plot_importances(study, metric),
    }
    if len(completed(study)) < LEAST_FOR_IMPORTANCES:
        del plots["importances"]
    width = max(8.0, 1.6 * (len(axes) + 1))
    for name, plot in plots.items():
        style = {"savefig.bbox": "tight", "figure.figsize": (6.4 if name == "each_setting" else width, 4.8)}  # plot_slice multiplies it
        with plt.rc_context(style), warnings.catch_warnings():  # Optuna's functions change the style for all later plots
            warnings.simplefilter("ignore")  # its plots are experimental; matplotlib warns where a setting has one value
            plot()
            save(plt.gcf(), RunDirectory(directory).plots / f"{name}.png")


def study_of(results: Sequence[TrialResult], axes: Sequence[Axis], mode: str) -> optuna.Study:
    """A study in memory with the current values of all trials, under their own numbers.

    A trial that was stopped early counts as complete with its best report, since Optuna plots no others; one without a report fails.
    """
    study = optuna.create_study(direction="minimize" if mode == "min" else "maximize")
    names, distributions = names_of(axes), [distribution_of(axis, results) for axis in axes]
    for result in results:
        if (best := result.best(mode)) is None:
            study.add_trial(create_trial(state=TrialState.FAIL))
            continue
        params = [(axis, distribution, param_of(axis, result)) for axis, distribution in zip(axes, distributions, strict=True)]
        params = [entry for entry in params if entry[0].values is not None or entry[2] is not None]
        study.add_trial(
            create_trial(
                value=best[1],
                params={names[axis.setting]: param for axis, _, param in params},
                distributions={names[axis.setting]: distribution for axis, distribution, _ in params},
                intermediate_values={step: value for step, value in result.reports if math.isfinite(value)},
            )
        )
    return study


def completed(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def names_of(axes: Sequence[Axis]) -> dict[str, str]:
    """Labels of the settings: short ones, if these are distinct."""
    names = {axis.setting: short_name(axis.setting) for axis in axes}
    return names if len(set(names.values())) == len(names) else {setting: setting for setting in names}


def distribution_of(axis: Axis, results: Sequence[TrialResult]) -> BaseDistribution:
    """The choices or the range of an axis, extended by values outside it: the defaults need not be in the space."""
    values = [param_of(axis, result) for result in results]
    if axis.values is not None:
        return CategoricalDistribution(list(dict.fromkeys([*map(hashable, axis.values), *values])))
    numbers = [*axis.arguments[:2], *(value for value in values if value is not None)]
    return FloatDistribution(float(min(numbers)), float(max(numbers)), log=axis.distribution == "loguniform" and min(numbers) > 0)


def param_of(axis: Axis, result: TrialResult) -> Any:
    """A trial's value as Optuna can hold it; None on a range if it is not a number."""
    value = result.values.get(axis.setting)
    if axis.values is not None:
        return hashable(value)
    return float(value) if isinstance(value, NUMBERS) else None


def hashable(value: Any) -> Any:
    return plot_text(str(value)) if isinstance(value, str | list | dict) else value


def plot_history(study: optuna.Study, results: Sequence[TrialResult], mode: str, metric: str) -> None:
    """Each trial's best report, and the best so far."""
    axes = optuna_plots.plot_optimization_history(study, target_name=f"best {metric}")
    early = [(result.trial.number, best[1]) for result in results if result.state == EARLY and (best := result.best(mode)) is not None]
    if early:
        axes.scatter(*zip(*early, strict=True), color=ORANGE, zorder=3, label="stopped early")
        axes.legend(bbox_to_anchor=(1.05, 1.0), loc="upper left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_learning_curves(study: optuna.Study, results: Sequence[TrialResult], mode: str, metric: str) -> None:
    """Every report of every trial: the best trial in colour, a cross where a trial was stopped early.

    Optuna's colours repeat after 20 trials, and its legend outgrows the plot: each line has its trial's number at its end instead.
    """
    axes = optuna_plots.plot_intermediate_values(study)
    axes.set(title="Learning Curves", xlabel="optimizer step", ylabel=metric)
    best = best_result(results, mode)
    for line in axes.lines:
        number = str(line.get_label()).removeprefix("Trial")
        is_best = best is not None and number == str(best.trial.number)
        line.set(color=BLUE if is_best else DARK_GREY, linewidth=2.5 if is_best else 1, zorder=3 if is_best else 2)
        line.set_label(f"trial {number}, the best" if is_best else "_")
        axes.annotate(f"  {number}", tuple(line.get_xydata()[-1]), fontsize=8, va="center")  # type: ignore[index, arg-type]
    ends = [result.reports[-1] for result in results if result.state == EARLY and result.reports]
    if ends:
        axes.plot(*zip(*ends, strict=True), "x", color=ORANGE, markersize=8, zorder=4, label="stopped early")
    axes.legend(bbox_to_anchor=(1.05, 1.0), loc="upper left")


def plot_each_setting(study: optuna.Study, metric: str) -> None:
    """Best report against each setting; the colour is the trial's number."""
    panels = optuna_plots.plot_slice(study, target_name=f"best {metric}")
    for axes in np.atleast_1d(np.asarray(panels, dtype=object)):
        axes.tick_params(axis="x", which="both", rotation=45)  # on a log scale, labels overlap otherwise


def plot_importances(study: optuna.Study, metric: str) -> None:
    """How much the values of each setting differ between the best trials and all (PED-ANOVA, arXiv:2304.10255)."""
    quantile = max(0.1, min(0.5, TRIALS_ON_TOP / len(completed(study))))
    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)
    axes = optuna_plots.plot_param_importances(study, evaluator=evaluator, target_name=metric)
    axes.legend().remove()
