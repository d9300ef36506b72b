"""Problems in the user's input, reported all at once and before anything starts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MOST_SHOWN = 40  # a file of a million bad records has one cause, not a million


@dataclass(frozen=True)
class Problem:
    """One problem: `where`, as the user wrote it; `what` was found and what is required; how to `fix` it."""

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}\n    {self.what}" + (f"\n    fix: {self.fix}" if self.fix else "")


class InputError(ValueError):
    """Bad input, found before any worker starts. The commands print it without a traceback and exit with code 2."""

    def __init__(self, problems: Sequence[Problem] | Problem) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        assert self.problems, "an InputError needs at least one problem"
        super().__init__(str(self))

    def __reduce__(self) -> tuple[type["InputError"], tuple[list[Problem]]]:
        return type(self), (self.problems,)  # pickled when it crosses a process boundary

    def __str__(self) -> str:
        count = len(self.problems)
        shown = [f"  {problem}" for problem in self.problems[:MOST_SHOWN]]
        if count > MOST_SHOWN:
            shown.append(f"  ... and {count - MOST_SHOWN} more")
        return f"{count} problem{'s' if count > 1 else ''}; nothing was started\n" + "\n".join(shown)


class Findings:
    """Collects the problems of several checks, each of which raises its own, so that they are reported together."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def add(self, *problems: Problem) -> None:
        self.problems += problems

    def extend(self, problems: Iterable[Problem]) -> None:
        self.problems += problems

    def __enter__(self) -> "Findings":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        """Collect an InputError; any other exception is a bug and propagates."""
        if isinstance(error, InputError):
            self.problems += error.problems
            return True
        return False

    def raise_any(self) -> None:
        """Raise the collected problems, each once.

        Raises:
            InputError: at least one problem was found.
        """
        if self.problems:
            raise InputError(list(dict.fromkeys(self.problems)))
