"""Records of phase 2 to tokens: those that fit the context, and what becomes of the others."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raytrain2p.config import Findings, InputError, Problem
from raytrain2p.data.chat import ChatFormat, Encoded, soft_codes
from raytrain2p.data.records import ASSISTANT, Record
from raytrain2p.data.tokens import TokenRecords, truncated
from raytrain2p.phases.inputs import SourceShare


@dataclass(frozen=True)
class Tokenized:
    """Records that fit the context, their tokens, which ones they are, and a line about the others."""

    tokens: TokenRecords
    records: list[Record]
    kept: list[int]
    notes: tuple[str, ...]


def tokenize(records: list[Record], chat: ChatFormat, limit: int, too_long: str, setting: str) -> Tokenized:
    """Tokens of all records that fit.

    Args:
        limit: tokens of the longest record.
        too_long: what becomes of longer ones, see data.too_long.
        setting: of the records, for the note about them.

    Raises:
        InputError: answers without a token, templates that cannot render a record, and records that are too long.
    """
    findings = Findings()
    packed, kept, fitting, cut, dropped = [], [], [], 0, 0
    for number, record, one in chat.encode_each(records, findings):
        if len(one.ids) > limit:
            if too_long == "error":
                what = f"is {len(one.ids)} tokens long (soft tokens included), the limit is {limit}"
                fix = "shorten the record, set data.too_long, or raise model.max_length if the language model's context allows it"
                findings.add(Problem(record.where, what, fix, cause=f"is longer than {limit} tokens (soft tokens included)"))
            shorter = truncated(one, limit) if too_long == "truncate" else None
            if shorter is None:
                dropped += 1
                continue
            if chat.loss_on == "all":
                record = shortened(record, shorter)
            one, cut = shorter, cut + 1
        packed.append(one.packed())
        kept.append(number)
        fitting.append(record)
    findings.raise_any()
    notes = [
        f"{setting}: {count:,} records longer than {limit} tokens {what}" for count, what in ((cut, "cut"), (dropped, "left out")) if count
    ]
    if not kept:
        raise InputError(Problem(setting, f"no record fits into {limit} tokens", "raise model.max_length, or set data.too_long=truncate"))
    return Tokenized(TokenRecords.joined(packed, soft_codes(chat.soft_tokens)), fitting, kept, tuple(notes))


def shortened(record: Record, encoded: Encoded) -> Record:
    """The record without the turns after the last answer in its tokens."""
    answers = sum(now and not before for before, now in zip([False, *encoded.supervised], encoded.supervised, strict=False))
    ends = [place for place, message in enumerate(record.messages, 1) if message.role == ASSISTANT]
    return replace(record, messages=record.messages[: ends[answers - 1]])


def kept_shares(shares: Sequence[SourceShare], kept: Sequence[int]) -> tuple[SourceShare, ...]:
    """The sources without the records that were left out."""
    ends = np.cumsum([share.records for share in shares])
    counts = np.bincount(np.searchsorted(ends, kept, side="right"), minlength=len(shares))
    return tuple(SourceShare(int(count), share.weight) for count, share in zip(counts, shares, strict=True))
