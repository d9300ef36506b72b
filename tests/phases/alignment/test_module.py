"""The loss over records that have some of the modalities, and what aligner.pt holds."""

from pathlib import Path

import numpy as np
import pytest
import torch

from raytrain2p.config import AlignmentSettings, Findings, InputError
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.data.batches import Ragged
from raytrain2p.data.features import Features, FeatureTable, padded
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, USER, Message, Record
from raytrain2p.models.artifacts import load_artifact
from raytrain2p.phases.alignment.data import AlignmentSplit, check_trained, some_texts
from raytrain2p.phases.alignment.module import build, export
from raytrain2p.phases.inputs import Batch, MediaTable

RECORDS, WIDTH = 8, 32


@pytest.fixture
def settings(tiny_vit: Path, tiny_bert: Path) -> AlignmentSettings:
    """The audio encoder is never run: only its width is read."""
    encoders = {"image": str(tiny_vit), "audio": str(tiny_vit), "text": str(tiny_bert)}
    return AlignmentSettings.model_validate({"data": {"train": "x"}, "training": {"max_steps": 1}, "model": {"encoders": encoders}})


def test_the_validation_loss_is_of_the_pairs_of_modalities_that_a_batch_has(settings: AlignmentSettings) -> None:
    module = build(settings, 1, "float32").eval()
    random = torch.Generator().manual_seed(0)
    every, none = torch.ones(RECORDS, dtype=torch.bool), torch.zeros(RECORDS, dtype=torch.bool)
    items = {name: Features(torch.randn(RECORDS, size, WIDTH, generator=random)) for name, size in (("image", 4), ("text", 1))}
    two: Batch = {"items": items, "present": {"image": every, "text": every}, "keys": torch.arange(RECORDS)}
    three = two | {"items": items | {"audio": padded([])}, "present": two["present"] | {"audio": none}}
    with torch.inference_mode():
        expected = module.val_sums(two)
        assert module.val_sums(three) == expected
        alone = {"items": {"image": items["image"]}, "present": {"image": every}, "keys": torch.arange(RECORDS)}
        assert module.val_sums(alone) == (0, RECORDS)
    assert expected[0] > 0


def test_a_modality_that_no_training_record_has_is_refused() -> None:
    record = Record("a.jsonl:1", (Message(USER, (MediaRef("audio", "a.wav"),)), Message(ASSISTANT, ("a",))))
    findings = Findings()
    check_trained([record], ["image", "audio", "text"], findings)
    with pytest.raises(InputError) as caught:
        findings.raise_any()
    (problem,) = caught.value.problems
    assert (problem.where, problem.what) == ("model.encoders.image", "no record of data.train has image")
    assert problem.fix == "set model.encoders.image=null, or add records with image"


def test_aligner_pt_keeps_texts_of_training_with_their_vectors(settings: AlignmentSettings, tmp_path: Path) -> None:
    texts = ["red", "blue", "red", "green" * 100]
    items = [{"text": text} for text in texts]
    np.save(tmp_path / "shard.npy", np.random.default_rng(0).normal(size=(3, WIDTH)).astype(np.float16))
    features = FeatureTable((str(tmp_path / "shard.npy"),), np.zeros(3, np.int32), np.arange(3), np.ones(3, np.int64))
    split = AlignmentSplit({"text": MediaTable(Ragged([[0], [1], [0], [2]]), features)}, np.arange(4), texts=some_texts(items, 0))
    module = build(settings, 1, "float32").eval()
    export(module, tmp_path / "aligner.pt", {}, split)
    known = load_artifact(tmp_path / "aligner.pt", ALIGNMENT)["known"]
    assert known["texts"] == ["red", "blue", "green" * 40]
    with torch.no_grad():
        expected = module.vectors({"items": {"text": features.gather(np.arange(3))}})["text"]
    torch.testing.assert_close(known["vectors"], expected)


def test_of_many_texts_a_random_part_is_kept_each_with_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raytrain2p.phases.alignment.data.MOST_TEXTS", 10)
    kept = some_texts([{"text": f"text {number % 100}"} for number in range(300)], seed=1)
    assert len(kept) == 10
    assert all(text == f"text {number}" for text, number in kept.items())
    assert list(kept.values()) == sorted(kept.values()) != list(range(10))
