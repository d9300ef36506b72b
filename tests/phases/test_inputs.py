"""Digests of a run's inputs: content and order count, file names do not. And the size of what is to be encoded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raytrain2p.config import AlignmentSettings, load_settings
from raytrain2p.data.features import FeatureStore, write_shard
from raytrain2p.data.media import MediaRef, content_key
from raytrain2p.data.records import ASSISTANT, USER, Message, Record
from raytrain2p.models.encoders import EncoderSpec
from raytrain2p.phases.alignment.data import AlignmentInputs
from raytrain2p.phases.inputs import SAMPLED, EncoderJob, digest_records, plan_notes

A, B, MOVED = MediaRef("image", "a.png"), MediaRef("image", "b.png"), MediaRef("image", "elsewhere.png")
KEYS = {A: content_key(b"one"), B: content_key(b"two"), MOVED: content_key(b"one")}


def asked(*parts: str | MediaRef, answer: str, task: str = "all") -> Record:
    return Record("x:1", (Message(USER, parts), Message(ASSISTANT, (answer,))), task)


RECORDS = [
    asked(A, "Which colour?", answer="red", task="colour"),
    asked("Say yes.", answer="yes"),
    replace(asked(B, answer="a blue circle"), concept="circle"),
]


def test_moved_files_with_the_same_content_have_the_same_digest() -> None:
    moved = [replace(record, where=f"y:{number}") for number, record in enumerate(RECORDS)]
    moved[0] = replace(asked(MOVED, "Which colour?", answer="red", task="colour"), where="y:0")
    assert digest_records(moved, KEYS) == digest_records(RECORDS, KEYS)


@pytest.mark.parametrize(
    "other",
    [
        RECORDS[::-1],
        RECORDS[:2],
        [asked(A, "Which colour?", answer="blue", task="colour"), *RECORDS[1:]],
        [asked(A, "Which color?", answer="red", task="colour"), *RECORDS[1:]],
        [replace(RECORDS[0], task="all"), *RECORDS[1:]],
        [asked(B, "Which colour?", answer="red", task="colour"), *RECORDS[1:]],
        [asked("Which colour?", answer="red", task="colour"), *RECORDS[1:]],
        [asked("Which colour?", A, answer="red", task="colour"), *RECORDS[1:]],
        [*RECORDS[:2], replace(RECORDS[2], concept="square")],
        [*RECORDS[:2], asked(B, answer="a blue square")],
    ],
)
def test_other_content_or_order_has_another_digest(other: list[Record]) -> None:
    assert digest_records(other, KEYS) != digest_records(RECORDS, KEYS)


@pytest.mark.parametrize(
    ("overrides", "notes"),
    [
        (["training.global_batch_size=20"], []),
        (["training.global_batch_size=16"], ["data.train: 4 of 100 records, others in each epoch, are left out: they fill no step of 16"]),
        (["training.max_steps=3"], ["data.train: 60 of 100 records are used: training ends after 3 steps of 20"]),
        (["training.max_steps=1001", "data.train=[{path: a.jsonl, weight: 2}]", "training.global_batch_size=16"], []),
        (["training.warmup_steps=6"], ["training.warmup_steps=6 is shortened to 5, since training has 10 steps"]),
    ],
)
def test_what_a_run_makes_of_its_settings_is_said(overrides: list[str], notes: list[str]) -> None:
    base = ["training.max_epochs=2", "training.max_steps=1000", "training.global_batch_size=20", "training.warmup_steps=1"]
    assert plan_notes(load_settings(1, None, [*base, *overrides]), 100) == notes


@pytest.mark.parametrize(
    ("train", "use"),
    [
        ("emoji:train", []),
        ("speech:train", ["data.train=[speech:train]"]),
        ("[emoji:train, speech:train]", ["data.train=[emoji:train, speech:train]"]),
        ("a.jsonl", ["data.train=FILE"]),
    ],
)
def test_phase_2_trains_on_the_same_embedded_sets_or_on_records_of_its_own(train: str, use: list[str]) -> None:
    settings = load_settings(1, None, [f"data.train={train}"])
    assert isinstance(settings, AlignmentSettings)
    assert AlignmentInputs({}, (), {}, (), (), settings).use == use


@pytest.mark.parametrize(("options", "off"), [({}, 0.0), ({"pooled": False}, 0.05)])
def test_the_size_of_features_is_estimated_from_some_of_the_items_that_are_missing(
    options: dict[str, bool], off: float, tiny_bert: Path, tmp_path: Path
) -> None:
    """Texts of 2 to 33 tokens: a vector each, or one for each token."""
    lengths = np.random.default_rng(0).integers(2, 34, 4 * SAMPLED)
    texts: dict[bytes, MediaRef | str] = {
        content_key(f"{number}".encode()): f"{number:04}"[:2] + "x" * int(length - 2) for number, length in enumerate(lengths)
    }
    store, spec = FeatureStore(tmp_path, "f" * 64), EncoderSpec("text", str(tiny_bert), options)
    grids = [grid.numpy() for grid in spec.build()(list(texts.values()))]
    store.directory.mkdir()
    half = 2 * SAMPLED
    write_shard(store.directory, list(texts)[:half], grids[:half])
    estimated = EncoderJob("text", store, texts, spec).bytes_needed
    write_shard(store.directory, list(texts)[half:], grids[half:])
    rest = sum(grid.nbytes + 36 for grid in grids[half:])
    assert estimated == pytest.approx(rest, rel=off)
    assert EncoderJob("text", store, texts, spec).bytes_needed == 0
