"""Run identity: one launch, one MLflow run, one directory, however often the launch is retried.

The launch ID is a tag of the MLflow run, and a record on disk. Rank 0 looks for both before it makes a run.
"""

import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from raytrain2p.config import InputError, Problem, Settings, flatten
from raytrain2p.tracking.files import write_json, write_whole

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")

import mlflow
from mlflow.entities import Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

LAUNCH_TAG, DIRECTORY_TAG, TIMESTAMP_TAG = "raytrain2p.launch_id", "raytrain2p.directory", "raytrain2p.timestamp"
RUN_ID_LENGTH = 32
PARAMS_PER_BATCH = 100  # MLflow's limit for one request


@dataclass(frozen=True)
class Run:
    """One MLflow run and the directory that belongs to it. Plain, so that rank 0 can broadcast it."""

    run_id: str
    directory: str
    experiment: str
    timestamp: str
    launch_id: str
    phase: str
    tracking_uri: str

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def checkpoints(self) -> Path:
        return self.path / "lightning_checkpoints"

    @property
    def client(self) -> "mlflow.MlflowClient":
        return mlflow.MlflowClient(self.tracking_uri)


def launch_record(root: str, launch_id: str) -> Path:
    """Where a launch notes which run is its own."""
    return Path(root) / ".launches" / f"{launch_id}.json"


def recorded_run(root: str, launch_id: str) -> Run | None:
    """The run that a launch made, if it got that far."""
    try:
        return Run(**json.loads(launch_record(root, launch_id).read_text()))
    except FileNotFoundError:
        return None


def experiment_name(settings: Settings, default: str) -> str:
    return settings.tracking.experiment or default


def prepare_store(settings: Settings, default_experiment: str) -> None:
    """Make the tracking store and the experiment once, in the driver: several workers at a fresh SQLite file fail.

    Raises:
        InputError: the store cannot be reached.
    """
    uri, name = settings.tracking.uri, experiment_name(settings, default_experiment)
    location = None
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        folder.mkdir(parents=True, exist_ok=True)
        location = (folder / "mlruns" / name).as_uri()  # MLflow's default is relative to the process's working directory
    try:
        client = mlflow.MlflowClient(uri)
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            client.create_experiment(name, artifact_location=location)
    except (MlflowException, OSError, ImportError, SQLAlchemyError) as error:
        reason = " ".join(str(error).split()).replace(uri, masked(uri))[:300]
        raise InputError(
            Problem(
                f"tracking.uri={masked(uri)}",
                f"MLflow cannot use it: {reason}",
                "start the server, or mend the URI",
            )
        ) from None

    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise InputError(
            Problem(
                f"tracking.experiment={name}",
                "the experiment of this name was deleted in MLflow",
                f"restore it (`mlflow experiments restore -x {experiment.experiment_id}`), or set tracking.experiment to another name",
            )
        )


def get_or_create_run(settings: Settings, phase: str, default_experiment: str, launch_id: str) -> Run:
    """The launch's run: the one that an earlier worker group made, else a new one. Called on rank 0 alone."""
    root = settings.output.root
    if (run := recorded_run(root, launch_id)) is not None:
        run.client.update_run(run.run_id, status="RUNNING")
        return run
    client = mlflow.MlflowClient(settings.tracking.uri)
    name = experiment_name(settings, default_experiment)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None, "prepare_store() runs in the driver, before any worker"
    found = client.search_runs([experiment.experiment_id], f"tags.`{LAUNCH_TAG}` = '{launch_id}'", max_results=1)
    if found:
        made, timestamp = found[0], found[0].data.tags[TIMESTAMP_TAG]
    else:
        timestamp = datetime.now().strftime("%Y%m%d_%H%M%S")
        made = client.create_run(
            experiment.experiment_id, run_name=f"{phase}_{timestamp}", tags={LAUNCH_TAG: launch_id, TIMESTAMP_TAG: timestamp}
        )
    run_id = made.info.run_id
    directory = str(Path(root) / phase / f"{run_id}_{timestamp}")
    run = Run(run_id, directory, name, timestamp, launch_id, phase, settings.tracking.uri)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    client.set_tag(run_id, DIRECTORY_TAG, directory)
    write_json(launch_record(root, launch_id), asdict(run))
    return run


def describe_run(run: Run, settings: Settings, resolved: dict[str, Any], command: str) -> None:
    """Write what the run is into its directory and into MLflow: settings, identity, and a page for a person.

    Args:
        run: the run.
        settings: as given.
        resolved: what was only known on the worker, by dotted path, such as the precision that `auto` became.
        command: shell line that launches the same again.
    """
    config = json.loads(settings.model_dump_json())
    for key, value in resolved.items():
        *groups, last = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    config["tracking"]["uri"] = masked(config["tracking"]["uri"])
    write_json(run.path / "config.json", config)
    write_whole(
        run.path / "MLFLOW_RUN_ID.txt",
        f"run_id: {run.run_id}\ndirectory: {run.directory}\nexperiment: {run.experiment}\ntimestamp: {run.timestamp}\n",
    )
    write_whole(run.path / "README.md", _readme(run, command))
    params = flatten(settings) | resolved | {"tracking.uri": masked(settings.tracking.uri)}
    logged = run.client.get_run(run.run_id).data.params
    # MLflow never changes a parameter: what a later attempt of the launch has otherwise is kept as a tag
    changed = [
        RunTag(f"raytrain2p.changed.{key}", str(value)) for key, value in params.items() if logged.get(key, str(value)) != str(value)
    ]
    pairs = [Param(key, str(value)) for key, value in params.items() if key not in logged]
    for start in range(0, len(pairs), PARAMS_PER_BATCH):
        run.client.log_batch(run.run_id, params=pairs[start : start + PARAMS_PER_BATCH])
    run.client.log_batch(run.run_id, tags=[RunTag("raytrain2p.command", command), *changed])
    run.client.log_artifact(run.run_id, str(run.path / "config.json"), "config")


def _readme(run: Run, command: str) -> str:
    artifact = {"alignment": "aligner.pt", "phase2": "model.pt"}[run.phase]
    use = (
        f"python -m raytrain2p.train --phase 2 --aligner {run.run_id[:8]}"
        if run.phase == "alignment"
        else f'python -m raytrain2p.predict --run {run.run_id[:8]} --image FILE "What does the picture show?"'
    )
    return f"""# {run.phase} run {run.run_id}

Made by raytrain2p on {run.timestamp}, MLflow experiment `{run.experiment}`.

| file | what it is |
|---|---|
| `{artifact}` | the deployable result |
| `lightning_checkpoints/` | the best checkpoint and the last one: what was trained, and the optimizer |
| `config.json` | every setting |
| `metrics.jsonl` | every metric point |
| `plots/` | pictures |

Trained with

    {command}

Use it:

    {use}
"""


def finish_run(run: Run, status: str) -> None:
    """Set FINISHED, FAILED or KILLED."""
    run.client.set_terminated(run.run_id, status)


def masked(uri: str) -> str:
    """The URI without its password: it would end in logs, files and parameters that many can read."""
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    if not at or ":" not in user:
        return uri
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}"))
