"""Signals that end a command: Ctrl-C, SIGTERM, and SIGHUP of a terminal that is closed. One line and an exit code, no traceback.

It imports nothing that takes time: it is at work while all else is imported.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedError(KeyboardInterrupt):
    """A signal ends the command. `exit_code` is that of the command; `run` is what can be resumed, if there is one yet."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.exit_code = number, 128 + number
        self.run: Any = None  # tracking.run.Run


def handle(*handlers: Any) -> tuple[Any, ...]:
    """Set the handler of these signals, or one for each, and return the previous ones. Under `nohup` SIGHUP stays ignored.
    Outside the main thread Python delivers no signals, and nothing is set.
    """
    before = tuple(map(signal.getsignal, NUMBERS))
    if threading.current_thread() is threading.main_thread():
        for number, handler, previous in zip(NUMBERS, handlers * len(NUMBERS), before, strict=False):
            if number != signal.SIGHUP or previous is not signal.SIG_IGN:
                signal.signal(number, handler)
    return before


def end_at_once(number: int, frame: object) -> None:
    """The handler where there is nothing to close. An exception would not do: some libraries lose one that comes in their import."""
    with suppress(OSError):  # the terminal is gone
        os.write(2, f"\nraytrain2p: {StoppedError(number)}\n".encode())
    os._exit(128 + number)


def stop(number: int, frame: object) -> None:
    """The handler where something must be closed. The next signal ends the command at once."""
    handle(end_at_once)
    raise StoppedError(number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, a signal raises StoppedError."""
    before = handle(stop)
    try:
        yield
    finally:
        handle(*before)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Within, the processes that are started will not end with the terminal: the checkpoint is theirs. And `ray.init` sets a
    handler of its own for SIGTERM, which is replaced by ours.
    """
    before = tuple(map(signal.getsignal, NUMBERS))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        handle(*before)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
