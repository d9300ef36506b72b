"""`runs latest`: one path, by the same rules as everywhere."""

from pathlib import Path

import pytest

from raytrain2p.config import Settings
from raytrain2p.runs import __main__ as runs
from raytrain2p.tracking.run import SWEEP_TAG, Run
from tests.runs.made import trained


@pytest.fixture
def made(settings: Settings) -> list[Run]:
    """A finished run with its artifact, one that failed with the artifact of an earlier part, and a trial."""
    found = [trained(settings, "a", [1.0]), trained(settings, "b", [1.0], "FAILED"), trained(settings, "c", [1.0])]
    found[2].add_tags({SWEEP_TAG: "0" * 32})
    for run in found:
        (run.path / "model.pt").write_bytes(b"model")
    return found


def latest(root: Path, capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> tuple[str, str]:
    assert runs.main(["latest", *words, f"output.root={root}"]) == code
    return capsys.readouterr()


def test_the_newest_run_is_never_a_trial_and_its_artifact_never_of_a_failed_run(
    made: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    root = made[0].path.parent.parent
    assert latest(root, capsys, "--phase", "2") == (f"{made[1].directory}\n", "")
    assert latest(root, capsys, "--phase", "2", "--artifact") == (f"{made[0].directory}/model.pt\n", "")


def test_a_damaged_run_is_passed_over_with_a_line(made: list[Run], capsys: pytest.CaptureFixture[str]) -> None:
    made[1].files.record.write_text("{")
    out, err = latest(made[0].path.parent.parent, capsys, "--phase", "2")
    assert out == f"{made[0].directory}\n"
    assert err.count("\n") == err.count(str(made[1].files.record)) == 1


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--phase", "1"), "there is no run in {root}/alignment"),
        (("--phase", "1", "--artifact"), "there is no finished run with aligner.pt in {root}/alignment"),
        (("--phase", "sweeps"), "python -m raytrain2p.tune"),
        (("--phase", "sweeps", "--artifact"), "a sweep has none"),
        (("--phase", "2", "abc"), "takes no run"),
    ],
)
def test_without_such_a_run_there_is_a_problem_and_nothing_on_stdout(
    made: list[Run], capsys: pytest.CaptureFixture[str], words: tuple[str, ...], problem: str
) -> None:
    root = made[0].path.parent.parent
    out, err = latest(root, capsys, *words, code=2)
    assert out == ""
    assert problem.format(root=root) in err
