"""Requests to stop (SIGTERM, Ctrl-C, `ray job stop`) in the driver; the workers' part is worker/callbacks/stop.py."""

import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray

from raytrain2p.worker.channel import RunChannel

SECONDS_TO_STOP = 60.0  # enough for a long step and a large checkpoint
LONGEST_WAIT = 0.5  # seconds


class StoppedError(Exception):
    """The launch was stopped by a signal. `exit_code` is that of the command."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """Within, SIGTERM and SIGINT are kept in `received`, and set `news`. Outside the main thread Python delivers no signals."""

    def __init__(self) -> None:
        self.news, self.received = threading.Event(), list[int]()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def wait(self, seconds: float = math.inf) -> bool:
        """Wait for news; False if there was none. In short parts: the kernel may give a signal to another thread (a process that is
        continued after SIGSTOP), and Python handles it when the main thread next runs."""
        end = time.monotonic() + seconds
        while not self.news.wait(LONGEST_WAIT):
            if time.monotonic() > end:
                return False
        return True

    def _receive(self, number: int, frame: object) -> None:
        self.received.append(number)
        self.news.set()


def fit_until_stopped(fit: Callable[[], Any], channel: RunChannel, say: Callable[[str], None]) -> int | None:
    """Run `fit` to its end. At a signal the workers are asked to stop after the current step, with a checkpoint.

    `fit` runs in a thread: in the main one Ray would replace our signal handler by its own, which writes no checkpoint.

    Returns:
        Number of the first signal, if there was one.

    Raises:
        StoppedError: a signal came, and the workers did not end by themselves: they were not training, took too long, or
            a second signal came.
        Exception: what `fit` raised.
    """
    outcome: Future[Any] = Future()
    with StopSignals() as signals:

        def work() -> None:
            try:
                outcome.set_result(fit())
            except BaseException as error:
                outcome.set_exception(error)
            signals.news.set()

        threading.Thread(target=work, name="fit", daemon=True).start()
        signals.wait()
        if signals.received and not outcome.done():
            say("stopping after this step, with a checkpoint (again: at once)")
            signals.news.clear()
            if _request_stop(channel):
                while not outcome.done() and len(signals.received) == 1 and signals.wait(SECONDS_TO_STOP):
                    signals.news.clear()
            if not outcome.done():
                raise StoppedError(signals.received[0])
        outcome.result()
        return signals.received[0] if signals.received else None


def _request_stop(channel: RunChannel) -> bool:
    """Ask the workers to stop; whether they are training, and so will."""
    try:
        return channel.request_stop()
    except ray.exceptions.RayError:  # or a time-out: the channel's node is gone or slow
        return False
