"""Terminal output of a launch: what its workers report."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import ray

from raytrain2p.config.console import Console
from raytrain2p.worker.channel import SECONDS_TO_ANSWER, RunChannel, Stage, StepProgress

POLL_SECONDS = 2.0  # the channel answers sooner if there is news


def describe(update: StepProgress) -> str:
    """One line, such as `epoch 0  step 120/250  loss 1.432  18.3 samples/s  0:01:54 left`; nothing is left after the last step."""
    left = f"  {timedelta(seconds=round(update.seconds_left))} left" if update.step < update.steps else ""
    speed = f"{update.samples_per_second:{'.1f' if update.samples_per_second >= 1 else '.2g'}}"
    return f"epoch {update.epoch}  step {update.step}/{update.steps}  loss {decimal(update.loss, 3)}  {speed} samples/s{left}"


def decimal(value: float, places: int) -> str:
    """A number with so many decimal places; with a power of ten where that would show fewer than two digits of it, or more than six
    before the point."""
    if value == 0 or not math.isfinite(value) or 10 ** (1 - places) <= abs(value) < 1e6:
        return f"{value:.{places}f}"
    return f"{value:.{places}e}"


@contextmanager
def followed(channel: RunChannel, console: Console) -> Iterator[None]:
    """Within, a thread shows what the workers put on the channel."""
    done = threading.Event()

    def follow() -> None:
        stage, last = "", ""
        while not done.is_set():
            try:
                update, lines = channel.next(POLL_SECONDS)
            except ray.exceptions.RayError:
                done.wait(POLL_SECONDS)  # the channel's node is gone or slow; training does not depend on it
                continue
            for line in lines:
                console.say(line)
            if isinstance(update, Stage) and update.name != stage:
                stage = update.name
                console.keep(last)
                console.say(stage)
                last = ""
            elif isinstance(update, StepProgress) and not done.is_set():
                console.show(last := describe(update))
        console.keep(last)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(POLL_SECONDS + SECONDS_TO_ANSWER + 1)
        console.clear()
