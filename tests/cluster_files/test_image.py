"""cluster/image: the Dockerfile as hadolint sees it, its versions, and what goes into it. tests/cluster/test_image.py builds it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.cluster_files.linters import lint_image
from tests.cluster_files.placeholders import CLUSTER

ROOT, IMAGE = CLUSTER.parent, CLUSTER / "image"
DOCKERFILE = (IMAGE / "Dockerfile").read_text()


def pinned(name: str) -> dict[str, str]:
    lines = (IMAGE / name).read_text().splitlines()
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


def test_hadolint_finds_nothing() -> None:
    assert lint_image(IMAGE / "Dockerfile") == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("python:3.11.14-slim-bookworm", "python"),  # no version
        ("--requirement requirements.txt", "torch"),  # a package without one
        ("COPY --from=build", "COPY --from=biuld"),  # no such stage
    ],
)
def test_hadolint_finds_a_mistake(right: str, wrong: str, tmp_path: Path) -> None:
    assert right in DOCKERFILE
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.replace(right, wrong).replace("${BASE}", wrong if wrong == "python" else "${BASE}"))
    assert lint_image(broken) != ""


def test_each_image_runs_as_a_user_that_is_not_root() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    final = {stage.split(" AS ")[1].split()[0]: re.findall(r"^USER (\S+)", stage, re.MULTILINE) for stage in stages}
    assert final == {"build": [], "mlflow-build": [], "mlflow": ["1000:1000"], "train": ["1000:1000"]}


def test_every_package_is_pinned_at_a_version_that_the_project_allows() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = pinned("requirements.txt")
    for text in [*project["dependencies"], *project["optional-dependencies"]["serve"], *project["optional-dependencies"]["object-storage"]]:
        requirement = Requirement(text)
        version = versions.get(canonicalize_name(requirement.name))
        right = version is not None and requirement.specifier.contains(version, prereleases=True)
        assert right, f"{text} is pinned at {version}: python cluster/image/pin.py > cluster/image/requirements.txt"
    assert pinned("mlflow.txt")["mlflow"] == versions["mlflow"]


def test_what_the_image_is_built_from_is_sent_to_the_builder_and_little_else() -> None:
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if line.startswith("COPY ") and "--from" not in line]
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source
        assert any(source == one or source.startswith(f"{one}/") for one in sent), source
