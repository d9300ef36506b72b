"""bitsandbytes, beside .venv: on the path of these tests (pyproject.toml), and of processes that are given it."""

from pathlib import Path

import pytest

BITSANDBYTES = Path(__file__).parents[1] / "build" / "quantization"
needs_bitsandbytes = pytest.mark.skipif(not BITSANDBYTES.is_dir(), reason="needs bitsandbytes: make build/quantization")
