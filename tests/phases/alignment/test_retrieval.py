"""Recall and chance, by hand."""

import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_array

from raytrain2p.phases.alignment.retrieval import retrieval_metrics


def both_ways(images: np.ndarray, texts: np.ndarray, keys: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    """From each image to the distinct texts, and back."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    right = inverse[:, None] == np.arange(len(first))
    return retrieval_metrics(images, texts[first], right), retrieval_metrics(texts[first], images, right.T)


def at_angles(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_recall_at_one_and_chance_by_hand_with_a_repeated_text() -> None:
    """Two images of one text (key 7, at 0 degrees), one each of two more (key 3 at 90, key 5 at 180 degrees).

    Images at 10, 80, 99, 170 degrees are nearest to the texts 7, 3, 3, 5: right, wrong, right, right.
    Texts 7, 3, 5 are nearest to the images at 10, 99, 170 degrees.
    """
    metrics, back = both_ways(at_angles(10, 80, 99, 170), at_angles(0, 0, 90, 180), np.array([7, 7, 3, 5]))
    assert metrics["recall_at_1"] == pytest.approx(3 / 4)
    assert metrics["chance_at_1"] == pytest.approx(1 / 3)  # one of three distinct texts
    assert back["recall_at_1"] == pytest.approx(1)
    assert back["chance_at_1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert metrics["recall_at_5"] == back["recall_at_5"] == 1  # fewer than five candidates


def test_a_text_finds_any_of_its_images() -> None:
    """The second image of key 7 lies far away; the first one alone makes the text's search a success."""
    metrics, back = both_ways(at_angles(5, 175, 90), at_angles(0, 0, 90), np.array([7, 7, 3]))
    assert back["recall_at_1"] == 1
    assert metrics["recall_at_1"] == pytest.approx(2 / 3)


def test_recall_at_five_counts_the_first_five_of_more() -> None:
    texts = at_angles(*range(0, 80, 10))
    images = texts.copy()
    images[0] = at_angles(44)[0]  # nearest: 40, 50, 30, 60, 20; 0 comes seventh
    images[7] = at_angles(51)[0]  # nearest: 50, 60, 40, 70: the fourth is right
    metrics = retrieval_metrics(images, texts, np.eye(8, dtype=bool))
    assert metrics["recall_at_1"] == pytest.approx(6 / 8)
    assert metrics["recall_at_5"] == pytest.approx(7 / 8)


def test_the_result_does_not_depend_on_the_order_of_records() -> None:
    random = np.random.default_rng(0)
    keys = np.array([4, 9, 4, 1, 9, 6, 8, 2, 3, -5])
    texts_of = {key: random.normal(size=8) for key in np.unique(keys)}
    texts, images = np.stack([texts_of[key] for key in keys]), random.normal(size=(10, 8))
    order = random.permutation(10)
    for shuffled, plain in zip(both_ways(images[order], texts[order], keys[order]), both_ways(images, texts, keys), strict=True):
        assert shuffled == pytest.approx(plain)


def test_a_query_without_a_right_candidate_does_not_count() -> None:
    right = np.array([[True, False], [False, False]])
    assert retrieval_metrics(at_angles(0, 90), at_angles(0, 90), right)["recall_at_1"] == 1
    assert retrieval_metrics(at_angles(90), at_angles(0, 90), right[1:]) == {}


def test_queries_are_compared_some_at_a_time() -> None:
    """All scores of 6,000 x 6,000 are 144 MB; equal candidates are found in their order."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(6000, 4)).astype(np.float32)
    vectors[1::2] = vectors[::2]
    belongs = csr_array((np.ones(6000), (np.arange(6000), np.arange(6000) // 2 * 2)), (6000, 6000))
    tracemalloc.start()
    metrics = retrieval_metrics(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), vectors, belongs)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 72e6
    assert metrics["chance_at_5"] == pytest.approx(5 / 6000)
    assert retrieval_metrics(at_angles(0, 0), at_angles(0, 0), np.array([[1, 0], [1, 0]]))["recall_at_1"] == 1
