"""Recall at k for retrieval between images and texts, where one text may describe several images."""

from math import comb

import numpy as np

RANKS = (1, 5)


def chance(candidates: int, right: int, k: int) -> float:
    """Probability that at least one right candidate is among k drawn without replacement (hypergeometric distribution)."""
    return 1 - comb(candidates - right, k) / comb(candidates, min(k, candidates)) if k < candidates else 1.0


def retrieval_metrics(images: np.ndarray, texts: np.ndarray, keys: np.ndarray) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, as fractions, and the recall of random retrieval.

    From image to text, the candidates are the distinct texts: one is right. From text to image, the candidates are
    all images, and each image of that text is right.

    Args:
        images: unit vectors (N, S).
        texts: unit vectors (N, S); rows of equal texts are equal.
        keys: (N,), equal where the texts are.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    similarity = images @ texts[first].T  # (images, distinct texts)
    right = inverse[:, None] == np.arange(len(first))[None, :]
    metrics: dict[str, float] = {}
    for direction, scores, hits in (("", similarity, right), ("text_to_image_", similarity.T, right.T)):
        order = np.argsort(-scores, axis=1, kind="stable")[:, : max(RANKS)]
        found = np.take_along_axis(hits, order, axis=1)
        for k in RANKS:
            metrics[f"{direction}recall_at_{k}"] = float(found[:, :k].any(axis=1).mean())
            metrics[f"{direction}chance_at_{k}"] = float(np.mean([chance(len(row), int(row.sum()), k) for row in hits]))
    return metrics
