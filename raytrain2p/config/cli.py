"""Shared by all commands: `--help` texts of settings, exit codes, and errors of the user without a traceback."""

import argparse
import io
import json
import os
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raytrain2p.config.escaping import printable
from raytrain2p.config.loading import type_name
from raytrain2p.config.metadata import known_keys
from raytrain2p.config.problems import InputError
from raytrain2p.config.secrets import masked
from raytrain2p.config.settings import SETTINGS_OF_PHASE

WIDTH = 110


def describe_settings(groups: Mapping[str, type[BaseModel]] | None = None) -> str:
    """Every setting with its type, default and meaning; those of one phase only are marked.

    Args:
        groups: further groups of settings by name, listed first.
    """
    lines = ["settings (key=value, or the same keys in a YAML file):"]
    for name, kind in (groups or {}).items():
        for key, field in known_keys(kind, f"{name}.").items():
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


FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 1, 2, 130, 141


def exit_code(command: Callable[[], int]) -> int:
    """Run a command. Returns its exit code; BAD_INPUT, with every problem on stderr; INTERRUPTED after Ctrl-C; or UNREAD.

    UNREAD: the reader of stdout went away, as `head` does; the code is that of a program that SIGPIPE ends.
    """
    sys.excepthook = report_bug
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may lack characters
    try:
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except InputError as error:
        print(f"raytrain2p: {printable(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("raytrain2p: stopped", file=sys.stderr)
        return INTERRUPTED


def report_bug(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Print the traceback of an error that nobody expected, without credentials."""
    print(printable(masked("".join(traceback.format_exception(kind, error, trace)))), end="", file=sys.stderr)


def say(line: str) -> None:
    """Print a line that has text from data, from a model or from a store."""
    print(printable(masked(line)), flush=True)


class Parser(argparse.ArgumentParser):
    """Its messages repeat what was typed, which may be a password in the wrong place."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(masked(message)))
