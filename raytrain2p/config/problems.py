"""Problems in the user's input, reported all at once and before anything starts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from raytrain2p.config.secrets import masked

# A file of a million bad records has one cause, not a million.
MOST_CAUSES = 20
MOST_ALIKE = 5  # problems shown of each cause


@dataclass(frozen=True)
class Problem:
    """One problem: `where`, as the user wrote it; `what` was found and what is required; how to `fix` it.

    `cause` is equal for problems of one kind: `what` without the specifics of a record. By default it is `what`.
    """

    where: str
    what: str
    fix: str = ""
    cause: str = field(default="", compare=False, repr=False)

    def __str__(self) -> str:
        return masked(f"{self.where}\n    {self.what}" + (f"\n    fix: {self.fix}" if self.fix else ""))


def grouped(problems: Iterable[Problem]) -> list[str]:
    """One text per problem, those of one cause together: the first few of each cause, and how many more there are."""
    causes: dict[str, list[Problem]] = {}
    for problem in problems:
        causes.setdefault(problem.cause or problem.what, []).append(problem)
    texts = []
    for alike in list(causes.values())[:MOST_CAUSES]:
        texts += [str(problem) for problem in alike[:MOST_ALIKE]]
        if len(alike) > MOST_ALIKE:
            texts.append(f"... and {len(alike) - MOST_ALIKE:,} more like it")
    if left_out := list(causes.values())[MOST_CAUSES:]:
        texts.append(f"... and {sum(map(len, left_out)):,} more, of {len(left_out):,} other causes")
    return texts


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
        shown = "\n".join(f"  {text}" for text in grouped(self.problems))
        return f"{count:,} problem{'s' if count > 1 else ''}; nothing was started\n{shown}"


class ReportedError(InputError):
    """Something is missing that another check reports: `Findings` leaves it out."""


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
            self.problems += [] if isinstance(error, ReportedError) else error.problems
            return True
        return False

    def raise_any(self) -> None:
        """Raise the collected problems, each once.

        Raises:
            InputError: at least one problem was found.
        """
        if self.problems:
            raise InputError(list(dict.fromkeys(self.problems)))
