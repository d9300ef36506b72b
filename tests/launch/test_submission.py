"""What the driver of a submitted job makes of what Ray gives it. With a real job: test_job.py, and tests/cluster/test_jobs.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ray.runtime_env.runtime_env import _merge_runtime_env

from raytrain2p.config import InputError, load_settings
from raytrain2p.launch.cluster import existing_address
from raytrain2p.launch.ray_private import JOB_CONFIG
from raytrain2p.launch.submission import launch_id_of_job, lines_of_job, outside_job, submitted_job, unless_of_job
from raytrain2p.tracking.run import LAUNCH_ID


def submit(monkeypatch: pytest.MonkeyPatch, submission_id: str, **variables: str) -> None:
    """From now on this process is the driver of a job."""
    config = {"runtime_env": {"env_vars": variables}, "metadata": {"job_submission_id": submission_id, "job_name": submission_id}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps(config))


def test_outside_a_job_there_is_none_and_no_launch_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    assert submitted_job() is None
    assert launch_id_of_job("phase1", {"seed": 1}) is None


def test_a_job_has_its_submission_id_and_the_names_of_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    submit(monkeypatch, "mine", HF_HOME="/models")
    job = submitted_job()
    assert job is not None
    assert job.submission_id == "mine"
    assert job.variables == {"HF_HOME"}
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": None, "metadata": {"job_submission_id": "mine"}}))
    job = submitted_job()
    assert job is not None
    assert not job.variables


def test_a_launch_sends_no_variable_that_the_job_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray merges both, which refuses a variable in both."""
    ours = {"HF_HOME": "/models", "RAYTRAIN2P_CACHE": "/cache"}
    monkeypatch.delenv(JOB_CONFIG, raising=False)
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "0")
    assert unless_of_job(ours) == ours
    for of_job, sent in (({"HF_HOME": "/models"}, {"RAYTRAIN2P_CACHE": "/cache"}), ({"RAY_ADDRESS": "auto"}, ours)):
        submit(monkeypatch, "mine", **of_job)
        assert unless_of_job(ours) == sent
        child = {"env_vars": sent | {"RAY_ADDRESS": "127.0.0.1:6379"}}
        merged = _merge_runtime_env({"env_vars": of_job}, child, override=os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1")
        assert merged is not None
        assert merged["env_vars"] == of_job | child["env_vars"]
    with outside_job():
        assert submitted_job() is None
    assert submitted_job() is not None


def test_the_same_job_has_the_same_launch_ids_and_each_launch_in_it_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(job: str, kind: str, **settings: object) -> str:
        submit(monkeypatch, job)
        launch_id = launch_id_of_job(kind, settings)
        assert launch_id is not None
        assert re.fullmatch(LAUNCH_ID, launch_id)
        return launch_id

    copies = [f"/tmp/ray/session_{number}/runtime_resources/working_dir_files/_ray_pkg_{number}/records.jsonl" for number in (1, 2)]
    assert of("mine", "phase1", data=copies[0], seed=1) == of("mine", "phase1", seed=1, data=copies[1])
    ids = set()
    for host in ("/home/a", "/home/b"):  # its head may be a new host
        monkeypatch.setenv("RAYTRAIN2P_SCRATCH", host)
        ids.add(of("mine", "phase1", output=f"{host}/s3/bucket/prefix"))
    assert len(ids) == 1
    launches = [("mine", "phase1", 1), ("mine", "phase1", 2), ("mine", "phase2", 1), ("mine", "sweep", 1), ("other", "phase1", 1)]
    assert len({of(job, kind, seed=seed) for job, kind, seed in launches}) == len(launches)
    assert of("mine", "phase1", seed=1).startswith("mine-phase1-")
    assert of("team a/ü: " + "x" * 200, "phase1") != of("team a/ü. " + "x" * 200, "phase1")


def test_a_job_whose_supervisor_would_kill_it_at_once_says_how_to_change_that(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(1)
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S", raising=False)
    assert lines_of_job(settings) == []
    submit(monkeypatch, "mine")
    (line,) = lines_of_job(settings)
    assert """--runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "90"}}'""" in line
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "90")
    assert lines_of_job(settings) == []


SCRIPT = (
    "from raytrain2p.launch.submission import cluster_of_job; print(cluster_of_job('127.0.0.1:9002'), cluster_of_job('elsewhere:6379'))"
)


def test_a_job_joins_the_cluster_that_started_it_and_not_the_one_that_was_started_last(tmp_path: Path) -> None:
    """In its place: a process of the raylet's name and options, whose child this driver is."""
    raylet = tmp_path / "raylet"
    raylet.write_text('#!/bin/sh\n"$PYTHON" -c "$SCRIPT"\n')
    raylet.chmod(0o755)
    (tmp_path / "ray_current_cluster").write_text("127.0.0.1:9002")
    environment = os.environ | {"PYTHON": sys.executable, "SCRIPT": SCRIPT}
    command = [str(raylet), f"--worker_command=python worker.py --gcs-address=127.0.0.1:9001 --temp-dir={tmp_path} more"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["127.0.0.1:9001", "elsewhere:6379"]


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_an_address_of_another_protocol_is_refused_with_the_command_that_submits_a_job(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match="ray job submit"):
        existing_address()
