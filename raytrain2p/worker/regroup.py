"""A worker group that ends to start again: with more workers, or without a node that is taken away."""

from collections.abc import Iterator
from contextlib import contextmanager

from raytrain2p.models.distributed import WorkerGroup


class RegroupError(Exception):
    """Raised by all workers after one and the same step, with a checkpoint of it on disk. Not a failure: launch/elastic.py has the
    group started again.

    Args:
        preempted: because a node is taken away.
    """

    def __init__(self, preempted: bool) -> None:
        super().__init__(preempted)
        self.preempted = preempted


@contextmanager
def leaving_together(group: WorkerGroup) -> Iterator[None]:
    """Within, RegroupError waits for all workers: Ray ends the others as soon as one has raised it, and rank 0 may still write."""
    try:
        yield
    except RegroupError:
        group.gather(None)
        raise
