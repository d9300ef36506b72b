"""Every shell script of the project, as shellcheck sees it."""

import subprocess
from pathlib import Path

import pytest

from tests.cluster_files.linters import lint_shell

ROOT = Path(__file__).parents[2]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
SCRIPTS = sorted(
    path for name in TRACKED if (path := ROOT / name).is_file() and path.read_bytes()[:64].splitlines()[:1] == [b"#!/usr/bin/env bash"]
)


def test_the_scripts_are_found() -> None:
    assert {".ci/run", "cluster/slurm/train.sbatch"} <= {str(path.relative_to(ROOT)) for path in SCRIPTS}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script: Path) -> None:
    assert lint_shell(script) == ""


def test_shellcheck_finds_a_mistake(tmp_path: Path) -> None:
    broken = tmp_path / "broken.sh"
    broken.write_text('#!/usr/bin/env bash\nif [ "$1" = a; then echo $2; fi\n')
    assert "error" in lint_shell(broken)
