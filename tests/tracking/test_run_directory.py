"""The files of a run: they are read as they were written, and their names are spelled in one place."""

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

import raytrain2p
from raytrain2p.config.phases import INSTRUCTION, PHASES
from raytrain2p.tracking.run_directory import BEST, LAST, Entry, RunDirectory, best_checkpoint_name

PACKAGE = Path(raytrain2p.__file__).parent
# phases.py: the names of artifacts; remote.py: the order in which a run's files are uploaded
ALLOWED = ("tracking/run_directory.py", "config/phases.py", "storage/remote.py")
MODEL_FILES = "models/"  # a transformers directory has a config.json of its own


def entries() -> dict[str, str]:
    """Each attribute of a run directory that is a path, and the name of that path."""
    return {attribute: entry.name for attribute, entry in vars(RunDirectory).items() if isinstance(entry, Entry)}


NAMES = {part for name in entries().values() for part in PurePosixPath(name).parts} | {".lock", *(one.artifact for one in PHASES.values())}


def strings(source: str) -> Iterator[tuple[int, str]]:
    """The strings of a module with their lines, without docstrings. In an f-string, `x` stands for each value."""
    nodes = list(ast.walk(ast.parse(source)))
    skipped = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield node.lineno, "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def names_in(text: str) -> set[str]:
    """The names of a run's files in a path. A text with spaces is a message, which may mention them."""
    if any(character.isspace() for character in text):
        return set()
    parts = PurePosixPath(text).parts
    return NAMES.intersection(parts) | {part for part in parts if part.endswith(".ckpt") or part.startswith("best-")}


def test_no_other_module_spells_the_name_of_a_runs_file() -> None:
    spelled = [
        f"{path.relative_to(PACKAGE)}:{line}: {', '.join(sorted(found))}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith((*ALLOWED, MODEL_FILES))
        for line, text in strings(path.read_text())
        if (found := names_in(text))
    ]
    assert spelled == [], "use RunDirectory"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('run.path / "config.json"', {"config.json"}),
        ('f"{run.directory}/config.json"', {"config.json"}),
        ('folder / "plots" / "curve.png"', {"plots"}),
        ('root.glob("phase2/*/metrics.jsonl")', {"metrics.jsonl"}),
        ('path / "lightning_checkpoints/last.ckpt"', {"lightning_checkpoints", "last.ckpt"}),
        ('f"best-epoch={epoch}-{value}.ckpt"', {"best-epoch=x-x.ckpt"}),
        ('path / "aligner.pt"', {"aligner.pt"}),
        ('Lock(run.path / ".lock")', {".lock"}),
        ('Lock(root / f"{launch_id}.lock")', set()),
        ('def f():\n    """Writes config.json."""', set()),
        ('raise ValueError("there is no config.json here")', set()),
        ('print(f"{folder} has no config.json")', set()),
        ('print("settings", "answers", "status")', set()),
    ],
)
def test_names_are_found_in_paths_and_not_in_docstrings_and_messages(source: str, found: set[str]) -> None:
    assert set().union(*(names_in(text) for _, text in strings(source))) == found


def test_every_path_is_below_the_directory_and_different() -> None:
    files = RunDirectory(Path("/runs/one"))
    paths = [getattr(files, attribute) for attribute in entries()]
    assert len(paths) == len(set(paths)) > 10
    assert all(path.is_relative_to(files.path) for path in paths)
    assert files.artifact(INSTRUCTION) == Path("/runs/one/model.pt")
    assert files.lock.path == Path("/runs/one/.lock")


def test_the_last_and_the_best_checkpoint_are_in_the_folder_of_checkpoints() -> None:
    files = RunDirectory(Path("/runs/one"))
    assert files.last_checkpoint == files.checkpoints / LAST
    name = best_checkpoint_name(3, "val/loss", 0.12345)
    assert name == "best-epoch=03-val_loss=0.1235.ckpt"
    assert PurePosixPath(name).match(BEST)


def test_the_run_id_is_the_beginning_of_the_directorys_name() -> None:
    assert RunDirectory(Path(f"/runs/{'a1' * 16}_20260101_120000")).run_id == "a1" * 16


def test_config_and_record_are_read_as_they_were_written_and_none_where_there_is_none(tmp_path: Path) -> None:
    files = RunDirectory(tmp_path)
    assert (files.read_config(), files.read_record(), files.tags()) == (None, None, {})
    files.write_config({"model": {"rank": 1}})
    files.write_record({"run_id": "a1", "tags": {"one": "1"}})
    assert files.read_config() == {"model": {"rank": 1}}
    assert files.read_record() == {"run_id": "a1", "tags": {"one": "1"}}
    assert files.tags() == {"one": "1"}


def test_objects_in_a_config_are_paths_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As settings have them: a run is resumed with what it began with, in whatever scratch that was."""
    monkeypatch.setenv("RAYTRAIN2P_SCRATCH", str(tmp_path / "scratch"))
    files = RunDirectory(tmp_path)
    files.write_config({"model": {"aligner": f"{tmp_path}/scratch/s3/b/aligner.pt", "language_model": "owner/name"}})
    assert "s3://b/aligner.pt" in files.config.read_text()
    monkeypatch.setenv("RAYTRAIN2P_SCRATCH", "/other")
    assert files.read_config() == {"model": {"aligner": "/other/s3/b/aligner.pt", "language_model": "owner/name"}}


def test_a_status_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert RunDirectory(tmp_path).read_status()["status"] == "RUNNING"
    for status in ("RUNNING", "FAILED", "FINISHED"):
        RunDirectory(tmp_path).write_status(status)
        assert RunDirectory(tmp_path).read_status()["status"] == status
