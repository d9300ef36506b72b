"""How a command ends: its exit code, and no traceback for what is the user's to mend."""

import sys
from collections.abc import Callable

from raytrain2p.config.problems import InputError

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def exit_code(command: Callable[[], int]) -> int:
    """Run a command: what it returns, or BAD_INPUT with every problem on stderr, or INTERRUPTED after Ctrl-C."""
    try:
        return command()
    except InputError as error:
        print(f"raytrain2p: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("raytrain2p: stopped", file=sys.stderr)
        return INTERRUPTED
