"""Pairs: what belongs together, for phase 1."""

from raytrain2p.data.formats.conversation import check_literal
from raytrain2p.data.formats.format import CONCEPT, ID, Example, Format
from raytrain2p.data.formats.row import Row
from raytrain2p.data.media import MEDIA, TEXT, MediaRef
from raytrain2p.data.records import ASSISTANT, USER, Message


def _read(row: Row, answered: bool) -> list[Message]:
    given = [key for key in (TEXT, *row.file.modalities) if key in row.fields]
    if len(given) < 2:
        kinds = ", ".join(f"`{key}`" for key in (TEXT, *row.file.modalities))
        row.bad(f"has {f'only `{given[0]}`' if given else 'nothing to align'}", f"a pair has two or more of {kinds}")
    text = row.optional_text(TEXT)
    if text is not None:
        check_literal(row, text, TEXT)
    media = [row.media(modality, row.fields[modality], modality) for modality in given if modality != TEXT]
    messages = [Message(USER, tuple(ref for ref in media if isinstance(ref, MediaRef)))]
    return messages if text is None else [*messages, Message(ASSISTANT, (text,))]


FORMAT = Format(
    name="pair",
    description="a text and an image or a sound that belong together, or two such media",
    phases=(1,),
    keys=lambda: (TEXT, *MEDIA, ID, CONCEPT),
    marks=lambda: (TEXT, *MEDIA),
    read=_read,
    examples=(
        Example({"text": "a cat", "image": "cat.png"}, ("user: [cat.png]", "assistant: a cat")),
        Example({"text": "a cat", "audio": "meow.wav", "concept": "cat"}, ("user: [meow.wav]", "assistant: a cat")),
        Example({"image": "cat.png", "audio": "meow.wav"}, ("user: [cat.png][meow.wav]",)),
        Example({"text": "a cat"}, problem="has only `text`"),
        Example({"text": "a cat", "images": "cat.png", "image": "cat.png"}, problem="has the unknown key `images`"),
        Example({"text": "<image>", "image": "cat.png"}, problem="`text` has the placeholder `<image>`"),
    ),
)
