"""Finding a run or its artifact again: by path, by run ID or the start of one, or the latest."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

import raytrain2p
from raytrain2p.config import InputError, Settings
from raytrain2p.config.phases import ALIGNMENT, INSTRUCTION, Phase
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.tracking.find import check_in_place, find_artifact, find_run, find_runs, is_alive, run_directories
from raytrain2p.tracking.run import SWEEP_TAG, Run, launch_record
from raytrain2p.tracking.run_directory import RunDirectory
from raytrain2p.worker.job import Outcome
from tests.tracking.stores import create

FIRST, SECOND, THIRD = "a1" * 16, "a1" * 8 + "b2" * 8, "c3" * 16


def make_run(root: Path, run_id: str, timestamp: str, artifact: str | None = "aligner.pt", phase: str = "alignment") -> Path:
    folder = root / phase / f"{run_id}_{timestamp}"
    folder.mkdir(parents=True)
    if artifact is not None:
        (folder / artifact).write_bytes(b"tensors")
    return folder


def find(root: Path, wanted: str, phase: Phase = ALIGNMENT) -> Path:
    return find_artifact(str(root), phase, wanted, "model.aligner")


def message(root: Path, wanted: str) -> str:
    with pytest.raises(InputError) as caught:
        find(root, wanted)
    (problem,) = caught.value.problems
    assert problem.where == f"model.aligner={wanted}"
    return f"{problem.what}\n{problem.fix}"


def test_a_path_of_a_file_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.pt").write_bytes(b"")
    assert find(tmp_path, str(tmp_path / "mine.pt")) == tmp_path / "mine.pt"
    monkeypatch.chdir(tmp_path)
    assert find(tmp_path, "mine.pt") == tmp_path / "mine.pt"


def test_a_path_of_a_run_directory_means_the_artifact_in_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, FIRST, "20260101_120000")
    assert find(tmp_path / "elsewhere", str(run)) == run / "aligner.pt"


@pytest.mark.parametrize("length", [1, 8, 32])
def test_a_run_id_or_its_unambiguous_start_finds_the_run(tmp_path: Path, length: int) -> None:
    make_run(tmp_path, FIRST, "20260101_120000")
    run = make_run(tmp_path, THIRD, "20250101_120000")
    assert find(tmp_path, THIRD[:length]) == run / "aligner.pt"


def test_the_name_of_a_run_directory_finds_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, FIRST, "20260101_120000")
    assert find(tmp_path, run.name) == run / "aligner.pt"


def test_an_ambiguous_start_is_refused_with_the_runs_that_fit(tmp_path: Path) -> None:
    make_run(tmp_path, FIRST, "20260101_120000")
    make_run(tmp_path, SECOND, "20260102_120000")
    make_run(tmp_path, THIRD, "20260103_120000")
    refusal = message(tmp_path, "a1")
    assert "fits 2 runs" in refusal
    assert "more of the run ID" in refusal
    assert find(tmp_path, SECOND[:18]).parent.name.startswith(SECOND)


def test_runs_that_an_ambiguous_start_fits_are_listed_distinctly(tmp_path: Path) -> None:
    make_run(tmp_path, FIRST, "20260101_120000")
    make_run(tmp_path, SECOND, "20260102_120000")
    listed = message(tmp_path, "a1").splitlines()[0].rpartition(": ")[2].split(", ")
    assert len(set(listed)) == 2


def test_a_name_that_fits_no_run_is_refused_with_the_folder_that_was_searched(tmp_path: Path) -> None:
    make_run(tmp_path, FIRST, "20260101_120000")
    refusal = message(tmp_path, "ffff")
    assert "neither a file nor the start of a run ID" in refusal
    assert str(tmp_path / "alignment") in refusal


def test_a_run_that_did_not_finish_is_refused_by_name(tmp_path: Path) -> None:
    run = make_run(tmp_path, FIRST, "20260101_120000", artifact=None)
    refusal = message(tmp_path, FIRST[:8])
    assert str(run) in refusal
    assert "did not finish" in refusal


def test_latest_is_the_newest_by_timestamp_and_not_by_run_id(tmp_path: Path) -> None:
    make_run(tmp_path, THIRD, "20260101_235959")
    newest = make_run(tmp_path, FIRST, "20260102_000000")
    make_run(tmp_path, SECOND, "20251231_235959")
    assert find(tmp_path, "latest") == newest / "aligner.pt"


def test_of_two_runs_of_one_second_the_later_changed_is_latest(tmp_path: Path) -> None:
    newest = make_run(tmp_path, FIRST, "20260102_000000")
    other = make_run(tmp_path, THIRD, "20260102_000000")
    os.utime(other, (1, 1))
    assert find(tmp_path, "latest") == newest / "aligner.pt"


def test_latest_passes_over_runs_without_an_artifact_and_other_directories(tmp_path: Path) -> None:
    finished = make_run(tmp_path, FIRST, "20260101_120000")
    make_run(tmp_path, SECOND, "20260301_120000", artifact=None)
    make_run(tmp_path, "notes", "20260401_120000")
    assert find(tmp_path, "latest") == finished / "aligner.pt"


def test_latest_looks_at_its_own_phase_only(tmp_path: Path) -> None:
    aligned = make_run(tmp_path, FIRST, "20260101_120000")
    tuned = make_run(tmp_path, SECOND, "20260102_120000", "model.pt", "phase2")
    assert find(tmp_path, "latest") == aligned / "aligner.pt"
    assert find(tmp_path, "latest", INSTRUCTION) == tuned / "model.pt"


def make_trial(root: Path, run_id: str, timestamp: str) -> Path:
    folder = make_run(root, run_id, timestamp)
    run = Run(run_id, str(folder), "e", timestamp, "launch", "alignment", "sqlite:///x")
    write_json(folder / "run.json", asdict(run) | {"tags": {SWEEP_TAG: "d4" * 16}})
    return folder


def test_latest_is_never_a_trial_of_a_sweep(tmp_path: Path) -> None:
    trial = make_trial(tmp_path, THIRD, "20260301_120000")
    refusal = message(tmp_path, "latest")
    assert "only trials of a sweep" in refusal
    assert "best.json" in refusal
    with pytest.raises(InputError, match="no such run"):
        find_run(str(tmp_path), ["alignment"], "latest", "--resume")
    own = make_run(tmp_path, FIRST, "20260101_120000")
    assert find(tmp_path, "latest") == own / "aligner.pt"
    assert find(tmp_path, THIRD[:8]) == trial / "aligner.pt", "by its name it is found"


def test_latest_is_never_the_artifact_of_a_run_that_failed(tmp_path: Path) -> None:
    """A finished run that is made longer, and fails then, keeps the artifact that it had."""
    older = make_run(tmp_path, FIRST, "20260101_120000")
    RunDirectory(make_run(tmp_path, SECOND, "20260102_120000")).write_status("FAILED")
    assert find(tmp_path, "latest") == older / "aligner.pt"
    assert find(tmp_path, SECOND).is_file(), "by name it is still found"
    RunDirectory(older).write_status("FAILED")
    assert "there is no finished run" in message(tmp_path, "latest")


def test_a_run_that_was_moved_is_refused(tmp_path: Path) -> None:
    folder = make_trial(tmp_path, FIRST, "20260101_120000")
    run = find_run(str(tmp_path), ["alignment"], str(folder), "--resume")
    with pytest.raises(InputError, match="it was moved"):
        check_in_place(run, str(tmp_path), "--resume")
    write_json(launch_record(str(tmp_path), "launch"), asdict(run))
    check_in_place(run, str(tmp_path), "--resume")


def test_a_run_is_in_place_in_a_root_that_was_moved_and_not_in_one_that_was_copied(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    folder = make_trial(first, FIRST, "20260101_120000")
    write_json(launch_record(str(first), "launch"), read_json(folder / "run.json"))
    shutil.copytree(first, second)
    copy = find_run(str(second), ["alignment"], FIRST, "--resume")
    with pytest.raises(InputError, match=f"{copy.directory} is a copy; the run itself is {folder}"):
        check_in_place(copy, str(second), "--resume")
    shutil.rmtree(first)
    check_in_place(copy, str(second), "--resume")


def test_latest_without_a_finished_run_is_refused_with_how_to_fix_it(tmp_path: Path) -> None:
    refusal = message(tmp_path, "latest")
    assert "no finished run with aligner.pt" in refusal
    assert "--phase 1" in refusal


def test_latest_prefers_artifacts_that_fit_and_is_else_the_newest(tmp_path: Path) -> None:
    first = make_run(tmp_path, FIRST, "20260101_120000") / "aligner.pt"
    second = make_run(tmp_path, SECOND, "20260102_120000") / "aligner.pt"
    third = make_run(tmp_path, THIRD, "20260103_120000") / "aligner.pt"

    def latest(*fitting: Path) -> Path:
        return find_artifact(str(tmp_path), ALIGNMENT, "latest", "model.aligner", lambda path: path in fitting)

    assert latest(first, second, third) == third
    assert latest(first, second) == second
    assert latest(first) == first
    assert latest() == third


def test_a_run_that_is_asked_for_by_name_is_found_whether_it_fits_or_not(tmp_path: Path) -> None:
    run = make_run(tmp_path, FIRST, "20260101_120000")
    assert find_artifact(str(tmp_path), ALIGNMENT, FIRST[:4], "model.aligner", lambda path: False) == run / "aligner.pt"


# whole runs

BOTH = ("alignment", "phase2")


def noted_run(root: Path, run_id: str, timestamp: str, phase: str = "phase2") -> Run:
    folder = make_run(root, run_id, timestamp, None, phase)
    run = Run(run_id, str(folder), "experiment", timestamp, f"launch-{run_id[:2]}", phase, "sqlite:///mlflow.db")
    write_json(folder / "run.json", asdict(run) | {"train_records": 60, "tags": {}})
    return run


def no_run(root: Path, wanted: str, *phases: str) -> str:
    with pytest.raises(InputError) as caught:
        find_run(str(root), phases or BOTH, wanted, "--resume")
    (problem,) = caught.value.problems
    assert problem.where == f"--resume {wanted}"
    return f"{problem.what}\n{problem.fix}"


@pytest.mark.parametrize("length", [1, 8, 32])
def test_a_run_is_found_by_its_id_or_an_unambiguous_start(tmp_path: Path, length: int) -> None:
    noted_run(tmp_path, FIRST, "20260103_120000")
    run = noted_run(tmp_path, THIRD, "20260102_120000", "alignment")
    assert find_run(str(tmp_path), BOTH, THIRD[:length], "--resume") == run


def test_a_run_is_found_by_its_directory_and_the_name_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = noted_run(tmp_path, FIRST, "20260101_120000")
    assert find_run(str(tmp_path), BOTH, run.path.name, "--resume") == run
    assert find_run(str(tmp_path / "elsewhere"), BOTH, run.directory, "--resume") == run
    monkeypatch.chdir(run.path.parent)
    assert find_run("elsewhere", BOTH, run.path.name, "--resume") == run


def test_the_latest_run_is_the_newest_whether_it_has_finished_or_not(tmp_path: Path) -> None:
    noted_run(tmp_path, THIRD, "20260101_235959")
    newest = noted_run(tmp_path, FIRST, "20260102_000000", "alignment")
    older = noted_run(tmp_path, SECOND, "20251231_235959", "alignment")
    assert find_run(str(tmp_path), BOTH, "latest", "--resume") == newest
    assert find_run(str(tmp_path), ["alignment"], "latest", "--resume") == newest
    (newest.path / "run.json").unlink()
    newest.path.rmdir()
    assert find_run(str(tmp_path), ["alignment"], "latest", "--resume") == older


def test_a_start_that_fits_several_runs_is_refused_with_all_of_them(tmp_path: Path) -> None:
    noted_run(tmp_path, FIRST, "20260101_120000")
    noted_run(tmp_path, SECOND, "20260102_120000", "alignment")
    refusal = no_run(tmp_path, "a1")
    assert "fits 2 runs" in refusal
    assert FIRST in refusal
    assert SECOND in refusal
    assert find_run(str(tmp_path), ["phase2"], "a1", "--resume").run_id == FIRST


@pytest.mark.parametrize("wanted", ["latest", "ffff", "no/such/directory"])
def test_a_missing_run_is_refused_with_the_folder_that_was_searched(tmp_path: Path, wanted: str) -> None:
    assert f"there is no such run in {tmp_path}" in no_run(tmp_path, wanted)


def test_a_run_of_the_other_phase_is_refused(tmp_path: Path) -> None:
    run = noted_run(tmp_path, FIRST, "20260101_120000", "alignment")
    assert "there is no such run" in no_run(tmp_path, FIRST, "phase2")
    refusal = no_run(tmp_path, run.directory, "phase2")
    assert "is a run of alignment; required is one of phase2" in refusal


def test_a_directory_of_another_version_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path, FIRST, "20260101_120000")
    with pytest.raises(InputError, match=r"has no run\.json: an older version made it"):
        find_run(str(tmp_path), ["alignment"], FIRST, "--resume")


def test_run_directories_are_listed_by_time_without_other_directories(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, THIRD, "20260101_120000", None, "phase2"),
        make_run(tmp_path, FIRST, "20260102_120000"),
        make_run(tmp_path, SECOND, "20260103_120000", None, "phase2"),
    ]
    make_run(tmp_path, "notes", "20260101_120000")
    make_run(tmp_path, FIRST, "20260101_130000", None, ".ray")
    (tmp_path / "phase2" / f"{FIRST}_20260101_140000_copy").mkdir()
    assert run_directories(str(tmp_path), BOTH) == runs
    assert run_directories(str(tmp_path), ["alignment"]) == runs[1:2]
    assert run_directories(str(tmp_path / "nowhere"), BOTH) == []
    (tmp_path / "phase2" / f"{FIRST}_20260101_110000").symlink_to("nowhere")
    assert run_directories(str(tmp_path), BOTH)[1:] == runs


def test_a_run_of_another_machine_that_did_not_touch_its_lock_is_not_alive(settings: Settings) -> None:
    run = create(settings)
    with run.files.lock.held():
        pass
    run.files.write_status("RUNNING")
    write_json(run.path / "status.json", read_json(run.path / "status.json") | {"host": "another"})
    os.utime(run.files.lock.path, (1, 1))
    assert not is_alive(run, settings.output.root)


def test_a_moved_run_directory_is_found_where_it_is(settings: Settings, tmp_path: Path) -> None:
    run = create(settings)
    moved = tmp_path / "moved" / run.path.name
    shutil.copytree(run.path, moved)
    (found,) = find_runs(settings.output.root, [str(moved)])
    assert found.path == moved


def test_latest_passes_over_a_damaged_run_and_says_so(tmp_path: Path) -> None:
    older = noted_run(tmp_path, FIRST, "20260101_120000", "alignment")
    newer = noted_run(tmp_path, SECOND, "20260102_120000", "alignment")
    for run in (older, newer):
        (run.path / "aligner.pt").write_bytes(b"tensors")
    newer.files.record.write_bytes(b"")
    said: list[str] = []
    assert find_run(str(tmp_path), BOTH, "latest", "--resume", said.append) == older
    assert find_artifact(str(tmp_path), ALIGNMENT, "latest", "model.aligner", report=said.append) == older.path / "aligner.pt"
    assert len(said) == 2
    assert all(f"{newer.files.record} is empty" in line for line in said)
    with pytest.raises(InputError, match=r"run\.json\n    is empty"):
        find_run(str(tmp_path), BOTH, SECOND, "--resume", said.append)


def test_a_name_that_is_too_long_for_a_path_is_no_run(tmp_path: Path) -> None:
    assert "there is no such run" in no_run(tmp_path, "a" * 5000)


def test_an_empty_name_is_no_run(tmp_path: Path) -> None:
    """As `--resume "$RUN"` gives it if there is no such variable."""
    noted_run(tmp_path, "a" * 32, "20260101_000000")
    make_run(tmp_path, "b" * 32, "20260101_000000")
    assert "there is no such run" in no_run(tmp_path, "", "phase2")
    assert "is neither a file nor the start of a run ID" in message(tmp_path, "")


def test_a_run_is_found_by_its_launch_id(settings: Settings) -> None:
    root = settings.output.root
    run, other = create(settings, "baseline"), create(settings, "other")
    run.files.artifact(INSTRUCTION).write_bytes(b"weights")
    assert find_run(root, ["phase2"], "baseline", "RUN") == run
    assert find_run(root, ["phase2"], "other", "RUN") == other
    assert find_artifact(root, INSTRUCTION, "baseline", "--run") == run.files.artifact(INSTRUCTION)
    with pytest.raises(InputError, match="no such run"):
        find_run(root, ["alignment"], "baseline", "RUN")


def test_a_program_finds_a_run_by_whatever_it_has_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYTRAIN2P_HOME", raising=False)
    older = noted_run(tmp_path / "checkpoints", FIRST, "20260101_120000", "alignment")
    newer = noted_run(tmp_path / "checkpoints", THIRD, "20260102_120000")
    outcome = Outcome(older.run_id, older.directory, None, None, "aligner.pt", {})
    assert raytrain2p.find() == newer.files
    assert raytrain2p.find(phase=1) == older.files
    for given in (FIRST, "a1", older.directory, older.path, older, older.files, outcome):
        assert raytrain2p.find(given, root="checkpoints") == older.files
    for wrong, what in ((3, "is a int"), ("ffff", "there is no such run")):
        with pytest.raises(InputError, match=what):
            raytrain2p.find(wrong)
    with pytest.raises(InputError, match="phase=3"):
        raytrain2p.find(phase=3)
    newer.files.record.write_bytes(b"")
    with pytest.warns(UserWarning, match="is empty"):
        assert raytrain2p.find() == older.files


def test_in_a_submitted_job_a_run_of_its_working_directory_is_not_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lies in a copy that Ray deletes. And a file that was not sent with the job is to be named by its absolute path."""
    copy, root = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_1", str(tmp_path / "checkpoints")
    noted_run(copy / "checkpoints", FIRST, "20260101_120000")
    monkeypatch.chdir(copy)
    wanted = f"checkpoints/phase2/{FIRST}_20260101_120000"
    run = find_run(root, ["phase2"], wanted, "--resume")
    with pytest.raises(InputError, match=r"is in Ray's copy of the job's working directory(.|\n)*give its run ID"):
        check_in_place(run, root, f"--resume {wanted}")
    with pytest.raises(InputError, match=r"an absolute path \(a relative one is in Ray's copy"):
        find_artifact(root, ALIGNMENT, "checkpoints/alignment/x/aligner.pt", "model.aligner")
