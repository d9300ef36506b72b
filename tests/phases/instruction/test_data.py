"""What the user is told of the test records of phase 2."""

from typing import cast

import pytest

from raytrain2p.config import InstructionSettings, load_settings
from raytrain2p.data.records import Record
from raytrain2p.phases.instruction.data import evaluation_notes


@pytest.mark.parametrize(
    ("most", "notes"),
    [
        ("null", []),
        ("3", []),
        ("2", ["evaluation.max_records=2 of each task: 3 of 4 of one are evaluated"]),
        ("1", ["evaluation.max_records=1 of each task: 2 of 4 of one, 1 of 2 of two are evaluated"]),
    ],
)
def test_records_that_are_not_evaluated_are_counted(most: str, notes: list[str]) -> None:
    settings = load_settings(2, None, [f"evaluation.max_records={most}", "data.test={one: a.jsonl, two: b.jsonl}"])
    splits = {"one": [Record("a", (), "x")] * 3 + [Record("a", (), "y")], "two": [Record("b", ())] * 2, "val": [Record("c", ())] * 9}
    assert evaluation_notes(cast(InstructionSettings, settings), splits) == notes
