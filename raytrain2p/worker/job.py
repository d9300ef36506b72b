"""What passes between the driver and the workers, and what comes out. It imports no framework: Ray's controller reads it too."""

from dataclasses import dataclass, field
from typing import Any

from raytrain2p.config import Settings

OBJECTIVE = "objective"  # metric of a trial's run: what the sweep compares, whatever it is


@dataclass(frozen=True)
class TrainJob:
    """What the driver hands to each worker.

    Args:
        settings: of the run.
        phase: 1 or 2.
        launch_id: stable name of the launch.
        command: shell line that launches the same again.
        threads: CPUs of a worker.
        data: the prepared splits in Ray's object store.
        channel: where rank 0 and the driver leave word for each other.
        facts: what a resumed run is checked against.
        environment: variables that MLflow needs, credentials perhaps: so they are not in Ray's runtime environment,
            which Ray logs.
        membership: of the sweep that this is a trial of; None if there is none.
        tags: more tags of the run: a trial names its sweep.
    """

    settings: Settings = field(repr=False)  # its tracking URI may have a password
    phase: int
    launch_id: str
    command: str
    threads: int
    data: Any
    channel: Any
    facts: dict[str, Any]
    environment: dict[str, str] = field(repr=False)
    membership: "TrialContext | None" = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialContext:
    """What a worker knows of its sweep.

    Args:
        number: of its trial.
        objective: metric that trials are compared by.
        channel: of the sweep.
    """

    number: int
    objective: str
    channel: Any


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: result.json in its directory, and what `--json` prints."""

    run_id: str
    directory: str
    best: str | None
    last: str | None
    artifact: str
    metrics: dict[str, float]
