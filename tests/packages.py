"""bitsandbytes, beside .venv: on the path of these tests (pyproject.toml), and of processes that are given it."""

import sys
from pathlib import Path

import pytest

BITSANDBYTES = Path(__file__).parents[1] / "build" / "quantization"
needs_bitsandbytes = pytest.mark.skipif(not BITSANDBYTES.is_dir(), reason="needs bitsandbytes: make build/quantization")


def without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process it is as if it were not installed."""
    monkeypatch.setattr("sys.path", [folder for folder in sys.path if Path(folder) != BITSANDBYTES])
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
