"""The end of a run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain2p.worker.callbacks.nonfinite import DivergedError
from raytrain2p.worker.finalize import restored


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_never_become_an_artifact(tmp_path: Path, number: float) -> None:
    """A version that did not check them may have saved them."""
    module: Any = torch.nn.Linear(2, 1)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": module.state_dict()}, path)
    assert restored(module, path, torch.device("cpu")) is module
    torch.save({"state_dict": {"weight": torch.tensor([[1.0, number]])}}, path)
    with pytest.raises(DivergedError, match=r"last\.ckpt has weights that are not finite"):
        restored(module, path, torch.device("cpu"))
