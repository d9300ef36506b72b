"""What the LightningModules of both phases share: optimizer, schedule, the step's loss, checkpoints of what trains."""

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from raytrain2p.config.settings import LaunchSettings, TrainingSettings
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.models.parameters import ParameterCount
from raytrain2p.phases.inputs import Batch, warmup_of

T = TypeVar("T")
Answer = dict[str, Any]  # a row of the table of sample answers


class PhaseModule(pl.LightningModule):
    """Base of the phase modules. A checkpoint holds what trains; frozen weights are loaded from their models."""

    def __init__(self, training: TrainingSettings, launch: LaunchSettings, seed: int, total_steps: int) -> None:
        super().__init__()
        self.training_settings, self.launch, self.seed = training, launch, seed
        self.total_steps = total_steps
        self.steps_per_epoch: int | None = None  # set before a resume
        self.strict_loading = False  # the frozen weights are not in the checkpoint
        self.compiled = False  # whether parts of it run through torch.compile
        self.parameter_counts: dict[str, ParameterCount] = {}  # by part
        self.pass_loss = torch.zeros(())  # this worker's share of the step's loss: summed over passes, averaged over workers
        self.pass_tokens = 0  # that this worker's language model has read in the pass; padding does not count
        self.gradient_norm = torch.zeros(())  # of the step, before clipping; equal on all workers

    @property
    def passes_per_step(self) -> int:
        return self.training_settings.gradient_accumulation_steps(self.trainer.world_size)

    def shardable(self) -> list[tuple[nn.Module, MixedPrecisionPolicy]]:
        """Modules that FSDP shards one by one, innermost first, and this one last; and the precision in which each is gathered."""
        raise NotImplementedError

    def total_loss(self, batch: Batch) -> torch.Tensor:
        """The loss whose mean over workers and passes is the step's."""
        raise NotImplementedError

    def val_sums(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """A batch's summed loss and the number of its terms."""
        raise NotImplementedError

    def flops_per_token(self, positions: float) -> float | None:
        """That a forward and a backward pass need, in records of so many tokens; of a phase that counts its tokens, if it is known."""
        return None

    def configure_model(self) -> None:
        """Shard, if the strategy is FSDP: then, and only then, there is a device mesh."""
        mesh = self.device_mesh
        if mesh is not None and not isinstance(self, FSDPModule):
            workers = mesh["data_parallel"]
            if (shards := self.launch.shard_workers or workers.size()) < workers.size():
                workers = init_device_mesh(mesh.device_type, (workers.size() // shards, shards), mesh_dim_names=("copies", "shards"))
            for part, precision in self.shardable():
                fully_shard(part, mesh=workers, mp_policy=precision)
            register_fsdp_forward_method(self, "as_forward")

    def as_forward(self, work: Callable[[], T]) -> T:
        """What `work` returns, which calls parts of this module. Where it is sharded, all workers must do so, and equally often."""
        return work()

    def on_train_start(self) -> None:
        """Sets the rates of the settings: a checkpoint has its own, and population-based training resumes with others."""
        settings = self.training_settings
        scheduler, optimizer = self.lr_schedulers(), self.optimizers(use_pl_optimizer=False)
        scheduler.base_lrs = [settings.learning_rate * factor for factor, _ in self.groups()]
        for group, rate, schedule in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = rate
            group["lr"] = rate * schedule(scheduler.last_epoch)
            group["weight_decay"] = settings.weight_decay if group["params"][0].ndim >= 2 else 0.0

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """Dropout depends on the worker and the pass alone: a resumed run draws the same.

        Lightning lets go of a step's gradients after the next forward pass, which would need memory for them and its activations at once.
        """
        passes = self.passes_per_step
        if index % passes == 0:
            self.optimizers(use_pl_optimizer=False).zero_grad()
        place = [self.seed, self.trainer.global_rank, self.trainer.global_step * passes + index % passes]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def training_step(self, batch: Batch, index: int) -> torch.Tensor:
        loss = self.total_loss(batch)
        self.pass_loss, self.pass_tokens = loss.detach() / self.passes_per_step, batch.get("tokens_read", 0)
        return loss

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips the norm. A step whose norm is not finite is not applied: the fused optimizer reads `found_inf` on the device, so
        nothing waits for it. The norm is equal on all workers, and so is the decision.
        """
        parameters = self.trained_parameters()
        if gradient_clip_val is None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        self.gradient_norm = whole(norm)
        optimizer.found_inf = (~self.gradient_norm.isfinite()).float()  # type: ignore[attr-defined]

    def trained_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def rate_factor(self, name: str) -> float:
        """By which the learning rate of the parameter of this name is multiplied."""
        return 1.0

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """What trains, matrices apart from the rest, by the factor of its learning rate; first what has the rate of the settings."""
        found: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                factor = self.rate_factor(name)
                found.setdefault((factor != 1, factor, parameter.ndim < 2), []).append(parameter)
        return [(factor, found[key]) for key in sorted(found) for factor in [key[1]]]

    @torch.no_grad()
    def weights_norm(self) -> float:
        """Of what trains; a collective if it is sharded."""
        return float(whole(torch.nn.utils.get_total_norm(self.trained_parameters())))

    @torch.no_grad()
    def validate(self, loader: Iterable[Batch]) -> float:
        """The mean loss over all validation records, on each worker."""
        strategy = self.trainer.strategy
        parts = torch.zeros(2, device=self.device)
        self.eval()
        with self.trainer.precision_plugin.forward_context():
            for batch in loader:
                on_device = strategy.batch_to_device(batch)
                total, count = self.val_sums(on_device)
                counts = min(on_device["step_tokens"], 1)  # 0: a batch that does not count: it keeps this worker in step with the others
                parts += counts * torch.stack([total.detach().float(), total.new_tensor(float(count), dtype=torch.float32)])
        self.train()
        if isinstance(self, FSDPModule):  # a forward pass leaves the outermost weights gathered, for the backward pass
            self.reshard()
        total, count = strategy.reduce(parts, reduce_op="sum")
        return float(total / count)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in trained}
        steps_per_epoch = int(self.trainer.num_training_batches) // self.passes_per_step
        set_progress(checkpoint["loops"]["fit_loop"], checkpoint["global_step"], steps_per_epoch, self.passes_per_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning counts passes and epochs. A resumed run may have other numbers of passes per step, and of records, than before."""
        assert self.steps_per_epoch is not None
        set_progress(checkpoint["loops"]["fit_loop"], checkpoint["global_step"], self.steps_per_epoch, self.passes_per_step)

    def configure_optimizers(self) -> Any:
        """AdamW with linear warm-up, then a cosine to zero (arXiv:1608.03983, equation 5, one cycle)."""
        settings = self.training_settings
        groups = [
            {
                "params": parameters,
                "lr": settings.learning_rate * factor,
                "weight_decay": settings.weight_decay if parameters[0].ndim >= 2 else 0.0,
                **({"rate_factor": factor} if factor != 1 else {}),
            }
            for factor, parameters in self.groups()
        ]
        optimizer = torch.optim.AdamW(groups, fused=True)
        optimizer.register_load_state_dict_pre_hook(_fused)
        warmup = warmup_of(settings, self.total_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = (step - warmup) / max(1, self.total_steps - warmup)
            return (1 + math.cos(math.pi * min(done, 1.0))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def whole(value: torch.Tensor) -> torch.Tensor:
    """The value of a norm, or of a parameter; if it is sharded, gathered from all workers."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_on_first(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Named tensors on rank 0's CPU, and nothing on the others; those that are sharded are gathered one after the other."""
    first, kept = WorkerGroup.current().is_first, dict[str, torch.Tensor]()
    for name, value in tensors:
        gathered = whole(value.detach())
        kept |= {name: gathered.cpu()} if first else {}
    return kept


@torch.no_grad()
def take_over(parameter: torch.Tensor, value: torch.Tensor) -> bool:
    """Copy a value, which every worker has, into a parameter, which may be sharded: then only this worker's shard of the value is read.

    Returns:
        Whether what was read is finite.
    """
    if not isinstance(parameter, DTensor):
        parameter.copy_(value)
        return bool(value.isfinite().all())
    shard = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    mine = shard.to_local()
    parameter.to_local().copy_(mine)
    return bool(mine.isfinite().all())


def _fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """In a checkpoint of an earlier version it is not."""
    for group in state["param_groups"]:
        group["fused"] = True


def set_progress(loops: dict[str, Any], step: int, steps_per_epoch: int, passes_per_step: int) -> None:
    """Write into Lightning's loop counters that `step` optimizer steps are done, and nothing is half done.

    What Lightning counts differs between its hooks: saved in the one at an epoch's end, a run would
    resume one step into the ended epoch. Saved like this, it resumes with the next pass, whichever hook saved it.

    Args:
        loops: state of the fit loop, as in a checkpoint.
        step: optimizer steps that are done.
    """
    epoch, done = divmod(step, steps_per_epoch)
    begun = epoch + (1 if done else 0)
    epochs = {"ready": begun, "started": begun, "processed": epoch, "completed": epoch}
    loops["epoch_progress"] = {"total": epochs, "current": dict(epochs)}
    for name, unit in (("batch_progress", passes_per_step), ("scheduler_progress", 1)):
        progress = loops[f"epoch_loop.{name}"]
        progress["total"] = dict.fromkeys(progress["total"], step * unit)
        progress["current"] = dict.fromkeys(progress["current"], done * unit)
    loops["epoch_loop.batch_progress"]["is_last_batch"] = False
