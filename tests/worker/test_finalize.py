"""The end of a run: its artifact is finite, and the results in its directory are those of the artifact."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain2p.models.distributed import WorkerGroup
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.tracking.run import Run
from raytrain2p.worker.callbacks.nonfinite import DivergedError
from raytrain2p.worker.finalize import restored, set_aside_results


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of 60 steps."""
    run = Run("0" * 32, str(tmp_path / "run"), "e", "20260101_000000", "launch", "phase2", "x")
    run.files.plots.mkdir(parents=True)
    for path in (run.files.answers, run.files.answer_sheet, run.files.training_curve, run.path / "model.pt"):
        path.write_text("of 60 steps")
    write_json(run.files.test_metrics, {"same/loss": 1.0})
    write_json(run.files.result, {"steps": 60})
    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_that_is_trained_on_does_not_show_the_results_of_its_earlier_model(run: Run) -> None:
    set_aside_results(run, 65)
    assert names(run.path) == {"plots", "model.pt", "earlier"}
    assert names(run.files.plots) == {"training_curve.png"}
    assert names(run.files.earlier / "step_60") == {"answers.jsonl", "answers.png", "test_metrics.json", "result.json"}
    set_aside_results(run, 65)
    assert read_json(run.files.earlier / "step_60" / "result.json") == {"steps": 60}


def test_a_run_that_only_ends_again_keeps_its_results(run: Run) -> None:
    set_aside_results(run, 60)
    assert run.files.answers.is_file()
    assert not run.files.earlier.exists()


def test_results_of_an_earlier_version_do_not_have_their_step(run: Run) -> None:
    write_json(run.files.result, {})
    set_aside_results(run, 65)
    assert (run.files.earlier / "step_unknown" / "answers.jsonl").is_file()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_never_become_an_artifact(tmp_path: Path, number: float) -> None:
    """A version that did not check them may have saved them."""
    module: Any = torch.nn.Linear(2, 1)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": module.state_dict()}, path)
    assert restored(module, path, torch.device("cpu"), WorkerGroup()) is module
    torch.save({"state_dict": {"weight": torch.tensor([[1.0, number]])}}, path)
    with pytest.raises(DivergedError, match=r"last\.ckpt has weights that are not finite"):
        restored(module, path, torch.device("cpu"), WorkerGroup())
