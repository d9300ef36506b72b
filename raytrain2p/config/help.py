"""The settings as `--help` shows them."""

import json
import textwrap
from typing import Any

from pydantic.fields import FieldInfo

from raytrain2p.config.loading import known_keys, type_name
from raytrain2p.config.settings import SETTINGS_OF_PHASE
from raytrain2p.config.sweep import SweepSettings

WIDTH = 110


def describe_settings(sweep: bool = False) -> str:
    """Every setting with its type, default and meaning; those of one phase alone are marked.

    Args:
        sweep: with those of a sweep, before them.
    """
    lines = ["settings (key=value, or the same keys in a YAML file):"]
    for key, field in known_keys(SweepSettings, "sweep.").items() if sweep else ():
        lines += _described(key, field, "")
    first, second = (known_keys(kind) for kind in SETTINGS_OF_PHASE.values())
    for key in dict.fromkeys([*first, *second]):
        phase = "" if key in first and key in second else " [phase 1]" if key in first else " [phase 2]"
        lines += _described(key, first.get(key) or second[key], phase)
    return "\n".join(lines)


def _described(key: str, field: FieldInfo, phase: str) -> list[str]:
    head = f"  {key} ({type_name(field.annotation)}{_default(field)}){phase}"
    return [head, *textwrap.wrap(field.description or "", WIDTH, initial_indent="      ", subsequent_indent="      ")]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    value: Any = field.default
    return f", default {value if isinstance(value, str) else json.dumps(value)}"
