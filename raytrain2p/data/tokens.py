"""Token records as flat arrays, and padded batches of them."""

from dataclasses import dataclass

import numpy as np
import torch

from raytrain2p.data.batches import Ragged
from raytrain2p.data.chat import SOFT

IGNORED = -100  # torch's cross entropy leaves out positions with this label


@dataclass(frozen=True)
class TokenRecords:
    """Prompts and responses of a split, in tokens; SOFT is in place of soft tokens."""

    prompts: Ragged
    responses: Ragged

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per record, soft ones included."""
        return self.prompts.lengths + self.responses.lengths


def right_padded(tokens: TokenRecords, records: np.ndarray) -> dict[str, torch.Tensor]:
    """Prompt and response of each record, (B, L): input_ids, attention, soft, and labels on the response only.

    Padding is masked by length, never by token ID: if the pad token is the end token, the end must still be learnt.
    """
    width = int(tokens.lengths[records].max())
    ids = np.zeros((len(records), width), np.int64)
    attention = np.zeros((len(records), width), np.int64)
    labels = np.full((len(records), width), IGNORED, np.int64)
    for row, record in enumerate(records):
        prompt, response = tokens.prompts[record], tokens.responses[record]
        end = len(prompt) + len(response)
        ids[row, : len(prompt)], ids[row, len(prompt) : end] = prompt, response
        attention[row, :end] = 1
        labels[row, len(prompt) : end] = response
    return _tensors(ids, attention) | {"labels": torch.from_numpy(labels)}


def left_padded(tokens: TokenRecords, records: np.ndarray) -> dict[str, torch.Tensor]:
    """Prompts alone, (B, L), all ending in the last column, where generation continues."""
    width = int(tokens.prompts.lengths[records].max())
    ids = np.zeros((len(records), width), np.int64)
    attention = np.zeros((len(records), width), np.int64)
    for row, record in enumerate(records):
        prompt = tokens.prompts[record]
        ids[row, width - len(prompt) :] = prompt
        attention[row, width - len(prompt) :] = 1
    return _tensors(ids, attention)


def _tensors(ids: np.ndarray, attention: np.ndarray) -> dict[str, torch.Tensor]:
    soft = ids == SOFT
    ids[soft] = 0  # any valid ID: the soft token's embedding replaces it
    return {"input_ids": torch.from_numpy(ids), "attention": torch.from_numpy(attention), "soft": torch.from_numpy(soft)}
