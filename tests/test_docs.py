"""Every command in the README and in docs/ runs: all shell blocks in order, in one directory."""

import json
import re
import shlex
from pathlib import Path

import pytest

from raytrain2p.data.embedded import clips, images
from tests.launch.launching import run_command

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
SHORT = {1: ["training.max_epochs=1", "training.global_batch_size=16"], 2: ["training.max_steps=2"]}
FEW = {
    "configs/phase1_av.yaml": ["data.train=[emoji:val, speech:val]", "data.val=null", "data.test={}"],
    "configs/phase2_av.yaml": ["data.train=[emoji:val, speech:val, emoji_speech:val]", "data.val=null", "data.test={}"],
}
ELSEWHERE = {"ray": "tests/launch/test_job.py submits it"}


def commands() -> list[list[str]]:
    return [shlex.split(line) for page in PAGES for block in FENCE.findall(page.read_text()) for line in block.splitlines()]


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A directory with the files that the commands name: records of both phases, an image, a clip, and configs/."""
    records = tmp_path / "records"
    records.mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "image.png").write_bytes(images("train")[0].ref.read())
    (tmp_path / "clip.ogg").write_bytes(clips("train")[0].ref.read())
    rows: dict[int, list[dict[str, str]]] = {1: [], 2: []}
    for number in range(32):
        image = f"{number}.png"
        (records / image).write_bytes(images("train")[number].ref.read())
        rows[1].append({"text": f"drawing {number // 3}", "image": image})
        rows[2].append({"instruction": "Which one?", "response": f"number {number // 3}", "image": image})
    for name, lines in {"train1": rows[1], "train2": rows[2], "test2": rows[2][:4]}.items():
        (records / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return tmp_path


@pytest.mark.real
def test_every_command_of_the_documentation_runs(reader: Path, ray_head: str, embedded_features: str) -> None:
    typed = [list(words) for words in dict.fromkeys(map(tuple, commands()))]  # a command on two pages runs once
    assert len(typed) >= 8
    for words in typed:
        if words[0] in ELSEWHERE:
            continue
        assert words[:2] == ["python", "-m"], f"no test runs {' '.join(words)}"
        arguments = words[2:]
        if arguments[0] == "raytrain2p.train":
            own = any(word.startswith("data.train=") for word in arguments)
            arguments += SHORT[int(arguments[arguments.index("--phase") + 1])]
            arguments += [] if own else ["evaluation.max_records=4", "evaluation.samples=2", "evaluation.shuffled=false"]
            arguments += next((few for config, few in FEW.items() if config in arguments), [])
            if "launch.num_workers=2" not in arguments:
                arguments.append("launch.cpus_per_worker=2")
        if arguments[0] == "raytrain2p.tune":
            arguments += SWEEP
        done = run_command(reader, *arguments, RAY_ADDRESS=ray_head, RAYTRAIN2P_FEATURES=embedded_features)
        assert done.code == 0, f"{' '.join(words)}\n{done.err[-3000:]}"


def test_every_page_that_is_linked_exists() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links {target}"
