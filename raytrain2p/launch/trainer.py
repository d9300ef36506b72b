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
from raytrain2p.launch.early import WORKER_ENVIRONMENT, starts_early
from raytrain2p.launch.elastic import GroupScaling, NodesAreNoFailures
from raytrain2p.launch.process_group import OwnAddressConfig
from raytrain2p.launch.ray_private import ControlledGroup, DatasetsCallback, PlacementGroupCleanerCallback, TrainController
from raytrain2p.worker.job import TrainJob

HANG_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
WATCHES_NODES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"  # an actor more, of no use where workers have no other node to go to
WATCH_INTERVAL = "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"
SECONDS_BETWEEN_LOOKS = "2"  # at nodes that are taken away: clouds give 30 seconds or more, for a step and a checkpoint
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def ray_trainer(job: TrainJob, own_cluster: bool, ray_stays: bool = False) -> TorchTrainer:
    """The trainer of a job. Ray keeps its state under the launch ID, apart from the run directories.

    Args:
        job: for each worker.
        own_cluster: Ray was started by this process, and ends with it.
        ray_stays: this process must be able to end the workers without `ray.shutdown`.
    """
    settings, launch, storage = job.settings, job.settings.launch, Path(job.settings.output.root) / ".ray"
    remove_torn_state(storage / job.launch_id)
    os.environ[HANG_TIMEOUT] = str(launch.hang_timeout_s)  # Ray passes these on to its controller
    nodes = sum(node["Alive"] for node in ray.nodes())
    os.environ[WATCHES_NODES] = str(int(not own_cluster and (launch.is_elastic or nodes > 1)))
    os.environ.setdefault(WATCH_INTERVAL, SECONDS_BETWEEN_LOOKS)
    scaling = ScalingConfig(
        num_workers=(launch.min_workers, launch.max_workers) if launch.is_elastic else launch.max_workers,
        use_gpu=launch.gpus > 0,
        resources_per_worker=worker_resources(launch.model_copy(update={"cpus_per_worker": job.threads})),
        placement_strategy=launch.placement_strategy,
    )
    failures = FailureConfig(
        max_failures=launch.max_failures or 0, max_preemption_failures=-1 if launch.max_preemptions is None else launch.max_preemptions
    )
    return LeanTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=OwnAddressConfig(timeout_s=int(COLLECTIVE_TIMEOUT.total_seconds())),
        scaling_config=scaling,
        run_config=RunConfig(
            name=job.launch_id,
            storage_path=str(storage),
            failure_config=failures,
            worker_runtime_env=WORKER_ENVIRONMENT if own_cluster and starts_early(launch) else None,
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=settings.checkpoint.monitor, checkpoint_score_order=settings.checkpoint.mode
            ),
        ),
        is_trial=job.trial is not None,
        own_cluster=own_cluster,
        ray_stays=ray_stays,
        scaling_policy=GroupScaling(scaling, settings.worker_counts, job.channel, launch.grow_after_s, not own_cluster, ray_stays),
        failure_policy=NodesAreNoFailures(failures, launch.is_elastic),
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
    """Takes policies of ours, and leaves out the sharding of Ray Datasets, since the splits come through the object store, and the
    process that frees the CPUs if the controller is killed, on a cluster of its own and in a trial: it would outlive each trial that
    Tune stops, and the sweep frees the CPUs itself; and on a Ray that our caller has initialised: it would look for the controller in
    the cluster that was started last on this machine, which may be another one, and end the workers.

    On a cluster of its own and in a trial, Ray's controller runs in this process, which would only wait otherwise, and with which the
    workers must end.
    """

    def __init__(
        self,
        *args: Any,
        is_trial: bool,
        own_cluster: bool,
        ray_stays: bool,
        scaling_policy: GroupScaling,
        failure_policy: NodesAreNoFailures,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._controller = TrainController if is_trial else OwnController if own_cluster else None
        self._policies = {"scaling_policy": scaling_policy, "failure_policy": failure_policy}
        cleaner = (PlacementGroupCleanerCallback,) if is_trial or own_cluster or ray_stays else ()
        self._unneeded = (DatasetsCallback, *cleaner)

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, self._unneeded)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options |= self._policies
        if self._controller is not None:
            controller = self._controller(**options)
            asyncio.run(controller.run())
            return controller.get_result()
        return super()._initialize_and_run_controller(**options)


class OwnGroup(ControlledGroup):
    """Workers of a controller that is no actor, on a cluster of the launch's own, whose processes have the driver's environment variables
    anyway: with more of them, workers would not take the processes that were started for them.
    """

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        return dict(custom_runtime_env)

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]) -> None:
        shared = {
            "train_run_context": self._train_run_context,
            "synchronization_actor": sync_actor,
            "storage_context": self._storage_context,
            "worker_callbacks": self._worker_callbacks_to_propagate,
            "controller_actor": None,  # it would be asked for checkpoints that were reported
        }
        each = [{name: values[rank] for name, values in train_context_args.items()} for rank in range(len(workers))]
        ray.get(
            [
                worker.actor.init_train_context.remote(distributed_context=worker.distributed_context, **shared, **own)
                for worker, own in zip(workers, each, strict=True)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class OwnController(TrainController):
    worker_group_cls = OwnGroup


def remove_torn_state(folder: Path) -> None:
    """Remove Ray's state of an earlier attempt if a kill has left it half written: Ray would refuse to start. A resume does not need it."""
    try:
        for snapshot in folder.glob("*snapshot*.json"):
            json.loads(snapshot.read_text())
    except ValueError:
        shutil.rmtree(folder)
