"""From `models:/NAME@ALIAS` or `models:/NAME/VERSION`, as MLflow writes them, to the model.pt that was registered."""

import re
import tempfile
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from raytrain2p.config import InputError, Problem
from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.config.scratch import cache_directory
from raytrain2p.storage.errors import StorageError
from raytrain2p.tracking.mlflow_runs import one_line_errors
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import DIGEST_TAG, DIRECTORY_TAG
from raytrain2p.tracking.run_directory import RunDirectory

REFERENCE = re.compile(r"models:/(?P<name>[^@/]+)(?:@(?P<alias>[^@/]+)|/(?P<version>\d+))")
FILES = "artifacts"  # the folder of model.pt and base models in a registered model


def registered_artifact(reference: str, uri: str) -> tuple[str, Path]:
    """The name of the registered model, and its model.pt: in the directory of its run if that is here, else downloaded into the cache.

    Raises:
        InputError: there is no such version, it has no model.pt, or the store does not answer.
    """
    if (found := REFERENCE.fullmatch(reference)) is None:
        raise InputError(Problem(reference, "is not a registered model", "write models:/NAME@ALIAS or models:/NAME/VERSION"))
    name = found["name"]
    try:
        with one_line_errors(uri):
            client = client_of(uri)
            by_alias = found["alias"] is not None
            version = (
                client.get_model_version_by_alias(name, found["alias"]) if by_alias else client.get_model_version(name, found["version"])
            )
            return name, _in_its_run(client, version) or _downloaded(client, version)
    except StorageError as error:
        raise InputError(Problem(reference, str(error), "check the name and the alias, or give --tracking-uri")) from None


def _in_its_run(client: MlflowClient, version: ModelVersion) -> Path | None:
    """The run may have been trained on since: then its model.pt is another one."""
    folder = version.tags.get(DIRECTORY_TAG) or client.get_run(version.run_id).data.tags.get(DIRECTORY_TAG)
    if not folder:
        return None
    files = RunDirectory(Path(folder))
    path = files.artifact(INSTRUCTION)
    same = version.tags.get(DIGEST_TAG) in (None, files.artifact_digest())
    return path if path.is_file() and same else None


def _downloaded(client: MlflowClient, version: ModelVersion) -> Path:
    """From the folder of the registered model, else from the run's own `model`."""
    run = client.get_run(version.run_id)
    source, root = str(version.source), f"{run.info.artifact_uri.rstrip('/')}/"
    inside = f"{source.removeprefix(root)}/{FILES}"
    if not source.startswith(root) or not client.list_artifacts(version.run_id, inside):
        inside = INSTRUCTION.artifact.partition(".")[0]
    path = cache_directory() / "registered" / f"{version.run_id}-{version.name}-{version.version}" / INSTRUCTION.artifact
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            Path(client.download_artifacts(version.run_id, f"{inside}/{INSTRUCTION.artifact}", aside)).replace(path)
    return path
