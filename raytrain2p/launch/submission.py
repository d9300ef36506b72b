"""The job of `ray job submit` whose driver this process is: what Ray gives it, and the launch ID that follows from it."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from raytrain2p.config import Settings
from raytrain2p.config.paths import COPY, outputs_line
from raytrain2p.config.scratch import public
from raytrain2p.launch.ray_private import JOB_CONFIG, find_bootstrap_address

STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"


@dataclass(frozen=True)
class SubmittedJob:
    """What Ray gives the driver of a job.

    Args:
        submission_id: as `ray job submit --submission-id` has it, else one that Ray has made.
        variables: names of the environment variables that the job gives to all its processes.
    """

    submission_id: str
    variables: frozenset[str]


def submitted_job() -> SubmittedJob | None:
    """The job that this process belongs to; None for a process that was not started by `ray job submit`."""
    if (text := os.environ.get(JOB_CONFIG)) is None:
        return None
    config = json.loads(text)
    variables = (config.get("runtime_env") or {}).get("env_vars") or {}
    return SubmittedJob(config["metadata"]["job_submission_id"], frozenset(variables))


def cluster_of_job(address: str) -> str:
    """The cluster that the job was sent to.

    Args:
        address: RAY_ADDRESS of the job. Ray sets it to the head that was started last on this machine with the same temporary folder, which
            may be another one. The node that started the job has the right one in its command. An address that the job's command has set
            stays.
    """
    for process in psutil.Process().parents():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue
        own, folder = (re.search(rf"--{option}=(\S+)", command) for option in ("gcs-address", "temp-dir"))
        if process.name() == "raylet" and own and folder:
            return own[1] if find_bootstrap_address(folder[1]) == address else address
    return address


def unless_of_job(variables: Mapping[str, str]) -> dict[str, str]:
    """Those that `ray.init` may send: the job's own reach all its processes, each with the value on its node, and Ray refuses to set one
    again, be it to the same value. Lets RAY_ADDRESS be set again, to the one address that is right.
    """
    job = submitted_job()
    if job is not None and "RAY_ADDRESS" in job.variables:
        os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] = "1"
    return {name: value for name, value in variables.items() if job is None or name not in job.variables}


@contextmanager
def outside_job() -> Iterator[None]:
    """Within, `ray.init` does not know of the job: a cluster of our own lacks its files."""
    config = os.environ.pop(JOB_CONFIG, None)
    try:
        yield
    finally:
        if config is not None:
            os.environ[JOB_CONFIG] = config


def lines_of_job(settings: Settings) -> list[str]:
    """What the user of a job should know before it trains: where its outputs go, and that it has no time to stop."""
    lines = [outputs_line(settings)]
    if submitted_job() is not None and STOP_WAIT not in os.environ:  # its supervisor, which kills it, has the same environment
        variables = f"""--runtime-env-json '{{"env_vars": {{"{STOP_WAIT}": "90"}}}}'"""
        lines.append(f"`ray job stop` kills this job after 3 seconds, perhaps before its checkpoint is written: submit it with {variables}")
    return [line for line in lines if line is not None]


def launch_id_of_job(kind: str, settings: Any) -> str | None:
    """The launch ID of a launch that the user has given none: a job that is submitted again with the same submission ID resumes. Another
    phase, and the same one with other settings, are launches of their own. None outside a job.

    Args:
        kind: what is launched: a word.
        settings: all its settings, as JSON has them.
    """
    if (job := submitted_job()) is None:
        return None
    text = COPY.sub("", public(json.dumps([job.submission_id, kind, settings], sort_keys=True)))
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", job.submission_id)[:64].lstrip("-.")
    return f"{name}-{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
