"""The settings that vary in a sweep, and the distributions that their values come from."""

import math
import sys
from dataclasses import dataclass
from typing import Any

NUMBERS = (int, float)
MOST_VALUES = 1000
MOST_STEPS = 10**9
Values = dict[str, Any]  # of settings, by dotted path
# Distribution: its arguments
DISTRIBUTIONS = {
    "choice": "[VALUE, ...]",
    "grid": "[VALUE, ...]",
    "uniform": "[LOWEST, HIGHEST]",
    "loguniform": "[LOWEST, HIGHEST], both above 0",
    "quniform": "[LOWEST, HIGHEST, STEP]",
    "randint": "[LOWEST, ABOVE HIGHEST], whole numbers",
}


@dataclass(frozen=True)
class Axis:
    """One setting that varies.

    Args:
        setting: dotted path.
        distribution: key of DISTRIBUTIONS.
        arguments: as in the settings.
    """

    setting: str
    distribution: str
    arguments: tuple[Any, ...]

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values, if they are listed."""
        if self.distribution in ("choice", "grid"):
            return self.arguments
        return None

    def probes(self) -> tuple[Any, ...]:
        """Values to check before anything starts: all, or the limits, in the type that is sampled."""
        if self.distribution == "randint":
            return (self.arguments[0], self.arguments[1] - 1)
        if self.distribution == "quniform":
            return tuple(self.rounded(end) for end in self.arguments[:2])
        return self.values or tuple(map(float, self.arguments))

    def rounded(self, value: float) -> Any:
        """The nearest of LOWEST, LOWEST + STEP, ... up to HIGHEST."""
        low, high, step = self.arguments
        nearest = low + min(max(round((value - low) / step), 0), math.floor((high - low) / step + 1e-9)) * step
        return int(nearest) if all(isinstance(one, int) for one in self.arguments) else float(f"{nearest:.12g}")

    def problem(self) -> str | None:
        """What is wrong with the arguments."""
        wanted = f"required: {self.distribution}: {DISTRIBUTIONS.get(self.distribution, '')}"
        if self.distribution not in DISTRIBUTIONS:
            return f"there is no distribution {self.distribution}; required is one of {', '.join(DISTRIBUTIONS)}"
        if self.values is not None:
            if len(self.arguments) > MOST_VALUES:
                return f"has {len(self.arguments):,} values, at most {MOST_VALUES:,} are taken: the settings are checked with each"
            return None if self.arguments else f"has no values; {wanted}"
        count = 3 if self.distribution == "quniform" else 2
        numeric = all(isinstance(one, NUMBERS) and not isinstance(one, bool) and abs(one) <= sys.float_info.max for one in self.arguments)
        if len(self.arguments) != count or not numeric:
            return wanted
        if self.distribution == "randint" and not all(isinstance(one, int) for one in self.arguments):
            return wanted
        if self.arguments[0] >= self.arguments[1]:
            return f"the lowest value must be below the highest; {wanted}"
        if self.distribution == "loguniform" and self.arguments[0] <= 0:
            return wanted
        if self.distribution == "quniform" and self.arguments[2] <= 0:
            return f"the step must be above 0; {wanted}"
        if self.distribution == "quniform" and self.arguments[1] - self.arguments[0] > MOST_STEPS * self.arguments[2]:
            return f"there are more than {MOST_STEPS:,} steps; {wanted}"
        return None
