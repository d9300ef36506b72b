"""All that is imported from private modules of Ray, each with its reason; other modules import it from here.

Checked against CHECKED_VERSION: tests/launch/test_ray_private.py fails on another one, and lists the private methods that are
overridden elsewhere.
"""

# What starts the process group of the workers: it has PyTorch listen on all interfaces. No public option names the address.
from ray.train.torch.config import _set_torch_distributed_env_vars as set_torch_environment
from ray.train.torch.config import _TorchBackend as TorchBackend

# The type of its argument.
from ray.train._internal.base_worker_group import BaseWorkerGroup as WorkerGroup  # isort: skip

# Ray Train shards its own datasets by it. Ours come through the object store. No public option leaves it out.
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback

# A process that frees a launch's CPUs after its controller was killed. It would outlive the trials that Tune stops, and
# serves nothing where Ray ends with the driver. No public option leaves it out.
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

# Public `TorchTrainer.fit` runs it in an actor. A trial of Tune has a process already, with which its workers must end; and beside a
# launch's driver, which only waits, that actor would start seconds later.
from ray.train.v2._internal.execution.controller import TrainController

# How many workers there are. `fit` takes no policy, and Ray's elastic one does not fit: see launch/elastic.py. The fixed one also
# starts an actor that asks the autoscaler for nodes, which `ScalingConfig` cannot turn off.
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup as ControlledGroup

# Which restarts count as failures. `FailureConfig` has no place for a group that ends on purpose, to grow.
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision  # isort: skip

# Starts processes for workers before there is a task for them. Ray's own number is that of the CPUs, and each would load what trains.
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest  # isort: skip
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub  # isort: skip
from ray._private.grpc_utils import init_grpc_channel  # isort: skip

# The variable by which a new process calls a function first. The public runtime environment `worker_process_setup_hook` sets it, and
# may be given for a whole job alone.
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR as SETUP_HOOK  # isort: skip

# What is free on each node, and which nodes are about to be taken away: the public functions add nodes up, or leave it out.
from ray._private.state import available_resources_per_node, state  # isort: skip

# The address that `ray start` recorded on this machine. `ray.init(address="auto")` uses it too, but waits for minutes if that
# cluster is gone, and falls back to any Ray on the machine, such as that of another launch.
from ray._private.services import find_bootstrap_address  # isort: skip

# The variable in which Ray gives the driver of a submitted job its submission ID and runtime environment.
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR as JOB_CONFIG  # isort: skip

# A request to the autoscaler that stays until its end, beside those of others, and runs out if this process is killed. Public
# `request_resources` replaces what others have asked for, and never runs out.
from ray.train._internal.autoscaling_coordinator_client import TrainV1ResourceReservation as HeldRequest  # isort: skip

# Whether the cluster has an autoscaler, as it reports to Ray's head. `ray status` prints the same; no public function returns it.
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS as AUTOSCALER_STATUS  # isort: skip
from ray.experimental.internal_kv import _internal_kv_get as internal_kv_get  # isort: skip
from ray.autoscaler.v2.utils import is_autoscaler_v2  # isort: skip

# What an autoscaler on Kubernetes may add: derived from the RayCluster, as the autoscaler does. No public function reads it.
from ray.autoscaler._private.kuberay.autoscaling_config import AutoscalingConfigProducer as KubernetesConfig  # isort: skip

# The CPUs that `ray.init` would count, container limits included. `os.cpu_count` ignores those limits, and
# `ray.cluster_resources` needs a Ray that runs: too many workers are refused before one is started.
from ray._private.utils import get_num_cpus  # isort: skip

# The memory that `ray.init` would count, for the same reason.
from ray._common.utils import get_system_memory  # isort: skip

# Sets the title of this process; Ray comes with it. The package of this name would be a dependency for one line.
from ray._raylet import setproctitle  # type: ignore[attr-defined]  # isort: skip

CHECKED_VERSION = "2.60.0"
get_draining_nodes = state.get_draining_nodes

__all__ = [
    "AUTOSCALER_STATUS",
    "CHECKED_VERSION",
    "JOB_CONFIG",
    "SETUP_HOOK",
    "ControlledGroup",
    "DatasetsCallback",
    "DefaultFailurePolicy",
    "FailureDecision",
    "FixedScalingPolicy",
    "HeldRequest",
    "KubernetesConfig",
    "NodeManagerServiceStub",
    "NoopDecision",
    "PlacementGroupCleanerCallback",
    "PrestartWorkersRequest",
    "ResizeDecision",
    "TorchBackend",
    "TrainController",
    "WorkerGroup",
    "available_resources_per_node",
    "find_bootstrap_address",
    "get_draining_nodes",
    "get_num_cpus",
    "get_system_memory",
    "init_grpc_channel",
    "internal_kv_get",
    "is_autoscaler_v2",
    "set_torch_environment",
    "setproctitle",
]
