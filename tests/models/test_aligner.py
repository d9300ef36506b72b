"""The aligner's branches: shapes, unit vectors, pooling."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from raytrain2p.models.aligner import Aligner, Branch


def test_an_aligner_gives_a_unit_vector_per_item_and_modality() -> None:
    aligner = Aligner({"image": 12, "text": 8}, hidden=16, dimension=6)
    vectors = aligner({"image": (torch.randn(3, 9, 12), None), "text": (torch.randn(3, 1, 8), None)})
    assert {name: tuple(x.shape) for name, x in vectors.items()} == {"image": (3, 6), "text": (3, 6)}
    for x in vectors.values():
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(3))


def test_an_aligner_takes_whichever_modalities_are_there() -> None:
    aligner = Aligner({"image": 12, "audio": 5}, hidden=16, dimension=6)
    assert list(aligner({"audio": (torch.randn(2, 4, 5), None)})) == ["audio"]


def test_an_aligner_is_rebuilt_from_its_shape() -> None:
    aligner = Aligner({"image": 12, "text": 8}, hidden=16, dimension=6, dropout=0.3)
    shape: Any = aligner.shape
    again = Aligner(**shape)
    again.load_state_dict(aligner.state_dict())
    features = {"text": (torch.randn(2, 1, 8), None)}
    torch.testing.assert_close(again.eval()(features)["text"], aligner.eval()(features)["text"])
    assert again.shape == aligner.shape


def test_positions_beyond_an_items_own_count_for_nothing() -> None:
    branch = Branch(8, 16, 6, dropout=0.0)
    short, long = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    together = torch.cat([F.pad(short, (0, 0, 0, 2), value=9.0), long])
    vectors = branch(together, torch.tensor([3, 5]))
    torch.testing.assert_close(vectors, torch.cat([branch(short), branch(long)]))


def test_a_position_of_the_grid_depends_on_that_position_alone() -> None:
    branch = Branch(8, 16, 6, dropout=0.0)
    features = torch.randn(2, 5, 8)
    changed = features.clone()
    changed[:, 3, 0] += 1  # not all of its features: LayerNorm takes away what they have in common
    same = (branch.grid(features) == branch.grid(changed)).all(dim=-1)
    assert same.tolist() == [[True, True, True, False, True]] * 2


def test_pooling_does_not_depend_on_the_order_of_positions() -> None:
    branch = Branch(8, 16, 6, dropout=0.0)
    features = torch.randn(2, 5, 8)
    torch.testing.assert_close(branch(features), branch(features[:, torch.tensor([4, 2, 0, 1, 3])]))


def test_the_query_weighs_positions() -> None:
    """Were pooling a plain mean, the query would have no gradient."""
    branch = Branch(8, 16, 6, dropout=0.0)
    branch(torch.randn(2, 5, 8)).sum().backward()
    assert branch.query.weight.grad is not None
    assert branch.query.weight.grad.abs().max() > 0


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_there_in_training_only(training: bool) -> None:
    torch.manual_seed(0)
    branch = Branch(8, 64, 6, dropout=0.5).train(training)
    features = torch.randn(2, 5, 8)
    assert torch.equal(branch(features), branch(features)) != training


def test_vectors_are_float32_and_of_unit_length_in_bfloat16_compute() -> None:
    branch = Branch(8, 16, 6, dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = branch(torch.randn(4, 5, 8))
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4))
