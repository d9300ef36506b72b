"""Ways in which files are damaged, by name: each changes one file in place, and draws what it needs from a seeded generator."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

# Values that a field of JSON or YAML may have and a program does not expect.
WRONG: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 10**20, 1e308, float("nan"), float("inf"), "", "\x1b[31mred", "a\nb", "\ud800", "../" * 9, "x" * 5000, "nul\0",
    [], [1], {}, {"name": {}}, [[[]]],
)  # fmt: skip


def empty(path: Path, random: Random) -> None:
    path.write_bytes(b"")


def zeros(path: Path, random: Random) -> None:
    path.write_bytes(bytes(path.stat().st_size or 10))


def truncated(path: Path, random: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content) + 1)])


def zeros_inside(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    start = random.randrange(len(content) + 1)
    end = min(len(content), start + random.choice((1, 40, 4096)))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def flipped(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(random.choice((1, 1, 5, 50))):
        if content:
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def not_utf8(path: Path, random: Random) -> None:
    path.write_bytes(b"\xff\xfe" + path.read_bytes())


def foreign(path: Path, random: Random) -> None:
    path.write_text(json.dumps(random.choice((*WRONG, {"a": 1}, {"run_id": 1, "tags": []}))))


def deep(path: Path, random: Random) -> None:
    opening, closing = random.choice((("[", "]"), ('{"a":', "}")))
    path.write_text(opening * 100_000 + "1" + closing * 100_000)


def repeated(path: Path, random: Random) -> None:
    path.write_bytes(2 * path.read_bytes())


def a_directory(path: Path, random: Random) -> None:
    path.unlink()
    path.mkdir()


def missing(path: Path, random: Random) -> None:
    path.unlink()


def wrong_fields(path: Path, random: Random) -> None:
    """Of a JSON object, or of a line of JSON lines: fields with other values, or without them."""
    lines = path.read_text().splitlines()
    try:
        place, value = None, json.loads("\n".join(lines))
    except ValueError:
        place = random.randrange(len(lines))
        value = json.loads(lines[place])
    for _ in range(random.choice((1, 1, 2, 4))):
        spoil(value, random)
    text = json.dumps(value)
    path.write_text(text if place is None else "\n".join([*lines[:place], text, *lines[place + 1 :]]) + "\n")


def spoil(tree: Any, random: Random) -> None:
    """Change one value somewhere in nested groups."""
    while isinstance(tree, dict) and tree:
        key = random.choice(list(tree))
        if isinstance(tree[key], dict) and tree[key] and random.random() < 0.8:
            tree = tree[key]
            continue
        if random.random() < 0.3:
            del tree[key]
        elif random.random() < 0.1:
            tree["another"] = random.choice(WRONG)
        else:
            tree[key] = random.choice(WRONG)
        return


DAMAGES: dict[str, Callable[[Path, Random], None]] = {
    one.__name__: one
    for one in (empty, zeros, truncated, zeros_inside, flipped, not_utf8, foreign, deep, repeated, a_directory, missing, wrong_fields)
}


def damage_one(path: Path, random: Random) -> str:
    """Damage a file in one of these ways. Returns the name of the way."""
    name = random.choice(list(DAMAGES))
    if name == "wrong_fields" and path.suffix not in (".json", ".jsonl"):
        name = "flipped"
    DAMAGES[name](path, random)
    return name


def restore(folder: Path, pristine: Path) -> None:
    """Make a folder equal to a copy of it that was kept."""
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder, symlinks=True)
