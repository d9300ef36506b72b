"""What a launch leaves out: some of Ray Train's helper processes, and training libraries where nothing is trained."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from raytrain2p.config import load_settings
from raytrain2p.launch import trainer
from raytrain2p.launch.early import WORKER_ENVIRONMENT
from raytrain2p.launch.elastic import GroupScaling, NodesAreNoFailures
from raytrain2p.launch.ray_private import DatasetsCallback, PlacementGroupCleanerCallback
from raytrain2p.launch.trainer import HANG_TIMEOUT, WATCH_INTERVAL, WATCHES_NODES, OwnGroup, remove_torn_state
from raytrain2p.worker.job import TrainJob


@pytest.mark.parametrize(
    ("own_cluster", "ray_stays", "is_trial", "frees_cpus", "asks_autoscaler", "controller"),
    [
        (True, False, False, False, False, "in this process"),
        (False, False, False, True, True, "in an actor"),
        (False, True, False, False, True, "in an actor"),
        (False, False, True, False, True, "in this process"),
    ],
)
def test_helper_processes_that_are_not_needed_are_not_started(
    own_cluster: bool,
    ray_stays: bool,
    is_trial: bool,
    frees_cpus: bool,
    asks_autoscaler: bool,
    controller: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed: dict[str, Any] = {}

    class Controller:
        def __init__(self, **options: Any) -> None:
            passed.update(options, controller="in this process")

        async def run(self) -> None:
            """Ray's own would train here."""

        def get_result(self) -> None:
            """There is no result."""

    def in_an_actor(self: Any, **options: Any) -> None:
        passed.update(options, controller="in an actor")

    monkeypatch.setattr(trainer.ray, "nodes", lambda: [{"Alive": True}] * 2)
    monkeypatch.setattr(trainer, "TrainController", Controller)
    monkeypatch.setattr(trainer, "OwnController", Controller)
    monkeypatch.setattr(trainer.TorchTrainer, "_initialize_and_run_controller", in_an_actor)
    lean = trainer.ray_trainer(job_in(tmp_path, is_trial=is_trial), own_cluster, ray_stays)
    helpers = {type(callback) for callback in lean._create_default_callbacks()}
    assert DatasetsCallback not in helpers
    assert (PlacementGroupCleanerCallback in helpers) == frees_cpus
    assert os.environ[WATCHES_NODES] == ("0" if own_cluster else "1")
    lean._initialize_and_run_controller(scaling_policy="Ray's", failure_policy="Ray's")
    scaling: Any = passed["scaling_policy"]
    assert isinstance(scaling, GroupScaling)
    assert isinstance(passed["failure_policy"], NodesAreNoFailures)
    assert (scaling.asks_autoscaler, scaling.is_known, scaling.counts) == (asks_autoscaler, ray_stays, [1])
    assert passed["controller"] == controller


@pytest.mark.parametrize(("nodes", "watches"), [(1, "0"), (2, "1")])
def test_nodes_are_watched_where_workers_have_another_one_to_go_to(
    nodes: int, watches: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.ray, "nodes", lambda: [{"Alive": True}] * nodes + [{"Alive": False}])
    trainer.ray_trainer(job_in(tmp_path), own_cluster=False)
    assert os.environ[WATCHES_NODES] == watches


@pytest.mark.parametrize(("own_cluster", "use_gpu", "early"), [(True, False, True), (True, True, False), (False, False, False)])
def test_workers_without_gpus_take_processes_that_were_started_early_on_a_ray_of_the_launchs_own(
    own_cluster: bool, use_gpu: bool, early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.ray, "nodes", list)
    job = job_in(tmp_path, f"launch.use_gpu={str(use_gpu).lower()}")
    environment = trainer.ray_trainer(job, own_cluster).run_config.worker_runtime_env
    assert environment == (WORKER_ENVIRONMENT if early else {})
    assert OwnGroup._get_worker_runtime_env(environment) == environment


def job_in(folder: Path, *overrides: str, is_trial: bool = False) -> TrainJob:
    settings = load_settings(1, None, [f"output.root={folder}", *overrides])
    nothing: Any = None
    return TrainJob(settings, 1, "x", "", 1, nothing, nothing, {}, {}, 0.0, trial=nothing if not is_trial else mock.MagicMock())


def test_ray_is_given_the_time_after_which_a_worker_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its worker group reads it in the controller's process, to which Ray passes it on, or in a trial's."""
    monkeypatch.setenv(HANG_TIMEOUT, "600")
    monkeypatch.setattr(trainer.ray, "nodes", list)
    trainer.ray_trainer(job_in(tmp_path, "launch.hang_timeout_s=7"), own_cluster=True)
    assert get_env_vars_to_propagate()[HANG_TIMEOUT] == "7"
    assert {WATCH_INTERVAL, WATCHES_NODES} <= set(get_env_vars_to_propagate())
    group = WorkerGroup(mock.MagicMock(), mock.MagicMock())
    assert group._worker_health_check_timeout_s == 7


def test_state_that_a_kill_has_torn_is_removed(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder, text in ((whole, "{}"), (torn, '{"half')):
        folder.mkdir()
        (folder / "checkpoint_manager_snapshot.json").write_text(text)
        remove_torn_state(folder)
    assert whole.exists()
    assert not torn.exists()


@pytest.mark.parametrize(
    ("process", "module", "not_loaded"),
    [
        ("Ray Train's controller", "launch.trainer", {"pytorch_lightning", "transformers", "peft", "matplotlib"}),
        ("a trial of a sweep", "sweep.trial", {"pytorch_lightning", "transformers", "peft", "matplotlib"}),
        ("the driver of a launch, before it reads inputs", "launch.driver", {"pytorch_lightning", "transformers", "peft", "optuna"}),
    ],
)
def test_a_process_that_does_not_train_loads_no_training_library(process: str, module: str, not_loaded: set[str], tmp_path: Path) -> None:
    """With all of a worker's imports it would start two to six seconds later, and take 200 MB more."""
    load = f"import json, sys, raytrain2p.launch.summary, raytrain2p.{module}"
    loaded = f"{load}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    output = subprocess.run([sys.executable, "-c", loaded], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    modules = set(json.loads(output.splitlines()[-1]))
    assert {"ray", "torch", "raytrain2p"} <= modules
    assert not modules & not_loaded, process
