"""Token records as flat arrays, and padded batches of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raytrain2p.data.batches import Ragged
from raytrain2p.data.chat import Encoded, Packed


@dataclass(frozen=True)
class TokenRecords:
    """The records of a split in tokens.

    Args:
        ids: int32; soft tokens are negative.
        supervised: bool, as long as `ids`.
        prompts: tokens before the last answer, (N,).
        codes: the ID that stands for a soft token of each modality.
    """

    ids: Ragged
    supervised: Ragged
    prompts: np.ndarray
    codes: Mapping[str, int]

    @classmethod
    def of(cls, records: Iterable[Encoded], codes: Mapping[str, int]) -> "TokenRecords":
        """Flat arrays of `records`."""
        return cls.joined([one.packed() for one in records], codes)

    @classmethod
    def joined(cls, records: Sequence[Packed], codes: Mapping[str, int]) -> "TokenRecords":
        """Flat arrays of packed records."""
        ids, supervised, prompts = zip(*records, strict=True) if records else ((), (), ())
        return cls(Ragged(ids), Ragged(supervised, bool), np.array(prompts, np.int64), codes)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per record, soft ones included, (N,)."""
        return self.ids.lengths

    @property
    def supervised_counts(self) -> np.ndarray:
        """Supervised tokens per record, (N,)."""
        total = np.concatenate([[0], np.cumsum(self.supervised.flat)])
        return total[self.supervised.ends] - total[self.supervised.starts]


def truncated(record: Encoded, limit: int) -> Encoded | None:
    """What is within the first `limit` tokens, up to the last supervised one; None if there is none. No item is cut: answers hold none."""
    supervised = record.supervised[:limit]
    if True not in supervised:
        return None
    end = len(supervised) - supervised[::-1].index(True)
    prompt = record.prompt
    if prompt >= end:  # the last answer is gone: the one that is the last now
        prompt = end - [*supervised[end - 1 :: -1], False].index(False)
    return Encoded(record.ids[:end], supervised[:end], prompt)


def right_padded(tokens: TokenRecords, records: np.ndarray) -> dict[str, Any]:
    """Whole records: input_ids (B, L), and places in them: those of `soft` tokens by modality, and those, `supervised`, after which a token
    of `targets` is to be learnt, (M,). A place is row * L + column; they are found here, since to find them on a GPU makes Python wait.

    There is no attention mask: no token looks at what is behind it, and padding is. Padding is told by length, never by token ID: if the
    pad token is the end token, the end must still be learnt.
    """
    lengths = tokens.lengths[records]
    ids, index, inside = _padded(tokens, records, lengths, np.zeros_like(lengths))
    learnt = inside & tokens.supervised.flat[index]
    learnt[:, 0] = False  # nothing is before it
    places = np.flatnonzero(learnt)
    return _tensors(ids, tokens.codes) | {"supervised": torch.from_numpy(places - 1), "targets": torch.from_numpy(ids.flat[places])}


def left_padded(tokens: TokenRecords, records: np.ndarray) -> dict[str, Any]:
    """Prompts of the last answers alone, all ending in the last column, where generation continues: input_ids and attention (B, L), which
    is 0 at padding, and the places of `soft` tokens.
    """
    lengths = tokens.prompts[records]
    ids, _, inside = _padded(tokens, records, lengths, lengths.max() - lengths)
    return _tensors(ids, tokens.codes) | {"attention": torch.from_numpy(inside.astype(np.int64))}


def _padded(tokens: TokenRecords, records: np.ndarray, lengths: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first `lengths` tokens of each record, from column `first` on: IDs, their places in the flat array, and where there are any."""
    columns = np.arange(lengths.max()) - first[:, None]
    inside = (columns >= 0) & (columns < lengths[:, None])
    index = np.where(inside, tokens.ids.starts[records][:, None] + columns, 0)
    return np.where(inside, tokens.ids.flat[index], 0).astype(np.int64), index, inside


def _tensors(ids: np.ndarray, codes: Mapping[str, int]) -> dict[str, Any]:
    soft = {modality: torch.from_numpy(np.flatnonzero(ids == code)) for modality, code in codes.items()}
    ids[ids < 0] = 0  # any valid ID: the soft token's embedding replaces it
    return {"input_ids": torch.from_numpy(ids), "soft": soft}
