"""Requests to stop."""

import os
import signal
import threading
import time
from typing import Any

import pytest

from raytrain2p.interrupts import StoppedError, stoppable
from raytrain2p.launch import signals as signals_module
from raytrain2p.launch.signals import StopSignals, fit_until_stopped


def test_a_signal_that_another_thread_receives_is_noticed() -> None:
    """As after SIGSTOP and SIGCONT, when the main thread may be the last to run again."""
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    with stoppable(), StopSignals() as signals:
        other.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.wait(10)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            over.set()
            other.join()
    assert signals.received == [signal.SIGTERM]


def test_waiting_ends_without_news() -> None:
    with StopSignals() as signals:
        assert not signals.wait(0.01)


@pytest.mark.parametrize(("training", "presses", "promised"), [(None, 2, False), (False, 1, False), (True, 2, True)])
def test_a_signal_promises_a_checkpoint_only_if_the_workers_train_and_the_next_one_ends_the_wait(
    training: bool | None, presses: int, promised: bool
) -> None:
    """None: they are starting, and do not answer yet."""

    class Workers:
        def request_stop(self) -> bool | None:
            if training is None:
                time.sleep(20)
            return training

    def press() -> None:
        for _ in range(presses):
            time.sleep(0.7)
            os.kill(os.getpid(), signal.SIGTERM)

    lines, workers = list[str](), Workers()
    channel: Any = workers
    threading.Thread(target=press).start()
    began = time.monotonic()
    with stoppable(), pytest.raises(StoppedError) as stopped:
        fit_until_stopped(threading.Event().wait, channel, lines.append)
    assert time.monotonic() - began < 10
    assert stopped.value.exit_code == 143
    assert bool(lines) == promised


def test_a_node_that_is_taken_away_ends_a_launch_as_sigterm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are asked once, and end with a checkpoint."""
    monkeypatch.setattr(signals_module, "SECONDS_BETWEEN_LOOKS", 0.01)
    over, asked, looks = threading.Event(), list[None](), iter([False, False, *[True] * 1000])

    class Workers:
        def request_stop(self) -> bool:
            asked.append(None)
            over.set()
            return True

    lines = list[str]()
    channel: Any = Workers()
    assert fit_until_stopped(over.wait, channel, lines.append, lambda: next(looks)) == signal.SIGTERM
    assert lines[0] == "the node of this launch is taken away"
    assert len(asked) == 1
