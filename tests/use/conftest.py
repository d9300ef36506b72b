"""Uses of a really trained model, too slow for `make test`: `make test-use` runs them."""

import os
from pathlib import Path

import pytest

from raytrain2p.config.phases import INSTRUCTION
from raytrain2p.tracking.run_directory import RunDirectory


@pytest.fixture(scope="session")
def quickstart_model() -> Path:
    """The model.pt of the quickstart's phase 2 run, whose directory RAYTRAIN2P_USE_RUN is."""
    if os.environ.get("RAYTRAIN2P_USE_TESTS") != "1":
        pytest.skip("takes minutes: set RAYTRAIN2P_USE_TESTS=1")
    folder = os.environ.get("RAYTRAIN2P_USE_RUN")
    if folder is None:
        pytest.skip("needs a trained model: set RAYTRAIN2P_USE_RUN to the directory of the quickstart's phase 2 run")
    return RunDirectory(Path(folder)).artifact(INSTRUCTION)
