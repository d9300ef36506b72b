"""Ray's trainer around the training function, without the helper processes that are not needed.

An idle Ray process wakes up a hundred times a second: on two cores each costs a hundredth of the training speed, and its imports
make the start longer. Ray's controller loads this module, so it imports no training library either.
"""

import asyncio
import json
import os
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raytrain2p.config.secrets import mask_error
from raytrain2p.launch.capacity import worker_resources
from raytrain2p.launch.process_group import OwnAddressConfig
from raytrain2p.launch.ray_private import DatasetsCallback, FixedScalingPolicy, PlacementGroupCleanerCallback, TrainController
from raytrain2p.worker.channel import RunChannel
from raytrain2p.worker.job import TrainJob

HANG_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def ray_trainer(job: TrainJob, own_cluster: bool, ray_stays: bool = False) -> TorchTrainer:
    """The trainer of a job. Ray keeps its state under the launch ID, apart from the run directories.

    Args:
        job: for each worker.
        own_cluster: Ray was started by this process, and ends with it.
        ray_stays: this process must be able to end the workers without `ray.shutdown`.
    """
    settings, storage = job.settings, Path(job.settings.output.root) / ".ray"
    remove_torn_state(storage / job.launch_id)
    os.environ[HANG_TIMEOUT] = str(settings.launch.hang_timeout_s)  # Ray passes it on to its controller
    return LeanTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=OwnAddressConfig(timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=settings.launch.num_workers,
            use_gpu=settings.launch.gpus > 0,
            resources_per_worker=worker_resources(settings.launch.model_copy(update={"cpus_per_worker": job.threads})),
            placement_strategy=settings.launch.placement_strategy,
        ),
        run_config=RunConfig(
            name=job.launch_id,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=settings.launch.max_failures or 0),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=settings.checkpoint.monitor, checkpoint_score_order=settings.checkpoint.mode
            ),
        ),
        is_trial=job.trial is not None,
        own_cluster=own_cluster,
        reports_to=job.channel if ray_stays else None,
    )


def train_worker(config: dict[str, Any]) -> None:
    """The training function that Ray runs on each worker."""
    try:
        from raytrain2p.worker.train_loop import train

        train(config["job"])
    except Exception as error:
        mask_error(error)
        raise


class LeanTrainer(TorchTrainer):
    """Leaves out the sharding of Ray Datasets, since the splits come through the object store, and:

    - the process that frees the CPUs if the controller is killed, on a cluster of its own and in a trial: it would outlive each
      trial that Tune stops, and the sweep frees the CPUs itself; and on a Ray that our caller has initialised: it would look for the
      controller in the cluster that was started last on this machine, which may be another one, and end the workers;
    - the requests to an autoscaler, on a cluster of its own, which has none.

    A trial's controller runs in the trial's own process, which would only wait otherwise, and with which the workers must end.
    """

    def __init__(self, *args: Any, is_trial: bool, own_cluster: bool, reports_to: RunChannel | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self._own_cluster, self._is_trial, self._reports_to = own_cluster, is_trial, reports_to
        cleaner = (PlacementGroupCleanerCallback,) if is_trial or own_cluster or reports_to else ()
        self._unneeded = (DatasetsCallback, *cleaner)

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, self._unneeded)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if self._own_cluster:
            options["scaling_policy"] = WithoutAutoscaler(options["scaling_policy"].scaling_config)
        if self._reports_to is not None:
            options["scaling_policy"] = KnownController(options["scaling_policy"].scaling_config, self._reports_to)
        if self._is_trial:
            controller = TrainController(**options)
            asyncio.run(controller.run())
            return controller.get_result()
        return super()._initialize_and_run_controller(**options)


class WithoutAutoscaler(FixedScalingPolicy):
    """Sends no requests for nodes."""

    def after_controller_start(self, train_run_context: Any) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


class KnownController(FixedScalingPolicy):
    """Makes the controller known on a channel: `fit` keeps it to itself."""

    def __init__(self, scaling_config: ScalingConfig, channel: RunChannel) -> None:
        super().__init__(scaling_config)
        self._channel = channel

    def after_controller_start(self, train_run_context: Any) -> None:
        super().after_controller_start(train_run_context)
        self._channel.put_controller(ray.get_runtime_context().current_actor)


def remove_torn_state(folder: Path) -> None:
    """Remove Ray's state of an earlier attempt if a kill has left it half written: Ray would refuse to start. A resume does not need it."""
    try:
        for snapshot in folder.glob("*snapshot*.json"):
            json.loads(snapshot.read_text())
    except ValueError:
        shutil.rmtree(folder)
