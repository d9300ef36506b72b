"""Contrastive losses: by hand, and over two real workers."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raytrain2p.models.losses import LARGEST_SCALE, ContrastiveLoss
from tests.two_workers import found_by_two

FORMS = ("softmax", "sigmoid")
CASES = [(form, absent) for form in FORMS for absent in (False, True)]
KEYS = torch.tensor([5, 9, 5, 2, 9, 7, 5, 1])  # repeated within a worker's half and across the halves


class Towers(nn.Module):
    """A small linear layer for each modality, and the loss."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)
        self.loss = ContrastiveLoss(form)

    def forward(self, x: torch.Tensor, y: torch.Tensor, keys: torch.Tensor, *present: torch.Tensor) -> torch.Tensor:
        return self.loss(F.normalize(self.left(x), dim=-1), F.normalize(self.right(y), dim=-1), keys, present or None)


def union_batch(absent: bool) -> tuple[torch.Tensor, ...]:
    """With `absent`, some records lack an item of one modality: three of the left, five of the right; the halves differ."""
    generator = torch.Generator().manual_seed(4)
    whole = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator), KEYS
    return (*whole, torch.tensor([1, 1, 0, 1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 0, 0, 1, 1, 0, 0]).bool()) if absent else whole


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed)), dim=-1)


def value(loss: ContrastiveLoss, left: torch.Tensor, right: torch.Tensor, keys: list[int]) -> float:
    return loss(left, right, torch.tensor(keys)).item()


def half_of_the_union(rank: int, folder: str) -> None:
    """One of two workers: losses and gradients of its half, for both forms."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {}
    for form, absent in CASES:
        towers = Towers(form)
        wrapped = DistributedDataParallel(towers)
        mine = slice(4 * rank, 4 * rank + 4)
        loss = wrapped(*(part[mine] for part in union_batch(absent)))
        loss.backward()
        gradients = {name: p.grad for name, p in towers.named_parameters()}
        found[form, absent] = {"loss": loss.detach(), "gradients": gradients}
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each of two real workers found."""
    return found_by_two(half_of_the_union, tmp_path_factory.mktemp("workers"), seconds=60)


@pytest.mark.parametrize(("form", "absent"), CASES)
def test_the_gradient_over_two_workers_equals_the_one_on_the_union_batch(form: str, absent: bool, two_workers: list[dict]) -> None:
    alone = Towers(form)
    alone(*union_batch(absent)).backward()
    for worker in two_workers:
        gradients = worker[form, absent]["gradients"]
        assert gradients.keys() == dict(alone.named_parameters()).keys()
        for name, parameter in alone.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6)
    assert alone.left.weight.grad is not None
    assert alone.left.weight.grad.abs().max() > 1e-3, "a gradient of zero would equal anything"


@pytest.mark.parametrize(("form", "absent"), CASES)
def test_the_mean_of_the_workers_losses_is_the_loss_of_the_union_batch(form: str, absent: bool, two_workers: list[dict]) -> None:
    losses = torch.stack([worker[form, absent]["loss"] for worker in two_workers])
    torch.testing.assert_close(losses.mean(), Towers(form)(*union_batch(absent)), rtol=1e-5, atol=1e-6)
    assert losses[0] != losses[1], "each worker has its own share"


def test_with_distinct_keys_the_softmax_form_is_clips_loss() -> None:
    left, right = unit_rows(5, 0), unit_rows(5, 1)
    logits = (left @ right.T).double() / 0.07
    by_hand = 0.0
    for item in range(5):
        by_hand -= float(logits[item, item] - logits[item].exp().sum().log())
        by_hand -= float(logits[item, item] - logits[:, item].exp().sum().log())
    assert value(ContrastiveLoss("softmax"), left, right, [0, 1, 2, 3, 4]) == pytest.approx(by_hand / 10, rel=1e-5)


def test_with_distinct_keys_the_sigmoid_form_is_siglips_loss() -> None:
    left, right = unit_rows(5, 0), unit_rows(5, 1)
    by_hand = 0.0
    for i in range(5):
        for j in range(5):
            z = 1 if i == j else -1
            logit = 10 * float(left[i] @ right[j]) - 10
            by_hand += math.log(1 + math.exp(-z * logit))
    assert value(ContrastiveLoss("sigmoid"), left, right, [0, 1, 2, 3, 4]) == pytest.approx(by_hand / 5, rel=1e-5)


def test_in_the_softmax_form_items_of_equal_keys_share_the_target_evenly() -> None:
    left, right = unit_rows(3, 2), unit_rows(3, 3)
    logits = (left @ right.T).double() / 0.07
    rows, columns = logits.log_softmax(1), logits.log_softmax(0)
    forwards = -((rows[0, 0] + rows[0, 2]) / 2 + rows[1, 1] + (rows[2, 0] + rows[2, 2]) / 2) / 3
    backwards = -((columns[0, 0] + columns[2, 0]) / 2 + columns[1, 1] + (columns[0, 2] + columns[2, 2]) / 2) / 3
    assert value(ContrastiveLoss("softmax"), left, right, [8, 4, 8]) == pytest.approx(float(forwards + backwards) / 2, rel=1e-5)


def test_in_the_sigmoid_form_a_repeated_text_is_no_negative() -> None:
    same = unit_rows(1, 4).repeat(2, 1)
    loss = ContrastiveLoss("sigmoid")
    assert value(loss, same, same, [6, 6]) == pytest.approx(2 * math.log(2), rel=1e-5)  # two pairs each of logit 0, both positive
    loss.bias.data.zero_()
    repeated, distinct = value(loss, same, same, [6, 6]), value(loss, same, same, [6, 7])
    assert repeated == pytest.approx(2 * math.log(1 + math.exp(-10)), rel=1e-2)
    assert distinct > 10, "told apart, the equal texts push against themselves"


def test_the_scale_stays_at_clips_bound() -> None:
    left, right = unit_rows(4, 5), unit_rows(4, 6)
    loss = ContrastiveLoss("softmax")
    loss.log_scale.data.fill_(LARGEST_SCALE)
    bound = value(loss, left, right, [0, 1, 2, 3])
    loss.log_scale.data.fill_(LARGEST_SCALE + 3)
    assert value(loss, left, right, [0, 1, 2, 3]) == pytest.approx(bound)
    assert math.exp(LARGEST_SCALE) == pytest.approx(100)


@pytest.mark.parametrize("form", FORMS)
def test_items_that_records_lack_count_for_nothing(form: str) -> None:
    """The loss is that of the records that have both items, however the others' rows are filled."""
    torch.manual_seed(0)
    left, right, keys = unit_rows(6, 0), unit_rows(6, 1), torch.tensor([1, 2, 3, 4, 2, 6])
    has = torch.tensor([1, 1, 0, 1, 1, 0]).bool()
    loss = ContrastiveLoss(form)
    whole = loss(left[has], right[has], keys[has])
    filled = left.masked_fill(~has[:, None], 7.0), right.masked_fill(~has[:, None], -7.0)
    torch.testing.assert_close(loss(*filled, keys, (has, has)), whole)


def test_without_any_positive_the_softmax_form_is_zero_and_has_a_gradient() -> None:
    left = unit_rows(2, 0).requires_grad_()
    has_left = torch.tensor([True, False])
    loss = ContrastiveLoss("softmax")(left, unit_rows(2, 1), torch.tensor([1, 2]), (has_left, ~has_left))
    loss.backward()
    assert loss.item() == 0
    assert left.grad is not None
    assert (left.grad == 0).all()
