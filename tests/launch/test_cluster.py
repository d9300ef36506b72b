"""Before a launch connects to Ray. For the token see test_open_ports.py, for capacity test_bad_input.py."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import psutil
from raytrain2p.launch.cluster import hide_command_line
hide_command_line()
print(" ".join(psutil.Process().cmdline()))
"""


def title(*arguments: str) -> str:
    """The title of a process with these arguments, after a launch has looked at them."""
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, env=os.environ, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    return done.stdout


def test_a_password_is_not_in_the_title_of_the_process() -> None:
    shown = title("tracking.uri=postgresql://me:hunter2@db/x", "seed=3")
    assert "hunter2" not in shown
    assert "tracking.uri=postgresql://me:***@db/x seed=3" in shown
    assert "seed=3" in title("seed=3")
