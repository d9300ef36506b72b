"""The status line of a step."""

import math

import pytest

from raytrain2p.launch.progress import decimal, describe
from raytrain2p.worker.channel import StepProgress

WEEK = 7 * 24 * 3600


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *[(1.4321, "1.432"), (0.0, "0.000"), (0.01234, "0.012"), (1e-5, "1.000e-05"), (12345.678, "12345.678"), (3e9, "3.000e+09")],
        *[(-2e-4, "-2.000e-04"), (math.nan, "nan"), (math.inf, "inf")],
    ],
)
def test_a_loss_is_readable_whatever_its_size(value: float, shown: str) -> None:
    assert decimal(value, 3) == shown


def test_the_line_of_a_step_has_hours_and_slow_steps_and_nothing_left_at_the_end() -> None:
    assert describe(StepProgress(0, 120, 250, 1.4321, 18.34, 114)) == "epoch 0  step 120/250  loss 1.432  18.3 samples/s  0:01:54 left"
    assert describe(StepProgress(0, 1, 100_000, 9.9, 0.0123, 2 * WEEK)).endswith("  0.012 samples/s  14 days, 0:00:00 left")
    assert describe(StepProgress(2, 250, 250, 1e-5, 1234.5, 0.0)) == "epoch 2  step 250/250  loss 1.000e-05  1234.5 samples/s"
