"""Whichever process is killed, at any moment: one MLflow run, one directory, every step once, the weights of an undisturbed run.

Short here: rank 0 is killed twice. `make chaos` kills over 50 times, at named moments too, and writes docs/chaos.md.
"""

import importlib
import os
from functools import reduce
from pathlib import Path

import pytest

from tests.chaos.conftest import Judged, Undisturbed
from tests.chaos.killing import LONG, TARGETS, Stopwatch, keep_up, launch_in, only_long, run_with_kills, verdict
from tests.chaos.moments.sitecustomize import MOMENTS

MOMENTS_DIRECTORY = Path(__file__).parent / "moments"
# target: kills, and the least and most seconds between one in training and the next while processes start
SHORT_KILLS = (2, (2.0, 4.0))
KILLS = {
    "driver": (12, (3.0, 18.0)),
    "rank 0": (16, (1.0, 6.0)),
    "another worker": (12, (4.0, 8.0)),
    "Ray's controller": (10, (4.0, 14.0)),
}


@pytest.mark.parametrize("target", ["rank 0", *(pytest.param(name, marks=only_long) for name in TARGETS if name != "rank 0")])
def test_a_process_is_killed_at_random_moments(
    target: str, chaos: Path, ray_head: str, tiny_config: Path, undisturbed: Undisturbed, judged: Judged
) -> None:
    kills, seconds = KILLS[target] if LONG in os.environ else SHORT_KILLS
    workers = 2 if target == "another worker" else 1
    launch = launch_in(chaos / target.replace(" ", "_"), tiny_config, workers, RAY_ADDRESS=ray_head)
    kills_done, waits = run_with_kills(launch, target, kills, seconds, seed=kills)
    judged(verdict(f"SIGKILL of {target} at random moments", launch, undisturbed(workers), kills_done, waits))
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
    launch.start()
    stopwatch = Stopwatch(launch)
    assert keep_up(launch, stopwatch, done.exists), "it never reached that moment, so nothing was tested"
    stopwatch.start(done.stat().st_mtime)
    keep_up(launch, stopwatch, lambda: False)
    assert launch.starts == 1, launch.log
    judged(verdict(f"rank 0 killed {moment}", launch, undisturbed(), 1, stopwatch.measured))
