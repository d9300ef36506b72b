"""Requests to stop (SIGTERM, Ctrl-C, `ray job stop`) in the driver; the workers' part is worker/callbacks/stop.py."""

import math
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray

from raytrain2p.interrupts import StoppedError, end_at_once, handle, stop
from raytrain2p.worker.channel import RunChannel

SECONDS_TO_STOP = 60.0  # enough for a long step and a large checkpoint
LONGEST_WAIT = 0.5  # seconds
SECONDS_BETWEEN_LOOKS = 1.0  # at whether the node is drained


class StopSignals:
    """Within, signals that stop a launch are kept in `received`, and set `news`. After one, the next ends a command at once; of a
    program that called us, it is the program's own again."""

    def __init__(self) -> None:
        self.news, self.received = threading.Event(), list[int]()
        self.before: tuple[Any, ...] = ()

    def __enter__(self) -> "StopSignals":
        self.before = handle(self.receive)
        return self

    def __exit__(self, *_: object) -> None:
        handle(*(end_at_once if self.received and handler is stop else handler for handler in self.before))

    def wait(self, seconds: float = math.inf) -> bool:
        """Wait for news; False if there was none. In short parts: the kernel may give a signal to another thread (a process that is
        continued after SIGSTOP), and Python handles it when the main thread next runs."""
        end = time.monotonic() + seconds
        while not self.news.wait(LONGEST_WAIT):
            if time.monotonic() > end:
                return False
        return True

    def receive(self, number: int, frame: object = None) -> None:
        self.received.append(number)
        self.news.set()


def fit_until_stopped(
    fit: Callable[[], Any], channel: RunChannel, say: Callable[[str], None], is_drained: Callable[[], bool] | None = None
) -> int | None:
    """Run `fit` to its end. At a signal the workers are asked to stop after the current step, with a checkpoint.

    `fit` runs in a thread: in the main one Ray would replace our signal handler by its own, which writes no checkpoint.

    Args:
        is_drained: whether this process will end with its node soon, which is a SIGTERM with more notice.

    Returns:
        Number of the first signal, if there was one.

    Raises:
        StoppedError: a signal came, and the workers did not end by themselves: they were not training, took too long, or
            a second signal came.
        Exception: what `fit` raised.
    """
    outcome, training = Future[Any](), Future[bool]()
    with StopSignals() as signals:

        def work() -> None:
            try:
                outcome.set_result(fit())
            except BaseException as error:
                outcome.set_exception(error)
            signals.news.set()

        def watch(is_drained: Callable[[], bool]) -> None:
            while not (outcome.done() or signals.received):
                if is_drained():
                    say("the node of this launch is taken away")
                    signals.receive(signal.SIGTERM)
                time.sleep(SECONDS_BETWEEN_LOOKS)

        def ask() -> None:
            training.set_result(_request_stop(channel))
            signals.news.set()

        def wait_until(over: Callable[[], bool]) -> None:
            while not (over() or outcome.done() or len(signals.received) > 1) and signals.wait(SECONDS_TO_STOP):
                signals.news.clear()

        threading.Thread(target=work, name="fit", daemon=True).start()
        if is_drained is not None:
            threading.Thread(target=watch, args=(is_drained,), name="drain", daemon=True).start()
        signals.wait()
        if signals.received and not outcome.done():
            signals.news.clear()
            threading.Thread(target=ask, name="ask", daemon=True).start()  # workers that start do not answer for seconds
            wait_until(training.done)
            if training.done() and training.result():
                say("stopping after this step, with a checkpoint (again: at once)")
                wait_until(lambda: False)
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
