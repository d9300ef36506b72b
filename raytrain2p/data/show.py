"""Records as the model will see them, for a person to read: `data show`."""

from collections.abc import Iterator

from raytrain2p.data.chat import ChatFormat, Encoded, soft_codes
from raytrain2p.data.records import Record

LEGEND = "⟦ ⟧ is learnt; ⟨ ⟩ are the soft tokens of an item"


def show_pair(record: Record) -> str:
    """A record of phase 1: the items that are aligned."""
    items = [f"  {modality:6} {item}" for modality, item in record.by_modality().items()]
    return "\n".join([record.where, *items, *([f"  concept {record.concept}"] if record.concept else [])])


def show_messages(record: Record, encoded: Encoded, chat: ChatFormat) -> str:
    """A record of phase 2: its tokens as text, with what is learnt and the media marked."""
    soft, learnt = sum(token < 0 for token in encoded.ids), sum(encoded.supervised)
    head = f"{record.where} ({record.task}): {len(encoded.ids)} tokens, of them {soft} soft and {learnt} learnt"
    return f"{head}\n{''.join(_marked(record, encoded, chat))}"


def _marked(record: Record, encoded: Encoded, chat: ChatFormat) -> Iterator[str]:
    """The text piece by piece."""
    modalities = {code: modality for modality, code in soft_codes(chat.soft_tokens).items()}
    media, start = record.media(), 0
    while start < len(encoded.ids):
        if (modality := modalities.get(encoded.ids[start])) is not None:
            ref = next(media)
            yield f"⟨{ref.modality} {ref}: {chat.soft_tokens[modality]} tokens⟩"
            start += chat.soft_tokens[modality]
            continue
        end = start
        while end < len(encoded.ids) and encoded.ids[end] >= 0 and encoded.supervised[end] == encoded.supervised[start]:
            end += 1
        text = chat.tokenizer.decode(encoded.ids[start:end])
        yield f"⟦{text}⟧" if encoded.supervised[start] else text
        start = end
