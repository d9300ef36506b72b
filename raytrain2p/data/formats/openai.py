"""Messages of OpenAI's chat API, whose content is text or a list of parts. https://platform.openai.com/docs/api-reference/chat/create"""

from collections.abc import Mapping
from typing import Any

from raytrain2p.data.formats.conversation import check_literal, check_order, read_turns
from raytrain2p.data.formats.format import COMMON, Example, Format
from raytrain2p.data.formats.row import Row, present, shown
from raytrain2p.data.media import TEXT, MediaRef
from raytrain2p.data.records import USER, Message

MESSAGES = "messages"
TYPE = "type"


def _read(row: Row, answered: bool) -> list[Message]:
    turns = read_turns(row, MESSAGES, "role", "content")
    if turns:
        check_order(row, turns, answered)
    messages = []
    for role, content, place in turns:
        found: list[str | MediaRef | None]
        if isinstance(content, list):
            found = [_part(row, part, f"{place}.{index}", role) for index, part in enumerate(content)]
        else:
            found = [_text(row, content, place)]
        parts = tuple(part for part in found if part is not None)
        if len(parts) == len(found) and not any(isinstance(part, MediaRef) or part.strip() for part in parts):
            row.bad(f"`{place}` is empty", cause="`content` is empty")
        messages.append(Message(role, parts))
    return messages


def _text(row: Row, text: Any, place: str) -> str | None:
    if not row.is_text(text, place, may_be_empty=True):  # a line break between two images, for example
        return None
    check_literal(row, text, place)
    return str(text)


def _part(row: Row, part: Any, place: str, role: str) -> str | MediaRef | None:
    if not isinstance(part, Mapping):
        row.bad(f"`{place}` is a {type(part).__name__}, required is a JSON object", cause="a part of `content` is not a JSON object")
        return None
    fields = present(part)
    modality_of = {name: modality for modality in row.file.modalities for name in (f"{modality}_url", f"input_{modality}", modality)}
    kind = fields.get(TYPE)
    if kind == "input_text":  # of the Responses API
        kind = TEXT
    if kind == TEXT:
        text = _inside(row, fields, (TEXT, TYPE), place)
        return None if text is None else _text(row, text, f"{place}.{TEXT}")
    if not isinstance(kind, str) or kind not in modality_of:
        found = "without a type" if kind is None else f"of the unknown type {shown(kind)}"
        row.bad(f"`{place}` is a part {found}", f"types are {', '.join([TEXT, *modality_of])}", f"a part {found}")
        return None
    if role != USER:
        row.bad(f"`{place}` is media in a message of the {role}", "media belong to the user", f"media of the {role}")
    modality = modality_of[kind]
    key = f"{modality}_url" if kind == f"input_{modality}" and kind not in fields and f"{modality}_url" in fields else kind  # as above
    value = _inside(row, fields, (key, TYPE), place)
    return None if value is None else _media(row, modality, key, value, f"{place}.{key}")


def _media(row: Row, modality: str, kind: str, value: Any, place: str) -> MediaRef | None:
    if not isinstance(value, Mapping) or kind == modality:
        return row.media(modality, value, place)  # many write a URL without the object around it; Qwen2-VL's {"type": "image", "image"}
    key, *_ = keys = ("data", "format") if kind.startswith("input_") else ("url", "detail")
    content = _inside(row, present(value), keys, place)
    if content is None:
        return None
    if key == "url" or not isinstance(content, str) or content.startswith("data:"):
        return row.media(modality, content, f"{place}.{key}")
    return row.embedded(modality, content, f"{place}.{key}")


def _inside(row: Row, fields: Mapping[str, Any], keys: tuple[str, str], place: str) -> Any:
    """The value of the first key, which is required; the second may be absent, and others are bad."""
    row.check_keys(fields, keys, place)
    if keys[0] not in fields:
        row.bad(f"`{place}` has no `{keys[0]}`", cause=f"a part of `content` has no `{keys[0]}`")
    return fields.get(keys[0])


ANSWER = {"role": "assistant", "content": "A cat."}

FORMAT = Format(
    name="openai",
    description="messages as in OpenAI's chat API, with text, image_url (a data URL or a file) and input_audio (base64) as parts",
    phases=(1, 2),
    keys=lambda: (MESSAGES, *COMMON),
    marks=lambda: (MESSAGES,),
    read=_read,
    examples=(
        Example(
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": "cat.png"}}],
                    },
                    ANSWER,
                ]
            },
            ("system: Be brief.", "user: What is it?[cat.png]", "assistant: A cat."),
        ),
        Example(
            {
                "messages": [
                    {"role": "developer", "content": "Be brief."},
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_image", "image_url": "cat.png"},
                            {"type": "image", "image": "dog.png"},
                            {"type": "input_text", "text": "Which are they?"},
                        ],
                    },
                    ANSWER,
                ]
            },
            ("system: Be brief.", "user: [cat.png][dog.png]Which are they?", "assistant: A cat."),
        ),
        Example({"messages": [{"role": "user", "content": "Name a pet."}, ANSWER]}, ("user: Name a pet.", "assistant: A cat.")),
        Example(
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}]},
                    ANSWER,
                ]
            },
            problem="`messages.0.content.0.image_url.url` is at an address",
        ),
        Example(
            {"messages": [{"role": "user", "content": "<image> What is it?"}, ANSWER]},
            problem="`messages.0.content` has the placeholder `<image>`",
        ),
        Example({"messages": [{"role": "tool", "content": "{}"}, ANSWER]}, problem="`messages.0` has the unknown role `tool`"),
    ),
)
