"""LLaVA's conversations. https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md"""

from raytrain2p.data.formats.conversation import check_order, place_media, read_turns
from raytrain2p.data.formats.format import COMMON, Example, Format
from raytrain2p.data.formats.row import Row
from raytrain2p.data.media import MEDIA
from raytrain2p.data.records import Message

CONVERSATIONS = "conversations"
UNUSED = ("model", "data_source")  # in the published files


def _read(row: Row, answered: bool) -> list[Message]:
    media = row.media_lists({modality: modality for modality in row.file.modalities})
    if turns := read_turns(row, CONVERSATIONS, "from", "value"):
        check_order(row, turns, answered)
    return place_media(row, turns, media) if turns else []


ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWERED = {"from": "gpt", "value": "A cat."}

FORMAT = Format(
    name="llava",
    description="conversations as LLaVA writes them: `<image>` stands where the file in `image` goes, or the next file of a list",
    phases=(1, 2),
    keys=lambda: (CONVERSATIONS, *MEDIA, *COMMON, *UNUSED),
    marks=lambda: (CONVERSATIONS,),
    read=_read,
    examples=(
        Example(
            {"id": "1", "image": "cat.png", "conversations": [ASKED, ANSWERED]},
            ("user: [cat.png]\nWhat is it?", "assistant: A cat."),
        ),
        Example(
            {
                "image": ["cat.png", "dog.png"],
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    ASKED,
                    ANSWERED,
                    {"from": "human", "value": "And <image>?"},
                    {"from": "gpt", "value": "A dog."},
                ],
            },
            ("system: Be brief.", "user: [cat.png]\nWhat is it?", "assistant: A cat.", "user: And [dog.png]?", "assistant: A dog."),
        ),
        Example({"conversations": [ASKED, ANSWERED]}, problem="has 1 placeholders `<image>` for 0 media"),
        Example({"image": ["cat.png", "dog.png"], "conversations": [ASKED, ANSWERED]}, problem="has 1 placeholders `<image>` for 2 media"),
        Example({"conversations": [ANSWERED]}, problem="message 0 is of the assistant, required is one of the user"),
    ),
)
