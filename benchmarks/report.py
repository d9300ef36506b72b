"""What the parts found: kept in results.json, from which docs/benchmarks.md and its plot are written."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.turns import Ratio

PACKAGES = ("torch", "ray", "pytorch-lightning", "transformers", "peft", "mlflow")
NOISES = 3.0
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "bf16")


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Bar:
    """One ratio of the plot: their time over ours, more than 1 where this program is faster."""

    label: str
    ratio: Ratio
    group: str


@dataclass
class Found:
    """What a part found."""

    tables: list[Table] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def machine() -> dict[str, str]:
    """The processor, its instruction sets that matter here, memory and versions."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = facts.get("flags", facts.get("Features", "")).split()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": facts.get("model name", platform.processor() or platform.machine()),
        "cores": str(os.cpu_count()),
        "instruction sets": ", ".join(name for name in INSTRUCTIONS if name in flags) or "unknown",
        "memory": f"{memory:.0f} GiB",
        "Python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": commit(),
    }


def commit() -> str:
    """Dirty, if anything but the docs has changed: the page of benchmarks is written after each part."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])  # noqa: S607
        return done.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        "-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs") else ""
    )


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    return found


def keep(path: Path, name: str, found: Found, seconds: float, short: bool) -> dict[str, Any]:
    """Add a part to the results, in place of an earlier one."""
    results = load(path)
    results["machine"] = machine()
    when = time.strftime("%Y-%m-%d %H:%M")
    results["parts"][name] = {"when": when, "commit": commit(), "seconds": round(seconds), "short": short, **asdict(found)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    return results


def markdown(table: Mapping[str, Any]) -> str:
    lines = [f"**{table['title']}**", "", f"| {' | '.join(table['columns'])} |", f"|{'---|' * len(table['columns'])}"]
    lines += [f"| {' | '.join(row)} |" for row in table["rows"]]
    return "\n".join([*lines, "", *table["notes"]]).rstrip() + "\n"


def page(results: Mapping[str, Any], titles: Mapping[str, str], plot: str) -> str:
    """The page of the documentation.

    Args:
        titles: what each part is about, in the order of the page.
        plot: file name of the plot.
    """
    facts = "; ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` (`python -m benchmarks [PART ...]`; `--short` only tries each part). Contestants are processes that",
        "take turns: one runs while the others are suspended, and each step is compared with the same step of the other, so that a drift",
        "of the machine cancels. Figures are ratios, median and quartiles. **A ratio over 1 means that this program is faster.** All train",
        "the same records in the same order from the same weights; where losses differ, the comparison is void and its row says so. bf16",
        f"losses may differ by {NOISES:g} times the noise: the mean difference between two runs of ours that sum in another order or,",
        "for those that encode in bf16, that round features to it. Those with peft's LoRA layers, which in bf16 round twice, are compared",
        "with runs of ours that have them too.",
        "",
        f"Machine: {facts}.",
        "",
        f"![Ratios]({plot})",
        "",
    ]
    for name, title in titles.items():
        part = results["parts"].get(name)
        if part is None:
            continue
        form = "**short form, a try and not a result**, " if part["short"] else ""
        lines += [
            f"## {title}",
            "",
            f"`python -m benchmarks {name}`, {form}{part['when']}, {part['seconds']} s, commit {part['commit']}.",
            "",
        ]
        for error in part["errors"]:
            lines += ["Failed:", "", *(f"    {line}" for line in error.splitlines()), ""]
        for table in part["tables"]:
            lines += [markdown(table)]
    return "\n".join(lines).rstrip() + "\n"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """All ratios as bars, by group, on one logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    bars = [bar for part in results["parts"].values() for bar in part["bars"] if bar["ratio"]["median"] > 0]
    groups = list(dict.fromkeys(bar["group"] for bar in bars))
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.27 * (len(bars) + len(groups))))
    place, ticks, names = 0.0, list[float](), list[str]()
    for number, group in enumerate(groups):
        ticks, names = [*ticks, place], [*names, group]
        for bar in (one for one in bars if one["group"] == group):
            place += 1
            ratio = bar["ratio"]
            spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
            axis.barh(place, ratio["median"] - 1, left=1, xerr=spread, height=0.7, color=f"C{number % 10}", ecolor="black")
            ticks, names = [*ticks, place], [*names, f"{bar['label']}  {ratio['median']:.2f}"]
        place += 1
    axis.set_yticks(ticks, names, fontsize=8)
    for tick, name in zip(axis.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name in groups else "normal")
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("theirs / ours, in time or bytes (more than 1: this program needs less)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def number(value: float) -> str:
    """With three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def median_text(values: Sequence[float]) -> str:
    """Median and quartiles, with three significant digits."""
    return Ratio.of(values).text(number)
