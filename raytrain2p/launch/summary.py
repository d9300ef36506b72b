"""What is said at the end of a launch: where the run is, what it measured, and what to do next."""

import io
from collections import defaultdict

from rich.console import Console as RichConsole
from rich.table import Table

from raytrain2p.config import Settings
from raytrain2p.config.secrets import masked
from raytrain2p.worker.job import Outcome


def summary(outcome: Outcome, phase: int, settings: Settings) -> str:
    """A table of the test metrics, one column per split, and the next commands."""
    short = outcome.run_id[:8]
    command = (
        f"python -m raytrain2p.train --phase 2 --aligner {short}"
        if phase == 1
        else f'python -m raytrain2p.predict --run {short} --image FILE "What does the picture show?"'
    )
    lines = [
        "",
        f"run        {outcome.run_id}",
        f"directory  {outcome.directory}",
        f"artifact   {outcome.artifact}",
        "",
        metric_table(outcome.metrics),
        f"next       {command}",
        f"compare    mlflow ui --backend-store-uri {masked(settings.tracking.uri)}",
    ]
    return "\n".join(lines)


def metric_table(metrics: dict[str, float]) -> str:
    """Metrics named `<split>/<metric>`, a row per metric and a column per split."""
    rows: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in metrics.items():
        split, slash, metric = name.partition("/")
        rows[metric if slash else name]["train" if not slash else split] = value
    splits = list(dict.fromkeys(split for row in rows.values() for split in row))
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for split in splits:
        table.add_column(split, justify="right")
    for metric, row in rows.items():
        table.add_row(metric, *(format_metric(metric, row[split]) if split in row else "" for split in splits))
    stream = io.StringIO()
    RichConsole(file=stream, width=120).print(table)
    return stream.getvalue()


def format_metric(name: str, value: float) -> str:
    """Shares as percentages, losses as they are."""
    share = any(word in name for word in ("recall", "chance", "exact_match", "majority"))
    return f"{100 * value:.2f} %" if share else f"{value:.4f}"
