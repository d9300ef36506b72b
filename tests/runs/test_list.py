"""`runs list`: what is known of each run, from its directory or from MLflow alone; conditions and order."""

import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from raytrain2p.config import Settings
from raytrain2p.runs import __main__ as runs
from raytrain2p.runs.output import human_age, human_bytes
from raytrain2p.runs.summary import order, summary_of
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.metrics_file import MetricPoint, MetricsFile, read_summary, summarize, write_summary
from raytrain2p.tracking.mlflow_store import client_of
from raytrain2p.tracking.run import SWEEP_TAG, Run
from tests.runs.made import printed, sent, trained
from tests.tracking.stores import NOBODY, settings_in


@pytest.fixture
def three(settings: Settings, tmp_path: Path) -> list[Run]:
    """A finished run, a failed trial with another learning rate, and one without a process."""
    fast = settings_in(tmp_path, "training.learning_rate=0.01")
    first, second = trained(settings, "a", [3.0, 2.0]), trained(fast, "b", [3.0, 2.5, 2.75], "FAILED")
    second.add_tags({SWEEP_TAG: "0" * 32, "keep": "true", "note": "\x1b[31m"})
    return [first, second, trained(settings, "c", [4.0], None)]


def listed(three: list[Run], capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = printed(three[0].path.parent.parent, capsys, "list", *words)
    return found


def test_each_run_is_listed_with_what_is_known_of_it(three: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(three, capsys)
    assert [one["run_id"] for one in found] == [run.run_id for run in three]
    assert [one["status"] for one in found] == ["FINISHED", "FAILED", "ORPHANED"]
    assert [one["steps"] for one in found] == [2, 3, 1]
    assert [one["best"] for one in found] == [2.0, 2.5, 4.0]
    assert [one["metrics"] for one in found][1] == {"val/loss": 2.75, "train_loss": 2.75}
    assert [one["sweep"] for one in found] == [None, "0" * 32, None]
    assert all(int(str(one["bytes"])) > 1000 for one in found)


def test_the_table_has_a_line_for_each_and_nothing_in_it_controls_the_terminal(
    three: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs.main(["list", f"output.root={three[0].path.parent.parent}"]) == 0
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["run", "phase", "status", "age", "steps", "metric", "best", "size", "tags"]
    assert [line.split()[0] for line in lines] == [run.run_id[:8] for run in three]
    assert r"keep note=\x1b[31m" in lines[1]


@pytest.mark.parametrize(
    ("words", "fitting"),
    [
        (("--status", "finished"), "a"),
        (("--status", "ORPHANED"), "c"),
        (("--phase", "1"), ""),
        (("--where", "val/loss<2.1"), "a"),
        (("--where", "val/loss<2.8", "--where", "steps>=3"), "b"),
        (("--where", "training.learning_rate=1e-2"), "b"),
        (("--where", "keep=true"), "b"),
        (("--where", "no/such>0"), ""),
        (("--where", "val/loss<9,9"), ""),
        (("--sort", "best"), "abc"),
        (("--sort", "best", "--reverse"), "cba"),
        (("--sort", "note"), "bac"),
        (("--sort", "size", "--reverse"), "bac"),
        (("--sort", "training.learning_rate"), "acb"),
        (("--where", "age<1h", "--where", "keep=TRUE"), "b"),
        (("--where", "age>2d"), ""),
    ],
)
def test_runs_are_chosen_and_sorted(three: list[Run], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], fitting: str) -> None:
    assert "".join(str(one["launch_id"]) for one in listed(three, capsys, *words)) == fitting


def test_a_condition_that_is_none_is_refused(three: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.main(["list", f"output.root={three[0].path.parent.parent}", "--where", "val/loss"]) == 2
    assert "--where val/loss\n    is not a condition" in capsys.readouterr().err
    assert runs.main(["list", f"output.root={three[0].path.parent.parent}", "--where", "age<7days"]) == 2
    assert "7days is not an age" in capsys.readouterr().err
    assert runs.main(["show", f"output.root={three[0].path.parent.parent}", "~nobody here"]) == 2
    assert "the name of a user that there is not" in capsys.readouterr().err


def test_a_damaged_run_is_a_line_and_the_others_are_listed(three: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    three[1].files.status.write_text("{")
    assert runs.main(["list", "--json", f"output.root={three[0].path.parent.parent}"]) == 1
    captured = capsys.readouterr()
    assert [one["launch_id"] for one in json.loads(captured.out)] == ["a", "c"]
    assert captured.err.count(str(three[1].files.status)) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("show", "latest"),
        ("latest", "--phase", "2"),
        ("find", "--no-mlflow"),
        ("tree", "--no-mlflow"),
    ],
)
def test_mlflow_is_not_imported(three: list[Run], words: tuple[str, ...]) -> None:
    code = "import sys; from raytrain2p.runs.__main__ import main; main(); sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    root = f"output.root={three[0].path.parent.parent}"
    done = subprocess.run([sys.executable, "-c", code, *words, root], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_name_that_no_run_has_is_reported(three: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"output.root={three[0].path.parent.parent}", "--sort", "val/los", "--where", "val/loss<9", "--where", "steps>0"]
    assert runs.main(["list", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == "raytrain2p: no run has `val/los`, be it a metric, a setting or a tag\n"
    assert len(captured.out.splitlines()) == 4


@pytest.mark.parametrize("columns", [70, 80, 120])
def test_each_run_is_one_line_of_a_narrow_terminal(three: list[Run], columns: int) -> None:
    three[1].add_tags({"note": "a long remark " * 20})
    code = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-m", "raytrain2p.runs", "list", f"output.root={three[0].path.parent.parent}"]
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", code, *command], env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True
    )
    lines = re.sub(r"\x1b\[\d*m", "", done.stdout.decode()).splitlines()
    assert len(lines) == 4, lines
    assert all(len(line.rstrip()) <= columns for line in lines)
    assert lines[2].rstrip().endswith("…") == (columns > 70)  # less leaves no room for tags


# from MLflow


def test_mlflow_lists_the_runs_whose_directories_are_not_here(
    settings: Settings, three: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    for run in three:
        sent(run)
    client_of(settings.tracking.uri).delete_run(three[2].run_id)
    root, uri = three[0].path.parent.parent, f"tracking.uri={settings.tracking.uri}"
    root.rename(root.with_name("gone"))
    found = printed(root, capsys, "list", "--mlflow", uri)
    assert [one["run_id"] for one in found] == [run.run_id for run in three[:2]]
    assert [(one["phase"], one["status"], one["steps"], one["sweep"]) for one in found] == [
        ("phase2", "FINISHED", 2, None),
        ("phase2", "FAILED", 3, "0" * 32),
    ]
    assert [one["metrics"]["val/loss"] for one in found] == [2.0, 2.75]
    assert [one["launch_id"] for one in printed(root, capsys, "list", uri, "--where", "training.learning_rate=0.01")] == ["b"]
    assert [one["launch_id"] for one in printed(root, capsys, "list", uri, "latest")] == ["a"]
    assert runs.main(["list", uri, f"output.root={root}"]) == 0  # without directories, MLflow is asked, and a line reports it
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [
        f"raytrain2p: output.root={root} has no runs; these are the ones that MLflow has, {settings.tracking.uri}"
    ]
    heading, first, _ = captured.out.splitlines()
    assert heading.split() == ["run", "phase", "status", "age", "steps", "metric", "last", "tags"]
    assert first.split()[-2:] == ["train_loss", "2"]


@pytest.mark.parametrize(("words", "line"), [((), "has no runs"), (("--mlflow",), "MLflow is away")])
def test_without_directories_and_mlflow_there_is_nothing_to_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    assert runs.main(["list", *words, f"output.root={tmp_path}", f"tracking.uri={NOBODY}"]) == 2
    assert line in capsys.readouterr().err


def test_the_kept_summary_of_metrics_counts_until_they_grow(tmp_path: Path) -> None:
    metrics, kept = tmp_path / "metrics.jsonl", tmp_path / "metrics_summary.json"
    MetricsFile(metrics).append([MetricPoint("loss", value, step, 1.7e9) for step, value in enumerate([2.0, 1.0, float("nan")], 1)])
    write_summary(metrics, kept)
    summary = read_summary(metrics, kept)
    assert summary == summarize(metrics)
    assert summary["loss"] == {
        "last": 1.0,
        "step": 3,
        "lowest": 1.0,
        "lowest_step": 2,
        "highest": 2.0,
        "highest_step": 1,
        "points": 3,
    }
    write_json(kept, {"bytes": metrics.stat().st_size, "metrics": {}})
    assert read_summary(metrics, kept) == {}
    MetricsFile(metrics).append([MetricPoint("loss", 0.5, 4, 1.7e9)])
    assert read_summary(metrics, kept)["loss"]["lowest"] == 0.5


def test_sizes_and_ages_are_short() -> None:
    assert [human_bytes(count) for count in (0, 999, 24_783_449, 999_600_000, None)] == ["0 B", "999 B", "24.8 MB", "1 GB", ""]
    assert human_age(time.strftime("%Y%m%d_%H%M%S", time.localtime(time.time() - 3 * 86400 - 60))) == "3 d"
    assert human_age("20261399_000000") == human_age("29990101_000000") == human_age("today") == ""
    assert human_age(time.strftime("%Y%m%d_%H%M%S", time.localtime(time.time() + 3600))) == "0 s"


def test_a_value_that_is_not_a_number_is_sorted_last(three: list[Run]) -> None:
    values = zip(three, (2.0, math.nan, 1.0), strict=True)  # as MLflow has them of a run that diverged
    known = [replace(summary_of(run, str(run.path.parent.parent)), metrics={"val/loss": value}) for run, value in values]
    first, diverged, best = known
    assert order(known, "val/loss", reverse=False) == [best, first, diverged]
    assert order(known, "val/loss", reverse=True) == [first, best, diverged]
