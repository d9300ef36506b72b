"""ShareGPT's conversations beside lists of media, as LLaMA-Factory reads them, and `messages` beside such lists, as TRL does.

https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

from collections.abc import Mapping
from typing import Any

from raytrain2p.data.formats.conversation import check_order, place_media, read_turns
from raytrain2p.data.formats.format import COMMON, Example, Format
from raytrain2p.data.formats.row import Row, present
from raytrain2p.data.media import MEDIA, TEXT
from raytrain2p.data.records import SYSTEM, Message

CONVERSATIONS, MESSAGES = "conversations", "messages"


def _read(row: Row, answered: bool) -> list[Message]:
    media = row.media_lists({modality: f"{modality}s" for modality in row.file.modalities}, one=False)
    if MESSAGES in row.fields:
        turns = [(role, _joined(content), place) for role, content, place in read_turns(row, MESSAGES, "role", "content")]
        if CONVERSATIONS in row.fields:
            row.bad(f"has both `{CONVERSATIONS}` and `{MESSAGES}`", "leave one of them out")
    else:
        turns = read_turns(row, CONVERSATIONS, "from", "value")
    if not turns:
        return []
    if system := row.fields.get(SYSTEM):  # LLaMA-Factory leaves it empty where there is none
        turns.insert(0, (SYSTEM, system, SYSTEM))
    check_order(row, turns, answered)
    return place_media(row, turns, media)


def _joined(content: Any) -> Any:
    """The text of parts `{"type": "text", "text"}` and `{"type": "image"}`, which is a placeholder; anything else as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        fields = {key: value for key, value in present(part).items() if key != "index"} if isinstance(part, Mapping) else {}
        if fields.get("type") in tuple(MEDIA) and len(fields) == 1:  # a tuple: what it is compared with may be anything
            texts.append(f"<{fields['type']}>")
        elif fields.get("type") == TEXT and isinstance(fields.get(TEXT), str) and len(fields) == 2:
            texts.append(fields[TEXT])
        else:
            return content
    return "".join(texts)


ASKED = {"from": "human", "value": "<image>What is it?"}
ANSWERED = {"from": "gpt", "value": "A cat."}

FORMAT = Format(
    name="sharegpt",
    description="conversations beside lists `images`, `audios`: each placeholder in the text stands for the next item of its list",
    phases=(1, 2),
    keys=lambda: (CONVERSATIONS, MESSAGES, SYSTEM, *(f"{modality}s" for modality in MEDIA), *COMMON),
    marks=lambda: (CONVERSATIONS, MESSAGES),
    read=_read,
    examples=(
        Example(
            {"conversations": [ASKED, ANSWERED], "images": ["cat.png"], "system": "Be brief."},
            ("system: Be brief.", "user: [cat.png]What is it?", "assistant: A cat."),
        ),
        Example(
            {
                "messages": [{"role": "user", "content": "<audio>Is this <image>?"}, {"role": "assistant", "content": "Yes."}],
                "images": ["cat.png"],
                "audios": ["meow.wav"],
            },
            ("user: [meow.wav]Is this [cat.png]?", "assistant: Yes."),
        ),
        Example(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "index": 0, "text": None}, {"type": "text", "text": "What is it?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
                ],
                "images": ["cat.png"],
            },
            ("user: [cat.png]What is it?", "assistant: A cat."),
        ),
        Example({"conversations": [ASKED, ANSWERED], "images": []}, problem="has 1 placeholders `<image>` for 0 media"),
        Example({"conversations": [ASKED, ANSWERED], "images": "cat.png"}, problem="`images` is a str, required is a list"),
        Example({"conversations": [ASKED], "images": ["cat.png"]}, problem="ends with a message of the user"),
    ),
)
