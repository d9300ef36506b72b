"""What phase 1 knows an item by, as soft tokens: the words of its likeliest texts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Recall(nn.Module):
    """A vector of the shared space to the embeddings of the words that it stands for.

    Phase 1 learns which text belongs to an item. Here the texts are those that phase 1 was trained with, and each is given by the language
    model's embeddings of its first tokens; those of the nearest texts, one text after the other, are what the language model reads. That is
    a key-value memory as in Tip-Adapter (arXiv:2111.03930), whose values are words. Nothing of it is learnt in phase 2.

    Phase 1 has nearly learnt by heart which text belongs to an item of its training set. A language model that always reads the right text
    learns to look at nothing else, so in training the nearest one may be left out now and then.

    Shape letters as in `assistant.py`, and N known texts, of which C are read, R tokens of each.

    Args:
        dimension: S.
        known: N, more than C.
        tokens: R.
        texts: C.
    """

    keys: torch.Tensor
    token_ids: torch.Tensor

    def __init__(self, dimension: int, known: int, tokens: int, texts: int) -> None:
        super().__init__()
        self.texts, self.tokens = texts, texts * tokens
        self.dropout = 0.0  # how often the nearest text is left out in training
        self.register_buffer("keys", torch.zeros(known, dimension))  # unit vectors
        self.register_buffer("token_ids", torch.zeros(known, tokens, dtype=torch.int64))

    def fill(self, vectors: torch.Tensor, texts: Sequence[str], tokenizer: Any, end: int) -> None:
        """Take over what phase 1 has learnt.

        Args:
            vectors: unit vectors of the texts, (N, S).
            tokenizer: of the language model.
            end: token that fills up shorter texts.
        """
        # a text begins like a word amid a sentence; what looks like a special token in it is text
        ids = tokenizer([f" {text}" for text in texts], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        length = self.token_ids.shape[1]
        self.token_ids.copy_(torch.tensor([(one + [end] * length)[:length] for one in ids]))
        self.keys.copy_(vectors)

    @torch.no_grad()
    def forward(self, vectors: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """Unit vectors (P, S) to soft tokens (P, C * R, E), the nearest text's first, through the language model's embedding layer."""
        with torch.autocast(vectors.device.type, enabled=False):  # which is nearest may hang on less than bfloat16 can tell apart
            nearest = (vectors.float() @ self.keys.float().T).topk(self.texts + 1).indices
        first = torch.zeros(len(vectors), 1, dtype=torch.int64, device=vectors.device)
        if self.training and self.dropout:
            first += torch.rand_like(first, dtype=torch.float32) < self.dropout
        read = nearest.gather(1, first + torch.arange(self.texts, device=vectors.device))
        return embedding(self.token_ids[read]).flatten(1, 2)
