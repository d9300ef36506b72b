"""What the user sees while a run is under way: one live line in a terminal, occasional lines elsewhere."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import ray

PLAIN_SECONDS = 15.0  # between two lines where nobody looks all the time
POLL_SECONDS = 0.5


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Holds the latest word of rank 0 until the driver asks. It knows nothing that is not on disk too."""

    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}

    def put(self, word: dict[str, Any]) -> None:
        self.latest = word

    def get(self) -> dict[str, Any]:
        return self.latest


def describe(word: dict[str, Any]) -> str:
    """One line, such as `epoch 0  step 120/250  loss 1.432  18.3 samples/s  1:54 left`."""
    if "stage" in word:
        return str(word["stage"])
    minutes, seconds = divmod(round(word["seconds_left"]), 60)
    return (
        f"epoch {word['epoch']}  step {word['step']}/{word['steps']}  loss {word['loss']:.3f}  "
        f"{word['samples_per_second']:.1f} samples/s  {minutes}:{seconds:02d} left"
    )


class Console:
    """Writes progress to a stream: over one line if it is a terminal, else a new line every now and then."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
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
def followed(board: Any, console: Console) -> Iterator[None]:
    """Within, a thread shows what workers put on the board."""
    done = threading.Event()

    def follow() -> None:
        stage = ""
        while not done.wait(POLL_SECONDS):
            try:
                word = ray.get(board.get.remote(), timeout=5)
            except ray.exceptions.RayError:
                continue  # the board's node is gone or slow: training goes on without a picture of it
            if word.get("stage", stage) != stage:
                stage = word["stage"]
                console.say(stage)
            elif word and "stage" not in word:
                console.show(describe(word))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)
        console.clear()


def putter(board: Any) -> Callable[[dict[str, Any]], None]:
    """Sends a word to the board without waiting for it."""

    def put(word: dict[str, Any]) -> None:
        board.put.remote(word)

    return put
