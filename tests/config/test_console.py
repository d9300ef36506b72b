"""Output for people, in a terminal and elsewhere."""

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from raytrain2p.config import console as console_module
from raytrain2p.config.console import Console

LONG_PATH = "/a/" + "x" * 300 + "/aligner.pt"
SCRIPT = f"""
from raytrain2p.config.console import Console
console = Console()
with console.status("reading " + "y" * 300):
    console.say("{LONG_PATH}")
with console.progress_bar("encoding images") as advance:
    advance(250, 500)
    console.say("above the bar")
console.show("the last step")
console.keep("the last step")
console.say("the end")
"""


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def in_terminal(script: str, columns: int, tmp_path: Path) -> str:
    """What the script writes to a terminal that is so wide."""
    driver, terminal = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm"}
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    written = bytearray()
    try:
        while part := os.read(driver, 65536):
            written += part
    except OSError:  # Linux: the other side is closed
        pass
    os.close(driver)
    assert process.wait(60) == 0
    return written.decode()


@pytest.mark.parametrize("columns", [60, 140])
def test_in_a_terminal_the_status_line_fits_and_stays_below_the_lines(columns: int, tmp_path: Path) -> None:
    written = in_terminal(SCRIPT, columns, tmp_path)
    assert LONG_PATH in written, "a path is neither wrapped nor cut"
    assert f"{'reading ' + 'y' * (columns - 9)}…" in written
    assert "y" * columns not in written
    assert "250/500" in written
    assert "above the bar" in written
    assert written.rstrip().endswith("the last step\r\nthe end"), "it stays"
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h"), "the cursor is visible again"


def test_elsewhere_there_are_plain_lines_and_progress_now_and_then(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now)
    console = Console(stream)
    console.say(LONG_PATH)
    console.show("step 1")
    console.show("step 2")
    now += console_module.PLAIN_SECONDS
    with console.progress_bar("encoding images") as advance:
        advance(250, 500)
        advance(500, 500)
    console.keep("encoding images: 250/500")
    assert stream.getvalue().splitlines() == [LONG_PATH, "step 1", "encoding images: 250/500"]


@pytest.mark.parametrize(("hours", "most"), [(1 / 60, 5), (1, 150), (10, 300), (24 * 7, 1300)])
def test_a_log_does_not_grow_with_the_steps(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, hours: float, most: int) -> None:
    now = 100.0
    monkeypatch.setattr(console_module.time, "monotonic", lambda: now)
    console, steps = Console(stream), 100_000
    for step in range(steps):
        now = 100.0 + step * hours * 3600 / steps
        console.show(f"step {step}")
    assert most / 2 < len(stream.getvalue().splitlines()) <= most


def test_text_from_data_is_no_markup_and_controls_no_terminal(stream: io.StringIO) -> None:
    Console(stream).say("[red]task[/red] :smile: \x1b[31m\x07\r 'quoted' 1.5\n\tsecond line")
    assert stream.getvalue() == "[red]task[/red] :smile: \\x1b[31m\\x07\\r 'quoted' 1.5\n        second line\n"


def test_a_reader_that_closes_the_output_does_not_end_the_command(tmp_path: Path) -> None:
    script = "from raytrain2p.config.console import Console; console = Console(); [console.say('line') for _ in 'abc']; print('end')"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=writing, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, "end\n")
