"""Every command in the README and in docs/ runs: all shell blocks in order, in one directory. Short here: sweeps, sound, two workers
and a resume are in `make chaos`, and in tests of their own. The reader's own records are handwritten digits, which both phases learn.
"""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from raytrain2p import predict
from raytrain2p.data import __main__ as data
from raytrain2p.data.embedded import clips, images
from raytrain2p.runs import __main__ as runs
from tests.chaos.killing import LONG
from tests.launch.launching import Command, run_command

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"```sh\n(.*?)```", re.DOTALL)
SWEEP = [
    "sweep.num_trials=2",
    "sweep.metric=train_loss",
    "data.val=null",
    "training.max_steps=4",
    "checkpoint.every_steps=2",
    "sweep.asha.grace_period=2",
    "evaluation.max_records=4",
]
SHORT = {
    1: ["training.max_epochs=1", "training.global_batch_size=16", "data.train=emoji:val", "data.test={}"],  # few images to encode
    2: ["training.max_steps=2"],
}
LEARN = {  # the digits, from the reader's own records
    1: ["training.max_epochs=30", "training.global_batch_size=80"],
    2: [
        "training.max_steps=20",
        "training.global_batch_size=8",
        "training.warmup_steps=5",
        "training.learning_rate=1e-3",
        "evaluation.shuffled=false",
    ],
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FEW = {
    "configs/phase1_av.yaml": ["data.train=[emoji:val, speech:val]", "data.val=null", "data.test={}"],
    "configs/phase2_av.yaml": ["data.train=[emoji:val, speech:val, emoji_speech:val]", "data.val=null", "data.test={}"],
}
ONLY_LONG = {
    "raytrain2p.tune",
    "--resume",
    "launch.num_workers=2",
    "configs/phase1_av.yaml",
    "configs/phase2_av.yaml",
    "--audio",
}  # in `make chaos` alone
# In this process: each would import torch or MLflow.
HERE = {"raytrain2p.runs": runs.main, "raytrain2p.data": data.main, "raytrain2p.predict": predict.main}
ELSEWHERE = {"ray": "tests/launch/test_job.py submits it"}


SHELL = "tutorial_model.md"  # tests/use/test_tutorial.py types it into a shell


def commands() -> list[list[str]]:
    pages = [page for page in PAGES if page.name != SHELL]
    return [shlex.split(line) for page in pages for block in FENCE.findall(page.read_text()) for line in block.splitlines()]


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A directory with the files that the commands name: records of 184 digits for both phases, an image, a clip, and configs/."""
    records = tmp_path / "records"
    records.mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "image.png").write_bytes(images("train")[0].ref.read())
    (tmp_path / "clip.ogg").write_bytes(clips("train")[0].ref.read())
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))[:184]
    for split, chosen in (("train", order[:160]), ("test", order[160:])):
        rows: dict[int, list[dict[str, str]]] = {1: [], 2: []}
        for number in chosen:
            name, image = DIGITS[digits.target[number]], f"{number}.png"
            pixels = Image.fromarray((255 - digits.images[number] * 15).astype(np.uint8))
            pixels.resize((64, 64), Image.Resampling.BICUBIC).save(records / image)
            rows[1].append({"text": f"a handwritten {name}", "image": image})
            rows[2].append({"instruction": "Which digit is it?", "response": name, "image": image, "task": "digit"})
        for phase, lines in rows.items():
            (records / f"{split}{phase}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tmp_path


def training_arguments(typed: list[str]) -> list[str]:
    """The command as typed, with fewer steps and records, but enough of the reader's own to learn them."""
    phase = int(typed[typed.index("--phase") + 1])
    if any(word.startswith("data.train=") for word in typed):
        extra = [*LEARN[phase], f"data.test={{test: records/test{phase}.jsonl}}", "evaluation.samples=2"]
    else:
        extra = [*SHORT[phase], "evaluation.max_records=4", "evaluation.samples=2", "evaluation.shuffled=false"]
    extra += next((few for config, few in FEW.items() if config in typed), [])
    extra += ["launch.cpus_per_worker=1"]  # the tests of the other process need the other core
    return [*typed, *extra]


def learnt(phase: int, done: Command) -> None:
    """Check what the reader's own records taught."""
    metrics = done.outcome["metrics"]
    assert ".cc:" not in done.err, "output of Ray's core"
    if phase == 1:
        assert metrics["test/image_to_text_recall_at_1"] > 0.6, metrics  # ten texts: chance is 10 %
        assert "184 computed" in done.err
    else:
        assert np.mean(done.losses[-5:]) < np.mean(done.losses[:5]) / 2
        assert metrics["test/exact_match/digit"] > metrics["test/majority/digit"], metrics


@pytest.mark.real
@pytest.mark.timeout(1200)
def test_every_command_of_the_documentation_runs(
    reader: Path, ray_head: str, embedded_features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(reader)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(reader))
    typed = [list(words) for words in dict.fromkeys(map(tuple, commands()))]  # a command on two pages runs once
    assert len(typed) >= 8
    for words in typed:
        if words[0] in ELSEWHERE or (LONG not in os.environ and ONLY_LONG & {*words}):
            continue
        assert words[:2] == ["python", "-m"], f"no test runs {' '.join(words)}"
        arguments = words[2:]
        own = arguments[0] == "raytrain2p.train" and "data.train=" in " ".join(words) and "--dry-run" not in words
        if arguments[0] == "raytrain2p.train":
            arguments = training_arguments(arguments) + (["--json"] if own else [])
        if arguments[0] == "raytrain2p.tune":
            arguments += SWEEP
        if (here := HERE.get(arguments[0])) is not None:
            assert here(arguments[1:]) == 0, " ".join(words)
            continue
        done = run_command(reader, *arguments, RAY_ADDRESS=ray_head, RAYTRAIN2P_FEATURES=embedded_features)
        assert done.code == 0, f"{' '.join(words)}\n{done.err[-3000:]}"
        if own:
            learnt(int(words[words.index("--phase") + 1]), done)


def test_every_page_that_is_linked_exists() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links {target}"


def test_every_test_that_a_page_names_exists() -> None:
    named = re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", "".join(page.read_text() for page in PAGES))
    assert len(named) >= 50
    for path, name in named:
        assert f"def {name}" in (ROOT / path).read_text(), f"{path}::{name}"
