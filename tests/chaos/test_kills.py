"""Whichever process is killed, at any moment: one MLflow run, one directory, every step once, the weights of an undisturbed run.

Short here: rank 0 is killed once. `make chaos` kills over 50 times, at named moments too, and writes docs/chaos.md.
"""

import importlib
import os
import signal
import time
from functools import reduce
from pathlib import Path

import psutil
import pytest

from tests.chaos.conftest import Judged, Undisturbed
from tests.chaos.killing import (
    HUNG,
    LONG,
    MOMENTS_DIRECTORY,
    TARGETS,
    Launch,
    Stopwatch,
    keep_up,
    launch_in,
    only_long,
    run_with_kills,
    verdict,
)
from tests.chaos.moments.sitecustomize import MOMENTS
from tests.launch.launching import Terminal

# target: kills, and the least and most seconds between one in training and the next while processes start
SHORT_KILLS = (1, (2.0, 4.0))
KILLS = {
    "driver": (12, (3.0, 18.0)),
    "rank 0": (16, (1.0, 6.0)),
    "another worker": (12, (4.0, 8.0)),
    "Ray's controller": (10, (4.0, 14.0)),
    HUNG: (1, (0.0, 0.0)),
}


@pytest.mark.parametrize("target", ["rank 0", *(pytest.param(name, marks=only_long) for name in TARGETS if name != "rank 0")])
def test_a_process_is_killed_at_random_moments(
    target: str, chaos: Path, ray_head: str, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    kills, seconds = KILLS[target] if LONG in os.environ else SHORT_KILLS
    workers = 2 if target == "another worker" else 1
    launch = launch_in(chaos / target.replace(" ", "_"), tiny_config, workers, RAY_ADDRESS=ray_head)
    if target == HUNG:
        launch.arguments = [*launch.arguments, "launch.hang_timeout_s=5"]
    kills_done, waits = run_with_kills(launch, target, kills, seconds, seed=kills)
    scenario = "SIGSTOP of rank 0" if target == HUNG else f"SIGKILL of {target}"
    judged(verdict(f"{scenario} at random moments", launch, undisturbed(workers), kills_done, waits))
    assert kills_done == kills, "it ended before the last kill"
    assert launch.starts <= 1 + (kills_done if target in ("driver", "Ray's controller") else 0), "a killed worker ended the launch"


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_function_of_each_named_moment_exists(moment: str) -> None:
    module, name, *_ = MOMENTS[moment]
    assert callable(reduce(getattr, name.split("."), importlib.import_module(module)))


@only_long
@pytest.mark.parametrize("moment", MOMENTS)
def test_rank_zero_is_killed_at_a_named_moment(
    moment: str, chaos: Path, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    folder = chaos / moment.replace(" ", "_")
    done = chaos / f"{folder.name}.struck"
    launch = launch_in(
        folder,
        tiny_config,
        1,
        RAY_ADDRESS="local",
        PYTHONPATH=str(MOMENTS_DIRECTORY),
        RAYTRAIN2P_CHAOS_MOMENT=moment,
        RAYTRAIN2P_CHAOS_DONE=str(done),
    )
    judged(verdict(f"rank 0 killed {moment}", launch, undisturbed(), 1, killed_once(launch, done)))
    assert launch.starts == 1, launch.log


def killed_once(launch: Launch, done: Path) -> list[float]:
    """Start a launch of which a process is killed once, and then `done` exists; the seconds to the next step."""
    launch.start()
    stopwatch = Stopwatch(launch)
    assert keep_up(launch, stopwatch, done.exists), "it never reached that moment, so nothing was tested"
    stopwatch.start(done.stat().st_mtime)
    keep_up(launch, stopwatch, lambda: False)
    return stopwatch.measured


@only_long
def test_a_launch_that_takes_all_memory_loses_a_process_and_goes_on(
    chaos: Path, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    done, memory = chaos / "memory.struck", psutil.virtual_memory()
    launch = launch_in(
        chaos / "memory",
        tiny_config,
        1,
        RAY_ADDRESS="local",
        RAY_memory_usage_threshold=str((memory.total - memory.available + 4e9) / memory.total),
        RAY_memory_monitor_refresh_ms="100",
        PYTHONPATH=str(MOMENTS_DIRECTORY),
        RAYTRAIN2P_CHAOS_MOMENT="between two checkpoints",
        RAYTRAIN2P_CHAOS_MEMORY="8",
        RAYTRAIN2P_CHAOS_DONE=str(done),
    )
    judged(verdict("a process killed for memory", launch, undisturbed(), 1, killed_once(launch, done)))
    if launch.starts > 1:  # Ray has chosen its controller
        assert "was ended because its node ran out of memory" in (launch.folder / "log1").read_text()


@only_long
def test_a_terminal_is_closed_and_the_launch_is_started_again(
    chaos: Path, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    launch = launch_in(chaos / "terminal", tiny_config, 1, RAY_ADDRESS="local")
    launch.folder.mkdir()
    terminal = Terminal(launch.folder / "log1")
    launch.process, launch.starts = terminal.start(launch.folder, *launch.command(), **launch.variables), 1
    launch.wait_for_steps(100)
    terminal.close()
    stopwatch = Stopwatch(launch)
    stopwatch.start(time.time())
    assert launch.wait() == 128 + signal.SIGHUP, launch.log
    keep_up(launch, stopwatch, lambda: False)
    assert launch.starts == 2, launch.log
    judged(verdict("terminal closed, and the launch started again", launch, undisturbed(), 1, stopwatch.measured))
