"""The feature store: what a frozen encoder says about an item is computed once and kept.

    <root>/<encoder fingerprint>/<name>.npy     features (rows, T, D), float16, memory-mapped by the workers
                                 <name>.keys    the rows' content keys, 32 bytes each; written last: no keys, no shard

Shards are never changed. An item is found by its content, so changed data recomputes only what changed, and every later
run, worker and trial on the same storage reuses the rest.
"""

import functools
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from raytrain2p.data.media import ImageRef, decode_image

KEY_BYTES = 32
SHARD_ROWS = 256
ENCODE_ROWS = 32  # items per forward pass; larger ones are no faster on a CPU and need more memory

Encoder = Callable[[Sequence[Any]], torch.Tensor]


@dataclass(frozen=True)
class FeatureTable:
    """Rows of the store in the order of a data set: item i is row `rows[i]` of `shards[files[i]]`."""

    shards: tuple[str, ...]
    files: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, items: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Features (len(items), T, D), float16."""
        return torch.from_numpy(np.stack([_mapped(self.shards[self.files[item]])[self.rows[item]] for item in items]))


@functools.lru_cache(maxsize=4096)
def _mapped(shard: str) -> np.ndarray:
    return np.load(shard, mmap_mode="r")


class FeatureStore:
    """The features of one encoder.

    Args:
        root: directory on storage that all nodes share.
        fingerprint: of the encoder and its preprocessing.
    """

    def __init__(self, root: str | Path, fingerprint: str) -> None:
        self.directory = Path(root) / fingerprint[:32]

    def index(self) -> dict[bytes, tuple[str, int]]:
        """Where each stored item lies: content key to (shard, row)."""
        found: dict[bytes, tuple[str, int]] = {}
        for keys in sorted(self.directory.glob("*.keys")):
            content, shard = keys.read_bytes(), str(keys.with_suffix(".npy"))
            for row in range(len(content) // KEY_BYTES):
                found[content[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = (shard, row)
        return found

    def table(self, keys: Sequence[bytes]) -> FeatureTable:
        """The table for items that are all stored.

        Raises:
            KeyError: one is not.
        """
        index = self.index()
        places = [index[key] for key in keys]
        shards = tuple(dict.fromkeys(shard for shard, _ in places))
        number = {shard: position for position, shard in enumerate(shards)}
        return FeatureTable(
            shards, np.array([number[shard] for shard, _ in places], np.int32), np.array([row for _, row in places], np.int64)
        )

    def complete(
        self,
        items: Mapping[bytes, ImageRef | str],
        build_encoder: Callable[[], Encoder],
        workers: int,
        cpus: int,
        gpus: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Compute what is missing, through Ray Data over a pool of encoder processes, and return how many items that was.

        One process at a time completes a store; a second one waits and then finds the work done.

        Args:
            items: images or texts by content key.
            build_encoder: makes the encoder, inside its process.
            workers: encoder processes.
            cpus: CPUs for each of them.
            gpus: GPUs for each of them.
            progress: called with (done, total) as shards are finished.
        """
        if not self.missing(items):
            return 0
        self.directory.mkdir(parents=True, exist_ok=True)
        with FileLock(self.directory / "lock"):
            missing = self.missing(items)
            if missing:
                self._encode({key: items[key] for key in missing}, build_encoder, workers, cpus, gpus, progress)
        return len(missing)

    def missing(self, items: Mapping[bytes, Any]) -> list[bytes]:
        stored = self.index()
        return [key for key in items if key not in stored]

    def _encode(
        self,
        items: Mapping[bytes, ImageRef | str],
        build_encoder: Callable[[], Encoder],
        workers: int,
        cpus: int,
        gpus: int,
        progress: Callable[[int, int], None],
    ) -> None:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        rows = [
            {"key": key, "source": item.source, "row": -1 if item.row is None else item.row, "text": ""}
            if isinstance(item, ImageRef)
            else {"key": key, "source": "", "row": -1, "text": item}
            for key, item in items.items()
        ]
        blocks = max(1, -(-len(rows) // SHARD_ROWS))
        shards = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            ShardWriter,
            fn_constructor_args=(build_encoder, str(self.directory)),
            batch_size=SHARD_ROWS,
            compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        done = 0
        progress(done, len(rows))
        for batch in shards.iter_batches(batch_size=1, prefetch_batches=0):
            done += int(batch["rows"].sum())
            progress(done, len(rows))


class ShardWriter:
    """Encodes batches of items and writes each as a shard; what travels through Ray is only the count."""

    def __init__(self, build_encoder: Callable[[], Encoder], directory: str) -> None:
        self.encoder = build_encoder()
        self.directory = Path(directory)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        items: list[Any] = [
            text if not source else decode_image(ImageRef(source, None if row < 0 else int(row)).read())
            for source, row, text in zip(batch["source"], batch["row"], batch["text"], strict=True)
        ]
        parts = [self.encoder(items[start : start + ENCODE_ROWS]).cpu().numpy() for start in range(0, len(items), ENCODE_ROWS)]
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise ValueError("the encoder's output has values beyond float16 (65504) or NaN: use data.features=online, or another encoder")
        write_shard(self.directory, [bytes(key) for key in batch["key"]], features)
        return {"rows": np.array([len(items)])}


def write_shard(directory: Path, keys: Sequence[bytes], features: np.ndarray) -> None:
    """Features first, keys last, each aside and then renamed: a reader never sees a shard that is not whole."""
    name = uuid.uuid4().hex
    aside = directory / f".{name}"
    with aside.open("wb") as stream:
        np.save(stream, features)
        stream.flush()
        os.fsync(stream.fileno())
    aside.rename(directory / f"{name}.npy")
    aside.write_bytes(b"".join(keys))
    aside.rename(directory / f"{name}.keys")
