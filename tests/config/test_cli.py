"""The settings as `--help` shows them: each one, with type, default, meaning and phase."""

import re

import pytest

from raytrain2p.config.cli import WIDTH, describe_settings
from raytrain2p.config.metadata import known_keys
from raytrain2p.config.settings import SETTINGS_OF_PHASE


def entry(key: str) -> str:
    (line,) = [line for line in describe_settings().splitlines() if line.startswith(f"  {key} (")]
    return line.removeprefix(f"  {key} ")


@pytest.mark.parametrize("phase", [1, 2])
def test_every_setting_of_a_phase_is_listed_once_with_its_meaning(phase: int) -> None:
    text = " ".join(describe_settings().split())
    for key, field in known_keys(SETTINGS_OF_PHASE[phase]).items():
        assert text.count(f" {key} (") == 1, key
        assert field.description, f"{key} has no description"


def test_type_and_default_stand_beside_the_name() -> None:
    assert entry("training.global_batch_size") == "(int, default 16)"
    assert entry("training.max_steps") == "(int | null, default null)"
    assert entry("training.gradient_checkpointing") == "(true | false, default false)"
    assert entry("training.learning_rate") == "(float, default 0.001)"
    assert entry("launch.strategy") == "(ddp | fsdp, default ddp)"
    assert entry("data.test") == "(dict of list of path or {path, weight}, default {})"


def test_a_setting_without_a_default_is_marked_as_required() -> None:
    assert entry("data.train") == "(list of path or {path, weight}, required)"


def test_settings_of_one_phase_alone_are_marked() -> None:
    assert entry("model.dimension").endswith(" [phase 1]")
    assert entry("model.lora.rank").endswith(" [phase 2]")
    assert "[phase" not in entry("model.encoders.image.name")
    assert "[phase" not in entry("seed")


def test_descriptions_are_wrapped() -> None:
    wrapped = [line for line in describe_settings().splitlines() if re.match(r" {6}\S", line)]
    assert wrapped
    assert max(map(len, wrapped)) <= WIDTH
