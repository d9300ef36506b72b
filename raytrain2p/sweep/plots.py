"""Images of a sweep, made to be looked at."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from raytrain2p.sweep.results import EARLY, TrialResult, best_row
from raytrain2p.sweep.space import Axis
from raytrain2p.tracking.plots import BLUE, GREY, ORANGE, save
from raytrain2p.tracking.run_directory import RunDirectory

COLOURS = plt.get_cmap("viridis_r")


def draw_sweep(directory: Path, rows: Sequence[TrialResult], axes: Sequence[Axis], mode: str, metric: str) -> None:
    """All images, into `plots/`; none of a sweep of which nothing was reported.

    Args:
        directory: of the sweep.
        rows: its trials.
        axes: what varied.
        mode: `min` or `max`.
        metric: what the objective is.
    """
    reported = [row for row in rows if row.best(mode) is not None]
    if not reported:
        return
    plots, title = RunDirectory(directory).plots, f"sweep {directory.name[:8]}"
    objective_by_trial(reported, mode, metric, title, plots / "objective_by_trial.png")
    learning_curves(reported, mode, metric, title, plots / "learning_curves.png")
    parallel_coordinates(reported, axes, mode, metric, title, plots / "parallel_coordinates.png")
    each_setting(reported, axes, mode, metric, title, plots / "each_setting.png")


def objectives(rows: Sequence[TrialResult], mode: str) -> np.ndarray:
    """Each trial's best report."""
    return np.array([found[1] for row in rows if (found := row.best(mode)) is not None])


def objective_by_trial(rows: Sequence[TrialResult], mode: str, metric: str, title: str, target: Path) -> None:
    """Each trial's best, and the best so far."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    numbers, values = np.array([row.trial.number for row in rows]), objectives(rows, mode)
    best = (np.minimum if mode == "min" else np.maximum).accumulate(values)
    axes.step(numbers, best, where="post", color=GREY, label="best so far")
    for early, colour, label in ((False, BLUE, "ran to its end"), (True, ORANGE, "stopped early")):
        chosen = np.array([(row.state == EARLY) == early for row in rows])
        if chosen.any():
            axes.plot(numbers[chosen], values[chosen], "o", color=colour, label=label)
    axes.set_xlabel("trial")
    axes.set_ylabel(f"best {metric}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _finish(axes, title)
    axes.legend(frameon=False)
    save(figure, target)


def learning_curves(rows: Sequence[TrialResult], mode: str, metric: str, title: str, target: Path) -> None:
    """Every report of every trial: the best one in colour, a cross where a trial was stopped early."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    best = best_row(rows, mode)
    for row in rows:
        steps, values = zip(*row.reports, strict=True)
        is_best = best is not None and row.trial.number == best.trial.number
        axes.plot(
            steps, values, "o-", color=BLUE if is_best else GREY, markersize=3, linewidth=2 if is_best else 1, zorder=3 if is_best else 2
        )
        if row.state == EARLY:
            axes.plot(steps[-1], values[-1], "x", color=ORANGE, markersize=8, zorder=4)
        axes.annotate(f" {row.trial.number}", (steps[-1], values[-1]), fontsize=8, color=BLUE if is_best else "#4a5568", va="center")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(metric)
    if best is not None:
        axes.plot([], [], "o-", color=BLUE, markersize=3, label=f"trial {best.trial.number}, the best")
    if any(row.state == EARLY for row in rows):
        axes.plot([], [], "x", color=ORANGE, label="stopped early")
    _finish(axes, title)
    axes.legend(frameon=False)
    save(figure, target)


