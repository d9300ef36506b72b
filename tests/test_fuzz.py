"""Damaged input of every kind, at random: each command refuses it in words, and quickly.

Each case is drawn from `RAYTRAIN2P_FUZZ_SEED` and its own number; `RAYTRAIN2P_FUZZ_CASES` is how many there are. One case again:
`pytest tests/test_fuzz.py -k 'case-17'`. A kind of input is a function in `KINDS`: it spoils the world, and returns a command.
"""

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

import pytest
import ray
import yaml
from PIL import Image

from raytrain2p import train
from raytrain2p.config.escaping import CONTROL_CHARACTERS
from raytrain2p.config.metadata import known_keys
from raytrain2p.config.phases import ALIGNMENT, PHASES, SWEEPS
from raytrain2p.config.settings import SETTINGS_OF_PHASE
from raytrain2p.runs import __main__ as runs
from raytrain2p.storage.files import write_json
from raytrain2p.tracking.mlflow_sync import MlflowSync
from raytrain2p.tracking.run_writer import describe_run, resolved_config
from raytrain2p.worker.job import Outcome
from tests.damage import WRONG, damage_one, restore, spoil
from tests.tracking.stores import create, note, settings_in

CASES, SEED = int(os.environ.get("RAYTRAIN2P_FUZZ_CASES", "60")), os.environ.get("RAYTRAIN2P_FUZZ_SEED", "14")
SECONDS = 30

COMMANDS = {"train": train.main, "runs": runs.main}
CODES = {"train": (0, 2), "runs": (0, 1, 2)}


@dataclass(frozen=True)
class World:
    """A folder with everything that a command reads: settings, records, images, run directories and a store."""

    folder: Path
    directories: list[Path] = field(default_factory=list)  # of the runs, in the order in which they were made: MLflow draws their names

    @property
    def root(self) -> Path:
        return self.folder / "checkpoints"

    def config(self, phase: int) -> Path:
        return self.folder / f"phase{phase}.yaml"

    def train(self, phase: int, *words: str) -> list[str]:
        """A dry run, with nothing outside of the folder."""
        options = [f"output.root={self.root}", f"tracking.uri=sqlite:///{self.folder}/mlflow.db"]
        options += [f"model.aligner={self.folder}/aligner.pt"] * (phase == 2)
        return ["train", "--phase", str(phase), "--config", str(self.config(phase)), "--dry-run", *options, *words]

    def runs(self, verb: str, *words: str) -> list[str]:
        """With a store of this case's own: MLflow keeps connections to those that it has used."""
        store = self.folder.parent / f"{uuid.uuid4().hex}.db"
        shutil.copy(self.folder / "mlflow.db", store)
        return ["runs", verb, f"output.root={self.root}", f"tracking.uri=sqlite:///{store}", *words]


@pytest.fixture(scope="module")
def pristine(
    tmp_path_factory: pytest.TempPathFactory, made_store: Path, tiny_config: Path, shapes: Path, untrained_aligner: Path
) -> tuple[World, Path]:
    """The world, and a copy of it."""
    world = World(tmp_path_factory.mktemp("fuzz") / "world")
    shutil.copytree(shapes, world.folder)
    shutil.copy(made_store / "mlflow.db", world.folder)
    shutil.copy(untrained_aligner, world.folder / "aligner.pt")
    for number in PHASES:
        content = (tiny_config / f"phase{number}.yaml").read_text()
        for one in PHASES:  # the records of phase 2 are listed with the same names in the folder of the world
            content = content.replace(f"{shapes}/phase{one}.jsonl", f"{world.folder}/phase{one}.jsonl")
        world.config(number).write_text(content)
    for launch, (phase, status) in enumerate((("alignment", "FINISHED"), ("phase2", "FAILED"), ("phase2", "RUNNING"), (SWEEPS, "KILLED"))):
        settings = settings_in(world.folder, phase=1 if phase == ALIGNMENT.name else 2)
        run = create(settings, f"launch-{launch}", phase)
        describe_run(
            run, resolved_config(settings, {}), "command", {"train_records": 48, "train_digest": "0" * 64}, lambda run, command: "page"
        )
        note(run, 1, 2, 3)
        run.files.write_status(status)
        if status != "RUNNING":
            MlflowSync(run, settings.tracking.uri).send()
        world.directories.append(run.path)
        if phase == ALIGNMENT.name:
            shutil.copy(untrained_aligner, run.path)
            write_json(run.files.result, asdict(Outcome(run.run_id, run.directory, None, None, "aligner.pt", {"train_loss": 1.0})))
        if phase == SWEEPS:
            run.add_tags({"raytrain2p.stopped_early": "no"})
    shutil.copytree(world.folder, world.folder.parent / "pristine")
    return world, world.folder.parent / "pristine"


# The kinds of input


