"""Both phases with the packaged pretrained models on the embedded set, for a few steps: the loss falls."""

from pathlib import Path

import numpy as np
import pytest

from raytrain2p.data.emoji import EMOJI_FILE
from tests.launch.launching import Run


@pytest.mark.real
def test_the_loss_of_both_phases_falls_and_the_result_answers(run: Run, workshop: Path) -> None:
    few = "evaluation.max_records=32"
    first = run("raytrain2p.train", "--phase", "1", "--json", "training.max_epochs=4", few)
    assert first.losses[-1] < first.losses[0] / 2
    metrics = first.outcome["metrics"]
    assert metrics["test_drawing/recall_at_1"] > 20 * metrics["test_drawing/chance_at_1"]

    second = run("raytrain2p.train", "--phase", "2", "--json", "training.max_steps=16", "training.warmup_steps=5", few)
    assert "0 computed" in second.err, "phase 1 has encoded these pictures"
    assert np.mean(second.losses[-4:]) < np.mean(second.losses[:4])

    picture = workshop / "picture.png"
    from raytrain2p.data.images import ImageRef

    picture.write_bytes(ImageRef(str(EMOJI_FILE), 0).read())
    said = run("raytrain2p.predict", "--run", "latest", "--image", str(picture), "Which group does it belong to?")
    assert said.code == 0, said.err
    assert said.out.strip()
