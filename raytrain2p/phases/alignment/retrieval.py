"""Recall at k for retrieval between the modalities, where several items may belong to one concept."""

from math import comb

import numpy as np

RANKS = (1, 5)


def chance(candidates: int, right: int, k: int) -> float:
    """Probability that at least one right candidate is among k drawn without replacement (hypergeometric distribution)."""
    return 1 - comb(candidates - right, k) / comb(candidates, min(k, candidates)) if k < candidates else 1.0


def retrieval_metrics(queries: np.ndarray, candidates: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Recall at 1 and 5, as fractions, and the recall of random retrieval.

    Args:
        queries: unit vectors (Q, S).
        candidates: unit vectors (C, S).
        right: which candidates a query should find, (Q, C); queries without any are left out.
    """
    queries, right = queries[right.any(axis=1)], right[right.any(axis=1)]
    if not len(queries):
        return {}
    order = np.argsort(-(queries @ candidates.T), axis=1, kind="stable")[:, : max(RANKS)]
    found = np.take_along_axis(right, order, axis=1)
    metrics: dict[str, float] = {}
    for k in RANKS:
        metrics[f"recall_at_{k}"] = float(found[:, :k].any(axis=1).mean())
        metrics[f"chance_at_{k}"] = float(np.mean([chance(len(candidates), count, k) for count in right.sum(axis=1).tolist()]))
    return metrics