def run_directories(world: World, random: Random) -> tuple[str, list[str]]:
    """A file of a run, or the record of a launch."""
    folders = [*world.directories, world.root / ".launches"]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jsonl", ".pt")]
    spoilt = [(path, damage_one(path, random)) for path in random.sample(files, random.choice((1, 1, 2)))]
    run_ids = [path.name[:32] for path in world.directories]
    command = random.choice(
        [
            world.runs("sync"),
            world.runs("reconcile"),
            world.runs(random.choice(("sync", "reconcile")), random.choice(run_ids)),
            world.runs("list", *random.choice([(), ("--where", "train_loss<2"), ("--sort", "best", "--json"), ("--mlflow",)])),
            world.runs(random.choice(("show", "find")), random.choice(run_ids)),
            world.runs(*random.choice([("find", "--aligner", run_ids[0]), ("tree",), ("latest", "--phase", "1", "--artifact")])),
            world.runs("compare", *random.sample(run_ids, 2)),
            world.runs("verify", *random.choice([(), ("--fast",), ("--repair",)])),
            world.runs("prune", *random.choice([("--keep-last", "1"), ("--status", "FAILED", "--yes"), ("--older-than", "0h")])),
            world.runs("tag", random.choice(run_ids), "--set", "keep"),
            world.runs("migrate", str(random.choice(world.directories).parent)),
            world.train(1, "--resume", "latest"),
            world.train(2, "--resume", random.choice(["latest", *run_ids])),
            world.train(random.choice((1, 2)), "--launch-id", f"launch-{random.randrange(3)}"),
            world.train(2, "model.aligner=latest"),
        ]
    )
    return str([(str(path.relative_to(world.folder)), way) for path, way in spoilt]), command


def settings_files(world: World, random: Random) -> tuple[str, list[str]]:
    phase = random.choice((1, 2))
    path = world.config(phase)
    if random.random() < 0.5:
        return damage_one(path, random), world.train(phase)
    tree = yaml.safe_load(path.read_text())
    for _ in range(random.choice((1, 2, 3))):
        spoil(tree, random)
    path.write_text(yaml.safe_dump(tree))
    return "other values", world.train(phase)


def overrides(world: World, random: Random) -> tuple[str, list[str]]:
    phase = random.choice((1, 2))
    keys = [*known_keys(SETTINGS_OF_PHASE[phase]), "no.such.key", "data", "=", ""]
    texts = [str(one).replace("\0", "") for one in WRONG] + [
        "010",
        "1:30",
        ".inf",
        "[[",
        "{a: ",
        "&a *a",
        "!!python/name:os.system",
        "\ud800",
    ]
    words = [f"{random.choice(keys)}={random.choice(texts)}" for _ in range(random.choice((1, 1, 2, 3)))]
    return str(words), world.train(phase, *(word for word in words if not word.startswith("-")))


def records(world: World, random: Random) -> tuple[str, list[str]]:
    phase = random.choice((1, 2))
    return damage_one(world.folder / f"phase{phase}.jsonl", random), world.train(phase)


FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": ("RGB", "L", "1", "P", "I;16", "RGBA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "TIFF": ("RGB", "I;16", "F"),
    **dict.fromkeys(("BMP", "WEBP", "PPM", "TGA", "SGI", "DDS"), ("RGB",)),
    "GIF": ("P",),
    "ICO": ("RGBA",),
}


def images(world: World, random: Random) -> tuple[str, list[str]]:
    path = random.choice(sorted(world.folder.glob("*.png")))
    name = random.choice(list(FORMATS))
    mode, size = random.choice(FORMATS[name]), random.choice(((32, 32), (16, 16), (16, 500), (33, 17)))
    Image.new(mode, size).save(path, name)
    way = damage_one(path, random) if random.random() < 0.7 else "whole"
    return f"{path.name}: {name} {mode} {size} {way}", world.train(random.choice((1, 2)))


KINDS: tuple[Callable[[World, Random], tuple[str, list[str]]], ...] = (run_directories, settings_files, overrides, records, images)


@pytest.mark.timeout(SECONDS, func_only=True)
@pytest.mark.parametrize("case", range(CASES), ids=lambda case: f"case-{case}")
def test_damaged_input_is_refused_in_words(
    case: int, pristine: tuple[World, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    world, copy = pristine
    restore(world.folder, copy)
    monkeypatch.chdir(world.folder)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(world.folder))
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(world.folder / "features"))
    kind, random = KINDS[case % len(KINDS)], Random(f"{SEED}-{case}")
    spoilt, (command, *arguments) = kind(world, random)
    drawn = f"RAYTRAIN2P_FUZZ_SEED={SEED} case {case}, {kind.__name__}: {ascii(spoilt)[:400]}\n{command} {ascii(arguments)[:1000]}"
    try:
        code = COMMANDS[command](arguments)
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    except Exception as error:
        pytest.fail(f"{drawn}\n{type(error).__name__}: {ascii(str(error))[:500]}")
    captured = capsys.readouterr()
    output = captured.out + captured.err
    assert code in CODES[command], f"{drawn}\n{output[-3000:]}"
    assert code == 0 or output.strip(), drawn
    assert "Traceback" not in output, f"{drawn}\n{output[-3000:]}"
    theirs = ("Loading weights", "LOAD REPORT")  # transformers' own lines
    shown = "\n".join(line for line in output.replace("\r", "\n").split("\n") if not any(one in line for one in theirs))
    assert not CONTROL_CHARACTERS.search(shown), f"{drawn}\n{shown[-3000:]!a}"
    assert not ray.is_initialized()
