"""Files of every format train through the command line: together here, each alone in `make chaos`."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from raytrain2p.data.formats import FORMATS
from tests.chaos.killing import only_long
from tests.data.files import write_records
from tests.launch.launching import COLOURS, Run, encode_here

ENDINGS = {"pair": "parquet", "instruction": "jsonl", "llava": "json", "sharegpt": "parquet", "openai": "jsonl"}
CASES = [(phase, name) for name, kind in FORMATS.items() for phase in kind.phases]


def rows(name: str, folder: Path) -> list[dict[str, Any]]:
    """A dozen coloured shapes in the form of a format: two turns where it has them, images in the way that is usual for it."""
    found = []
    for number in range(12):
        colour, path = COLOURS[number % len(COLOURS)], folder / f"{number}.png"
        cell = {"bytes": path.read_bytes(), "path": path.name}
        question, more = "Which colour?", "Are you sure?"
        turns = [
            {"from": who, "value": text}
            for who, text in (("human", f"<image>{question}"), ("gpt", colour), ("human", more), ("gpt", "yes"))
        ]
        url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        forms: dict[str, dict[str, Any]] = {
            "pair": {"text": colour, "image": cell},
            "instruction": {"instruction": question, "response": colour, "image": str(path)},
            "llava": {"id": str(number), "image": str(path), "conversations": turns},
            "sharegpt": {"conversations": turns, "images": [cell]},
            "openai": {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": colour}]},
        }
        found.append(forms[name])
    return found


@pytest.fixture
def files(tmp_path: Path, shapes: Path) -> dict[str, Path]:
    """A file of each format."""
    return {name: write_records(tmp_path / f"{name}.{ending}", *rows(name, shapes)) for name, ending in ENDINGS.items()}


def train(run: Run, phase: int, tiny_config: Path, aligner: Path, files: list[Path]) -> str:
    """A few steps on these files; returns what the launch printed."""
    sources = json.dumps([{"path": str(file), "weight": 1 + number} for number, file in enumerate(files)])
    few = ["training.max_steps=3", "training.global_batch_size=12", f"data.train={sources}", "data.val=null", "data.test={}"]
    few += [f"model.aligner={aligner}"] if phase == 2 else []
    config, features = tiny_config / f"phase{phase}.yaml", files[0].parent / "features"
    encode_here(phase, config, features, *few)
    done = run("raytrain2p.train", f"--phase={phase}", f"--config={config}", "--json", *few, f"data.feature_store={features}")
    assert len(done.losses) == 3
    return done.err


@pytest.mark.parametrize("phase", [1, pytest.param(2, marks=only_long)])
def test_files_of_all_formats_train_together(
    run: Run, phase: int, tiny_config: Path, untrained_aligner: Path, files: dict[str, Path]
) -> None:
    names = [name for number, name in CASES if number == phase]
    said = train(run, phase, tiny_config, untrained_aligner, [files[name] for name in names])
    for name in names:
        assert f"12 records of {files[name]} ({name})" in said


@only_long
@pytest.mark.parametrize(("phase", "name"), CASES)
def test_a_file_of_one_format_trains(
    run: Run, phase: int, name: str, tiny_config: Path, untrained_aligner: Path, files: dict[str, Path]
) -> None:
    said = train(run, phase, tiny_config, untrained_aligner, [files[name]])
    assert f"({name})" in said
    assert "data.val is not set: no validation loss; data.test is not set: nothing is evaluated after training" in said
