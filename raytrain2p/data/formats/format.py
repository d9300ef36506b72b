"""What a format of records is."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from raytrain2p.data.formats.row import Row
from raytrain2p.data.records import Message

ID, TASK, CONCEPT = COMMON = ("id", "task", "concept")  # keys that several formats take


@dataclass(frozen=True)
class Example:
    """A row as people write it, and what it becomes, or why it is refused.

    Args:
        row: of a file beside which are cat.png, dog.png and meow.wav.
        messages: `role: text` of each message, with `[cat.png]` in place of a media file.
        problem: the beginning of the message about a bad row.
    """

    row: dict[str, Any]
    messages: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Format:
    """A format of records.

    Args:
        description: in one line, for the user.
        phases: that take it.
        keys: all that its records may have.
        marks: keys of which a record in this format has at least one.
        read: a row's messages; problems are added to the row. The last argument is whether an answer is required.
        examples: the first is the one to show.
    """

    name: str
    description: str
    phases: tuple[int, ...]
    keys: Callable[[], Collection[str]]
    marks: Callable[[], Collection[str]]
    read: Callable[[Row, bool], list[Message]]
    examples: tuple[Example, ...]

    @property
    def example(self) -> dict[str, Any]:
        """A row in this format."""
        return self.examples[0].row
