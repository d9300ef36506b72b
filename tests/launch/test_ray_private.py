"""What is used of Ray's private modules and methods exists in the installed version, and was checked against it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train.torch import TorchTrainer
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from raytrain2p.launch import ray_private

PACKAGE = Path(__file__).parents[2] / "raytrain2p"
PRIVATE = re.compile(r"\bray(\.\w+)*\.(_\w+|torch\.config)\b")  # modules
# Private methods and attributes that our subclasses override or use, by class
OVERRIDDEN = {
    TorchTrainer: {"_create_default_callbacks", "_initialize_and_run_controller"},  # launch/trainer.py LeanTrainer
    ray_private.FixedScalingPolicy: {  # launch/elastic.py GroupScaling
        "after_controller_start",
        "_get_num_workers_for_resource_request",
        "_maybe_send_resource_request",
        "make_decision_for_non_running_worker_group",
        "make_decision_for_running_worker_group",
    },
    ray_private.DefaultFailurePolicy: {"make_decision"},  # launch/elastic.py NodesAreNoFailures
    ray_private.TorchBackend: {"on_start"},  # launch/process_group.py OwnAddressBackend
    ray_private.TrainController: {"run", "get_result", "abort", "worker_group_cls"},  # LeanTrainer; worker/channel.py end_workers
    ray_private.ControlledGroup: {  # launch/trainer.py OwnGroup
        "_get_worker_runtime_env",
        "_init_train_context_on_workers",
        "_decorate_worker_log_file_paths",
    },
    PopulationBasedTraining: {"_exploit"},  # sweep/pbt.py ResumablePbt
}


def test_the_installed_version_of_ray_is_the_one_that_was_checked() -> None:
    assert ray.__version__ == ray_private.CHECKED_VERSION, (
        f"Ray {ray.__version__} is installed, but what is used of Ray's private modules was checked against "
        f"{ray_private.CHECKED_VERSION}: read each entry of launch/ray_private.py and the classes of OVERRIDDEN in the new "
        "source, run `make chaos`, then set CHECKED_VERSION"
    )


@pytest.mark.parametrize("name", [name for name in ray_private.__all__ if name not in ("CHECKED_VERSION", "JOB_CONFIG")])
def test_each_private_name_comes_from_ray(name: str) -> None:
    found = getattr(ray_private, name)
    if isinstance(found, str):
        return  # a key, not a function
    assert callable(found)
    assert found.__module__.startswith(
        (
            "ray._private",
            "ray._common",
            "ray._raylet",
            "ray.autoscaler",
            "src.ray.protobuf",  # ray.core.generated
            "ray.core.generated",
            "ray.experimental.internal_kv",
            "ray.train._internal",
            "ray.train.torch.config",
            "ray.train.v2._internal",
        )
    )


@pytest.mark.parametrize("kind", OVERRIDDEN, ids=lambda kind: kind.__name__)
def test_each_method_that_a_subclass_overrides_exists(kind: type) -> None:
    """LeanTrainer._create_default_callbacks and _initialize_and_run_controller, WithoutAutoscaler.after_controller_start and
    _maybe_send_resource_request, ResumablePbt._exploit.
    """
    assert {name for name in OVERRIDDEN[kind] if not callable(getattr(kind, name, None))} == set()


def test_each_private_attribute_that_a_subclass_uses_exists() -> None:
    """ResumableAsha: `_brackets`, each with `_rungs`. ResumablePbt: `_next_perturbation_sync`, `_perturbation_interval`, `_trial_state`."""
    asha: Any = ASHAScheduler(time_attr="step", metric="loss", mode="min")
    (bracket,) = asha._brackets
    assert bracket._rungs
    pbt: Any = PopulationBasedTraining(time_attr="step", metric="loss", mode="min", hyperparam_mutations={"rate": [1, 2]})
    assert pbt._next_perturbation_sync == pbt._perturbation_interval
    assert pbt._trial_state == {}


def test_private_modules_are_imported_in_one_file() -> None:
    users = {path.name for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert users == {"ray_private.py"}


@pytest.mark.parametrize("package", ["launch", "sweep"])
def test_ray_does_not_start_by_itself(package: str, tmp_path: Path) -> None:
    """A thread of Ray Tune may outlive `ray.shutdown`, and would start another Ray by its next call."""
    script = f"import raytrain2p.{package}, ray; ray.put(1)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Ray has not been started yet" in done.stderr
