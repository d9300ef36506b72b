"""A user's own data: handwritten digits as PNG files and JSON Lines, both phases, the packaged models."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tests.launch.launching import Run

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def digits(workdir: Path) -> Path:
    """400 digits: training and test records of both phases."""
    folder = workdir / "digits"
    (folder / "png").mkdir(parents=True)
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))[:400]
    for split, chosen in (("train", order[:320]), ("test", order[320:])):
        pairs, instructions = [], []
        for number in chosen:
            name, image = NAMES[bunch.target[number]], f"png/{number}.png"
            Image.fromarray((255 - bunch.images[number] * 15).astype(np.uint8)).resize((64, 64), Image.Resampling.BICUBIC).save(
                folder / image
            )
            pairs.append({"text": f"a handwritten {name}", "image": image})
            instructions.append({"instruction": "Which digit is it?", "response": name, "image": image, "task": "digit"})
        for phase, rows in ((1, pairs), (2, instructions)):
            (folder / f"{split}{phase}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.real
def test_both_phases_learn_digits_from_the_users_files(run: Run, digits: Path, workdir: Path) -> None:
    for phase, length in (
        (1, "{max_epochs: 15, global_batch_size: 80}"),
        (2, "{max_steps: 20, global_batch_size: 16, warmup_steps: 5, learning_rate: 1e-3}"),
    ):
        model = 'model: {system_prompt: ""}' if phase == 2 else ""
        data = f"data: {{train: digits/train{phase}.jsonl, test: {{test: digits/test{phase}.jsonl}}}}"
        (workdir / f"digits{phase}.yaml").write_text(f"{data}\n{model}\ntraining: {length}\n")

    aligned = run("raytrain2p.train", "--phase", "1", "--config", "digits1.yaml", "--json")
    metrics = aligned.outcome["metrics"]
    assert metrics["test/image_to_text_recall_at_1"] > 0.6, metrics  # ten texts: chance is 10 %
    assert "400 computed" in aligned.err
    assert ".cc:" not in aligned.err, "output of Ray's core"

    done = run("raytrain2p.train", "--phase", "2", "--config", "digits2.yaml", "--json")
    assert np.mean(done.losses[-5:]) < np.mean(done.losses[:5]) / 2
    metrics = done.outcome["metrics"]
    assert metrics["test/exact_match/digit"] > metrics["test/majority/digit"], metrics
