"""What phase 1 knows an item by, as soft tokens: its texts, each as likely as phase 1 finds it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Recall(nn.Module):
    """A vector of the shared space to the embeddings of the words that it stands for.

    Phase 1 learns how likely a text belongs to an item: the softmax, over texts, of scaled cosines (arXiv:2103.00020, figure 3). Here the
    texts are those that phase 1 was trained with, and each is given by the language model's embeddings of its first tokens; their mean,
    weighted by how likely each text is, is what the language model reads. That is a key-value memory as in Tip-Adapter (arXiv:2111.03930),
    whose values are words. Nothing of it is learnt in phase 2 but the scale.

    Phase 1 has nearly learnt by heart which text belongs to an item of its training set. A language model that always reads the right text
    learns to look at nothing else, so in training the likeliest one may be hidden now and then.

    Shape letters as in `assistant.py`, and N texts, R tokens of each.

    Args:
        texts: N.
        tokens: R.
        dimension: S.
    """

    keys: torch.Tensor
    token_ids: torch.Tensor

    def __init__(self, texts: int, tokens: int, dimension: int) -> None:
        super().__init__()
        self.tokens, self.dropout = tokens, 0.0  # how often the likeliest text is hidden in training
        self.register_buffer("keys", torch.zeros(texts, dimension))  # unit vectors
        self.register_buffer("token_ids", torch.zeros(texts, tokens, dtype=torch.int64))
        self.log_scale = nn.Parameter(torch.zeros(1))

    def fill(self, vectors: torch.Tensor, scale: float, texts: Sequence[str], tokenizer: Any, end: int) -> None:
        """Take over what phase 1 has learnt.

        Args:
            vectors: unit vectors of the texts, (N, S).
            scale: of the contrastive loss.
            tokenizer: of the language model.
            end: token that fills up shorter texts.
        """
        # a text begins like a word amid a sentence; what looks like a special token in it is text
        ids = tokenizer([f" {text}" for text in texts], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        self.token_ids.copy_(torch.tensor([(one + [end] * self.tokens)[: self.tokens] for one in ids]))
        self.keys.copy_(vectors)
        with torch.no_grad():
            self.log_scale.fill_(math.log(scale))

    def forward(self, vectors: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """Unit vectors (P, S) to soft tokens (P, R, E), through the language model's embedding layer."""
        with torch.autocast(vectors.device.type, enabled=False):  # bfloat16 has steps of a quarter at logits of 40
            logits = self.log_scale.float().exp() * vectors.float() @ self.keys.float().T
        if self.training and self.dropout:
            likeliest = nn.functional.one_hot(logits.argmax(dim=-1), len(self.keys)).bool()
            hidden = likeliest & (torch.rand(len(vectors), 1, device=vectors.device) < self.dropout)
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        likely = logits.softmax(dim=-1)
        with torch.no_grad():
            values = embedding(self.token_ids)
        return torch.einsum("pn,nre->pre", likely.to(values.dtype), values)
