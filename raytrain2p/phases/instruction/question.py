"""A question from the user's own records, as `predict` takes it: what to ask the model first."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

from raytrain2p.config.escaping import printable
from raytrain2p.config.secrets import masked
from raytrain2p.data.media import MEDIA, MediaRef
from raytrain2p.data.records import USER, Message, Record
from raytrain2p.phases.inputs import TRAIN, VAL

FILE, QUESTION = "FILE", "QUESTION"  # for the user to replace
LOOKED_AT = 1000  # records of each split
LONGEST, MOST_MEDIA = 80, 4  # characters and items of a question that is easily read


def question_arguments(splits: Mapping[str, Sequence[Record]]) -> list[str]:
    """A file for each item, and the question: of a test record if there is one, with media if there are any, and short.

    An item that is no file of its own, such as one in Parquet, is left to the user: FILE.
    """
    names = [*(name for name in splits if name not in (TRAIN, VAL)), VAL, TRAIN]
    asked = list(chain.from_iterable(first_questions(islice(splits.get(name, ()), LOOKED_AT)) for name in names))
    with_media = [message for message in asked if refs(message)]
    chosen = next(filter(is_plain, with_media), None) or next(filter(is_plain, asked), None)
    if chosen is not None:
        return arguments_of(chosen, question_text(chosen))
    longer = next(iter(with_media or asked), Message(USER, ()))
    return arguments_of(longer, shortened(question_text(longer)))


def first_questions(records: Iterator[Record]) -> Iterator[Message]:
    """The first message of the user in each record: later ones refer to it."""
    return (next(message for message in record.messages if message.role == USER) for record in records)


def is_plain(message: Message) -> bool:
    """Whether the question can be read and typed as it is."""
    text = question_text(message)
    return shortened(text) == text and text.isprintable() and masked(text) == text and len(refs(message)) <= MOST_MEDIA


def question_text(message: Message) -> str:
    """The text, with a placeholder for each item unless all come first and in the order of the flags."""
    media = refs(message)
    if list(message.parts[: len(media)]) == sorted(media, key=lambda ref: list(MEDIA).index(ref.modality)):
        return message.text.strip()
    return "".join(part if isinstance(part, str) else f"<{part.modality}>" for part in message.parts).strip()


def arguments_of(message: Message, question: str) -> list[str]:
    found = [word for ref in refs(message) for word in (f"--{ref.modality}", file_of(ref))]
    return [*found, question]


def refs(message: Message) -> list[MediaRef]:
    return [part for part in message.parts if isinstance(part, MediaRef)]


def file_of(ref: MediaRef) -> str:
    """Its path, if it is a file that a person can name."""
    return ref.source if ref.row is None and ref.source.isprintable() and Path(ref.source).is_absolute() else FILE


def shortened(question: str) -> str:
    """In one line of at most LONGEST characters, and not like a flag; QUESTION if nothing is left."""
    line = " ".join(printable(masked(question)).split()).lstrip("-")
    return (line if len(line) <= LONGEST else f"{line[: LONGEST - 3].rstrip()}...") or QUESTION
