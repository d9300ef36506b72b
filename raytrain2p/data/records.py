"""A record is a list of messages, whose parts are text or media. Readers in `data/formats/` turn what people have into it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from raytrain2p.data.media import TEXT, MediaRef

ALL_TASKS = "all"  # the task of records that name none
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Message:
    """What one role says: texts and media, in order."""

    role: str
    parts: tuple[str | MediaRef, ...]

    @property
    def text(self) -> str:
        """Its texts, without the media."""
        return "".join(part for part in self.parts if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Record:
    """One record of either phase.

    Args:
        where: file and line it was read from, for messages.
        messages: an optional system message, then user and assistant in turns, beginning with the user.
        task: metrics are reported by task.
        concept: phase 1: records of one concept are positives of each other; None takes the text.
    """

    where: str
    messages: tuple[Message, ...]
    task: str = ALL_TASKS
    concept: str | None = None

    def media(self) -> Iterator[MediaRef]:
        """All media items, in order."""
        return (part for message in self.messages for part in message.parts if isinstance(part, MediaRef))

    @property
    def question(self) -> str:
        """The text of the last message of the user."""
        return next((message.text for message in reversed(self.messages) if message.role == USER), "")

    @property
    def answers(self) -> list[str]:
        """The texts of the assistant."""
        return [message.text for message in self.messages if message.role == ASSISTANT]

    def by_modality(self) -> Mapping[str, str | MediaRef]:
        """Phase 1: the items to align, one of each modality; the text is what the assistant says."""
        items: dict[str, str | MediaRef] = {ref.modality: ref for ref in self.media()}
        if text := "\n".join(self.answers):
            items[TEXT] = text
        return items


def spread(items: list[Item], most: int) -> list[Item]:
    """At most so many of them, evenly from the whole list."""
    return items if len(items) <= most else [items[index * len(items) // most] for index in range(most)]
