"""The feature store on disk: a shard is complete or ignored, and a table finds every item by its content."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raytrain2p.data.features import ENCODE_ITEMS, FeatureStore, ShardWriter, padded, write_shard
from raytrain2p.data.media import content_key
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


def test_the_writer_encodes_media_and_texts_in_their_order(store: FeatureStore, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (7, 0, 0)).save(buffer, "PNG")
    (tmp_path / "dark.png").write_bytes(buffer.getvalue())
    sizes: list[int] = []

    def encode(items: Sequence[Any]) -> list[torch.Tensor]:
        sizes.append(len(items))
        values = [float(np.asarray(item)[0, 0, 0]) if isinstance(item, Image.Image) else float(item) for item in items]
        return list(torch.tensor(values, dtype=torch.float16)[:, None, None].expand(-1, 2, 3))

    texts = [str(number) for number in range(100, 100 + ENCODE_ITEMS)]
    batch = {
        "key": np.array([key(name) for name in ["image", *texts]], object),
        "modality": np.array(["image"] + [""] * len(texts), object),
        "source": np.array([str(tmp_path / "dark.png")] + [""] * len(texts), object),
        "place": np.array([""] * (1 + len(texts)), object),
        "row": np.full(1 + len(texts), -1),
        "text": np.array(["", *texts], object),
    }
    counted = ShardWriter(lambda: encode, str(store.directory))(batch)
    assert counted["items"].tolist() == [1 + ENCODE_ITEMS]
    assert sizes == [ENCODE_ITEMS, 1]
    table = store.table([key("image"), key("131"), key("100")])
    assert table.gather(range(3)).values[:, 1, 2].tolist() == [7, 131, 100]


def texts(*names: str) -> dict[str, np.ndarray]:
    """A batch of texts, as Ray Data gives it."""
    count = len(names)
    return {
        "key": np.array([key(name) for name in names], object),
        "modality": np.array([""] * count, object),
        "source": np.array([""] * count, object),
        "place": np.array([""] * count, object),
        "row": np.full(count, -1),
        "text": np.array(names, object),
    }


def test_a_full_disk_is_said_with_its_path_and_the_shard_is_written_once_there_is_space(disk: Disk) -> None:
    store = FeatureStore(disk.folder, "f" * 64)
    store.directory.mkdir()
    writer = ShardWriter(lambda: lambda items: [torch.ones(2, 3, dtype=torch.float16) for _ in items], str(store.directory))
    disk.fill()
    result = writer(texts("a"))
    assert result["items"].tolist() == [0]
    assert "no space left" in result["what"][0]
    assert str(store.directory) in result["what"][0]
    assert "data.feature_store" in result["fix"][0]
    assert list(store.directory.iterdir()) == []
    disk.fix()
    assert writer(texts("a"))["items"].tolist() == [1]
    assert store.missing([key("a")]) == []


def test_output_that_float16_cannot_hold_is_not_stored(store: FeatureStore) -> None:
    result = ShardWriter(lambda: lambda items: [torch.full((2, 3), torch.inf) for _ in items], str(store.directory))(texts("a"))
    assert "65504" in result["what"][0]
    assert store.missing([key("a")]) == [key("a")]


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
