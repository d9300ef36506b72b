"""Recall at k for retrieval between pictures and texts, where one text may describe several pictures."""

import numpy as np

RANKS = (1, 5)


def retrieval_metrics(images: np.ndarray, texts: np.ndarray, keys: np.ndarray) -> dict[str, float]:
    """Recall at 1 and 5 in both directions, as fractions, beside what chance gives.

    From picture to text, the candidates are the distinct texts: one is right. From text to picture, the candidates are
    all pictures, and each picture of that text is right.

    Args:
        images: unit vectors (N, S).
        texts: unit vectors (N, S); rows of equal texts are equal.
        keys: (N,), equal where the texts are.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    similarity = images @ texts[first].T  # (pictures, distinct texts)
    right = inverse[:, None] == np.arange(len(first))[None, :]
    metrics: dict[str, float] = {}
    for direction, scores, hits in (("", similarity, right), ("text_to_image_", similarity.T, right.T)):
        order = np.argsort(-scores, axis=1, kind="stable")[:, : max(RANKS)]
        found = np.take_along_axis(hits, order, axis=1)
        for k in RANKS:
            metrics[f"{direction}recall_at_{k}"] = float(found[:, :k].any(axis=1).mean())
        metrics[f"{direction}chance_at_1"] = float(hits.mean())
    return metrics
