"""Keeps the logs of libraries out of the user's terminal."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from raytrain2p.config.console import STDERR

LOGGERS = ("ray", "ray.data", "ray.tune", "ray.train", "mlflow", "alembic", "pytorch_lightning", "lightning", "bitsandbytes")


def quiet() -> None:
    """Errors only, in this process and in those that Ray starts from it. Call it before Ray is started."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # a trial's process does not load it
        from raytrain2p.models.pretrained import quiet_transformers

        quiet_transformers()


@contextmanager
def muted_stderr(verbose: bool) -> Iterator[None]:
    """Within, unless verbose, standard error is discarded, except through `own_stderr` of config/console.py. Ray's C++ core writes
    there while Ray starts and when Ray Data starts encoders; the same is in Ray's log files.
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
