"""Contestants take turns, and each step is compared with the same one of another."""

import time
from pathlib import Path

import pytest

from benchmarks.turns import Contestant, Ended, Ratio, paired, python, take_turns, written_steps

LOOP = """
import json, sys, time
with open(sys.argv[1] + "/steps0", "a", buffering=1) as stream:
    for number in range(1, 10_000):
        time.sleep(float(sys.argv[2]))
        stream.write(json.dumps([time.time(), 1 / number, 0]) + "\\n")
        if len(sys.argv) > 3 and number == int(sys.argv[3]):
            sys.exit("broken")
"""


def sleeper(folder: Path, name: str, *arguments: str) -> Contestant:
    out = folder / name
    out.mkdir()
    return Contestant(name, python("-c", LOOP, str(out), *arguments), out / "log", lambda: written_steps(out, 1))


def test_a_suspended_contestant_makes_no_steps_and_its_turns_alone_are_compared(tmp_path: Path) -> None:
    contestants = [sleeper(tmp_path, "fast", "0.1"), sleeper(tmp_path, "slow", "0.2")]
    try:
        for one in contestants:
            one.wait_for_step(3, 30)
            one.each("suspend")
        before = len(contestants[0].steps())
        time.sleep(0.3)
        assert len(contestants[0].steps()) == before
        assert not take_turns(contestants, 2, 3, lambda line: None)
        fast, slow = (one.durations() for one in contestants)
        assert len(fast) >= 3
        assert max(fast.values()) < 0.3, "no step holds a suspension"
        ratio = paired(slow, fast)
        assert 1.3 < ratio.median < 3
        assert contestants[0].losses()[2] == 0.5
    finally:
        for one in contestants:
            one.end()
    assert all(one.process.poll() is not None for one in contestants)


def test_a_contestant_that_fails_is_left_out_and_says_why(tmp_path: Path) -> None:
    contestants = [sleeper(tmp_path, "good", "0.02"), sleeper(tmp_path, "bad", "0.02", "3")]
    said = list[str]()
    try:
        failed = take_turns(contestants, 2, 2, said.append)
        assert list(failed) == ["bad"]
        assert "broken" in failed["bad"]
        assert said[-1] == "turn 2 of 2"
        with pytest.raises(Ended, match="ended with 1"):
            contestants[1].wait_until_ended(10)
    finally:
        for one in contestants:
            one.end()


def test_the_steps_of_several_workers_are_their_sum_and_the_last_to_end(tmp_path: Path) -> None:
    (tmp_path / "steps0").write_text("[10.0, 1.0, 1]\n[20.0, 2.0, 1]\n[30")
    (tmp_path / "steps1").write_text("[11.0, 0.5, 2]\n")
    assert written_steps(tmp_path, 2) == {1: (11.0, 1.5)}
    assert written_steps(tmp_path, 3) == {}


def test_a_ratio_has_the_median_and_the_quartiles() -> None:
    assert str(Ratio.of([1.0, 2.0, 3.0, 4.0, 5.0])) == "3.00 (2.00 to 4.00)"
    assert Ratio.of([2.0]).count == 1
