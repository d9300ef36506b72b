"""Keeps the logs of libraries out of the user's terminal."""

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

LOGGERS = ("ray", "ray.data", "ray.tune", "ray.train", "mlflow", "alembic", "pytorch_lightning", "lightning")
STDERR = 2  # its file descriptor


def quiet() -> None:
    """Errors only, in this process and in those that Ray starts from it. Call it before Ray is started."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # a trial's process does not load it
        from raytrain2p.models.pretrained import quiet_transformers

        quiet_transformers()


@contextmanager
def muted_stderr(verbose: bool) -> Iterator[None]:
    """Within, unless verbose, standard error is discarded, except through `own_stderr`. Ray's C++ core writes there while Ray
    starts and when Ray Data starts encoders; the same is in Ray's log files.
    """
    if verbose:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(STDERR)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, STDERR)
    try:
        yield
    finally:
        os.dup2(kept, STDERR)
        os.close(devnull)
        os.close(kept)


def own_stderr() -> TextIO:
    """A duplicate of standard error; where that has another file descriptor or none, so that `muted_stderr` does not discard it, standard
    error itself. That of a notebook shows its lines in the cell, and has the descriptor of the notebook server's terminal."""
    try:
        if sys.stderr.fileno() != STDERR:
            return sys.stderr
        raw = _Output(os.dup(STDERR), "w")
    except OSError:
        return sys.stderr
    return io.TextIOWrapper(io.BufferedWriter(raw), sys.stderr.encoding, errors="backslashreplace", line_buffering=True)


class _Output(io.FileIO):
    """Discards what cannot be written: its reader or its terminal is gone, and training continues."""

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError:
            return len(content)
