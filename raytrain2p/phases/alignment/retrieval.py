"""Recall at k for retrieval between the modalities, where several items may belong to one concept."""

from math import comb
from typing import Any

import numpy as np
from scipy.sparse import csr_array

RANKS = (1, 5)
QUERIES_AT_ONCE = 256


def chance(candidates: int, right: int, k: int) -> float:
    """Probability that at least one right candidate is among k drawn without replacement (hypergeometric distribution)."""
    return 1 - comb(candidates - right, k) / comb(candidates, min(k, candidates)) if k < candidates else 1.0


def retrieval_metrics(queries: np.ndarray, candidates: np.ndarray, right: Any) -> dict[str, float]:
    """Recall at 1 and 5, as fractions, and the recall of random retrieval.

    Args:
        queries: unit vectors (Q, S).
        candidates: unit vectors (C, S).
        right: which candidates a query should find, (Q, C), not 0, an array or a sparse one; queries without any are left out.
    """
    right = csr_array(right, dtype=bool)
    counts = np.diff(right.indptr)
    asked = np.flatnonzero(counts)
    if not len(asked):
        return {}
    found = np.zeros((len(asked), max(RANKS)), bool)
    for start in range(0, len(asked), QUERIES_AT_ONCE):
        block = asked[start : start + QUERIES_AT_ONCE]
        scores, belongs, rows = queries[block] @ candidates.T, right[block].toarray(), np.arange(len(block))
        for rank in range(min(max(RANKS), len(candidates))):
            best = scores.argmax(axis=1)  # of equal ones the first
            found[start + rows, rank] = belongs[rows, best]
            scores[rows, best] = -np.inf
    sizes, times = np.unique(counts[asked], return_counts=True)
    metrics: dict[str, float] = {}
    for k in RANKS:
        metrics[f"recall_at_{k}"] = float(found[:, :k].any(axis=1).mean())
        metrics[f"chance_at_{k}"] = float(np.average([chance(len(candidates), int(size), k) for size in sizes], weights=times))
    return metrics
