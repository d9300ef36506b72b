"""The image is built where a program can: it needs a registry for its base image, and 6 GB."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def builder() -> list[str] | None:
    """The command that builds an image here."""
    for command, check in ((["docker", "build"], "info"), (["podman", "build"], "info"), (["buildah", "build"], "info")):
        if shutil.which(command[0]) and not subprocess.run([command[0], check], capture_output=True, check=False).returncode:
            return command
    return None


@pytest.mark.skipif("RAYTRAIN2P_CLUSTER_TESTS" not in os.environ, reason="builds an image: make test-cluster")
@pytest.mark.parametrize("target", ["mlflow", "train"])
@pytest.mark.timeout(3600)
def test_the_image_is_built_and_its_program_starts(target: str, tmp_path: Path) -> None:
    if (command := builder()) is None:
        pytest.skip("no docker, podman or buildah that can build")
    name = f"raytrain2p-test-{target}"
    file = f"--file={ROOT}/cluster/image/Dockerfile"
    subprocess.run([*command, file, f"--target={target}", f"--tag={name}", str(ROOT)], check=True)
    if command[0] != "buildah":
        program = {"mlflow": ["mlflow", "--version"], "train": ["python", "-m", "raytrain2p.train", "--help"]}[target]
        done = subprocess.run([command[0], "run", "--rm", name, *program], capture_output=True, text=True, check=True)
        assert done.stdout
