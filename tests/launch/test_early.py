"""A Ray of the launch's own, and the processes of its workers, start while the driver reads its inputs."""

import time

import psutil
import pytest
import ray

from raytrain2p.config import InputError, Problem
from raytrain2p.config.settings import LaunchSettings
from raytrain2p.launch.early import WORKER_ENVIRONMENT, EarlyStart
from raytrain2p.launch.ray_private import SETUP_HOOK


@pytest.fixture(autouse=True)
def no_ray_begins_early() -> None:
    """It does, here."""


class Worker:
    def loaded(self) -> tuple[int, set[str]]:
        import os
        import sys

        return os.getpid(), {"pytorch_lightning", "transformers", "peft", "mlflow"} & {*sys.modules}


def started() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def prestarted() -> list[int]:
    return [process.pid for process in started() if "IDLE" in process.name() and SETUP_HOOK in process.environ()]


def test_a_worker_takes_the_process_that_was_started_for_it_and_a_refused_launch_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    before = set(started())
    with pytest.raises(InputError):
        take_the_process_and_refuse()
    assert not ray.is_initialized()
    _, alive = psutil.wait_procs([*set(started()) - before], timeout=10)
    assert alive == []


def take_the_process_and_refuse() -> None:
    with EarlyStart(verbose=False, is_command=False) as early:
        early.begin(LaunchSettings(num_workers=1, use_gpu=False, object_store_mb=100))
        assert early.started is not None
        assert early.started.result() is True
        deadline = time.monotonic() + 30
        while not (found := prestarted()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        worker = ray.remote(num_cpus=2, runtime_env=WORKER_ENVIRONMENT)(Worker).remote()
        assert ray.get(worker.loaded.remote()) == (found[0], {"pytorch_lightning", "transformers", "mlflow"})
        raise InputError(Problem("data.train", "has no records"))


def test_nothing_begins_where_there_is_a_ray(ray_head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_head)
    with EarlyStart(verbose=False, is_command=False) as early:
        early.begin(LaunchSettings(num_workers=1))
        assert early.started is None
