"""cluster/README.md: its placeholders, its links, and every command in it that can be read or run here."""

import re
import shlex
import subprocess
from typing import Any

import mlflow.cli
import pytest
import yaml
from ray.scripts.scripts import cli as ray_cli

from tests.cluster_files.commands import check_click, check_training
from tests.cluster_files.placeholders import CLUSTER, PLACEHOLDER, filled, placeholders
from tests.cluster_files.schemas import problems

README = (CLUSTER / "README.md").read_text()
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.name != "README.md" and "__pycache__" not in path.parts)
PROSE = re.sub(r"```yaml\n.*?```", "", README, flags=re.DOTALL)
INLINE = [text for text in re.findall(r"`((?:ray|python|mlflow|kubectl|grep) [^`]+)`", PROSE) if " cluster" in text or " -" in text]
COMMANDS = [*(line.strip() for line in PROSE.splitlines() if line.startswith("    ")), *INLINE]


def test_every_placeholder_is_explained_with_the_files_that_have_it() -> None:
    found = {(name, str(path.relative_to(CLUSTER))) for path in FILES for name in placeholders(path.read_text())}
    table = [line.split(" | ") for line in README.splitlines() if line.startswith("| `<")]
    said = {(name, file) for row in table for name in PLACEHOLDER.findall(row[0]) for file in re.findall(r"`([\w/.]+)`", row[2])}
    several = {"region", "machine-image", "partition", "ssh-user"}  # rows of more than one have one file
    assert said == found, sorted(said ^ found)
    assert several <= {name for name, _ in found}


def test_every_link_leads_somewhere() -> None:
    titles = [line.lstrip("# ").lower() for line in README.splitlines() if line.startswith("#")]
    headings = {re.sub(r"[^a-z -]", "", title).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (CLUSTER / path).exists() or path == "local/", target
        assert not anchor or anchor in headings, target


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_one_that_its_program_takes(command: str) -> None:
    words = shlex.split(filled(command, {}))
    for word in words:
        if word.startswith("cluster/"):
            assert (CLUSTER.parent / word).exists(), word
    if words[0] == "ray":
        parameters = check_click(ray_cli, words[1:])
        if words[1:3] == ["job", "submit"]:
            check_training([*parameters["entrypoint"]])
            assert parameters["submission_id"]  # without a name of its own, a job that is submitted again trains anew
    elif words[:3] == ["python", "-m", "raytrain2p.launch.ray_token"]:
        assert len(words) == 3
    elif words[0] == "sbatch":
        check_training(["python", "-m", "raytrain2p.train", *words[2:]])
    elif words[0] == "grep":
        found = subprocess.run(shlex.split(command), cwd=CLUSTER.parent, capture_output=True, text=True, check=True).stdout
        files = {str(path.relative_to(CLUSTER.parent)) for path in FILES if placeholders(path.read_text())}
        assert files <= {line.partition(":")[0] for line in found.splitlines()}
    elif words[:2] == ["mlflow", "server"]:
        check_click(mlflow.cli.server, words[2:])
    else:
        assert words[0] in {"docker", "export", "kubectl", "python", "scancel"}, command


def test_redis_can_be_added_to_the_standing_cluster() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    cluster: dict[str, Any] = yaml.safe_load(filled((CLUSTER / "kuberay/raycluster.yaml").read_text(), {}))
    cluster["spec"] |= yaml.safe_load(block)
    assert problems(cluster) == []
    cluster["spec"]["gcsFaultToleranceOptions"]["redisAdress"] = "redis:6379"
    assert problems(cluster)
