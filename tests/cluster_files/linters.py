"""shellcheck and hadolint, which the `dev` extra installs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDERS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def lint(*command: str) -> str:
    """What the program found; empty if nothing."""
    program = shutil.which(command[0], path=FOLDERS)
    assert program is not None, f"{command[0]} is not installed: pip install -e '.[dev]'"
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.stdout + done.stderr


def lint_shell(script: Path, *without: str) -> str:
    return lint("shellcheck", *(f"--exclude={code}" for code in without), str(script))


def lint_image(dockerfile: Path) -> str:
    return lint("hadolint", str(dockerfile))
