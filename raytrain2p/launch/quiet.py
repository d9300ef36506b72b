"""Keeps what libraries say about themselves out of the user's terminal; warnings that need an action stay."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

SPEAKERS = ("ray", "ray.data", "ray.tune", "ray.train", "mlflow", "alembic", "pytorch_lightning", "lightning")


def quiet() -> None:
    """For this process, and for the processes that Ray starts from it. Before Ray is started."""
    for name in SPEAKERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # not in a trial's own process
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()


@contextmanager
def muted_stderr(verbose: bool) -> Iterator[None]:
    """Within, unless verbose, what C++ writes to this process's standard error is dropped: Ray's core does so while it starts,
    and when Ray Data starts encoders (its logs have it too). `own_stderr` is heard all the same.
    """
    if verbose:
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def own_stderr() -> TextIO:
    """Standard error by a descriptor of its own; where it has none, as under a test's capture, standard error itself."""
    try:
        return os.fdopen(os.dup(sys.stderr.fileno()), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
    except OSError:
        return sys.stderr
