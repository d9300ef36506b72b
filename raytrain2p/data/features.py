"""The feature store: the output of a frozen encoder for an item is computed once and kept.

    <root>/<encoder fingerprint>/<name>.npy     features (positions of all items, D), float16, memory-mapped by the workers
                                 <name>.items   content key (32 bytes) and number of positions (4 bytes) of each item; written
                                                last: a shard without it is ignored

Shards are never changed. Items are keyed by their content: of changed data only what changed is computed again, and every
later run, worker and trial on the same storage reuses the rest.

Shape letters: B items, T positions of the longest one, D width of the encoder.
"""

import functools
import math
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from raytrain2p.config import InputError, Problem
from raytrain2p.data.media import TEXT, MediaRef, decode
from raytrain2p.storage.errors import StorageError, reporting_disk_errors
from raytrain2p.storage.files import remove_partial_files, replaced, write_file
from raytrain2p.storage.locks import Lock

ITEM = np.dtype([("key", "S32"), ("positions", "<u4")])
SHARD_ITEMS = 256
FREE_SPACE = "free space there, or set data.feature_store to a directory on another disk"
ENCODE_VALUES = 1 << 26  # of what an encoder takes, after which a pass begins with fewer items
ENCODE_ITEMS = 32  # items per forward pass on a CPU: with more it is no faster and needs more memory
GPU_ITEMS, GPU_THREADS = 64, 8  # items per forward pass on a GPU, and threads that meanwhile decode and preprocess as many


