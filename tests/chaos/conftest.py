"""Fixtures: the undisturbed launches that the others are compared with, and the table of results."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from raytrain2p.storage.files import write_json
from tests.chaos.killing import LONG, STEPS, Launch, Verdict, launch_in
from tests.launch.launching import encode_here

Judged = Callable[[Verdict], None]


class Undisturbed:
    """Undisturbed launches, each run when it is first used."""

    def __init__(self, folder: Path, tiny_config: Path, address: str) -> None:
        self.folder, self.tiny_config, self.address = folder, tiny_config, address
        self.launches: dict[tuple[int, int], Launch] = {}

    def __call__(self, workers: int = 1, steps: int = STEPS) -> Launch:
        if (workers, steps) not in self.launches:
            folder = self.folder / f"undisturbed{workers}_{steps}"
            launch = launch_in(folder, self.tiny_config, workers, steps, RAY_ADDRESS=self.address)
            launch.start()
            assert launch.wait() == 0, launch.log
            assert sorted(launch.steps()) == list(range(1, steps + 1))
            self.launches[workers, steps] = launch
        return self.launches[workers, steps]


@pytest.fixture(scope="session")
def chaos(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A folder for launches, with the features that they share."""
    folder = tmp_path_factory.mktemp("chaos")
    encode_here(1, tiny_config / "phase1.yaml", folder / "features")
    return folder


@pytest.fixture(scope="session")
def undisturbed(chaos: Path, ray_head: str, tiny_config: Path) -> Undisturbed:
    return Undisturbed(chaos, tiny_config, ray_head)


@pytest.fixture(scope="session")
def judged() -> Judged:
    """Adds a row to the table, if there is one, and fails if the launch differs from an undisturbed one."""
    rows: list[Verdict] = []

    def judge(row: Verdict) -> None:
        rows.append(row)
        if target := os.environ.get(LONG):
            write_json(Path(target), [vars(row) for row in rows])
        row.check()

    return judge
