"""The loss over records that have some of the modalities."""

from pathlib import Path

import pytest
import torch

from raytrain2p.config import AlignmentSettings, Findings, InputError
from raytrain2p.data.features import Features, padded
from raytrain2p.data.media import MediaRef
from raytrain2p.data.records import ASSISTANT, USER, Message, Record
from raytrain2p.phases.alignment.data import check_trained
from raytrain2p.phases.alignment.module import build
from raytrain2p.phases.inputs import Batch

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
