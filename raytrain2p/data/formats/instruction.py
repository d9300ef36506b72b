"""Instructions: one question and its answer, for phase 2."""

from raytrain2p.data.formats.conversation import place_media
from raytrain2p.data.formats.format import ID, TASK, Example, Format
from raytrain2p.data.formats.row import Row
from raytrain2p.data.media import MEDIA, MediaRef
from raytrain2p.data.records import ASSISTANT, USER, Message

INSTRUCTION, RESPONSE = "instruction", "response"
NEEDED = "records need `instruction` and `response`"


def _read(row: Row, answered: bool) -> list[Message]:
    media = row.media_lists({modality: modality for modality in row.file.modalities})
    instruction = row.text(INSTRUCTION, NEEDED)
    response = row.text(RESPONSE, NEEDED) if answered or RESPONSE in row.fields else None
    if instruction is None:
        return []
    asked, answer = (USER, instruction, INSTRUCTION), (ASSISTANT, response, RESPONSE)
    turns = [turn for turn in (asked, answer) if turn[1] is not None]
    if media and not row.file.placeholders.search(instruction):
        first = tuple(ref for items in media.values() for ref in items if isinstance(ref, MediaRef))
        _, *rest = place_media(row, turns, {})
        return [Message(USER, (*first, instruction)), *rest]
    return place_media(row, turns, media)


FORMAT = Format(
    name="instruction",
    description="a question and its answer; media come first unless placeholders in the question say where",
    phases=(2,),
    keys=lambda: (INSTRUCTION, RESPONSE, *MEDIA, ID, TASK),
    marks=lambda: (INSTRUCTION, RESPONSE),
    read=_read,
    examples=(
        Example(
            {"instruction": "What is it?", "response": "A cat.", "image": "cat.png", "task": "name"},
            ("user: [cat.png]What is it?", "assistant: A cat."),
        ),
        Example({"instruction": "Say hello.", "response": "Hello."}, ("user: Say hello.", "assistant: Hello.")),
        Example(
            {"instruction": "First <image>, then <image>: which barks?", "response": "The second.", "image": ["cat.png", "dog.png"]},
            ("user: First [cat.png], then [dog.png]: which barks?", "assistant: The second."),
        ),
        Example(
            {"instruction": "Are both the same animal?", "response": "Yes.", "image": "cat.png", "audio": ["meow.wav"]},
            ("user: [cat.png][meow.wav]Are both the same animal?", "assistant: Yes."),
        ),
        Example({"instruction": "What is it?", "image": "cat.png"}, problem="has no `response`"),
        Example({"instruction": "<image> What is it?", "response": "A cat."}, problem="has 1 placeholders `<image>` for 0 media"),
        Example({"instruction": "Hi", "response": "Hello", "images": ["cat.png"]}, problem="has the unknown key `images`"),
    ),
)
