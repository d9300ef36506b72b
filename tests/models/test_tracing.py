"""What a pass does, counted without numbers, and measured by making its operations again."""

from collections import Counter

import pytest
import torch
from torch import nn

from raytrain2p.models.gpus import GPUS, gpu_of
from raytrain2p.models.timing import filled, seconds_of
from raytrain2p.models.tracing import Operation, Pass, Recorder, Shape, traced

ROWS, IN, OUT = 64, 48, 96


@pytest.fixture
def of_linear() -> Pass:
    with torch.device("meta"):
        layer = nn.Linear(IN, OUT)
    x = torch.ones(ROWS, IN)
    return traced(layer, lambda: layer(x).sum())


def test_flops_and_bytes_are_those_of_the_products(of_linear: Pass) -> None:
    products = {str(one.kernel): one for one in of_linear.operations if one.flops}
    assert set(products) == {"aten.addmm.default", "aten.mm.default"}, "its input needs no gradient"
    for product in products.values():
        assert product.flops == 2 * ROWS * IN * OUT
    assert products["aten.addmm.default"].bytes == 4 * (OUT + ROWS * IN + IN * OUT + ROWS * OUT)


def test_gradients_that_others_keep_are_let_go() -> None:
    most = []
    for sharded in (False, True):
        with torch.device("meta"):
            layers = nn.Sequential(*(nn.Linear(500, 500) for _ in range(8)))
        most.append(traced(layers, lambda layers=layers: layers(torch.ones(1, 500)).sum(), sharded).most_bytes)  # type: ignore[misc]
    assert most[0] > 8 * 1e6 > 3 * 1e6 > most[1], "gradients of 1 MB"


def test_views_and_empty_memory_are_no_operations() -> None:
    x = torch.ones(4, 6)
    with Recorder() as recorder:
        torch.empty_like(x.t().reshape(6, 4)[1:]).copy_(x.t()[1:])
    assert [str(one.kernel) for one in recorder.operations] == ["aten.copy_.default"]
    with Recorder() as recorder:
        x.t().reshape(24)
    assert recorder.most == 4 * 24, "the copy, and not what it is a copy of"


def test_what_is_repeated_is_read_once_and_a_lookup_reads_what_it_returns() -> None:
    table = torch.ones(1000, 8)
    with Recorder() as recorder:
        torch.ones(8).expand(1000, 8) + 1
        nn.functional.embedding(torch.tensor([1, 2]), table)
    of = {str(one.kernel): one.bytes for one in recorder.operations}
    assert of["aten.add.Tensor"] == 4 * (8 + 8000)
    assert of["aten.embedding.default"] == 2 * 4 * 16


def test_operations_of_a_pass_are_made_again_with_numbers_and_timed(of_linear: Pass) -> None:
    seconds = seconds_of(of_linear.operations, torch.device("cpu"), budget=60)
    assert seconds.keys() == of_linear.operations.keys()
    assert all(value > 0 for value in seconds.values())
    assert seconds_of(of_linear.operations, torch.device("cpu"), budget=-1) == {}
    (product,) = (one for one in of_linear.operations if str(one.kernel) == "aten.addmm.default")
    (bias, rows, weight), _ = filled(product, torch.device("cpu"))
    assert (bias.shape, rows.shape, weight.shape, weight.stride()) == ((OUT,), (ROWS, IN), (IN, OUT), (1, IN))
    repeated = Operation(product.kernel, (Shape((2, 3), (0, 1), torch.float32),), torch.utils._pytree.tree_flatten(((0,), {}))[1], 0, 0)
    ((tensor,), _) = filled(repeated, torch.device("cpu"))
    assert torch.equal(tensor[0], tensor[1])


def test_an_operation_that_cannot_be_made_alone_is_left_out() -> None:
    x = torch.ones(3)
    with Recorder() as recorder:
        x[torch.tensor([0, 1])]
    (lookup,) = recorder.operations
    beyond = Operation(lookup.kernel, (Shape((0,), (1,), torch.float32), *lookup.arguments[1:]), lookup.nesting, 0, 8)
    assert seconds_of(Counter({beyond: 1}), torch.device("cpu"), budget=60) == {}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, key: str | None) -> None:
    assert gpu_of(name) == (GPUS[key] if key else None)
