"""One thing that `verify` finds, and what fixes it."""

from collections.abc import Iterator
from dataclasses import dataclass

from raytrain2p.config.secrets import one_line
from raytrain2p.tracking.damage import DamagedFileError
from raytrain2p.tracking.run import Run

SYNC, RECONCILE = "run `python -m raytrain2p.runs sync`", "run `python -m raytrain2p.runs reconcile`"
SEND_AGAIN = "run `python -m raytrain2p.runs verify --repair`, which asks MLflow what it has, and sends the rest again"
REPAIRED = (SYNC, RECONCILE, SEND_AGAIN)  # by `--repair`
NOT_CHANGEABLE = "MLflow cannot change it: what the directory has counts"
RESTORE = "restore it from a backup"


@dataclass(frozen=True)
class Difference:
    """A difference between what a run should be and what it is, on disk or in MLflow.

    Args:
        phase: of the run; `launch` if there is no run.
        run_id: of the run, or of the launch.
        where: the file, or the place in MLflow.
    """

    phase: str
    run_id: str
    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        run_id = self.run_id if self.phase == "launch" else self.run_id[:8]
        return f"{self.phase} {run_id}  {self.where} {one_line(self.what, 500)}; {self.fix}"


def difference(run: Run, where: object, what: str, fix: str) -> Difference:
    return Difference(run.phase, run.run_id, str(where), what, fix)


def readable(run: Run, checks: Iterator[Difference], alive: bool = False) -> Iterator[Difference]:
    """What checks find, until one comes to a file that is damaged, or that cannot be read: that is what is found, too.

    Args:
        alive: a process works on the run: a file that has vanished was replaced just now.
    """
    try:
        yield from checks
    except DamagedFileError as error:
        problem = error.problems[0]
        yield difference(run, problem.where, problem.what, problem.fix)
    except OSError as error:
        if not (alive and isinstance(error, FileNotFoundError)):
            yield difference(run, error.filename or run.directory, f"cannot be read: {error.strerror or error}", RESTORE)
