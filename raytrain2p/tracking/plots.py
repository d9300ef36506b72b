"""Plots of a run."""

import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from raytrain2p.config.escaping import plot_text
from raytrain2p.storage.files import write_file
from raytrain2p.tracking.metrics_file import MetricPoint, read_points

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#a0aec0"
SMOOTHING = 0.9


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """metrics.jsonl as (steps, values) by metric name."""
    return curves(read_points(path))


def curves(points: Iterable[MetricPoint]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Points as (steps, values) by metric name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for point in points:
        steps, values = found.setdefault(point.name, ([], []))
        steps.append(point.step)
        values.append(point.value)
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def training_curve(metrics: Path, target: Path, title: str) -> None:
    """Plot the training loss by step, as it is and smoothed, the validation loss, and the learning rate below."""
    found = read_metrics(metrics)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 5.4), sharex=True, height_ratios=(4, 1), layout="constrained")
    steps, losses = found["train_loss"]
    upper.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8, label="train loss, each step")
    upper.plot(steps, smoothed(losses), color=BLUE, linewidth=1.8, label="train loss, smoothed")
    if "val/loss" in found:
        upper.plot(*found["val/loss"], "o-", color=ORANGE, markersize=4, label="validation loss")
    upper.set_ylabel("loss")
    upper.set_title(plot_text(title), loc="left", fontsize=11)
    upper.legend(frameon=False)
    lower.plot(*found["learning_rate"], color=GREY)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    save(figure, target)


def answer_sheet(rows: Sequence[dict[str, Any]], read_images: Callable[[dict[str, Any]], Sequence[Any]], target: Path, title: str) -> None:
    """Plot each row's media with the question, the model's answer, and the expected answer where the model's is wrong."""
    columns = 5
    lines = -(-len(rows) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(2.3 * columns, 2.75 * lines), squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.axis("off")
    for axes, row in zip(grid.flat, rows, strict=False):
        images = read_images(row)
        for number, image in enumerate(images):
            inset = axes.inset_axes((number / len(images), 0, 1 / len(images), 1))
            inset.imshow(np.asarray(image))
            inset.axis("off")
        right = row["answer"] == row["expected"]
        answer = textwrap.fill(row["answer"] or "(nothing)", 26)
        expected = "" if right else "\n" + textwrap.fill(f"expected: {row['expected']}", 26)
        text = plot_text(f"{textwrap.fill(row['question'], 28)}\n{answer}{expected}")
        axes.set_title(text, fontsize=8, color="#276749" if right else "#9b2c2c")
    figure.suptitle(plot_text(title), fontsize=11, x=0.01, ha="left")
    save(figure, target)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Exponential moving average, started without bias (arXiv:1412.6980, section 3)."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        if np.isfinite(value):  # else every later value would be NaN
            mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * float(value), SMOOTHING * weight + 1 - SMOOTHING
        out.append(mean / weight if weight else np.nan)
    return np.array(out)


def save(figure: Figure, target: Path) -> None:
    """Write a figure as PNG."""
    write_file(target, png_of(figure))


def png_of(figure: Figure) -> bytes:
    """A figure as the content of a PNG file. The figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()
