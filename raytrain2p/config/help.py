"""The settings as `--help` shows them."""

import json
import textwrap
from typing import Any

from pydantic.fields import FieldInfo

from raytrain2p.config.loading import known_keys, type_name
from raytrain2p.config.settings import SETTINGS_OF_PHASE

WIDTH = 110


def describe_settings() -> str:
    """Every setting with its type, default and meaning; those of one phase alone are marked."""
    first, second = (known_keys(kind) for kind in SETTINGS_OF_PHASE.values())
    lines = ["settings (key=value, or the same keys in a YAML file):"]
    for key in dict.fromkeys([*first, *second]):
        field = first.get(key) or second[key]
        phase = "" if key in first and key in second else " [phase 1]" if key in first else " [phase 2]"
        lines.append(f"  {key} ({type_name(field.annotation)}{_default(field)}){phase}")
        lines += textwrap.wrap(field.description or "", WIDTH, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    value: Any = field.default
    return f", default {value if isinstance(value, str) else json.dumps(value)}"
