"""A model.pt with random weights, as phase 2 leaves it: its answers mean nothing, but are always the same."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from raytrain2p.config import InstructionSettings
from raytrain2p.config.phases import ALIGNMENT
from raytrain2p.data.batches import Ragged
from raytrain2p.data.media import MediaRef
from raytrain2p.data.tokens import TokenRecords
from raytrain2p.models.aligner import Aligner
from raytrain2p.models.artifacts import save_artifact
from raytrain2p.models.pretrained import fingerprint
from raytrain2p.phases.inputs import MediaTable
from raytrain2p.phases.instruction.data import InstructionSplit
from raytrain2p.phases.instruction.module import build, export

RUN_ID = "ab" * 16


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_vit: Path) -> Path:
    """`<root>/phase2/<run>/model.pt`."""
    torch.manual_seed(3)
    root = tmp_path_factory.mktemp("tiny_model")
    directory = root / "phase2" / f"{RUN_ID}_20261126_120000"
    directory.mkdir(parents=True)
    model = Aligner({"image": 32, "text": 8}, hidden=16, dimension=12)
    encoders = {"image": {"name": str(tiny_vit), "options": {}, "fingerprint": fingerprint(tiny_vit)}}
    save_artifact(root / "aligner.pt", ALIGNMENT, {}, encoders, shape=model.shape, state_dict=model.state_dict())
    settings = InstructionSettings.model_validate(
        {
            "data": {"train": "x.jsonl"},
            "training": {"max_steps": 1, "precision": "float32"},
            "model": {"language_model": str(tiny_llama), "aligner": str(root / "aligner.pt"), "soft_tokens": 4, "tuning": "full"},
        }
    )
    module = build(settings, 1, "float32")
    for parameter in module.assistant.parameters():  # so far from zero that an answer depends on all of its question
        parameter.data *= 6 if parameter.dim() > 1 else 1
    module.assistant.projector.gain.data *= 6
    export(module, directory / "model.pt", settings.model_dump(mode="json"), one_image_each())
    return directory / "model.pt"


def one_image_each() -> InstructionSplit:
    """What it has learnt: three records, the second without an image."""
    refs = (MediaRef("image", "a.png"), MediaRef("image", "b.png"))
    return InstructionSplit(TokenRecords.of([], {}), {"image": MediaTable(Ragged([[0], [], [1]]), refs)}, ("all",) * 3)


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with 0.png to 5.png, each of another colour."""
    folder = tmp_path_factory.mktemp("drawings")
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 255 - 40 * number, 90)).save(folder / f"{number}.png")
    return folder
