"""Settings that a program gives as Python values."""

from pathlib import Path

import numpy as np
import pytest

from raytrain2p.config import Findings, InputError, flatten, load_settings
from raytrain2p.config.metadata import known_keys
from raytrain2p.config.program import as_overrides, as_tree
from raytrain2p.config.settings import InstructionSettings, LoraSettings

KNOWN = known_keys(InstructionSettings)


def overrides(**given: object) -> list[str]:
    findings = Findings()
    found = as_overrides(given, KNOWN, findings)
    findings.raise_any()
    return found


def test_groups_and_dotted_paths_are_the_forms_of_the_command_line() -> None:
    given = {"training": {"max_steps": 5, "gradient_clip": None}, "training.log_every": 1, "seed": 3, "model": {"lora.rank": 4}}
    assert overrides(**given) == [
        "training.max_steps=5",
        "training.gradient_clip=null",
        "training.log_every=1",
        "seed=3",
        "model.lora.rank=4",
    ]


def test_a_setting_that_is_a_mapping_is_replaced_as_a_whole_and_a_group_is_merged() -> None:
    encoders = {"image": {"size": 64}}
    given = overrides(data={"test": {"mine": Path("/records.jsonl")}}, model={"soft_tokens": {"image": 8}, "encoders": encoders})
    assert given == ['data.test={"mine": "/records.jsonl"}', 'model.soft_tokens={"image": 8}', "model.encoders.image.size=64"]
    settings = load_settings(2, None, given)
    assert {key for key in flatten(settings) if key.startswith("data.test")} == {"data.test.mine"}
    assert settings.training.max_epochs == load_settings(2).training.max_epochs


def test_values_of_numpy_and_of_settings_are_taken_and_text_is_kept_as_it_is() -> None:
    given = overrides(
        training={"max_steps": np.int64(7), "learning_rate": np.float32(0.5)},
        model={"lora": LoraSettings(rank=2), "system_prompt": 'yes: "# ü😀\n'},
        data={"train": ("a.jsonl", {"path": "b.jsonl", "weight": 2.0})},
    )
    settings = load_settings(2, None, given)
    assert isinstance(settings, InstructionSettings)
    assert (settings.training.max_steps, settings.training.learning_rate, settings.model.lora.rank) == (7, 0.5, 2)
    assert settings.model.system_prompt == 'yes: "# ü😀\n'
    assert [Path(source.path).name for source in settings.data.train] == ["a.jsonl", "b.jsonl"]


def test_a_value_that_no_setting_has_is_a_problem_beside_the_others() -> None:
    findings = Findings()
    assert as_overrides({"seed": object(), "training": {"max_steps": {1, 2}, "log_every": 2}}, KNOWN, findings) == ["training.log_every=2"]
    assert [problem.where for problem in findings.problems] == ["seed", "training.max_steps"]


def test_a_dictionary_stands_for_a_file_and_stays_as_it_is(tmp_path: Path) -> None:
    given = {"data": {"train": tmp_path / "records.jsonl"}, "training": {"max_steps": 2}}
    tree = as_tree(given)
    settings = load_settings(1, tree, ["training.max_steps=3", "data.val=other.jsonl"])
    assert settings.training.max_steps == 3
    assert settings.data.test == {}, "nothing comes from the packaged settings"
    assert tree == {"data": {"train": str(tmp_path / "records.jsonl")}, "training": {"max_steps": 2}}
    with pytest.raises(InputError, match=r"data.train in settings\n    is missing"):
        load_settings(1, {"data": {}, "training": {"max_steps": 2}})


def test_checked_settings_are_the_same_when_they_are_checked_again() -> None:
    settings = load_settings(2, None, ["model.encoders.image=efficientnet-lite0", "data.test={a: emoji:val}", "training.max_steps=4"])
    assert load_settings(2, as_tree(settings)) == settings
