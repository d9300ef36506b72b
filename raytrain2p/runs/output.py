"""How verbs print: a table in the terminal, or JSON; sizes and ages for people."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any, Literal

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytrain2p.config.escaping import CONTROL_CHARACTERS, printable
from raytrain2p.config.secrets import masked, masker

LOCAL_TIMES = 26 * 3600.0  # seconds between the local times of two places on Earth, at most
UNLIMITED = 10_000  # columns of a pipe: nothing is wrapped or cut there
RIGHT = frozenset({"steps", "size", "age", "records", "points"})


def print_json(value: Any) -> None:
    """Print dataclasses and plain values as one JSON document, without credentials or control characters."""
    text = json.dumps(value, default=_plain, indent=2, ensure_ascii=False)
    print(CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", masked(text)))


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], cut: bool = False) -> None:
    """Print rows under their headings; nothing in them is read as markup, or controls the terminal.

    Args:
        cut: a row is one line of a terminal: what does not fit is left out, of the last column first.
    """
    terminal, hide = sys.stdout.isatty(), masker()
    lines = [[printable(hide("" if value is None else str(value))) for value in row] for row in rows]
    console = Console(file=sys.stdout, width=None if terminal else UNLIMITED, markup=False, emoji=False, highlight=False)
    if cut and terminal:
        *others, last = zip(columns, *lines, strict=True)
        left = console.width - sum(2 + max(map(cell_len, cells)) for cells in others)
        kept = [cell if cell_len(cell) <= left else set_cell_size(cell, left - 1).rstrip() + "…" for cell in last]
        columns, *lines = [[*cells, end][: None if left >= len(columns[-1]) else -1] for *cells, end in zip(*others, kept, strict=True)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in RIGHT else "left"
        table.add_column(column, justify=justify, overflow="ellipsis" if cut else "fold", no_wrap=cut or not terminal)
    for line in lines:
        table.add_row(*map(Text, line))
    console.print(table)


def human_bytes(count: int | None) -> str:
    """As in `24.8 MB`; nothing if unknown."""
    if count is None:
        return ""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.3g} {units[0]}"


def age_of(timestamp: str) -> float | None:
    """Seconds since a run's timestamp; None if that is not a time, or is to come: the clock was wrong then, or is now."""
    try:
        seconds = time.time() - datetime.strptime(timestamp, "%Y%m%d_%H%M%S").timestamp()
    except (ValueError, OverflowError):
        return None
    return max(0.0, seconds) if seconds > -LOCAL_TIMES else None


def human_age(timestamp: str) -> str:
    """How long ago a run's timestamp was, as in `3 d`; nothing if unknown."""
    if (seconds := age_of(timestamp)) is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


def human_time(seconds: float) -> str:
    """Seconds since 1970 as local time."""
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds")


def human_duration(seconds: float) -> str:
    """As in `2 h 5 min`."""
    minutes, hours = round(seconds) // 60, round(seconds / 60) // 60
    if hours:
        return f"{hours} h {round(seconds / 60) % 60} min"
    return f"{minutes} min {round(seconds) % 60} s" if minutes else f"{seconds:.0f} s"


def number(value: float | None) -> str:
    """A metric for a table, as in `2.148`."""
    return "" if value is None else f"{value:.5g}"
