"""The feature store on disk: a shard is complete or ignored, and a table finds every item by its content."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raytrain2p.data.features import ENCODE_ROWS, KEY_BYTES, FeatureStore, ShardWriter, write_shard
from raytrain2p.data.media import content_key


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
    write_shard(store.directory, [key(name) for name in items], np.stack([feature(value) for value in items.values()]))


def test_a_store_that_was_never_written_is_empty(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "absent", "abc")
    assert store.index() == {}
    assert store.missing({key("a"): "a"}) == [key("a")]


def test_encoders_of_different_fingerprints_do_not_share_a_directory(tmp_path: Path) -> None:
    assert FeatureStore(tmp_path, "a" * 64).directory != FeatureStore(tmp_path, "b" * 64).directory


def test_a_written_shard_is_features_and_keys_and_nothing_else(store: FeatureStore) -> None:
    fill(store, {"a": 1, "b": 2})
    assert sorted(path.suffix for path in store.directory.iterdir()) == [".keys", ".npy"]
    (keys,) = store.directory.glob("*.keys")
    assert keys.read_bytes() == key("a") + key("b")
    assert len(keys.read_bytes()) == 2 * KEY_BYTES
    assert np.load(keys.with_suffix(".npy")).dtype == np.float16


def test_the_index_finds_items_over_several_shards(store: FeatureStore) -> None:
    fill(store, {"a": 1, "b": 2})
    fill(store, {"c": 3})
    index = store.index()
    assert set(index) == {key("a"), key("b"), key("c")}
    for name, value in {"a": 1, "b": 2, "c": 3}.items():
        shard, row = index[key(name)]
        assert np.array_equal(np.load(shard)[row], feature(value))


def test_features_without_keys_are_ignored(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    fill(store, {"b": 2})
    shard, _ = store.index()[key("b")]
    Path(shard).with_suffix(".keys").unlink()  # a writer that died between the two files
    assert set(store.index()) == {key("a")}
    assert store.missing({key("a"): "a", key("b"): "b"}) == [key("b")]


def test_a_partial_file_is_ignored(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    (store.directory / ".0123456789abcdef").write_bytes(key("b"))
    assert set(store.index()) == {key("a")}


def test_only_what_is_not_stored_is_missing_in_the_given_order(store: FeatureStore) -> None:
    fill(store, {"b": 2})
    assert store.missing({key(name): name for name in "cba"}) == [key("c"), key("a")]


def test_a_table_has_the_order_of_the_data_and_may_repeat_items(store: FeatureStore) -> None:
    fill(store, {"a": 1, "b": 2})
    fill(store, {"c": 3})
    table = store.table([key(name) for name in "cabac"])
    assert len(table) == 5
    gathered = table.gather(np.arange(5))
    assert gathered.dtype == torch.float16
    assert gathered.shape == (5, 2, 3)
    assert gathered[:, 0, 0].tolist() == [3, 1, 2, 1, 3]


def test_a_table_names_only_the_shards_that_it_needs(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    fill(store, {"b": 2})
    assert store.table([key("b")]).shards == (store.index()[key("b")][0],)


def test_a_table_of_an_item_that_is_not_stored_is_refused(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    with pytest.raises(KeyError):
        store.table([key("a"), key("z")])


def test_gathered_features_are_a_copy_that_may_be_changed(store: FeatureStore) -> None:
    fill(store, {"a": 1})
    table = store.table([key("a")])
    table.gather([0]).add_(5)
    assert table.gather([0])[0, 0, 0].item() == 1


def test_the_writer_encodes_images_and_texts_in_their_order(store: FeatureStore, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (7, 0, 0)).save(buffer, "PNG")
    (tmp_path / "dark.png").write_bytes(buffer.getvalue())
    sizes: list[int] = []

    def encode(items: Sequence[Any]) -> torch.Tensor:
        sizes.append(len(items))
        values = [float(np.asarray(item)[0, 0, 0]) if isinstance(item, Image.Image) else float(item) for item in items]
        return torch.tensor(values, dtype=torch.float16)[:, None, None].expand(-1, 2, 3)

    texts = [str(number) for number in range(100, 100 + ENCODE_ROWS)]
    batch = {
        "key": np.array([key(name) for name in ["image", *texts]], object),
        "source": np.array([str(tmp_path / "dark.png")] + [""] * len(texts), object),
        "row": np.full(1 + len(texts), -1),
        "text": np.array(["", *texts], object),
    }
    counted = ShardWriter(lambda: encode, str(store.directory))(batch)
    assert counted["rows"].tolist() == [1 + ENCODE_ROWS]
    assert sizes == [ENCODE_ROWS, 1]
    table = store.table([key("image"), key("131"), key("100")])
    assert table.gather(range(3))[:, 1, 2].tolist() == [7, 131, 100]
