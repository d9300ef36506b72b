"""`raytrain2p.train(...)`: what a program gives, what it gets, and what stays as it was."""

import inspect
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import raytrain2p
from raytrain2p.config import InputError, load_settings
from raytrain2p.interrupts import NUMBERS, StoppedError
from raytrain2p.launch.api import called, changed, command_line, phase_of
from raytrain2p.launch.monitor import TrainingFailedError
from raytrain2p.launch.signals import StopSignals, fit_until_stopped
from raytrain2p.tracking.run import Run


def problems(**given: Any) -> str:
    with pytest.raises(InputError) as caught:
        raytrain2p.train(**given)
    return str(caught.value)


def test_its_signature_is_shown_whole() -> None:
    assert list(inspect.signature(raytrain2p.train).parameters)[:2] == ["settings", "phase"]
    assert list(inspect.signature(raytrain2p.sweep).parameters)[:2] == ["settings", "resume"]


def test_every_problem_is_in_one_error_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    text = problems(phase=2, training={"max_steps": "many", "warmup_stepz": 1}, seed=object(), **{"model.lora.rank": 0})
    assert text.startswith("4 problems; nothing was started\n")
    parts = ('max_steps="many"', "did you mean training.warmup_steps?", "value of type object", "model.lora.rank=0")
    assert all(part in text for part in parts), text
    assert capfd.readouterr() == ("", "")


def test_the_phase_is_given_or_is_that_of_the_settings() -> None:
    assert phase_of(load_settings(2), None) == 2
    assert phase_of({}, 1) == 1
    assert "phase=None" in problems()
    assert "phase='1'" in problems(phase="1")
    assert "the settings are of phase 2" in problems(settings=load_settings(2), phase=1)
    assert "is a int" in problems(settings=3, phase=1)
    assert "each of them names the run" in problems(phase=1, resume="latest", launch_id="mine")


def test_checks_of_the_data_are_those_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths begin at the caller's working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    (tmp_path / "file").touch()
    text = problems(phase=1, data={"train": "gone.jsonl"}, output={"root": Path("file/below")}, quiet=True)
    assert f"{tmp_path}/gone.jsonl" in text
    assert f"output.root={tmp_path}/file/below" in text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_recorded_command_has_the_settings_that_are_not_the_packaged_ones(tmp_path: Path) -> None:
    typed = ["training.max_steps=4", "data.test={}", "model.encoders.text=null", "model.encoders.audio=whisper-tiny.en"]
    settings = load_settings(1, None, [*typed, "data.train=it's here.jsonl"])
    verb, *words = shlex.split(command_line("train", ["--phase", "1", *changed(settings, load_settings(1))]))[2:]
    assert (verb, words[:2]) == ("raytrain2p.train", ["--phase", "1"])
    assert load_settings(1, None, words[2:]) == settings
    assert changed(settings, settings) == []
    assert "hunter2" not in command_line("train", ["tracking.uri=postgresql://me:hunter2@host/mlflow"])


def ended_by(error: Any) -> Any:
    """What a call raises that ends with an error of a launch."""
    error.run = Run("a" * 32, "/runs/a", "experiment", "20261126_120000", "launch", "alignment", "sqlite:////mlflow.db")
    with suppress(BaseException), called(quiet=True):
        raise error from RuntimeError("of Ray")
    return error


def test_a_failure_names_the_run_and_hides_the_errors_of_ray() -> None:
    failed = ended_by(TrainingFailedError("the reason"))
    assert str(failed) == f"run {'a' * 32} in /runs/a: the reason"
    assert (failed.__cause__, failed.__suppress_context__) == (None, True)


def test_an_interruption_names_the_run_to_resume() -> None:
    stopped = ended_by(StoppedError(signal.SIGINT))
    assert isinstance(stopped, KeyboardInterrupt)
    assert stopped.__notes__ == [f"run {'a' * 32} can be resumed with resume='/runs/a'"]


def test_the_programs_loggers_are_as_before() -> None:
    from raytrain2p.launch.quiet import quiet

    logger = logging.getLogger("ray.train")
    logger.setLevel(logging.DEBUG)
    try:
        with called(quiet=True):
            quiet()
            assert logger.level == logging.ERROR
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(logging.NOTSET)


def test_one_call_at_a_time_is_under_way() -> None:
    with called(quiet=True), pytest.raises(InputError, match="has not ended"), called(quiet=True):
        pass
    with called(quiet=True):
        pass


class Workers:
    """Which stop when they are asked to."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def request_stop(self) -> bool:
        self.asked.set()
        return True


def test_ctrl_c_is_the_programs_own_again_once_the_workers_have_stopped() -> None:
    """A command would end at once; a notebook must not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    before, workers = tuple(map(signal.getsignal, NUMBERS)), Workers()
    channel: Any = workers
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert fit_until_stopped(workers.asked.wait, channel, lambda line: None) == signal.SIGINT
    assert tuple(map(signal.getsignal, NUMBERS)) == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_outside_the_main_thread_no_handler_is_set() -> None:
    before, seen = tuple(map(signal.getsignal, NUMBERS)), list[Any]()

    def other() -> None:
        with StopSignals():
            seen.extend(map(signal.getsignal, NUMBERS))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert tuple(seen) == before


@pytest.mark.parametrize(("variables", "shown"), [({}, True), ({"TQDM_DISABLE": "1"}, False)])
def test_progress_bars_are_the_programs_affair(variables: dict[str, str], shown: bool, tmp_path: Path) -> None:
    """tqdm reads TQDM_DISABLE once, while it is imported."""
    script = "from raytrain2p.launch.api import quiet_imports\nwith quiet_imports(): pass\nfrom tqdm import tqdm\nlist(tqdm(range(3)))"
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"} | variables
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert ("3/3" in done.stderr) == shown
