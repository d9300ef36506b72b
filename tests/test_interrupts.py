"""Ctrl-C, SIGTERM and a closed terminal end a command at any moment with one line, and never with a traceback."""

import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launching import heed_sighup

COMMAND = [sys.executable, "-X", "importtime", "-m", "raytrain2p.predict", "What?"]


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("raytrain2p.config", signal.SIGINT),
        ("pydantic", signal.SIGHUP),
        ("numpy", signal.SIGTERM),
        ("torch", signal.SIGINT),
        ("transformers", signal.SIGINT),
    ],
)
def test_a_signal_during_the_imports_prints_one_line(module: str, number: signal.Signals, tmp_path: Path) -> None:
    started = subprocess.Popen(COMMAND, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heed_sighup)
    assert started.stderr is not None
    for line in started.stderr:
        if re.search(rf"\| +{module}(\.\w+)*$", line):  # Python reports each module once it is imported, the innermost first
            started.send_signal(number)
            break
    rest = [line for line in started.stderr if not line.startswith("import time:") and line.strip()]
    assert rest == [f"raytrain2p: stopped by {number.name}\n"]
    assert started.wait() == 128 + number


def run(script: str, **options: object) -> tuple[int, str]:
    """The exit code and the output of a script."""
    lines = f"import os, signal, sys, time\nfrom raytrain2p.interrupts import *\nme = os.getpid()\n{script}"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    return done.returncode, done.stdout + done.stderr


def test_the_first_signal_closes_what_was_begun_and_the_second_ends_at_once() -> None:
    script = """
with stoppable():
    try:
        os.kill(me, signal.SIGINT)
        time.sleep(5)
    finally:
        print("closing", flush=True)
        os.kill(me, signal.SIGTERM)
        time.sleep(5)
"""
    assert run(script) == (143, "closing\n\nraytrain2p: stopped by SIGTERM\n")


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    script = "handle(end_at_once)\nos.kill(me, signal.SIGHUP)\nprint('alive')"
    assert run(script, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) == (0, "alive\n")


def test_importing_the_package_leaves_the_handlers_of_a_program_as_they_are() -> None:
    script = "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)"
    heeded = run(script, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background ignores it
    assert heeded == (0, "True True\n")


def test_processes_that_outlive_the_terminal_do_not_get_its_signal() -> None:
    """Ray's would end before the checkpoint is written; and Ray sets a handler of its own, which would end us with code 15."""
    script = """
import subprocess
signal.signal(signal.SIGHUP, signal.SIG_DFL)
handle(end_at_once)
with kept_from_children():
    child = subprocess.Popen(["sleep", "60"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
child.send_signal(signal.SIGHUP)
time.sleep(0.2)
print(child.poll(), flush=True)
child.kill()
os.kill(me, signal.SIGTERM)
"""
    assert run(script) == (143, "None\n\nraytrain2p: stopped by SIGTERM\n")


def test_a_terminal_that_is_gone_does_not_end_a_command_that_prints(tmp_path: Path) -> None:
    """As after `disown`: no signal comes, and each write fails."""
    script = tmp_path / "prints.py"
    script.write_text("""
import signal, time
from pathlib import Path
from raytrain2p.config.cli import exit_code
from raytrain2p.config.console import Console
signal.signal(signal.SIGHUP, signal.SIG_IGN)
console = Console()
console.show("started")
while not Path("gone").exists():
    time.sleep(0.05)
for _ in range(3):
    console.show("step")
    console.say("line")
with console.progress_bar("encoding") as advance:
    advance(1, 2)
console.clear()
Path("code").write_text(str(exit_code(lambda: print("outcome", flush=True) or 0)))
""")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [sys.executable, str(script)], os.environ | {"TERM": "xterm"})
    output = b""
    while b"started" not in output:
        output += os.read(terminal, 1000)
    os.close(terminal)
    (tmp_path / "gone").touch()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "code").read_text() == "141"
