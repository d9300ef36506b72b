"""Whatever dies, and whenever: one MLflow run, one directory, every step once, and the weights of an undisturbed run.

Short here: rank 0 is killed twice. `make chaos` kills over 50 times, at named moments too, and writes docs/chaos.md.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.killing import LONG, TARGETS, Launch, Stopwatch, Verdict, keep_up, only_long, run_with_kills, verdict
from tests.chaos.moments.sitecustomize import MOMENTS

MOMENTS_DIRECTORY = Path(__file__).parent / "moments"
STEPS = 400
# name of the target: kills, and the least and most seconds between one in training and the next while it starts
SHORT_KILLS = (2, (2.0, 4.0))
KILLS = {
    "driver": (12, (3.0, 18.0)),
    "rank 0": (16, (1.0, 6.0)),
    "another worker": (12, (4.0, 8.0)),
    "Ray's controller": (10, (4.0, 14.0)),
}


@pytest.fixture(scope="module")
def table() -> Iterator[list[Verdict]]:
    """Rows of the table; written at the end where it is wanted."""
    rows: list[Verdict] = []
    yield rows
    if target := os.environ.get(LONG):
        Path(target).write_text(json.dumps([vars(row) for row in rows], indent=1))


def launch_in(folder: Path, tiny_config: Path, workers: int, **environment: str) -> Launch:
    """400 steps of phase 1 with dropout on tiny models: seconds, and several checkpoints and epochs."""
    arguments = [
        "--phase=1",
        f"--config={tiny_config}/phase1.yaml",
        f"training.max_steps={STEPS}",
        f"training.batch_size={8 // workers}",
        "training.log_every=7",
        "checkpoint.every_steps=20",
        "checkpoint.best_of=saves",
        "model.dropout=0.3",
        "data.val=null",
        "launch.max_failures=100",
        f"launch.num_workers={workers}",
    ]
    return Launch(folder, arguments, environment)


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def undisturbed(chaos: Path, ray_head: str, tiny_config: Path) -> dict[int, Launch]:
    """By number of workers: two for the long form alone."""
    launches = {}
    for workers in (1, 2) if LONG in os.environ else (1,):
        launches[workers] = launch_in(chaos / f"undisturbed{workers}", tiny_config, workers, RAY_ADDRESS=ray_head)
        launches[workers].start()
        assert launches[workers].wait() == 0, launches[workers].log
        assert sorted(launches[workers].steps()) == list(range(1, STEPS + 1))
    return launches


@pytest.mark.parametrize("target", ["rank 0", *(pytest.param(name, marks=only_long) for name in TARGETS if name != "rank 0")])
def test_a_process_is_killed_at_random_moments(
    target: str, chaos: Path, ray_head: str, tiny_config: Path, undisturbed: dict[int, Launch], table: list[Verdict]
) -> None:
    kills, seconds = KILLS[target] if LONG in os.environ else SHORT_KILLS
    workers = 2 if target == "another worker" else 1
    launch = launch_in(chaos / target.replace(" ", "_"), tiny_config, workers, RAY_ADDRESS=ray_head)
    struck, waits = run_with_kills(launch, target, kills, seconds, seed=kills)
    row = verdict(f"SIGKILL of {target} at random moments", launch, undisturbed[workers], struck, waits)
    table.append(row)
    row.check()
    assert struck == kills, "it ended before the last kill"
    assert launch.starts <= 1 + (struck if target in ("driver", "Ray's controller") else 0), "a worker's death ended the launch"


@only_long
@pytest.mark.parametrize("moment", MOMENTS)
def test_rank_zero_is_killed_at_a_named_moment(
    moment: str, chaos: Path, tiny_config: Path, undisturbed: dict[int, Launch], table: list[Verdict]
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
    assert keep_up(launch, stopwatch, done.exists), "it never came to that moment: that is no test"
    stopwatch.start(done.stat().st_mtime)
    keep_up(launch, stopwatch, lambda: False)
    assert launch.starts == 1, launch.log
    row = verdict(f"rank 0 killed {moment}", launch, undisturbed[1], 1, stopwatch.measured)
    table.append(row)
    row.check()
