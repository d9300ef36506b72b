"""A request to stop (SIGTERM, Ctrl-C, `ray job stop`), as the driver hears it; the workers' part is in stop_callback.py."""

import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import ray

from raytrain2p.worker.channel import RunChannel

SECONDS_TO_STOP = 60.0  # a long step and a large checkpoint must fit into it


class StoppedError(Exception):
    """The launch was asked to stop, and did."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopSignals:
    """SIGTERM and SIGINT, as requests that the driver sees between two waits. In another thread than the main one, where
    Python hears no signals, there are none.
    """

    def __init__(self) -> None:
        self.news, self.received = threading.Event(), list[int]()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received.append(number)
        self.news.set()


def fit_until_stopped(fit: Callable[[], Any], channel: RunChannel, say: Callable[[str], None]) -> int | None:
    """Wait for the end of `fit`; if a signal came meanwhile, its number.

    It runs in a thread: in the main one, Ray would put a handler of its own in the place of ours, which saves nothing.

    Raises:
        StoppedError: a signal came, and the workers did not end by themselves: they were not training, took too long, or
            the signal came again.
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
        signals.news.wait()
        if signals.received and not outcome.done():
            say("stopping after this step, with a checkpoint (again: at once)")
            signals.news.clear()
            if _request_stop(channel):
                while not outcome.done() and len(signals.received) == 1 and signals.news.wait(SECONDS_TO_STOP):
                    signals.news.clear()
            if not outcome.done():
                raise StoppedError(signals.received[0])
        outcome.result()
        return signals.received[0] if signals.received else None


def _request_stop(channel: RunChannel) -> bool:
    """Whether workers train, and will stop."""
    try:
        return channel.request_stop()
    except ray.exceptions.RayError:  # a time-out among them: the channel's node is gone or slow
        return False
