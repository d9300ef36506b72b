"""What both phase modules share: a run that goes on from any step is the run that was never interrupted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn
from torch.utils.data import DataLoader, Dataset

from raytrain2p.config.settings import CheckpointSettings, LaunchSettings, TrainingSettings
from raytrain2p.data.batches import MicroBatch, StepSampler
from raytrain2p.phases.base import PhaseModule
from raytrain2p.worker.callbacks.checkpoint import BestAndLastCheckpoints
from tests.training import ScriptedMetrics, trainer_in

RECORDS, BATCH, STEPS = 23, 2, 17


class Numbers(Dataset[dict[str, Any]]):
    def __init__(self, records: int) -> None:
        self.records = records

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, share: MicroBatch) -> dict[str, Any]:
        return {"x": torch.tensor(share.records, dtype=torch.float32), "step_tokens": 1}


class Small(PhaseModule):
    """A weight behind dropout, which notes what it has seen and what it lost."""

    def __init__(self, passes: int, batch: int, stop: int | None) -> None:
        settings = TrainingSettings(max_steps=STEPS, global_batch_size=batch * passes, micro_batch_size=batch, learning_rate=0.1)
        super().__init__(settings, LaunchSettings(), 5, STEPS)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.stop, self.noted = stop, list[tuple[int, int, list[float], float]]()
        self.had_gradients: list[bool] = []  # at the beginning of each pass

    def total_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        self.had_gradients.append(any(parameter.grad is not None for parameter in self.parameters()))
        loss = (self.net(batch["x"][:, None] / RECORDS) - 1).square().mean()
        self.noted.append((self.trainer.global_step, self.trainer.current_epoch, batch["x"].tolist(), float(loss)))
        return loss

    def val_sums(self, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
        return self.total_loss(batch), 1

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        if self.stop is not None and self.trainer.global_step == self.stop and self.passes_end_a_step(index):
            raise SIGTERMException

    def passes_end_a_step(self, index: int) -> bool:
        return (index + 1) % self.passes_per_step == 0


def train(
    folder: Path, passes: int, stop: int | None = None, first: int = 0, steps: int = STEPS, batch: int = BATCH, records: int = RECORDS
) -> Small:
    """As a worker does it; `stop` after so many steps, go on after the `first`."""
    torch.manual_seed(0)
    module = Small(passes, batch, stop)
    even = np.ones(records, int)
    sampler = StepSampler(even, even, batch * passes, batch, 0, 1, seed=3, first_step=first)
    loader: Any = DataLoader(Numbers(records), sampler=sampler, batch_size=None)
    module.steps_per_epoch = sampler.steps
    saving = BestAndLastCheckpoints(folder, CheckpointSettings(every_steps=None), sampler.steps, ScriptedMetrics({"train_loss": 1.0}))
    trainer = trainer_in(
        folder,
        [saving],
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=passes,
        limit_val_batches=0,
        use_distributed_sampler=False,
    )
    checkpoint = str(folder / "last.ckpt") if first else None
    if stop is None:
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=first > 0)
    else:
        with pytest.raises(SIGTERMException):
            trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=first > 0)
    return module


@pytest.mark.parametrize("passes", [1, 2])
def test_a_steps_gradients_are_gone_before_the_next_forward_pass_needs_memory(tmp_path: Path, passes: int) -> None:
    assert train(tmp_path, passes).had_gradients == [number % passes > 0 for number in range(STEPS * passes)]


@pytest.mark.parametrize("passes", [1, 2])
def test_a_run_that_goes_on_from_any_step_is_the_undisturbed_one(tmp_path: Path, passes: int) -> None:
    whole = train(tmp_path / "whole", passes)
    assert len(whole.noted) == STEPS * passes
    for stop in range(1, STEPS):
        folder = tmp_path / str(stop)
        begun = train(folder, passes, stop=stop)
        rest = train(folder, passes, first=stop)
        assert begun.noted + rest.noted == whole.noted, f"stopped after step {stop}"
        assert all(torch.equal(a, b) for a, b in zip(rest.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("first", [5, 11])
def test_a_run_that_is_made_longer_goes_on_where_it_was_in_the_data(tmp_path: Path, passes: int, first: int) -> None:
    """It ended by itself, within an epoch or at the end of one, and its checkpoint was saved in another of Lightning's hooks."""
    whole = train(tmp_path / "whole", passes)
    begun = train(tmp_path / "part", passes, steps=first)
    rest = train(tmp_path / "part", passes, first=first)
    assert begun.noted + rest.noted == whole.noted


@pytest.mark.parametrize("first", [3, 5, 11])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_resumed_run_may_take_its_steps_in_another_number_of_passes(tmp_path: Path, before: int, after: int, first: int) -> None:
    def steps_of(modules: list[Small]) -> dict[tuple[int, int], list[float]]:
        """Records by step and epoch."""
        found: dict[tuple[int, int], list[float]] = {}
        for step, epoch, records, _ in (noted for module in modules for noted in module.noted):
            found[step, epoch] = sorted(found.get((step, epoch), []) + records)
        return found

    whole = train(tmp_path / "whole", before, batch=4 // before)
    begun = train(tmp_path / "part", before, stop=first, batch=4 // before)
    rest = train(tmp_path / "part", after, first=first, batch=4 // after)
    assert steps_of([begun, rest]) == steps_of([whole])


@pytest.mark.parametrize("first", [5, 13])
@pytest.mark.parametrize("records", [9, 31])
def test_a_run_that_is_resumed_with_another_number_of_records_takes_the_steps_of_a_run_with_that_number(
    tmp_path: Path, records: int, first: int
) -> None:
    passes = 2

    def seen(module: Small) -> list[tuple[int, int, list[float]]]:
        return [(step, epoch, xs) for step, epoch, xs, _ in module.noted if step >= first]

    whole = train(tmp_path / "whole", passes, records=records)
    train(tmp_path / "part", passes, stop=first)
    assert seen(train(tmp_path / "part", passes, first=first, records=records)) == seen(whole)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_run_that_goes_on_has_the_rates_of_its_settings_not_of_the_checkpoint(
    tmp_path: Path, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Population-based training goes on from another trial's weights with a rate of its own."""
    monkeypatch.setattr(Small, "rate_factor", lambda self, name: factor if name.startswith("net.0") else 1.0)
    train(tmp_path, 1, stop=4)
    before = torch.load(tmp_path / "last.ckpt", weights_only=True)
    before["lr_schedulers"][0]["base_lrs"] = [7.0] * (2 if factor == 1 else 4)
    for group in before["optimizer_states"][0]["param_groups"]:
        group |= {"lr": 7.0, "initial_lr": 7.0, "weight_decay": 7.0, "fused": None}  # None: of an earlier version
    torch.save(before, tmp_path / "last.ckpt")
    train(tmp_path, 1, first=4)
    undisturbed = tmp_path / "undisturbed"
    train(undisturbed, 1)
    mine, theirs = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (tmp_path, undisturbed))
    assert all(torch.equal(mine["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"])
    assert [group["lr"] for group in mine["optimizer_states"][0]["param_groups"]] == [
        group["lr"] for group in theirs["optimizer_states"][0]["param_groups"]
    ]
