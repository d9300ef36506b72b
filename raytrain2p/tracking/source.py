"""Who launched a run, from which entry point, and at which commit: tags by which MLflow's pages show it. Called in the driver, where
the command was typed. No MLflow is imported."""

import getpass
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from raytrain2p.config.secrets import one_line

USER_TAG, NAME_TAG, TYPE_TAG = "mlflow.user", "mlflow.source.name", "mlflow.source.type"
COMMIT_TAG, BRANCH_TAG = "mlflow.source.git.commit", "mlflow.source.git.branch"
DIRTY_TAG, REMOTE_TAG = "mlflow.source.git.dirty", "mlflow.source.git.repoURL"
SOURCE_PREFIX, VERSION_PREFIX = "mlflow.source.", "version."
LIBRARIES = ("raytrain2p", "torch", "ray", "pytorch-lightning", "transformers", "peft", "mlflow")
SECONDS_FOR_GIT = 5.0


def source_tags(module: str, directory: Path | None = None) -> dict[str, str]:
    """The user, the entry point, and the commit of the working directory's repository, without credentials.

    The working directory is what `python -m` runs code from. Without git, without a repository, as in a job of Ray, whose upload leaves
    it out, or where git does not answer, there is no commit.

    Args:
        module: the entry point, such as raytrain2p.train.
        directory: in place of the working directory.
    """
    tags = {USER_TAG: user_name(), NAME_TAG: module, TYPE_TAG: "LOCAL"} | _git_tags(directory or Path.cwd())
    return {key: one_line(value) for key, value in tags.items()}


def user_name() -> str:
    """The login at the tracking server, as MLflow itself prefers, or that of the machine."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (OSError, KeyError):  # in a container, the process's user may have no name
        return f"uid {os.getuid()}"


def _git_tags(directory: Path) -> dict[str, str]:
    lines = _git(directory, "status", "--porcelain=v2", "--branch", "--untracked-files=no").splitlines()
    head = dict(line.removeprefix("# branch.").split(" ", 1) for line in lines if line.startswith("# branch."))
    commit, branch = head.get("oid", "(initial)"), head.get("head", "(detached)")
    if commit.startswith("("):
        return {}
    tags = {COMMIT_TAG: commit, DIRTY_TAG: str(any(not line.startswith("#") for line in lines)).lower()}
    if not branch.startswith("("):
        tags[BRANCH_TAG] = branch
    if remote := _git(directory, "config", "--get", "remote.origin.url").strip():
        tags[REMOTE_TAG] = remote
    return tags


def _git(directory: Path, *arguments: str) -> str:
    """What git prints; empty if it fails, is not installed, or does not answer. It writes nothing, and runs no monitor of the
    repository's own."""
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(directory), *arguments]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS_FOR_GIT, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")


def version_tags() -> dict[str, str]:
    """The versions of the libraries that train, as they are installed here, and of Python."""
    tags = {"python": ".".join(map(str, sys.version_info[:3]))}
    for library in LIBRARIES:
        try:
            tags[library] = version(library)
        except PackageNotFoundError:  # run from a checkout
            continue
    return {f"{VERSION_PREFIX}{library}": found for library, found in tags.items()}
