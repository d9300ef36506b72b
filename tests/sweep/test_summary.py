"""The text at the end of a sweep."""

import shlex
from dataclasses import asdict
from pathlib import Path

import pytest

from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.results import SweepOutcome, retrain_command
from raytrain2p.sweep.summary import sweep_summary
from raytrain2p.tracking.run import Run

PARENT, BEST = "a" * 32, "b" * 32


def run_in(root: Path, phase: str, run_id: str, uri: str, **record: object) -> Run:
    run = Run(run_id, f"{root}/{phase}/{run_id}_20260101_000000", "e", "20260101_000000", "s", phase, uri)
    run.path.mkdir(parents=True)
    run.files.write_record(asdict(run) | record)
    return run


@pytest.mark.parametrize(
    ("phase", "use"),
    [
        ("phase2", ["predict", "--run", BEST[:8], "--image", "FILE", "What's this?"]),
        ("alignment", ["train", "--phase", "2", "--aligner", BEST[:8]]),
    ],
)
def test_it_names_the_best_run_and_how_to_use_it(tmp_path: Path, phase: str, use: list[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    sweep = load_sweep(None, [f"output.root={tmp_path}/checkpoints", f"tracking.uri={uri}"])
    parent = run_in(tmp_path / "checkpoints", "sweeps", PARENT, uri)
    best = run_in(tmp_path / "checkpoints", phase, BEST, uri, use=use[3:] if phase == "phase2" else [])
    retrain = retrain_command(best, 2)
    found = {"trial": 1, "run_id": BEST, "directory": best.directory, "objective": 1e-5, "at_step": 80, "command": retrain}
    outcome = SweepOutcome(PARENT, parent.directory, 8, 1, 6, 0, 1, found | {"settings": {"a.b": 0.1}})
    text = sweep_summary(outcome, sweep, tmp_path)
    said, _, after = text.partition("\n\nnext:\n")
    assert said.splitlines()[1:] == [
        f"sweep      {PARENT}",
        f"directory  {parent.directory}",
        "trials     8: 1 finished, 6 stopped early, 1 not finished",
        f"best       trial 1, run {BEST}: val/loss 1.0000e-05 at step 80",
        "             a.b = 0.1",
    ]
    resume, *commands, pages = [shlex.split(line.removeprefix("  python -m raytrain2p.")) for line in after.splitlines()]
    assert resume == ["tune", "--resume", parent.directory]
    assert commands == [use, shlex.split(retrain.removeprefix("python -m raytrain2p.")), ["runs", "show", BEST[:8]]]
    assert pages == ["mlflow", "ui", "--backend-store-uri", uri]


def test_a_sweep_without_a_best_run_ends_with_the_pages_alone(tmp_path: Path) -> None:
    sweep = load_sweep(None, ["tracking.uri=http://me:hunter2@server"])
    text = sweep_summary(SweepOutcome(PARENT, str(tmp_path), 2, 0, 0, 2, 0, None), sweep, tmp_path)
    assert text.splitlines()[3:] == ["trials     2: 2 failed", "", "next:", "  http://me:***@server"]
