"""What every part is given."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.case import Case

PACKAGES = Path("build/bench_packages")  # `make bench` installs TRL there: it is no dependency


@dataclass
class Options:
    """Of one run of the benchmarks.

    Args:
        folder: for all that is written, which is removed afterwards.
        case: settings and models that all comparisons share; its folder has an aligner.
        short: each part in about a minute.
        long: also what takes a quarter of an hour alone.
    """

    folder: Path
    case: Case
    short: bool
    long: bool = False
    since: float = field(default_factory=time.monotonic)

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.since:6.0f} s] {line}", flush=True)

    def saying(self, prefix: str) -> Callable[[str], None]:
        return lambda line: self.say(f"{prefix}: {line}")

    def environment(self) -> dict[str, str]:
        """Of commands of the program: outputs in the folder."""
        return {"RAYTRAIN2P_HOME": str(self.folder)}
