"""The learning curves of several runs in one plot."""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from raytrain2p.config.escaping import plot_text
from raytrain2p.config.phases import PHASES_BY_NAME
from raytrain2p.runs.comparison import MISSING, ComparedRun, differing_settings, ranked, short_names
from raytrain2p.tracking.plots import GREY, png_of, smoothed

# Okabe and Ito's, which people with any colour vision tell apart, without yellow, which is too pale: https://jfly.uni-koeln.de/color/
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MOST_IN_COLOUR = 10  # runs; if there are more, as many of the best as there are colours
MOST_RAW = 3  # runs whose losses of each step are drawn, too
LEGEND, VALUE = 100, 40  # characters of a line, and of a setting's value in it
LEARNING = ("training.", "model.", "data.train")  # settings that come first: others change no curve


def comparison_png(runs: Sequence[ComparedRun]) -> bytes:
    """Training loss, smoothed, and validation loss by optimizer step; a panel for each phase. The content of a PNG file."""
    panels = [[run for run in runs if run.summary.phase == phase] for phase in PHASES_BY_NAME]
    panels = [panel for panel in panels if panel]
    heights = [3.4 + 0.2 * (1 + min(len(panel), MOST_IN_COLOUR)) for panel in panels]
    figure, grid = plt.subplots(len(panels), 1, figsize=(8, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=True):
        draw_panel(axes, panel)
    return png_of(figure)


def draw_panel(axes: Axes, runs: Sequence[ComparedRun]) -> None:
    """The runs of one phase."""
    names = labels(runs)
    best_first = ranked(runs)
    coloured = range(len(runs)) if len(runs) <= MOST_IN_COLOUR else best_first[: len(COLOURS)]
    colours = {run: COLOURS[n % len(COLOURS)] for n, run in enumerate(coloured)}
    dashed = set([*coloured][len(COLOURS) :])
    lines, validated = list[Line2D](), False
    for n in reversed(best_first):  # the best on top
        found = runs[n].curves()
        colour = colours.get(n, GREY)
        steps, losses = finite(found, "train_loss")
        if len(runs) <= MOST_RAW:
            axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        style = "--" if n in dashed else "-"
        (line,) = axes.plot(steps, smoothed(losses), style, color=colour, linewidth=1.8 if n in colours else 0.8, label=names[n])
        lines += [line] if n in colours else []
        steps, losses = finite(found, "val/loss")
        validated |= len(losses) > 0
        axes.plot(steps, losses, "o:", color=colour, markersize=4.5 if n in colours else 2, linewidth=1, markeredgecolor="white")
    lines.sort(key=lambda line: [names[n] for n in colours].index(str(line.get_label())))
    if len(colours) < len(runs):
        lines.append(Line2D([], [], color=GREY, linewidth=0.8, label=f"the other {len(runs) - len(colours)} runs; in colour the best"))
    kinds = [Line2D([], [], color="#4a5568", linewidth=1.8, label="train loss, smoothed")]
    if validated:
        kinds.append(Line2D([], [], color="#4a5568", marker="o", linestyle=":", linewidth=1, label="validation loss"))
    axes.add_artist(axes.legend(handles=kinds, loc="upper right", frameon=False, fontsize=9))
    axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(0, -0.16), frameon=False, fontsize=8.5, borderaxespad=0)
    axes.set_title(f"{runs[0].summary.phase}: {len(runs)} run{'s' * (len(runs) > 1)}", loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def finite(found: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    """A metric's (steps, values) without those that are not finite, after which a mean would have no value."""
    steps, values = found.get(name, (np.array([]), np.array([])))
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def labels(runs: Sequence[ComparedRun]) -> list[str]:
    """For each run the start of its ID, and its values of the settings that differ, as far as there is space."""
    settings, texts = differing_settings(runs), []
    names = short_names([*settings])
    first = sorted(settings, key=lambda key: next((n for n, group in enumerate(LEARNING) if key.startswith(group)), len(LEARNING)))
    for n, run in enumerate(runs):
        values = ", ".join(f"{names[key]}={value(settings[key][n])}" for key in first if settings[key][n] != MISSING)
        trial = "" if run.trial == MISSING else f"trial {run.trial}  "
        texts.append(plot_text(cut(f"{run.summary.run_id[:8]}  {trial}{values}", LEGEND)))
    return texts


def value(text: str) -> str:
    """A setting's value: of a drawn number four digits, of a long path the end."""
    text = re.sub(r"\d+\.\d{6,}(e-?\d+)?", lambda match: f"{float(match[0]):.4g}", text)
    return cut(text, VALUE) if "/" not in text or len(text) <= VALUE else f"...{text[3 - VALUE :]}"


def cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
