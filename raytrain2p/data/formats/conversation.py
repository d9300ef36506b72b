"""Turns of a conversation: shared by the formats that have them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raytrain2p.data.formats.row import Row, present, shown
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, SYSTEM, USER, Message

ROLES = {"user": USER, "human": USER, "assistant": ASSISTANT, "gpt": ASSISTANT, "system": SYSTEM, "developer": SYSTEM}
Turn = tuple[str, Any, str]  # role, content, place of the content


def read_turns(row: Row, key: str, role_key: str, content_key: str) -> list[Turn]:
    """The turns in a list of `{role_key, content_key}`; none of them, and problems, if one is bad."""
    turns = row.fields.get(key)
    if turns is None:
        row.bad(f"has no `{key}`")
        return []
    if not isinstance(turns, list) or not turns:
        row.bad(f"`{key}` is {'empty' if turns == [] else f'a {type(turns).__name__}'}, required is a list of messages")
        return []
    read: list[Turn] = []
    for number, turn in enumerate(turns):
        place = f"{key}.{number}"
        if not isinstance(turn, Mapping):
            row.bad(f"`{place}` is a {type(turn).__name__}, required is a JSON object", cause=f"`{key}` holds something else")
            continue
        turn = present(turn)
        row.check_keys(turn, (role_key, content_key), place)
        name, content = turn.get(role_key), turn.get(content_key)
        role = ROLES.get(name) if isinstance(name, str) else None
        if role is None:
            found = f"has the unknown role {shown(name)}" if name is not None else f"has no `{role_key}`"
            row.bad(f"`{place}` {found}", f"roles are {', '.join(ROLES)}", f"unknown role {shown(name)}")
        elif content is None:
            row.bad(f"`{place}` has no `{content_key}`", cause=f"`{key}` has no `{content_key}`")
        else:
            read.append((role, content, f"{place}.{content_key}"))
    return read if len(read) == len(turns) else []


def check_order(row: Row, turns: Sequence[Turn], answered: bool) -> None:
    """Report turns that do not alternate, from the user to the assistant, after an optional system message."""
    roles = [role for role, _, _ in turns]
    first = 1 if roles[:1] == [SYSTEM] else 0
    for number, role in enumerate(roles[first:], first):
        expected = (USER, ASSISTANT)[(number - first) % 2]
        if role != expected:
            what = f"message {number} is of the {role}, required is one of the {expected}"
            row.bad(what, "user and assistant take turns, and the user begins", f"{role} in place of {expected}")
            return
    if roles[first:] and answered and roles[-1] == USER:
        row.bad("ends with a message of the user", "end with the answer of the assistant")
    elif not roles[first:]:
        row.bad("has no message of the user")


def place_media(row: Row, turns: Sequence[Turn], media: Mapping[str, Sequence[MediaRef | None]]) -> list[Message]:
    """Messages of turns whose content is text, with media in place of their placeholders."""
    placeholders = row.file.placeholders
    used: Counter[str] = Counter()
    messages = []
    for role, text, place in turns:
        if not row.is_text(text, place):
            continue
        if "<" not in text or not placeholders.search(text):
            messages.append(Message(role, (text,)))
            continue
        if role != USER:
            check_literal(row, text, place)
            continue
        parts: list[str | MediaRef] = []
        end = 0
        for match in placeholders.finditer(text):
            modality = match[0][1:-1]
            items = media.get(modality, ())
            item = items[used[modality]] if used[modality] < len(items) else None
            used[modality] += 1
            parts += [part for part in (text[end : match.start()], item) if part]
            end = match.end()
        messages.append(Message(role, tuple([*parts, text[end:]] if text[end:] else parts)))
    if len(messages) == len(turns):
        for modality in row.file.modalities:
            if used[modality] != (given := len(media.get(modality, ()))):
                what = f"has {used[modality]} placeholders `<{modality}>` for {given} media of this kind"
                row.bad(what, "write one placeholder in the text for each, in order", f"placeholders `<{modality}>` and media differ")
    return messages


def check_literal(row: Row, text: str, place: str) -> None:
    """Report a placeholder in a text that has no media."""
    if "<" in text and (match := row.file.placeholders.search(text)):
        fix = "media belong to the user; write it differently if it is meant as text"
        row.bad(f"`{place}` has the placeholder `{match[0]}`", fix, f"placeholder `{match[0]}` in a text without media")


def check_alignment(row: Row, messages: Sequence[Message]) -> None:
    """Report a record of phase 1 without media, or with several items of one modality."""
    counts = Counter(part.modality for message in messages for part in message.parts if isinstance(part, MediaRef))
    if not counts:
        row.bad("has no media", "phase 1 aligns what the assistant says with an item of another modality")
    for modality, count in counts.items():
        if count > 1:
            row.bad(f"has {count} items of `{modality}`", "phase 1 takes one of each modality per record", f"several of `{modality}`")
