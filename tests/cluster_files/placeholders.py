"""Placeholders of the files in cluster/: `<what-goes-there>`, in lower case with hyphens."""

import re
from collections.abc import Mapping
from pathlib import Path

CLUSTER = Path(__file__).parents[2] / "cluster"
PLACEHOLDER = re.compile(r"<([a-z0-9]+(?:-[a-z0-9]+)*)>")


def placeholders(text: str) -> set[str]:
    return set(PLACEHOLDER.findall(text))


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with a value for each placeholder; those without one get their own name."""
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[1]), text)
