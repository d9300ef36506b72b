"""FSDP: what trains, and the frozen base with it, sharded over Ray's workers."""

from typing import Any

import ray.train
import ray.train.torch
import torch
from pytorch_lightning.strategies import ModelParallelStrategy, Strategy


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 under Ray. Ray's own RayFSDPStrategy is FSDP1, which Lightning allows on GPUs alone.

    Checkpoints are gathered on rank 0, so that one file goes on with any number of workers.
    """

    def __init__(self) -> None:
        super().__init__(
            data_parallel_size=ray.train.get_context().get_world_size(), tensor_parallel_size=1, save_distributed_checkpoint=False
        )

    @property
    def root_device(self) -> torch.device:
        return ray.train.torch.get_device()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As every other strategy does, through the checkpoint plugin; the state is gathered by now."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options=storage_options)
