"""Runs for the tests of verbs: made in process, with real files, and sent to a real store where a test asks for that."""

import json
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.config import Settings
from raytrain2p.runs import __main__ as runs
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import Run
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.tracking.stores import create


def trained(
    settings: Settings,
    launch_id: str,
    losses: list[float],
    status: str | None = "FINISHED",
    phase: str = "phase2",
    facts: dict[str, Any] | None = None,
) -> Run:
    """A run with these losses, a best checkpoint, and a status.

    Args:
        facts: digests of its inputs.
    """
    run = create(settings, launch_id, phase)
    describe_run(run, resolved_config(settings, {}), "command", facts or {}, page=lambda run, command: command)
    MetricsFile(run.files.metrics).append([MetricPoint("val/loss", loss, step, 1.7e9) for step, loss in enumerate(losses, 1)])
    MetricsFile(run.files.metrics).append([MetricPoint("train_loss", loss, step, 1.7e9) for step, loss in enumerate(losses, 1)])
    run.checkpoints.mkdir(exist_ok=True)
    (run.checkpoints / f"best-epoch=00-train_loss={min(losses):.4f}.ckpt").write_bytes(bytes(1000))
    if status is not None:
        run.files.write_status(status)
    return run


def sent(run: Run) -> Run:
    """The run, after MLflow got everything of it."""
    MlflowSync(run, run.tracking_uri).send()
    return run


def printed(root: str | Path, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    """What `runs VERB --json` prints, which ends with this exit code."""
    assert runs.main([*words, "--json", f"output.root={root}"]) == code
    return json.loads(capsys.readouterr().out)
