"""Ray's trainer around the worker function, without the helper processes that serve nothing here.

An idle process of Ray wakes a hundred times a second. On two cores each takes a hundredth of the training's speed, and its
imports make the launch longer. For the same reason this room imports nothing that trains: Ray's controller loads it.
"""

import asyncio
import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from raytrain2p.config import Settings
from raytrain2p.launch.cluster import started_here
from raytrain2p.worker.job import TrainJob

COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def ray_trainer(plan: TrainJob) -> TorchTrainer:
    """Its bookkeeping lies under the launch ID, apart from the run directories."""
    settings, storage = plan.settings, Path(plan.settings.output.root) / ".ray"
    forget_torn_bookkeeping(storage / plan.launch_id)
    return LeanTrainer(
        train_worker,
        train_loop_config={"plan": plan},
        torch_config=TorchConfig(timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=settings.launch.num_workers,
            use_gpu=settings.launch.use_gpu,
            resources_per_worker=_resources(settings, plan.threads),
        ),
        run_config=RunConfig(
            name=plan.launch_id,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=settings.launch.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=settings.checkpoint.monitor, checkpoint_score_order=settings.checkpoint.mode
            ),
        ),
        is_trial=plan.trial is not None,
    )


def train_worker(config: dict[str, Any]) -> None:
    """The training function that Ray runs on each worker."""
    from raytrain2p.worker.train_loop import train

    train(config["plan"])


class LeanTrainer(TorchTrainer):
    """Leaves out what shards Ray Datasets, since the splits come through the object store, and:

    - what gives back the CPUs after its controller's death, in a Ray that ends with this process, and in a trial: it would
      outlive each trial that Tune stops, and the sweep gives back the CPUs itself;
    - what asks an autoscaler for nodes, in a Ray that ends with this process, which has none.

    A trial's controller has no process of its own: the trial has one already, which does nothing but wait, and which the
    workers are to die with.
    """

    def __init__(self, *args: Any, is_trial: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self._alone, self._is_trial = started_here(), is_trial
        unneeded = [DatasetsCallback, *([PlacementGroupCleanerCallback] if is_trial or self._alone else [])]
        self._unneeded = tuple(unneeded)

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, self._unneeded)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self._alone:
            options["scaling_policy"] = WithoutAutoscaler(options["scaling_policy"].scaling_config)
        if self._is_trial:
            controller = TrainController(**options)
            asyncio.run(controller.run())
            return controller.get_result()
        return super()._initialize_and_run_controller(**options)


class WithoutAutoscaler(FixedScalingPolicy):
    """Asks nobody for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


def forget_torn_bookkeeping(folder: Path) -> None:
    """Ray reads its notes of an earlier attempt, refuses to begin if a kill has torn them, and we need none of them."""
    try:
        for snapshot in folder.glob("*snapshot*.json"):
            json.loads(snapshot.read_text())
    except ValueError:
        shutil.rmtree(folder)


def _resources(settings: Settings, threads: int) -> dict[str, float]:
    return {"CPU": float(threads)} | ({"GPU": 1.0} if settings.launch.use_gpu else {})
