"""What each launch that something happens to is compared with, and where the figures go."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from raytrain2p.storage.files import write_json
from tests.chaos.killing import LONG, STEPS, Launch, Verdict, launch_in

Judged = Callable[[Verdict], None]


class Undisturbed:
    """Launches that nothing happens to, each made when it is first asked for."""

    def __init__(self, folder: Path, tiny_config: Path, address: str) -> None:
        self.folder, self.tiny_config, self.address = folder, tiny_config, address
        self.made: dict[tuple[int, int], Launch] = {}

    def __call__(self, workers: int = 1, steps: int = STEPS) -> Launch:
        if (workers, steps) not in self.made:
            folder = self.folder / f"undisturbed{workers}_{steps}"
            launch = launch_in(folder, self.tiny_config, workers, steps, RAY_ADDRESS=self.address)
            launch.start()
            assert launch.wait() == 0, launch.log
            assert sorted(launch.steps()) == list(range(1, steps + 1))
            self.made[workers, steps] = launch
        return self.made[workers, steps]


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="session")
def undisturbed(chaos: Path, ray_head: str, tiny_config: Path) -> Undisturbed:
    return Undisturbed(chaos, tiny_config, ray_head)


@pytest.fixture(scope="session")
def judged() -> Judged:
    """Adds a row to the table, where one is wanted, and fails if the launch is not what an undisturbed one is."""
    rows: list[Verdict] = []

    def judge(row: Verdict) -> None:
        rows.append(row)
        if target := os.environ.get(LONG):
            write_json(Path(target), [vars(row) for row in rows])
        row.check()

    return judge
