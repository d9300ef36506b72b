"""How verbs print: a table in the terminal, or JSON; sizes and ages for people."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytrain2p.config.escaping import CONTROL_CHARACTERS, printable
from raytrain2p.config.secrets import masked

UNLIMITED = 10_000  # columns of a pipe: nothing is wrapped or cut there
RIGHT = frozenset({"steps", "size", "age", "records", "points"})


def print_json(value: Any) -> None:
    """Print dataclasses and plain values as one JSON document, without credentials or control characters."""
    text = json.dumps(value, default=_plain, indent=2, ensure_ascii=False)
    print(CONTROL_CHARACTERS.sub(lambda match: f"\\u{ord(match[0]):04x}", masked(text)))


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their headings; nothing in them is read as markup, or controls the terminal."""
    terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT else "left", overflow="fold", no_wrap=not terminal)
    for row in rows:
        table.add_row(*(Text(printable(masked("" if value is None else str(value)))) for value in row))
    Console(file=sys.stdout, width=None if terminal else UNLIMITED, markup=False, emoji=False, highlight=False).print(table)


def human_bytes(count: int | None) -> str:
    """As in `24.8 MB`; nothing if unknown."""
    if count is None:
        return ""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.3g} {units[0]}"


def human_age(timestamp: str) -> str:
    """How long ago a run's timestamp was, as in `3 d`."""
    try:
        seconds = time.time() - datetime.strptime(timestamp, "%Y%m%d_%H%M%S").timestamp()
    except (ValueError, OverflowError):
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0, seconds):.0f} s"


def number(value: float | None) -> str:
    """A metric for a table, as in `2.148`."""
    return "" if value is None else f"{value:.5g}"
