"""The feature store: the output of a frozen encoder for an item is computed once and kept.

    <root>/<encoder fingerprint>/<name>.npy     features (rows, T, D), float16, memory-mapped by the workers
                                 <name>.keys    content keys of the rows, 32 bytes each; written last: a shard without keys is ignored

Shards are never changed. Items are keyed by their content: of changed data only what changed is computed again, and every
later run, worker and trial on the same storage reuses the rest.
"""

import functools
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytrain2p.data.media import ImageRef, decode_image
from raytrain2p.storage.files import replaced, write_file
from raytrain2p.storage.locks import Lock

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
        """The place of each stored item: content key to (shard, row)."""
        found: dict[bytes, tuple[str, int]] = {}
        for keys in sorted(self.directory.glob("*.keys")):
            content, shard = keys.read_bytes(), str(keys.with_suffix(".npy"))
            for row in range(len(content) // KEY_BYTES):
                found[content[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = (shard, row)
        return found

    def table(self, keys: Sequence[bytes]) -> FeatureTable:
        """The table for items that are all stored.

        Raises:
            KeyError: an item is not stored.
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
        """Compute missing features through Ray Data, in a pool of encoder processes. Returns the number of items computed.

        One process at a time completes a store; a second one waits for the first.

        Args:
            items: images or texts by content key.
            build_encoder: builds the encoder, inside its process.
            workers: number of encoder processes.
            cpus: CPUs of each process.
            gpus: GPUs of each process.
            progress: called with (done, total) as shards are finished.
        """
        if not self.missing(items):
            return 0
        with Lock(self.directory / "lock").held(math.inf):
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
    """Encodes batches of items and writes each as a shard. Only the number of rows goes through Ray."""

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
            raise ValueError("the encoder's output has NaN or values beyond float16 (65504): use data.features=online, or another encoder")
        write_shard(self.directory, [bytes(key) for key in batch["key"]], features)
        return {"rows": np.array([len(items)])}


def write_shard(directory: Path, keys: Sequence[bytes], features: np.ndarray) -> None:
    """Features first and keys last, each atomically: a reader never sees an incomplete shard."""
    shard = directory / f"{uuid.uuid4().hex}.npy"
    with replaced(shard) as stream:
        np.save(stream, features)
    write_file(shard.with_suffix(".keys"), b"".join(keys))
