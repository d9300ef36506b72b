"""Shared by all commands: `--help` texts of settings, exit codes, and errors of the user without a traceback."""

import argparse
import errno
import io
import json
import os
import select
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
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


ACCEPT_HELP = "resume although records, models or the aligner have other content than the run began with; it is recorded in the run"
NO_HOME = "Could not determine home directory."  # Path.expanduser
FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 1, 2, 130, 141


def exit_code(command: Callable[[], int]) -> int:
    """Run a command. Returns its exit code; BAD_INPUT, with every problem on stderr; INTERRUPTED after Ctrl-C; or UNREAD.

    UNREAD: the reader of stdout went away, as `head` does, or its terminal; the code is that of a program that SIGPIPE ends.
    """
    sys.excepthook = report_bug
    sys.stdout = sys.stdout or io.StringIO()  # closed by the shell, as `>&-` does
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may lack characters
    try:
        code = command()
        sys.stdout.flush()
        return code
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"raytrain2p: {printable(str(error.filename))}: no file system takes so long a name", file=sys.stderr)
            return BAD_INPUT
        if error.errno not in (errno.EPIPE, errno.EIO) or error.filename is not None or not unread(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except RuntimeError as error:
        if str(error) != NO_HOME:
            raise
        print("raytrain2p: a path begins with `~` and the name of a user that there is not", file=sys.stderr)
        return BAD_INPUT
    except InputError as error:
        print(f"raytrain2p: {printable(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stopped:
        print(f"raytrain2p: {str(stopped) or 'stopped'}", file=sys.stderr)
        return getattr(stopped, "exit_code", INTERRUPTED)


def unread(stream: Any) -> bool:
    """Whether nobody can read a stream any more: its pipe has no reader, or its terminal is gone."""
    with suppress(io.UnsupportedOperation):
        (poll := select.poll()).register(stream.fileno(), 0)
        return bool(poll.poll(0))
    return False


def report(line: str) -> None:
    """Print a line for the user beside a command's output."""
    print(printable(masked(f"raytrain2p: {line}")), file=sys.stderr)


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
