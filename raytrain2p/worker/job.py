"""What passes between the driver and the workers, and what a run produces. Imports nothing that trains: Ray's controller loads it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raytrain2p.config import Settings

if TYPE_CHECKING:
    import ray

    from raytrain2p.phases.inputs import Split
    from raytrain2p.worker.channel import RunChannel, SweepChannel

OBJECTIVE = "objective"  # metric of a trial's run that the sweep compares, whichever one it is


@dataclass(frozen=True)
class TrainJob:
    """What each worker is given.

    Args:
        launch_id: stable over retries.
        command: shell line that launches the same again.
        launched: seconds since 1970 when it was given.
        threads: CPUs of a worker.
        data: the prepared splits by name, in Ray's object store.
        facts: what a resumed run is checked against.
        environment: variables that MLflow and the model hub need, perhaps credentials: Ray's own runtime environment would be logged.
        trial: of a sweep; None for a single run.
        tags: more tags of the run; a trial names its sweep.
    """

    settings: Settings = field(repr=False)  # its tracking URI may have a password
    phase: int
    launch_id: str
    command: str
    threads: int
    data: "ray.ObjectRef[Mapping[str, Split]]"
    channel: "RunChannel"
    facts: dict[str, Any]
    environment: dict[str, str] = field(repr=False)
    launched: float
    trial: "TrialContext | None" = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialContext:
    """The trial that a run is: its number, the metric that the sweep compares, and the sweep's channel."""

    number: int
    objective: str
    channel: "SweepChannel"


@dataclass(frozen=True)
class Outcome:
    """The result of a run: result.json in its directory, what `--json` prints, and what `raytrain2p.train` returns.

    Attributes:
        run_id: of the MLflow run; the name of the directory begins with it.
        directory: of the run.
        best: path of the best checkpoint; None if there is none.
        last: path of the latest one.
        artifact: path of aligner.pt or model.pt.
        metrics: at the end of training: `train_loss`, `val/loss`, and `SPLIT/METRIC` of each test split.
        steps: optimizer steps that it was trained; 0 in a result of an earlier version.
        digest: of the artifact; None in a result of an earlier version.
    """

    run_id: str
    directory: str
    best: str | None
    last: str | None
    artifact: str
    metrics: dict[str, float]
    steps: int = 0
    digest: str | None = None
