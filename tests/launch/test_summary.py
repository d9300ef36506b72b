"""The lines at the end of a launch."""

import io
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from raytrain2p.config.console import Console
from raytrain2p.config.phases import PHASES, PHASES_BY_NAME
from raytrain2p.interrupts import StoppedError
from raytrain2p.launch.summary import failed_text, print_summary, stopped_line
from raytrain2p.tracking.run import SWEEP_TAG, Run
from raytrain2p.worker.job import Outcome

METRICS = {"test_a/exact_match/[bold]task\x1b[31m": 0.5, "test_b/loss": 2.0, "val/loss": 0.00001, "train_loss": 1.25}
ASKED = ["--image", "/data/it's here/1.png", "What's in the $HOME? `ls`; \x1b[31m"]
OF_PHASE = {1: [], 2: ASKED}
Finished = Callable[..., Run]


@pytest.fixture
def finished(tmp_path: Path) -> Finished:
    """Makes finished runs on disk, each later than the one before."""
    made: list[Run] = []

    def make(digit: str, phase: int = 2, root: str = "checkpoints", uri: str = "", status: str = "FINISHED", **tags: str) -> Run:
        name, uri = PHASES[phase].name, uri or f"sqlite:///{tmp_path}/mlflow.db"
        directory = tmp_path / root / name / f"{digit * 32}_20261126_120000"
        run = Run(digit * 32, str(directory), "experiment", "20261126_120000", f"launch-{digit}", name, uri)
        (directory / "plots").mkdir(parents=True)
        made.append(run)
        run.files.write_record(asdict(run) | {"sequence": len(made), "tags": tags, "use": OF_PHASE[phase]})
        run.files.write_status(status)
        return run

    return make


def printed(run: Run, base: Path) -> list[str]:
    """The lines of a run's summary, in a command that is typed in `base`."""
    phase, stream = PHASES_BY_NAME[run.phase], io.StringIO()
    outcome = Outcome(run.run_id, run.directory, None, None, str(run.files.artifact(phase)), METRICS)
    print_summary(outcome, phase.number, run.tracking_uri, Console(stream), base)
    return stream.getvalue().splitlines()


def commands(lines: list[str]) -> list[list[str]]:
    """The words of each command below `next:`, as a shell reads them."""
    return [shlex.split(line) for line in lines[lines.index("next:") + 1 :]]


def test_the_summary_has_the_run_and_what_is_in_it_and_its_metrics_by_split(finished: Finished, tmp_path: Path) -> None:
    run = finished("a")
    for name in ("model.pt", "plots/training_curve.png"):
        (run.path / name).write_bytes(b"")
    lines = [line.split() for line in printed(run, tmp_path)]
    assert lines[1:4] == [["run", run.run_id], ["directory", run.directory], ["files", "model.pt,", "plots/training_curve.png"]]
    assert ["metric", "train", "val", "test_a", "test_b"] in lines
    assert ["loss", "1.2500", "1.0000e-05", "2.0000"] in lines, "losses of all splits in one row, and a small one is not 0.0000"
    assert ["exact_match/[bold]task\\x1b[31m", "50.00", "%"] in lines


def test_the_next_commands_have_the_runs_id_and_the_users_own_question(finished: Finished, tmp_path: Path) -> None:
    lines = printed(finished("a"), tmp_path)
    assert "\x1b" not in "".join(lines)
    assert commands(lines) == [
        ["python", "-m", "raytrain2p.predict", "--run", "a" * 8, *ASKED[:2], ASKED[2].replace("\x1b", "\\x1b")],
        ["python", "-m", "raytrain2p.runs", "show", "a" * 8],
        ["mlflow", "ui", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"],
    ]


def test_after_phase_1_phase_2_is_next(finished: Finished, tmp_path: Path) -> None:
    first = commands(printed(finished("a", phase=1), tmp_path))[0]
    assert first == ["python", "-m", "raytrain2p.train", "--phase", "2", "--aligner", "a" * 8]


def test_what_commands_do_not_find_by_themselves_is_given_without_passwords(finished: Finished, tmp_path: Path) -> None:
    root, uri = f"{tmp_path}/other place", "http://me:***@server:5000"
    where = [f"output.root={root}", f"tracking.uri={uri}"]
    train, show, pages = commands(printed(finished("a", 1, "other place", "http://me:hunter2@server:5000"), tmp_path))
    assert (train[-2:], show[-2:]) == (where, where)
    assert pages == [uri], "a server has pages of its own"
    assert commands(printed(finished("b", 2, "other place"), tmp_path))[0][3:7] == ["--run", "b" * 8, "--root", root]


def test_a_run_is_compared_with_the_finished_one_of_its_phase_before_it(finished: Finished, tmp_path: Path) -> None:
    finished("b"), finished("c", 1), finished("d", status="FAILED"), finished("e", **{SWEEP_TAG: "f" * 32})
    run = finished("a")
    finished("0")
    assert commands(printed(run, tmp_path))[1][3:] == ["compare", "b" * 8, "a" * 8]


def test_a_run_of_an_earlier_version_leaves_the_question_to_the_user(finished: Finished, tmp_path: Path) -> None:
    run = finished("a")
    run.files.write_record({key: value for key, value in json.loads(run.files.record.read_text()).items() if key != "use"})
    assert commands(printed(run, tmp_path))[0][-3:] == ["--run", "a" * 8, "QUESTION"]


def test_a_failed_launch_and_a_stopped_one_name_the_run_and_how_to_resume_it(finished: Finished, tmp_path: Path) -> None:
    run, stopped = finished("a", root="it's here", uri="postgresql://me:***@db/mlflow"), StoppedError(15)
    stopped.run = run
    for text in (failed_text("the cause", run, tmp_path, "--phase", "2"), stopped_line(stopped, "train", "--phase", "2")):
        last = text.splitlines()[-1]
        assert f"run {run.run_id} is in {run.directory}; " in last
        resume = ["python", "-m", "raytrain2p.train", "--phase", "2", "--resume", run.directory]
        assert shlex.split(last.partition("resume it with: ")[2]) == [*resume, f"tracking.uri={run.tracking_uri}"], "passwords are not kept"
    assert failed_text("the cause", None, tmp_path) == "raytrain2p: training failed\nthe cause"


def test_a_run_that_diverged_is_not_offered_for_a_resume(finished: Finished, tmp_path: Path) -> None:
    run = finished("a")
    run.files.write_status("FAILED", "4 steps in a row were not finite")
    last = failed_text("4 steps in a row were not finite", run, tmp_path, "--phase", "2").splitlines()[-1]
    assert last == f"run {run.run_id} is in {run.directory}; see it with: python -m raytrain2p.runs show aaaaaaaa"
