"""Versions in MLflow's Model Registry: a model of a run, once under each name.

Nothing refers to a model's files before all of them are there, and a version is made with its tags in one request. What a kill leaves
before that, the same command completes; a registered model that it leaves without a version, the next registration deletes.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.uri import append_to_uri_path

from raytrain2p.config import Problem
from raytrain2p.tracking.mlflow_errors import Kind, StoreProblem
from raytrain2p.tracking.mlflow_runs import one_line_errors, pages
from raytrain2p.tracking.mlflow_store import STORE_ERRORS, UnusableStoreError, client_of
from raytrain2p.tracking.model_package import ModelContent, write_package
from raytrain2p.tracking.run import DIGEST_TAG

RUN_TAG, METRIC_TAG = "raytrain2p.run_id", "raytrain2p.metric."  # of a version; metrics by name
PENDING_TAG, ABANDONED_MS = "raytrain2p.registering", 600_000  # of a registered model that has no version yet; no registration takes longer
FOLDER = "registered"  # among the run's artifacts: a folder for each model that was registered
NAME, ALIAS = re.compile(r"(?!\s)[^/:;?@\\\"\x00-\x1f\x7f]{1,200}(?<!\s)"), re.compile(r"[\w-]{1,200}")
RESERVED_ALIAS = re.compile(r"(?i)latest|v\d+")
TAG_KEY = re.compile(r"[\w.\- :]+(/[\w.\- :]+)*")


@dataclass(frozen=True)
class Registered:
    """A version, and whether it is new."""

    name: str
    version: int
    is_new: bool


def check_names(name: str, aliases: Sequence[str]) -> Iterator[Problem]:
    """What MLflow does not take, or what could not be written in `models:/NAME@ALIAS`."""
    if not NAME.fullmatch(name) or name in (".", ".."):
        fix = 'take up to 200 characters, without / : ; ? @ \\ " and without blanks at the ends'
        yield Problem(f"--name {name!r}", "is not a name for a registered model", fix)
    for alias in aliases:
        if not ALIAS.fullmatch(alias):
            yield Problem(f"--alias {alias!r}", "is not a name for an alias", "take up to 200 letters, digits, `_` and `-`")
        elif RESERVED_ALIAS.fullmatch(alias):
            yield Problem(f"--alias {alias}", "is reserved by MLflow", "take another, such as champion")


def register(
    uri: str, content: ModelContent, name: str, aliases: Sequence[str], tags: Mapping[str, str], description: str, scratch: Path
) -> Registered:
    """Get or create the version of a model, and move the aliases to it. One process at a time does it for a run: the caller holds its lock.

    Args:
        tags: of the version, beside its digest and its run ID; those whose names MLflow does not take are left out.
        scratch: an empty folder.

    Raises:
        StorageError: MLflow does not answer, or not as it should; or the run was deleted there. One line; what is left, the same call does.
    """
    with one_line_errors(uri):
        client = client_of(uri)
        run = client.get_run(content.run_id)
        if run.info.lifecycle_stage != "active":
            deleted = StoreProblem(Kind.DELETED, "")
            raise UnusableStoreError(Problem(f"run {content.run_id}", deleted.what, deleted.fix))
        _delete_abandoned(client)
        found = next((one for one in _versions(client, name) if one.tags.get(DIGEST_TAG) == content.digest), None)
        own = {DIGEST_TAG: content.digest, RUN_TAG: content.run_id}
        kept = {key: value for key, value in tags.items() if TAG_KEY.fullmatch(key)}
        version = found or _create_version(client, name, _send(client, run, content, scratch), content.run_id, kept | own, description)
        for alias in aliases:
            client.set_registered_model_alias(name, alias, version.version)
        return Registered(name, int(version.version), found is None)


def _versions(client: MlflowClient, name: str) -> Iterator[ModelVersion]:
    yield from pages(lambda token: client.search_model_versions(_named(name), page_token=token))


def _named(name: str) -> str:
    """MLflow's filter for a name."""
    mark = '"' if "'" in name else "'"
    return f"name = {mark}{name}{mark}"


def _send(client: MlflowClient, run: MlflowRun, content: ModelContent, scratch: Path) -> str:
    """Send a model's files to the run's artifacts, under the key of their content: there they never change. Returns their place."""
    folder = scratch / "model"
    place = f"{FOLDER}/{write_package(folder, content)}"
    source = str(append_to_uri_path(run.info.artifact_uri, place))
    registered = pages(lambda token: client.search_model_versions(f"run_id = '{run.info.run_id}'", page_token=token))
    if not any(one.source == source for one in registered):  # else they are all there: it has another name
        client.log_artifacts(run.info.run_id, str(folder), place)
        for name, path in content.files().items():
            client.log_artifact(run.info.run_id, str(path), str(Path(place, name).parent))
    return source


def _create_version(client: MlflowClient, name: str, source: str, run_id: str, tags: dict[str, str], description: str) -> ModelVersion:
    """Make a version, and the registered model if there is none of this name. If the version is refused, that is deleted again."""
    is_new = _create_model(client, name, run_id)
    try:
        version = client.create_model_version(name, source, run_id, tags, description=description)
    except BaseException:
        with suppress(*STORE_ERRORS):
            if is_new and not any(_versions(client, name)):
                client.delete_registered_model(name)
        raise
    with suppress(*STORE_ERRORS):  # the next registration deletes the tag
        client.delete_registered_model_tag(name, PENDING_TAG)
    return version


def _create_model(client: MlflowClient, name: str, run_id: str) -> bool:
    """Make a registered model, unless there is one. Returns whether it was made."""
    try:
        client.create_registered_model(name, {PENDING_TAG: run_id})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        if not client.search_registered_models(_named(name)):
            raise UnusableStoreError(Problem(f"--name {name}", "MLflow has a prompt of this name", "take another")) from None
        return False
    return True


def _delete_abandoned(client: MlflowClient) -> None:
    """Delete the registered models that a kill left without a version."""
    for model in pages(lambda token: client.search_registered_models(f"tags.`{PENDING_TAG}` != ''", page_token=token)):
        if any(_versions(client, model.name)):
            client.delete_registered_model_tag(model.name, PENDING_TAG)
        elif time.time() * 1000 - model.creation_timestamp > ABANDONED_MS:
            client.delete_registered_model(model.name)
