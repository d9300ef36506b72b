"""cluster/launcher: Ray's own checks of each file for `ray up`, and the shell commands in it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster_files.linters import lint_shell
from tests.cluster_files.placeholders import CLUSTER, filled

FILES = sorted((CLUSTER / "launcher").glob("*.yaml"))
START = ("head_start_ray_commands", "worker_start_ray_commands")


def configuration(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(filled((CLUSTER / "launcher" / name).read_text(), {}))
    return loaded


def check(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` checks it; returns it with Ray's defaults."""
    prepared: dict[str, Any] = prepare_config(config)
    validate_config(prepared)
    return prepared


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_ray_accepts_the_file(path: Path) -> None:
    config = check(configuration(path.name))
    assert config["head_node_type"] in config["available_node_types"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.parametrize(("key", "value"), [("setup_comands", []), ("head_start_ray_commands", "ray start"), ("idle_timeout_minutes", "5")])
def test_ray_refuses_a_misspelled_field_and_a_wrong_type(path: Path, key: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        check(configuration(path.name) | {key: value})


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_commands_are_right_as_shell_and_every_node_demands_the_token(path: Path, tmp_path: Path) -> None:
    config = configuration(path.name)
    commands = [command for key, value in config.items() if key.endswith("commands") for command in value]
    script = tmp_path / "commands.sh"
    script.write_text("#!/usr/bin/env bash\n" + "\n".join(commands) + "\n")
    assert lint_shell(script, "SC1090", "SC1091") == ""  # files that are on the nodes
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    image = (CLUSTER / "image" / "Dockerfile").read_text()
    for key in START:
        mode = image if "docker" in config else "\n".join(config[key])
        assert "RAY_AUTH_MODE=token" in mode, key


def test_on_premises_nodes_get_the_variables(tmp_path: Path) -> None:
    first, *_ = configuration("on_premises.yaml")["head_start_ray_commands"]
    after = f'{first}; . ~/.raytrain2p.env; echo "$RAY_AUTH_MODE $RAYTRAIN2P_HOME $RAY_JOB_STOP_WAIT_TIME_S"'
    done = subprocess.run(["bash", "-c", after], env={"HOME": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["token", "/mnt/raytrain2p", "90"]
