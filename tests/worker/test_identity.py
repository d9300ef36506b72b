"""What workers that start again keep of their run."""

from pathlib import Path

import pytest

from raytrain2p.config import load_settings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.run import Run
from raytrain2p.worker.identity import precision_setting


@pytest.mark.parametrize(("workers", "asked", "kept"), [("[1, 2]", "auto", "float32"), ("[1, 2]", "bf16", "bf16"), ("2", "auto", "auto")])
def test_workers_that_come_to_other_nodes_keep_the_precision_of_the_run(tmp_path: Path, workers: str, asked: str, kept: str) -> None:
    """Elsewhere `auto` could be another one, and so the losses."""
    settings = load_settings(1, None, [f"launch.num_workers={workers}", f"training.precision={asked}"])
    run = Run("0" * 32, str(tmp_path), "x", "20260101_120000", "y", ALIGNMENT.name, "z")
    assert precision_setting(settings, run, WorkerGroup()) == asked, "it has not begun"
    write_json(run.files.config, {"training": {"precision": "float32"}})
    assert precision_setting(settings, run, WorkerGroup()) == kept
