"""Requests to stop."""

import os
import signal
import threading

from raytrain2p.interrupts import stoppable
from raytrain2p.launch.signals import StopSignals


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
