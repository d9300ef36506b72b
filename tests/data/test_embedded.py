"""The embedded sets: what is asked, and that held-out items stay held out."""

from collections import Counter

import pytest

from raytrain2p.config import InputError
from raytrain2p.data.embedded import EMBEDDED, clips, embedded_records, images
from raytrain2p.data.media import decode


def test_each_order_question_is_asked_twice_with_the_images_swapped_and_the_other_answer() -> None:
    for split in EMBEDDED["emoji_order"].splits:
        records = embedded_records(f"emoji_order:{split}", 2, "data.train")
        half = len(records) // 2
        for one, other in zip(records[:half], records[half:], strict=True):
            assert list(one.media()) == list(other.media())[::-1]
            assert one.question == other.question
            assert one.answers != other.answers
            assert all(answer in one.question for answer in one.answers + other.answers)


def test_half_of_the_clips_name_the_image_beside_them() -> None:
    for split in EMBEDDED["emoji_speech"].splits:
        names = {item.ref: item.name for item in images(split) + clips({"test_drawing": "test_speaker"}.get(split, split))}
        records = embedded_records(f"emoji_speech:{split}", 2, "data.train")
        assert Counter(answer for record in records for answer in record.answers)["yes"] == len(records) / 2
        for record in records:
            image, clip = record.media()
            assert record.answers == ["yes" if names[image] == names[clip] else "no"]


@pytest.mark.parametrize(("items", "held_out"), [(images, "test_drawing"), (clips, "test_speaker")])
def test_known_and_new_concepts_are_what_they_are_called(items: object, held_out: str) -> None:
    assert callable(items)
    trained = {item.name for item in items("train")}
    assert {item.name for item in items(held_out)} | {item.name for item in items("val")} <= trained
    assert not trained & {item.name for item in items("test_concept")}


def test_images_and_clips_of_new_concepts_are_of_the_same_ones() -> None:
    assert {item.name for item in images("test_concept")} == {item.name for item in clips("test_concept")}


def test_a_clip_is_a_second_of_speech() -> None:
    clip = decode(clips("val")[0].ref)
    assert clip.rate == 16000
    assert 0.3 < clip.seconds < 3


def test_sets_made_of_two_have_no_records_of_phase_1() -> None:
    with pytest.raises(InputError, match="no records of phase 1"):
        embedded_records("emoji_order:train", 1, "data.train")
