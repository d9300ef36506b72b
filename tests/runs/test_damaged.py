"""Damaged and foreign run directories: each is reported in a line, and every other run is looked at all the same."""

import json
import re
from pathlib import Path
from random import Random

import pytest

from raytrain2p.config import Settings
from raytrain2p.runs import __main__ as runs
from raytrain2p.storage.files import read_json
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run import Run, launch_record
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from tests.damage import DAMAGES
from tests.tracking.stores import create, history, mlflow_run, note

NOT_READABLE = ("empty", "zeros", "not_utf8", "deep", "a_directory")  # whatever the file is


def left(settings: Settings, launch_id: str) -> Run:
    """A run whose process has ended, with two points that were not sent."""
    run = create(settings, launch_id)
    describe_run(run, resolved_config(settings, {}), "command", {})
    note(run, 1, 2)
    run.files.write_status("FAILED")
    return run


@pytest.fixture
def both(settings: Settings) -> tuple[Run, Run]:
    """A run to be damaged, and another one."""
    return left(settings, "launch-1"), left(settings, "launch-2")


def said(settings: Settings, capsys: pytest.CaptureFixture[str], *words: str, code: int = 1) -> list[str]:
    """What `runs VERB` prints; it ends with this exit code."""
    assert runs.main([*words, f"output.root={settings.output.root}"]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out.splitlines() + captured.err.splitlines()


@pytest.mark.parametrize("name", ["run.json", "status.json", "config.json"])
def test_a_damaged_file_is_one_line_and_the_other_run_is_sent(
    settings: Settings, both: tuple[Run, Run], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    bad, good = both
    whole = (bad.path / name).read_bytes()
    for way in NOT_READABLE:  # last a directory
        (bad.path / name).write_bytes(whole)
        DAMAGES[way](bad.path / name, Random(0))
        for verb in ("sync", "reconcile"):
            lines = said(settings, capsys, verb)
            assert len([line for line in lines if f"{bad.path}/{name} " in line and "restore it from a backup" in line]) == 1, (way, lines)
            assert lines[-1] == "1 of 2 runs are complete in MLflow"
    assert mlflow_run(settings, good).info.status == "FAILED"
    assert history(settings, good) == [(1, 0.5), (2, 1.0)]


def test_a_foreign_run_json_is_named_with_what_is_wrong(
    settings: Settings, both: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, _ = both
    whole = read_json(bad.files.record)
    for content, found in (
        ([1], "has a list where an object is required"),
        ({"launch_id": "x"}, "lacks run_id, directory, experiment, timestamp, phase, tracking_uri: another version of raytrain2p wrote it"),
        (whole | {"tags": ["a"]}, "`tags`: Input should be"),
        (whole | {"run_id": "../../etc"}, "is that of run ../../etc"),
        (whole | {"timestamp": 5, "launch_id": "../.."}, "`timestamp`: Input should be"),
        (whole | {"tags": {"a": "\ud800"}}, "is not UTF-8 text"),
        (whole | {"run_id": "\x1b[31mred\nline"}, r"is that of run \x1b[31mred line"),
    ):
        bad.files.record.write_text(json.dumps(content))
        (line,) = [line for line in said(settings, capsys, "sync") if str(bad.files.record) in line]
        assert found in line


def test_a_run_directory_without_a_record_is_named_unless_it_is_empty(
    settings: Settings, both: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, _ = both
    bad.files.record.unlink()
    assert f"{bad.path} has no run.json: an older version made it" in "\n".join(said(settings, capsys, "sync"))
    for path in bad.path.rglob("*"):
        if path.is_file():
            path.unlink()
    assert said(settings, capsys, "sync", code=0)[-1] == "1 of 1 runs are complete in MLflow"


def test_a_damaged_launch_record_leaves_its_run_alone_and_is_named(
    settings: Settings, both: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = both
    path = launch_record(settings.output.root, bad.launch_id)
    path.write_bytes(bytes(200))
    MlflowSync(good, settings.tracking.uri).send()
    bad.files.status.unlink()  # MLflow has it as RUNNING
    bad.path.rename(bad.path.parent / "elsewhere")
    lines = said(settings, capsys, "reconcile", f"tracking.uri={settings.tracking.uri}", code=0)
    assert [line for line in lines if "left alone" in line and f"{path} has zero bytes alone" in line]
    assert mlflow_run(settings, bad).info.status == "RUNNING"


# metrics.jsonl, and what is known of the points that were sent


def test_damaged_lines_of_points_are_reported_and_the_others_arrive(
    settings: Settings, both: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, good = both
    first, second = bad.files.metrics.read_bytes().splitlines(keepends=True)
    torn = [bytes(60), b'{"step": 2, "name": "tra', b'{"step": "2", "name": 5}', b"[1]", b'{"step": 1e99}', b"\xff" * 9, b"[" * 10_000]
    bad.files.metrics.write_bytes(first + b"\n".join(torn) + b"\n" + second)
    lines = said(settings, capsys, "sync")
    assert [one for one in lines if f"damaged: {bad.files.metrics} has damaged lines, which are left out: {len(torn)}" in one]
    assert history(settings, bad) == history(settings, good) == [(1, 0.5), (2, 1.0)]
    assert said(settings, capsys, "sync", code=0)[-1] == "2 of 2 runs are complete in MLflow"


@pytest.mark.parametrize("lost", [1, 80, None])
def test_a_file_that_is_shorter_than_what_was_sent_is_reported_and_nothing_is_sent_twice(
    settings: Settings, both: tuple[Run, Run], capsys: pytest.CaptureFixture[str], lost: int | None
) -> None:
    bad, _ = both
    said(settings, capsys, "sync", code=0)
    content = bad.files.metrics.read_bytes()
    bad.files.metrics.write_bytes(content[: -lost if lost else 0])
    bad.files.write_status("KILLED")
    lines = said(settings, capsys, "sync")
    count = lost or len(content)
    assert [one for one in lines if f"{bad.files.metrics} has lost {count} bytes that were sent" in one]
    assert history(settings, bad) == [(1, 0.5), (2, 1.0)]
    note(bad, 3)
    assert said(settings, capsys, "sync", code=0)[-1] == "2 of 2 runs are complete in MLflow"
    assert history(settings, bad) == [(1, 0.5), (2, 1.0), (3, 1.5)]


def test_mlflow_is_asked_what_was_sent_if_that_state_is_damaged_or_lost(
    settings: Settings, both: tuple[Run, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    bad, _ = both
    said(settings, capsys, "sync", code=0)
    for way in ("empty", "zeros", "not_utf8", "deep"):
        DAMAGES[way](bad.files.sync_state, Random(0))
        assert [one for one in said(settings, capsys, "sync") if re.search(r"\.mirror\.json .*; MLflow was asked what it has", one)]
    bad.files.sync_state.unlink()
    said(settings, capsys, "sync", code=0)
    assert history(settings, bad) == [(1, 0.5), (2, 1.0)]


# nothing there


@pytest.mark.parametrize("verb", ["sync", "reconcile"])
def test_a_directory_without_runs_is_a_problem_that_names_it(tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main([verb, f"output.root={tmp_path}"]) == 2
    printed = capsys.readouterr().err
    assert f"output.root={tmp_path}\n    has no runs\n    fix: name another: python -m raytrain2p.runs {verb} output.root=DIR" in printed
