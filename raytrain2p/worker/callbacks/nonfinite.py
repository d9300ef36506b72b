"""Steps whose loss or gradient is not finite, and weights that are not: reported, and soon the end of the run."""

import math
from collections.abc import Callable, Sequence

PLACES_SHOWN = 16


class DivergedError(RuntimeError):
    """The run does not train any more, and would not if it were started again. Its text is one line for the user."""


class NonFinite:
    """Ends training, on all workers alike, after more than `most` steps in a row whose loss or gradient is not finite.

    Such a step is not applied if it is the gradient, see `PhaseModule.configure_gradient_clipping`.

    Args:
        most: training.max_nonfinite_steps.
        places: where the records of a step are.
        report: takes a line for the user; None on every worker but the first.
    """

    def __init__(self, most: int, places: Callable[[int], list[str]], report: Callable[[str], None] | None) -> None:
        self.most, self.places, self.report = most, places, report
        self.first, self.count = "", 0  # of the steps in a row

    def check(self, step: int, loss: float, gradient_norm: float) -> bool:
        """Whether a step is finite. Called with every step, in order, and with the same numbers on every worker.

        Raises:
            DivergedError: it is one too many in a row.
        """
        if math.isfinite(loss) and math.isfinite(gradient_norm):
            self.count = 0
            return True
        found = f"step {step}: loss {loss:g}, gradient norm {gradient_norm:g}, records {listed(self.places(step))}"
        self.count += 1
        if self.count == 1:
            self.first = found
        if self.count > self.most:
            many = f"{self.count} steps in a row were" if self.count > 1 else "a step was"
            fix = "lower training.learning_rate or training.gradient_clip, or correct these records"
            raise DivergedError(f"{many} not finite (training.max_nonfinite_steps={self.most}), first {self.first}; {fix}")
        if self.report is not None:
            self.report(f"not finite, left out: {found}")
        return False

    def check_weights(self, step: int, norm: float) -> None:
        """Before they are saved.

        Raises:
            DivergedError: they are not finite.
        """
        if not math.isfinite(norm):
            since = f", not finite since {self.first}" if self.count else ""
            raise DivergedError(f"the norm of the weights is {norm:g} at step {step}{since}; lower training.learning_rate")


def listed(places: Sequence[str]) -> str:
    """Places in one line, files named once: `a.jsonl:3, 7; b.jsonl:1`."""
    by_file: dict[str, list[str]] = {}
    for place in places[:PLACES_SHOWN]:
        file, _, number = place.rpartition(":")
        by_file.setdefault(file, []).append(number)
    more = len(places) - PLACES_SHOWN
    return "; ".join(f"{file}:{', '.join(numbers)}" for file, numbers in by_file.items()) + (f" and {more} more" if more > 0 else "")
