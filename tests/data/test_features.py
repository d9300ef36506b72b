"""The feature store on disk: a shard is complete or ignored, and a table finds every item by its content."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Semaphore
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raytrain2p.data.features import ENCODE_ITEMS, GPU_ITEMS, FeatureStore, ShardWriter, _row, padded, write_shard
from raytrain2p.data.media import MediaRef, content_key
from tests.disks import Disk


def key(name: str) -> bytes:
    return content_key(name.encode())


def feature(value: float) -> np.ndarray:
    return np.full((2, 3), value, np.float16)


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    store = FeatureStore(tmp_path, "f" * 64)
    store.directory.mkdir()
    return store


def fill(store: FeatureStore, items: dict[str, float]) -> None:
    write_shard(store.directory, [key(name) for name in items], [feature(value) for value in items.values()])


def test_a_store_that_was_never_written_is_empty(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "absent", "abc")
    assert store.places() == {}
    assert store.missing({key("a"): "a"}) == [key("a")]


def test_encoders_of_different_fingerprints_do_not_share_a_directory(tmp_path: Path) -> None:
    assert FeatureStore(tmp_path, "a" * 64).directory != FeatureStore(tmp_path, "b" * 64).directory


def test_a_written_shard_is_features_and_a_list_of_items_and_nothing_else(store: FeatureStore) -> None:
    fill(store, {"a": 1, "b": 2})
    assert sorted(path.suffix for path in store.directory.iterdir()) == [".items", ".npy"]
    (items,) = store.directory.glob("*.items")
    two = (2).to_bytes(4, "little")
    assert items.read_bytes() == key("a") + two + key("b") + two
    assert np.load(items.with_suffix(".npy")).dtype == np.float16


def test_a_key_that_ends_in_zero_bytes_is_found(store: FeatureStore) -> None:
    zeros = b"k" + bytes(31)
    write_shard(store.directory, [zeros], [feature(1)])
    assert store.missing([zeros]) == []


def test_the_index_finds_items_over_several_shards(store: FeatureStore) -> None:
    fill(store, {"a": 1, "b": 2})
    fill(store, {"c": 3})
    places = store.places()
    assert set(places) == {key("a"), key("b"), key("c")}
    for name, value in {"a": 1, "b": 2, "c": 3}.items():
        shard, start, count = places[key(name)]
        assert np.array_equal(np.load(shard)[start : start + count], feature(value))


def test_items_may_have_different_numbers_of_positions(store: FeatureStore) -> None:
    grids = {"a": np.ones((2, 3), np.float16), "b": 2 * np.ones((5, 3), np.float16), "c": 3 * np.ones((2, 3), np.float16)}
    write_shard(store.directory, [key(name) for name in grids], list(grids.values()))
    table = store.table([key(name) for name in "cba"])
    values, positions = table.gather([0, 1, 2])
    assert positions is not None
    assert positions.tolist() == [2, 5, 2]
    assert values[:, :, 0].tolist() == [[3, 3, 0, 0, 0], [2] * 5, [1, 1, 0, 0, 0]]
    values, positions = table.gather([0, 2])
    assert (values[:, :, 0].tolist(), positions) == ([[3, 3], [1, 1]], None)


def test_nothing_is_a_batch_without_items() -> None:
    assert len(padded([]).values) == 0


def test_features_without_a_list_of_items_are_ignored(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    fill(store, {"b": 2})
    Path(store.places()[key("b")][0]).with_suffix(".items").unlink()  # a writer that died between the two files
    again = FeatureStore(store.directory.parent, "f" * 64)
    assert set(again.places()) == {key("a")}
    assert again.missing({key("a"): "a", key("b"): "b"}) == [key("b")]


def test_a_partial_file_is_ignored(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    (store.directory / ".0123456789abcdef").write_bytes(key("b"))
    assert set(store.places()) == {key("a")}


def test_only_what_is_not_stored_is_missing_in_the_given_order(store: FeatureStore) -> None:
    fill(store, {"b": 2})
    assert store.missing({key(name): name for name in "cba"}) == [key("c"), key("a")]


def test_a_table_has_the_order_of_the_data_and_may_repeat_items(store: FeatureStore) -> None:
    fill(store, {"a": 1, "b": 2})
    fill(store, {"c": 3})
    table = store.table([key(name) for name in "cabac"])
    assert len(table) == 5
    gathered, positions = table.gather(np.arange(5))
    assert positions is None
    assert gathered.dtype == torch.float16
    assert gathered.shape == (5, 2, 3)
    assert gathered[:, 0, 0].tolist() == [3, 1, 2, 1, 3]


def test_a_table_names_only_the_shards_that_it_needs(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    fill(store, {"b": 2})
    assert store.table([key("b")]).shards == (store.places()[key("b")][0],)


def test_a_table_of_an_item_that_is_not_stored_is_refused(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    with pytest.raises(KeyError):
        store.table([key("a"), key("z")])


def test_gathered_features_are_a_copy_that_may_be_changed(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    table = store.table([key("a")])
    table.gather([0]).values.add_(5)
    assert table.gather([0]).values[0, 0, 0].item() == 1


class Brightness:
    """An encoder of images and of numbers as texts: an item's first value, in two positions of three channels.

    Args:
        holds: items of a pass for which its GPU has memory.
    """

    def __init__(self, holds: int = 1000) -> None:
        self.holds, self.passes, self.preprocessed = holds, list[int](), Semaphore(0)

    def preprocess(self, items: Sequence[Any]) -> list[torch.Tensor]:
        self.preprocessed.release(len(items))
        return [torch.tensor(float(np.asarray(item).flat[0])) for item in items]

    def encode(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.passes.append(len(inputs))
        if len(inputs) > self.holds:
            raise torch.OutOfMemoryError
        return list(torch.stack(list(inputs)).half()[:, None, None].expand(-1, 2, 3))


def images(folder: Path, count: int) -> dict[bytes, MediaRef | str]:
    """Items of files that are brighter one by one, by key."""
    for number in range(count):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
    return {key(str(number)): MediaRef("image", str(folder / f"{number}.png")) for number in range(count)}


def batch_of(items: Mapping[bytes, MediaRef | str]) -> dict[str, np.ndarray]:
    """Rows, as Ray Data gives them."""
    rows = [_row(name, item) for name, item in items.items()]
    return {name: np.array([row[name] for row in rows], int if name == "row" else object) for name in rows[0]}


@pytest.mark.parametrize("kind", ["image", "text"])
def test_the_writer_encodes_some_items_at_a_time_in_their_order(store: FeatureStore, tmp_path: Path, kind: str) -> None:
    count, encoder = ENCODE_ITEMS + 1, Brightness()
    items = images(tmp_path, count) if kind == "image" else {key(str(number)): str(number) for number in range(count)}
    counted = ShardWriter(lambda: encoder, str(store.directory))(batch_of(items))
    assert counted["items"].tolist() == [count]
    assert encoder.passes == [ENCODE_ITEMS, 1]
    table = store.table([key("0"), key("31"), key("17")])
    assert table.gather(range(3)).values[:, 1, 2].tolist() == [0, 31, 17]


def test_on_a_gpu_media_are_preprocessed_while_earlier_ones_are_encoded(store: FeatureStore, tmp_path: Path) -> None:
    class Waiting(Brightness):
        """Its first pass ends once those of the next one are preprocessed, which without threads would be after it."""

        def encode(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            for _ in range(0 if self.passes else 2 * GPU_ITEMS):
                assert self.preprocessed.acquire(timeout=20)
            return super().encode(inputs)

    count, encoder = 2 * GPU_ITEMS + 1, Waiting()
    ShardWriter(lambda: encoder, str(store.directory), on_gpu=True)(batch_of(images(tmp_path, count)))
    assert encoder.passes == [GPU_ITEMS, GPU_ITEMS, 1]
    names = [key(str(number)) for number in range(count)]
    assert store.table(names).gather(range(count)).values[:, 0, 0].tolist() == list(range(count))


def test_a_pass_that_memory_does_not_hold_is_made_in_halves_from_then_on(store: FeatureStore) -> None:
    encoder = Brightness(holds=3)
    writer = ShardWriter(lambda: encoder, str(store.directory), on_gpu=True)
    writer.most = 8
    names = [str(number) for number in range(10)]
    assert writer(texts(*names))["items"].tolist() == [10]
    assert encoder.passes == [8, 4, 2, 2, 2, 2, 2]  # 4 and 4 of the first 8, each in halves; the last two are one pass
    assert store.table([key(name) for name in names]).gather(range(10)).values[:, 0, 0].tolist() == list(range(10))


def test_an_item_that_no_memory_holds_is_a_refusal(store: FeatureStore) -> None:
    result = ShardWriter(lambda: Brightness(holds=0), str(store.directory))(texts("1", "2"))
    assert result["what"][0] == "one item of text needs more memory than the GPU has free"
    assert "model.encoders.text.precision=bf16" in result["fix"][0]
    assert not store.places()


def texts(*names: str) -> dict[str, np.ndarray]:
    """A batch of texts, as Ray Data gives it."""
    return batch_of({key(name): name for name in names})


def test_a_full_disk_is_said_with_its_path_and_the_shard_is_written_once_there_is_space(disk: Disk) -> None:
    store = FeatureStore(disk.folder, "f" * 64)
    store.directory.mkdir()
    writer = ShardWriter(Brightness, str(store.directory))
    disk.fill()
    result = writer(texts("1"))
    assert result["items"].tolist() == [0]
    assert "no space left" in result["what"][0]
    assert str(store.directory) in result["what"][0]
    assert "data.feature_store" in result["fix"][0]
    assert list(store.directory.iterdir()) == []
    disk.fix()
    assert writer(texts("1"))["items"].tolist() == [1]
    assert store.missing([key("1")]) == []


def test_output_that_float16_cannot_hold_is_not_stored(store: FeatureStore) -> None:
    result = ShardWriter(Brightness, str(store.directory))(texts("1e6"))
    assert "65504" in result["what"][0]
    assert store.missing([key("1e6")]) == [key("1e6")]


@pytest.mark.parametrize("part", [".items", ".npy"])
@pytest.mark.parametrize("damage", ["empty", "zeros", "truncated", "foreign", "missing"])
def test_a_damaged_shard_is_named_and_its_items_are_missing(store: FeatureStore, part: str, damage: str) -> None:
    fill(store, {"a": 1})
    fill(store, {"b": 2})
    shard = Path(FeatureStore(store.directory.parent, "f" * 64).places()[key("b")][0])
    path = shard.with_suffix(part)
    content = path.read_bytes()
    if damage == "missing":
        if part == ".items":
            return  # such a shard is ignored: its writer was killed
        path.unlink()
    else:
        size = len(content)
        spoilt = {
            "empty": b"",
            "zeros": bytes(size),
            "truncated": content[:-3],
            "foreign": b"something else",
        }
        path.write_bytes(spoilt[damage])
    assert store.missing([key("a"), key("b")]) == [key("b")]
    (line,) = store.damaged
    assert f"features are computed again: {shard} is damaged" in line
    fill(store, {"b": 3})
    assert store.table([key("b")]).gather([0]).values[0, 0, 0] == 3
