"""The lines at the end of a launch."""

import io
from typing import Any

import pytest

from raytrain2p.config import load_settings
from raytrain2p.launch.progress import Console
from raytrain2p.launch.summary import print_summary
from raytrain2p.worker.job import Outcome

DIRECTORY = "/" + "d" * 300
METRICS = {"train_loss": 1.25, "test_a/exact_match/[bold]task\x1b[31m": 0.5, "test_b/loss": 2.0}


@pytest.mark.parametrize(("phase", "command"), [(1, "train --phase 2 --aligner aaaaaaaa"), (2, "predict --run aaaaaaaa")])
def test_the_summary_has_the_run_its_metrics_by_split_and_the_next_command(phase: int, command: str) -> None:
    stream = io.StringIO()
    settings = load_settings(1, None, ["tracking.uri=http://me:secret@server"])
    print_summary(Outcome("a" * 32, DIRECTORY, None, None, f"{DIRECTORY}/model.pt", METRICS), phase, settings, Console(stream))
    lines: Any = [line.split() for line in stream.getvalue().splitlines()]
    assert lines[1:4] == [["run", "a" * 32], ["directory", DIRECTORY], ["artifact", f"{DIRECTORY}/model.pt"]]
    assert ["metric", "train", "test_a", "test_b"] in lines
    assert ["train_loss", "1.2500"] in lines
    assert ["exact_match/[bold]task\\x1b[31m", "50.00", "%"] in lines
    assert ["loss", "2.0000"] in lines
    assert f"python -m raytrain2p.{command}" in stream.getvalue()
    assert "secret" not in stream.getvalue()