def parallel_coordinates(rows: Sequence[TrialResult], axes: Sequence[Axis], mode: str, metric: str, title: str, target: Path) -> None:
    """A line for each trial through its settings, coloured by its objective: the darkest is the best."""
    values = objectives(rows, mode)
    columns = [place_of(axis, rows) for axis in axes]
    heights = np.array([[place(row.values.get(axis.setting)) for axis, (place, _) in zip(axes, columns, strict=True)] for row in rows])
    scaled = (values - values.min()) / (np.ptp(values) or 1.0)
    goodness = 1 - scaled if mode == "min" else scaled
    figure, plot = plt.subplots(figsize=(max(7.0, 1.9 * (len(axes) + 1)), 4.5), layout="constrained")
    positions = np.arange(len(axes) + 1)
    for index in map(int, np.argsort(goodness)):
        line = [*heights[index], scaled[index]]
        plot.plot(positions, line, color=COLOURS(goodness[index]), linewidth=1 + 2 * goodness[index], alpha=0.9)
    for position, (_, ticks) in enumerate(columns):
        for height, label in ticks:
            plot.annotate(label, (position, height), xytext=(-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8)
    for height, value in ((0.0, values.min()), (1.0, values.max())):
        plot.annotate(f"{value:.4g}", (len(axes), height), xytext=(5, 0), textcoords="offset points", va="center", fontsize=8)
    for position in range(len(positions)):
        plot.axvline(position, color=GREY, linewidth=0.8, zorder=0)
    plot.set_xticks(positions, [axis.setting.replace(".", ".\n", 1) for axis in axes] + [metric], fontsize=9)
    plot.set_yticks([])
    plot.set_xlim(-0.45, len(axes) + 0.35)
    plot.spines[:].set_visible(False)
    plot.set_title(f"{title}: darkest is best", loc="left", fontsize=11)
    save(figure, target)


def each_setting(rows: Sequence[TrialResult], axes: Sequence[Axis], mode: str, metric: str, title: str, target: Path) -> None:
    """Objective against each setting, with the rank correlation: how much each one seems to matter."""
    columns = min(3, len(axes))
    lines = -(-len(axes) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(3.6 * columns, 3.1 * lines), squeeze=False, sharey=True, layout="constrained")
    values = objectives(rows, mode)
    for plot in grid.flat[len(axes) :]:
        plot.axis("off")
    for plot, axis in zip(grid.flat, axes, strict=False):
        place, ticks = place_of(axis, rows)
        heights = np.array([place(row.values.get(axis.setting)) for row in rows])
        early = np.array([row.state == EARLY for row in rows])
        plot.plot(heights[~early], values[~early], "o", color=BLUE)
        plot.plot(heights[early], values[early], "o", color=ORANGE)
        plot.set_xticks([height for height, _ in ticks], [label for _, label in ticks], fontsize=8)
        plot.set_xlim(-0.08, 1.08)
        plot.set_xlabel(f"{axis.setting}\nrank correlation {rank_correlation(heights, values):+.2f}", fontsize=9)
        plot.spines[["top", "right"]].set_visible(False)
    for plot in grid[:, 0]:
        plot.set_ylabel(f"best {metric}")
    figure.suptitle(f"{title} (orange: stopped early, so not comparable in full)", fontsize=11, x=0.01, ha="left")
    save(figure, target)


def place_of(axis: Axis, rows: Sequence[TrialResult]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """Where a value lies between 0 and 1, and the ticks: choices side by side, ranges to scale, what lies outside at the edge."""
    if axis.values is not None:
        extra = [row.values.get(axis.setting) for row in rows]
        known = {json.dumps(value): value for value in [*axis.values, *extra]}  # defaults need not be among the choices
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in known.values())
        order = sorted(known, key=lambda key: known[key]) if numeric else list(known)
        step = 1 / max(1, len(order) - 1)
        return (lambda value: order.index(json.dumps(value)) * step), [
            (index * step, _label(known[key])) for index, key in enumerate(order)
        ]
    scale = math.log if axis.distribution == "loguniform" else float
    outside = [value for row in rows if isinstance(value := row.values.get(axis.setting), int | float)]
    low, high = min([axis.arguments[0], *outside]), max([axis.arguments[1], *outside])
    if axis.distribution == "loguniform" and low <= 0:
        scale = float
    width = scale(high) - scale(low) or 1.0

    def place(value: Any) -> float:
        return (scale(value) - scale(low)) / width if isinstance(value, int | float) else 0.0

    return place, [(0.0, _label(low)), (1.0, _label(high))]


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's, with mean ranks for ties; 0 where one of them does not vary."""

    def ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(np.sum(values < value) + np.sum(values <= value) + 1) / 2 for value in values])

    one, other = ranks(first), ranks(second)
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])


def _finish(axes: Axes, title: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
