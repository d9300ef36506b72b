"""Results become a page and a plot; a part that fails does not end the others."""

from pathlib import Path

import pytest

from benchmarks.__main__ import PARTS, run
from benchmarks.case import Case
from benchmarks.checkpoints import EVERY, result
from benchmarks.counts import messages
from benchmarks.options import Options
from benchmarks.report import Bar, Found, Table, draw, keep, load, machine, page
from benchmarks.turns import Ratio


def test_every_part_can_be_measured() -> None:
    for name in PARTS:
        module = __import__(f"benchmarks.{name}", fromlist=["measure"])
        assert callable(module.measure), name


def test_the_page_has_what_was_found_what_failed_and_the_machine(tmp_path: Path) -> None:
    ratio = Ratio.of([1.5, 2.0, 2.5])
    good = Found([Table("A title", ["who", "ratio"], [["others", str(ratio)]], ["A note."])], [Bar("others", ratio, "step")])
    keep(tmp_path / "results.json", "step", good, 12.4, short=False)
    results = keep(tmp_path / "results.json", "sweeps", Found(errors=["Ended: it\nbroke"]), 3.0, short=True)
    assert load(tmp_path / "results.json") == results
    written = page(results, PARTS, "benchmarks.png")
    assert "| others | 2.00 (1.75 to 2.25) |" in written
    assert "    Ended: it\n    broke" in written
    assert "short form" in written.split("## ")[2]
    assert "short form" not in written.split("## ")[1]
    assert f"processor {machine()['processor']}" in written
    draw(results, tmp_path / "benchmarks.png")
    assert (tmp_path / "benchmarks.png").stat().st_size > 5_000


def test_a_part_that_raises_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: Options) -> Found:
        raise OSError("no disk")

    monkeypatch.setattr("benchmarks.counts.measure", broken)
    assert run("counts", Options(tmp_path, Case(str(tmp_path)), True)).errors == ["OSError: no disk"]


def test_what_a_save_adds_is_told_from_a_step() -> None:
    ends, now = list[float](), 0.0
    for step in range(1, 3 * EVERY + 1):
        now += 1.0 + (0.25 if step in (EVERY + 1, 2 * EVERY + 1) else 0.0) + (0.05 if step in (EVERY + 2, 2 * EVERY + 2) else 0.0)
        ends.append(now)
    found = result(ends, [0.25, 0.25], 1000, 2.0, 3.0)
    assert found["step"] == pytest.approx(1.0)
    assert found["extra"] == pytest.approx([0.3, 0.3])


def test_messages_of_a_run_are_counted() -> None:
    writes, shown, points = messages()
    assert (writes, shown) == (11, 10)  # every 10 of 100 steps, and the epoch's mean
    assert points == 3 * 100 + 3 * 10 + 1  # of steps, of writes, of the epoch
