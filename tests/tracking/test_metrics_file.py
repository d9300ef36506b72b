"""metrics.jsonl: each point once, after any kill and any number of resumes."""

import json
import math
from pathlib import Path

import pytest

from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile, read_points, trim_torn_line
from raytrain2p.tracking.plots import read_metrics
from tests.tracking.stores import points


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def places(path: Path) -> list[tuple[str, int]]:
    return [(point.name, point.step) for point in read_points(path)]


def test_points_are_read_as_they_were_written_with_times_to_a_millisecond(path: Path) -> None:
    MetricsFile(path).append([MetricPoint("val/loss", 0.1, 7, 1_700_000_000.12345)])
    assert list(read_points(path)) == [MetricPoint("val/loss", 0.1, 7, 1_700_000_000.123)]
    assert json.loads(path.read_text()) == {"step": 7, "name": "val/loss", "value": 0.1, "time": 1_700_000_000.123}


def test_points_are_appended_in_their_order(path: Path) -> None:
    metrics_file = MetricsFile(path)
    metrics_file.append(points(1, 2))
    metrics_file.append(points(3))
    assert places(path) == [("train_loss", 1), ("train_loss", 2), ("train_loss", 3)]


def test_no_points_make_no_file(path: Path) -> None:
    MetricsFile(path).append([])
    assert not path.exists()
    assert list(read_points(path)) == []


def test_repeated_steps_keep_their_first_values(path: Path) -> None:
    MetricsFile(path).append(points(1, 2, 3, 4))
    again = MetricsFile(path, 2)
    again.append([MetricPoint("train_loss", 99.0, step, 1_800_000_000.0) for step in (3, 4, 5)])
    assert [(point.step, point.value) for point in read_points(path)] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0), (5, 99.0)]


def test_another_metric_of_a_written_step_is_written(path: Path) -> None:
    MetricsFile(path).append(points(1, 2))
    MetricsFile(path, 1).append([*points(2), *points(2, name="learning_rate")])
    assert places(path) == [("train_loss", 1), ("train_loss", 2), ("learning_rate", 2)]


def test_points_of_the_step_that_a_run_resumes_from_are_not_written_again(path: Path) -> None:
    MetricsFile(path).append(points(4, name="val/loss"))
    MetricsFile(path, 4).append(points(4, name="val/loss"))
    assert places(path) == [("val/loss", 4)]


def test_resuming_twice_from_one_step_writes_each_point_once(path: Path) -> None:
    for last in (5, 7, 6):
        MetricsFile(path, 3 if path.exists() else 0).append(points(*range(4 if path.exists() else 1, last + 1)))
    assert places(path) == [("train_loss", step) for step in range(1, 8)]


def test_only_steps_from_the_resumed_one_on_are_kept_in_memory(path: Path) -> None:
    MetricsFile(path).append(points(*range(1, 100)))
    assert MetricsFile(path, 97).written == {("train_loss", 97), ("train_loss", 98), ("train_loss", 99)}


@pytest.mark.parametrize("torn", [b'{"step": 3, "na', b"{", b'{"step": 3, "name": "train_loss", "value": 1.5, "time": 1.0}'])
def test_an_incomplete_last_line_is_cut_off_and_its_point_is_written_again(path: Path, torn: bytes) -> None:
    MetricsFile(path).append(points(1, 2))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    metrics_file = MetricsFile(path, 2)
    assert path.read_bytes() == whole
    metrics_file.append(points(3))
    assert [(point.step, point.value) for point in read_points(path)] == [(1, 0.5), (2, 1.0), (3, 1.5)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b"torn", b""),
        (b"whole\n", b"whole\n"),
        (b"whole\ntorn", b"whole\n"),
        (b"whole\n" + b"x" * 4095, b"whole\n"),
        (b"whole\n" + b"x" * 4096, b"whole\n"),
        (b"whole\n" + b"x" * 10_000, b"whole\n"),
        (b"x" * 10_000, b""),
        (b"y" * 10_000 + b"\n", b"y" * 10_000 + b"\n"),
    ],
    ids=range(9),
)
def test_what_follows_the_last_line_end_is_cut_off(path: Path, before: bytes, after: bytes) -> None:
    path.write_bytes(before)
    trim_torn_line(path)
    assert path.read_bytes() == after


def test_trimming_a_missing_file_does_not_make_it(path: Path) -> None:
    trim_torn_line(path)
    assert not path.exists()


def test_nan_and_infinity_are_kept(path: Path) -> None:
    MetricsFile(path).append([MetricPoint("train_loss", value, step, 1.0) for step, value in enumerate([math.nan, math.inf, -math.inf], 1)])
    not_a_number, *infinite = [point.value for point in read_points(path)]
    assert math.isnan(not_a_number)
    assert infinite == [math.inf, -math.inf]
    assert read_metrics(path)["train_loss"][0].tolist() == [1, 2, 3]
    MetricsFile(path, 1).append([MetricPoint("train_loss", math.nan, 1, 1.0)])
    assert len(places(path)) == 3


def test_a_line_that_is_still_being_written_is_not_read(path: Path) -> None:
    MetricsFile(path).append(points(1))
    with path.open("ab") as stream:
        stream.write(b'{"step": 2, "name": "train_loss", "value": 1.0, "time": 1.0}')
    assert places(path) == [("train_loss", 1)]
    with path.open("ab") as stream:
        stream.write(b"\n")
    assert places(path) == [("train_loss", 1), ("train_loss", 2)]


def test_a_full_disk_is_an_error_and_keeps_earlier_points(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    MetricsFile(path).append(points(1, 2))
    (small_disk / "somebody elses").write_bytes(bytes(1024 * 1024 - 8192))
    with pytest.raises(OSError, match="No space left"):
        MetricsFile(path, 2).append(points(*range(3, 1000)))
    (small_disk / "somebody elses").unlink()
    MetricsFile(path, 2).append(points(*range(3, 1000)))
    assert places(path) == [("train_loss", step) for step in range(1, 1000)]


def test_after_a_full_disk_the_next_point_is_on_a_line_of_its_own(small_disk: Path) -> None:
    path = small_disk / "metrics.jsonl"
    metrics_file = MetricsFile(path)
    (small_disk / "somebody elses").write_bytes(bytes(1024 * 1024 - 8192))
    with pytest.raises(OSError, match="No space left"):
        metrics_file.append(points(*range(1, 1000)))
    (small_disk / "somebody elses").unlink()
    whole = len(places(path))
    metrics_file.append(points(1000))
    assert places(path) == [("train_loss", step) for step in [*range(1, whole + 1), 1000]]


def test_damaged_lines_are_left_out_and_counted(path: Path) -> None:
    MetricsFile(path).append(points(1, 2))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bytes(50) + b"\n" + second[:20] + b"\n[1]\n" + second)
    again = MetricsFile(path)
    assert len(again.damaged_lines) == 3
    again.append(points(2, 3))
    assert places(path) == [("train_loss", 1), ("train_loss", 2), ("train_loss", 3)]
    assert read_metrics(path)["train_loss"][0].tolist() == [1, 2, 3]
