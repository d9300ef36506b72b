"""What a running sweep shows: the table in a terminal, and the lines elsewhere."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from raytrain2p.config.console import Console
from raytrain2p.sweep.live_table import LiveTable
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.results import EARLY, KILLED, Trial, TrialResult

RATE = "training.learning_rate"
RESULTS = [
    TrialResult(Trial(0, {RATE: 0.001}, "s-0"), EARLY, None, ((20, 3.4121),), 20, "asha at step 20", (), {RATE: 0.001}),
    TrialResult(Trial(1, {RATE: 0.00206}, "s-1"), "running", None, ((20, 2.9), (40, 2.5)), 57, "", (), {RATE: 0.00206}),
    TrialResult(Trial(2, {RATE: 0.1}, "s-2"), KILLED, values={RATE: 0.1}),
]


class Records:
    """Of three trials."""

    def results(self) -> list[TrialResult]:
        return RESULTS


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def table(tmp_path: Path, stream: io.StringIO) -> LiveTable:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"sweep: {{num_trials: 3, space: {{{RATE}: {{loguniform: [1e-4, 0.1]}}}}}}\n")
    trial_records: Any = Records()
    channel: Any = None
    made = LiveTable(trial_records, load_sweep(path), channel, Console(stream))
    made.progress[1] = "epoch 0  step 57/80  loss 0.961  8.9 samples/s  0:01:29 left"
    made.changed(1, "running")
    return made


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_a_line_for_each_trial_however_narrow_the_terminal(table: LiveTable, width: int) -> None:
    drawn = RichConsole(file=io.StringIO(), width=width, record=True)
    drawn.print(table.table(RESULTS))
    heading, *lines = [line.rstrip() for line in drawn.export_text().splitlines()]
    assert heading.split()[:3] == ["trial", "state", "learning_rate"]
    assert len(lines) == len(RESULTS), "a cell that does not fit is cut"
    assert lines[0].split() == ["0", "stopped", "early", "0.001", "20", "3.4121"]
    assert lines[1].startswith("1 ")
    assert "2.5000" in lines[1], "its best report"
    assert "epoch 0" in lines[1]
    assert lines[2].split() == ["2", "waiting", "0.1", "0"], "it is tried again"


def test_elsewhere_each_change_of_state_is_a_line_and_is_printed_once(table: LiveTable, stream: io.StringIO) -> None:
    table._print(RESULTS, all_trials=False)
    said = stream.getvalue().splitlines()
    assert [line.split("  ")[:2] for line in said] == [["trial 0", EARLY], ["trial 1", "running"], ["trial 2", "waiting"]]
    assert "best so far: trial 1, 2.5" in said[0]
    table._print(RESULTS, all_trials=False)
    assert stream.getvalue().splitlines() == said


def test_no_cell_is_markup_or_controls_the_terminal(table: LiveTable) -> None:
    table.sweep = dataclasses.replace(table.sweep, options=table.sweep.options.model_copy(update={"metric": "test_[/x]/\x1b[31m"}))
    table.settings = ["data.train"]
    table.progress[1] = "[/INST]\x1b[0m"
    drawn = RichConsole(file=io.StringIO(), width=200, record=True)
    drawn.print(table.table([dataclasses.replace(RESULTS[1], values={"data.train": "[/INST]\x1b]0;title\x07"})]))
    text = drawn.export_text(styles=False)
    assert "\x1b" not in text
    assert text.count("[/INST]\\x1b") == 2
    assert "test_[/x]/\\x1b[31m" in text