class Encoder(Protocol):
    """A frozen encoder."""

    def preprocess(self, items: Sequence[Any]) -> Sequence[torch.Tensor]:
        """Decoded items to what `encode` takes, on the CPU."""

    def encode(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Features of each item, (T, D), float16."""


class Features(NamedTuple):
    """Grids of several items: values (B, T, D), float16, and the positions of each (B,); None if all have T."""

    values: torch.Tensor
    positions: torch.Tensor | None = None


def padded(grids: Sequence[torch.Tensor]) -> Features:
    """Grids (T_i, D) as one tensor, with zeros after the shorter ones."""
    counts = [len(grid) for grid in grids]
    if len(set(counts)) <= 1:
        return Features(torch.stack(list(grids)) if grids else torch.empty(0, 1, 1))
    return Features(torch.nn.utils.rnn.pad_sequence(list(grids), batch_first=True), torch.tensor(counts, device=grids[0].device))


@dataclass(frozen=True)
class FeatureTable:
    """Items of the store in the order of a data set: item i is `shards[files[i]][starts[i] : starts[i] + positions[i]]`."""

    shards: tuple[str, ...]
    files: np.ndarray
    starts: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def gather(self, items: Sequence[int] | np.ndarray) -> Features:
        """The features of these items."""
        rows = [_mapped(self.shards[self.files[item]])[self.starts[item] : self.starts[item] + self.positions[item]] for item in items]
        if len({len(row) for row in rows}) == 1:
            return Features(torch.from_numpy(np.stack(rows)))
        return padded([torch.from_numpy(np.array(row)) for row in rows])


@functools.lru_cache(maxsize=4096)
def _mapped(shard: str) -> np.ndarray:
    return np.load(shard, mmap_mode="r")


def read_items(path: Path) -> np.ndarray:
    """The list of items of a shard, if the shard is whole: as large as its items need.

    Raises:
        Exception: it is not.
    """
    listed = np.frombuffer(path.read_bytes(), ITEM)
    features = np.lib.format.open_memmap(path.with_suffix(".npy"), mode="r")  # raises for another header, and for a file cut off
    if features.ndim != 2 or features.dtype.kind != "f" or not len(listed) or len(features) != listed["positions"].sum():
        raise ValueError(f"features of shape {features.shape} do not fit a list of {len(listed)} items")
    return listed


class FeatureStore:
    """The features of one encoder.

    Args:
        root: directory on storage that all nodes share.
        fingerprint: of the encoder and its preprocessing.
    """

    def __init__(self, root: str | Path, fingerprint: str) -> None:
        self.directory = Path(root) / fingerprint[:32]
        self._places: dict[bytes, tuple[str, int, int]] = {}  # content key to shard, first position, number of positions
        self._read: set[str] = set()  # shards whose items are in it
        self.damaged: list[str] = []  # a line for the user about each damaged shard, whose items count as not stored

    def places(self) -> Mapping[bytes, tuple[str, int, int]]:
        """The place of each stored item. Only shards that are new since the last call are read."""
        for items in sorted(self.directory.glob("*.items")):
            if items.name in self._read:
                continue
            self._read.add(items.name)
            shard = str(items.with_suffix(".npy"))
            try:
                listed = read_items(items)
            except Exception as error:  # numpy raises many kinds for a damaged header
                self.damaged.append(f"features are computed again: {shard} is damaged ({' '.join(str(error).split())[:100]}); remove it")
                continue
            ends = np.cumsum(listed["positions"], dtype=np.int64)
            for key, start, count in zip(listed["key"], (ends - listed["positions"]).tolist(), listed["positions"].tolist(), strict=True):
                self._places[bytes(key).ljust(32, b"\0")] = (shard, start, count)  # numpy strips zero bytes at the end
        return self._places

    def table(self, keys: Iterable[bytes]) -> FeatureTable:
        """The table for items that are all stored.

        Raises:
            KeyError: an item is not stored.
        """
        stored = self.places()
        places = [stored[key] for key in keys]
        number = {shard: position for position, shard in enumerate(dict.fromkeys(shard for shard, _, _ in places))}
        return FeatureTable(
            tuple(number),
            np.array([number[shard] for shard, _, _ in places], np.int32),
            np.array([start for _, start, _ in places], np.int64),
            np.array([count for _, _, count in places], np.int32),
        )

    def complete(
        self,
        items: Mapping[bytes, MediaRef | str],
        build_encoder: Callable[[], Encoder],
        workers: int,
        cpus: int,
        gpus: float,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> int:
        """Compute missing features through Ray Data, in a pool of encoder processes. Returns the number of items computed.

        One process at a time completes a store; a second one waits for the first.

        Args:
            items: media or texts by content key.
            build_encoder: builds the encoder, inside its process.
            workers: number of encoder processes.
            cpus: CPUs of each process.
            gpus: GPUs of each process.
            progress: called with (done, total) as shards are finished.

        Raises:
            InputError: the store cannot be written, or the encoder's output cannot be stored. What was finished stays.
        """
        if not self.missing(items):
            return 0
        try:
            with reporting_disk_errors(self.directory / "lock", 1_000):
                self.directory.mkdir(parents=True, exist_ok=True)
                with Lock(self.directory / "lock").held(math.inf):
                    remove_partial_files(self.directory)
                    missing = self.missing(items)
                    if missing:
                        self._encode({key: items[key] for key in missing}, build_encoder, workers, cpus, gpus, progress)
        except StorageError as error:
            raise InputError(self._problem(str(error), FREE_SPACE)) from None
        return len(missing)

    def _problem(self, what: str, fix: str) -> Problem:
        return Problem(f"data.feature_store={self.directory.parent}", what, fix)

    def missing(self, items: Iterable[bytes]) -> list[bytes]:
        stored = self.places()
        return [key for key in items if key not in stored]

    def _encode(
        self,
        items: Mapping[bytes, MediaRef | str],
        build_encoder: Callable[[], Encoder],
        workers: int,
        cpus: int,
        gpus: float,
        progress: Callable[[int, int], None],
    ) -> None:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        blocks = max(1, -(-len(items) // SHARD_ITEMS))
        shards = ray.data.from_items([_row(key, item) for key, item in items.items()], override_num_blocks=blocks).map_batches(
            ShardWriter,
            fn_constructor_args=(build_encoder, str(self.directory), gpus > 0),
            batch_size=SHARD_ITEMS,
            compute=ray.data.ActorPoolStrategy(size=min(workers, blocks)),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        done = 0
        progress(done, len(items))
        for batch in shards.iter_batches(batch_size=1, prefetch_batches=0):
            if what := batch["what"][0]:
                raise InputError(self._problem(what, batch["fix"][0]))
            done += int(batch["items"].sum())
            progress(done, len(items))


def _row(key: bytes, item: MediaRef | str) -> dict[str, Any]:
    """An item as a row for Ray Data: a text, or a reference."""
    if isinstance(item, str):
        return {"key": key, "text": item, "modality": "", "source": "", "row": -1, "place": ""}
    row = -1 if item.row is None else item.row
    return {"key": key, "text": "", "modality": item.modality, "source": item.source, "row": row, "place": item.place}


class ShardWriter:
    """Encodes batches of items, all texts or all of one modality, and writes each as a shard. Only the number of items goes through Ray,
    or what is wrong and how to fix it: Ray wraps an exception in layers of its own, and its text in tracebacks.

    Args:
        on_gpu: media are decoded and preprocessed in threads, while earlier ones are encoded. On a CPU that takes all cores anyway.
    """

    def __init__(self, build_encoder: Callable[[], Encoder], directory: str, on_gpu: bool = False) -> None:
        self.encoder, self.directory = build_encoder(), Path(directory)
        self.most = GPU_ITEMS if on_gpu else ENCODE_ITEMS
        self.threads = ThreadPoolExecutor(GPU_THREADS) if on_gpu else None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        grids, waiting, values = list[np.ndarray](), list[torch.Tensor](), 0
        try:
            for one in self.preprocessed(batch):
                waiting.append(one)
                values += one.numel()
                if len(waiting) >= self.most or values > ENCODE_VALUES:
                    grids += self.encode(waiting)
                    waiting, values = [], 0
            grids += self.encode(waiting)
        except torch.OutOfMemoryError:
            modality = batch["modality"][0] or TEXT
            fix = f"set model.encoders.{modality}.precision=bf16 if it is not, or launch.use_gpu=false"
            return _result(what=f"one item of {modality} needs more memory than the GPU has free", fix=fix)
        if not all(np.isfinite(grid).all() for grid in grids):
            what = "the encoder's output for some item has NaN or values beyond float16 (65504), which the store holds"
            return _result(what=what, fix="set data.features=online, or take another encoder")
        try:
            with reporting_disk_errors(self.directory / "*.npy", sum(grid.nbytes for grid in grids)):
                write_shard(self.directory, [bytes(key) for key in batch["key"]], grids)
        except StorageError as error:
            return _result(what=str(error), fix=FREE_SPACE)
        return _result(len(grids))

    def preprocessed(self, batch: Mapping[str, np.ndarray]) -> Iterator[torch.Tensor]:
        if not batch["modality"][0]:
            return iter(self.encoder.preprocess(batch["text"].tolist()))
        columns = (batch[name] for name in ("modality", "source", "row", "place"))
        refs = [
            MediaRef(modality, source, None if row < 0 else int(row), place) for modality, source, row, place in zip(*columns, strict=True)
        ]
        return map(self.preprocess, refs) if self.threads is None else ahead(self.threads, self.preprocess, refs, self.most)

    def preprocess(self, ref: MediaRef) -> torch.Tensor:
        return self.encoder.preprocess([decode(ref)])[0]

    def encode(self, inputs: list[torch.Tensor]) -> list[np.ndarray]:
        """Features of each. After a pass that a GPU's memory does not hold, this one and later ones have half as many items.

        Raises:
            torch.OutOfMemoryError: it does not hold one item.
        """
        grids = list[np.ndarray]()
        while inputs:
            some = inputs[: self.most]
            try:
                grids += [grid.cpu().numpy() for grid in self.encoder.encode(some)]
                inputs = inputs[len(some) :]
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                self.most = len(some) // 2
        return grids


def ahead(
    threads: ThreadPoolExecutor, function: Callable[[MediaRef], torch.Tensor], refs: Iterable[MediaRef], count: int
) -> Iterator[torch.Tensor]:
    """The function of each, in their order; it is called for so many more than were asked for."""
    waiting = deque[Future[torch.Tensor]]()
    for ref in refs:
        waiting.append(threads.submit(function, ref))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _result(items: int = 0, what: str = "", fix: str = "") -> dict[str, np.ndarray]:
    return {"items": np.array([items]), "what": np.array([what]), "fix": np.array([fix])}


def write_shard(directory: Path, keys: Sequence[bytes], grids: Sequence[np.ndarray]) -> None:
    """Features first and the list of items last, each atomically: a reader never sees an incomplete shard."""
    shard = directory / f"{uuid.uuid4().hex}.npy"
    with replaced(shard) as stream:
        np.save(stream, np.concatenate(grids))
    listed = np.array([(key, len(grid)) for key, grid in zip(keys, grids, strict=True)], ITEM)
    write_file(shard.with_suffix(".items"), listed.tobytes())
