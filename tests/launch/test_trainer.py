"""What a launch goes without: some of Ray Train's own helpers, and, where nothing is trained, all that trains."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.train import RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from raytrain2p.launch import trainer
from raytrain2p.launch.trainer import LeanTrainer, WithoutAutoscaler, forget_torn_bookkeeping


@pytest.mark.parametrize(
    ("started_here", "is_trial", "gives_back_cpus", "policy", "controller"),
    [
        (True, False, False, WithoutAutoscaler, "in a process of its own"),
        (False, False, True, FixedScalingPolicy, "in a process of its own"),
        (False, True, False, FixedScalingPolicy, "in this process"),
    ],
)
def test_helpers_that_serve_nothing_are_not_started(
    started_here: bool,
    is_trial: bool,
    gives_back_cpus: bool,
    policy: type,
    controller: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handed_over: dict[str, Any] = {}

    class Controller:
        def __init__(self, **options: Any) -> None:
            handed_over.update(options, controller="in this process")

        async def run(self) -> None:
            """Ray's own would train."""

        def get_result(self) -> None:
            """Nothing came out."""

    def in_a_process(self: Any, **options: Any) -> None:
        handed_over.update(options, controller="in a process of its own")

    monkeypatch.setattr(trainer, "started_here", lambda: started_here)
    monkeypatch.setattr(trainer, "TrainController", Controller)
    monkeypatch.setattr(trainer.TorchTrainer, "_initialize_and_run_controller", in_a_process)
    options: dict[str, Any] = {
        "scaling_config": ScalingConfig(num_workers=1),
        "run_config": RunConfig(name="x", storage_path=str(tmp_path)),
    }
    lean = LeanTrainer(print, **options, is_trial=is_trial)
    helpers = {type(callback) for callback in lean._create_default_callbacks()}
    assert DatasetsCallback not in helpers
    assert (PlacementGroupCleanerCallback in helpers) == gives_back_cpus
    lean._initialize_and_run_controller(scaling_policy=FixedScalingPolicy(ScalingConfig(num_workers=1)))
    given: Any = handed_over["scaling_policy"]
    assert given.scaling_config.num_workers == 1
    assert type(given) is policy
    assert handed_over["controller"] == controller


def test_bookkeeping_that_a_kill_has_torn_is_forgotten(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    for folder, text in ((whole, "{}"), (torn, '{"half')):
        folder.mkdir()
        (folder / "checkpoint_manager_snapshot.json").write_text(text)
        forget_torn_bookkeeping(folder)
    assert whole.exists()
    assert not torn.exists()


@pytest.mark.parametrize(
    ("process", "room", "spared"),
    [
        ("Ray Train's controller", "trainer", {"pytorch_lightning", "transformers", "peft", "matplotlib"}),
        ("a trial of a sweep", "trials", {"pytorch_lightning", "transformers", "peft", "matplotlib"}),
        ("the driver of a launch", "driver", {"pytorch_lightning", "peft", "optuna", "matplotlib"}),
    ],
)
def test_a_process_that_does_not_train_loads_nothing_that_trains(process: str, room: str, spared: set[str], tmp_path: Path) -> None:
    """With all of a worker's imports it would begin two to six seconds later, and have 200 MB more."""
    load = f"import json, sys, raytrain2p.launch.summary, raytrain2p.launch.{room}"
    loaded = f"{load}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    output = subprocess.run([sys.executable, "-c", loaded], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    modules = set(json.loads(output.splitlines()[-1]))
    assert {"ray", "torch", "raytrain2p"} <= modules
    assert not modules & spared, process
