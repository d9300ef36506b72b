"""What the user sees while a run is under way: one live line in a terminal, occasional lines elsewhere."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import ray

from raytrain2p.launch.quiet import own_stderr
from raytrain2p.worker.channel import RunChannel, Stage, StepProgress

PLAIN_SECONDS = 15.0  # between two lines where nobody looks all the time
POLL_SECONDS = 2.0  # the channel answers sooner if there is news


def describe(update: StepProgress) -> str:
    """One line, such as `epoch 0  step 120/250  loss 1.432  18.3 samples/s  1:54 left`."""
    minutes, seconds = divmod(round(update.seconds_left), 60)
    return (
        f"epoch {update.epoch}  step {update.step}/{update.steps}  loss {update.loss:.3f}  "
        f"{update.samples_per_second:.1f} samples/s  {minutes}:{seconds:02d} left"
    )


class Console:
    """Writes progress to a stream: over one line if it is a terminal, else a new line every now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or own_stderr()
        self.live = self.stream.isatty()
        self.shown, self.since = "", float("-inf")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.clear()
        print(line, file=self.stream, flush=True)

    def show(self, line: str) -> None:
        """Where things stand; replaces the last such line in a terminal."""
        if line == self.shown:
            return
        if self.live:
            self.stream.write(f"\r\x1b[2K{line}")
            self.stream.flush()
            self.shown = line
        elif time.monotonic() - self.since >= PLAIN_SECONDS:
            print(line, file=self.stream, flush=True)
            self.shown, self.since = line, time.monotonic()

    def clear(self) -> None:
        if self.live and self.shown:
            self.stream.write("\r\x1b[2K")
            self.stream.flush()
        self.shown = ""


@contextmanager
def followed(channel: RunChannel, console: Console) -> Iterator[None]:
    """Within, a thread shows what workers put on the channel."""
    done = threading.Event()

    def follow() -> None:
        stage = ""
        while not done.is_set():
            try:
                update, lines = channel.next(POLL_SECONDS)
            except ray.exceptions.RayError:
                done.wait(POLL_SECONDS)  # the channel's node is gone or slow: training goes on without a image of it
                continue
            for line in lines:
                console.say(line)
            if isinstance(update, Stage) and update.name != stage:
                stage = update.name
                console.say(stage)
            elif isinstance(update, StepProgress):
                console.show(describe(update))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        console.clear()
