"""The sweep's settings: what varies, and everything that can be wrong with it, reported at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain2p.config import InputError, flatten, load_settings
from raytrain2p.config.program import as_tree
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Axis

SPACE = {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}, "model.lora.rank": {"choice": [4, 8]}}
BASE: dict[str, Any] = {"checkpoint": {"every_steps": 10, "best_of": "saves"}, "training": {"max_steps": 40}}


def sweep_file(folder: Path, base: dict[str, Any] | None = None, **options: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump((BASE if base is None else base) | {"sweep": {"num_trials": 4, "space": SPACE} | options}))
    return path


def loaded(folder: Path, **options: Any) -> Sweep:
    return load_sweep(sweep_file(folder, **options))


def problems(folder: Path, *overrides: str, base: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_sweep(sweep_file(folder, base, **options), overrides)
    return str(caught.value)


def test_the_shipped_sweep_is_valid_and_varies_several_settings() -> None:
    sweep = load_sweep(None)
    assert sweep.options.num_trials == 8
    assert {axis.setting for axis in sweep.axes} >= {"training.learning_rate", "model.lora.rank", "model.soft_tokens"}
    assert sweep.base.training.global_batch_size == 16, "what it does not say comes from configs/phase2.yaml"


def test_overrides_reach_the_sweep_and_the_trials(tmp_path: Path) -> None:
    sweep = load_sweep(sweep_file(tmp_path), ["sweep.num_trials=9", "training.max_steps=7", "sweep.space={model.lora.rank: {choice: [2]}}"])
    assert sweep.options.num_trials == 9
    assert sweep.axes == (Axis("model.lora.rank", "choice", (2,)),)
    assert sweep.base.training.max_steps == 7
    sweep = load_sweep(sweep_file(tmp_path), ["sweep.space.training.warmup_steps={choice: [1, 2]}"])
    assert Axis("training.warmup_steps", "choice", (1, 2)) in sweep.axes


def test_a_base_is_relative_to_the_file_that_names_it_and_an_override_to_where_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, steps in ((tmp_path / "file", 11), (tmp_path / "here", 12)):
        folder.mkdir()
        (folder / "mine.yaml").write_text(f"data: {{train: emoji:train, val: emoji:val}}\ntraining: {{max_epochs: {steps}}}\n")
    monkeypatch.chdir(tmp_path / "here")
    path = sweep_file(tmp_path / "file")
    path.write_text(path.read_text().replace("sweep:\n", "sweep:\n  base: mine.yaml\n"))
    assert load_sweep(path).base.training.max_epochs == 11
    assert load_sweep(path, ["sweep.base=mine.yaml"]).base.training.max_epochs == 12


def test_a_trial_has_its_values_and_the_rest_of_the_base(tmp_path: Path) -> None:
    settings = loaded(tmp_path).settings({"training.learning_rate": 0.002, "model.lora.rank": 8})
    assert (settings.training.learning_rate, settings.training.max_steps) == (0.002, 40)
    assert flatten(settings)["model.lora.rank"] == 8


def test_the_checkpoint_that_is_kept_is_the_best_by_the_sweeps_own_metric(tmp_path: Path) -> None:
    assert loaded(tmp_path, metric="train_loss", mode="min").base.checkpoint.monitor == "train_loss"
    assert loaded(tmp_path).base.checkpoint.monitor == "val/loss"


def test_everything_that_is_wrong_with_a_space_is_reported_at_once(tmp_path: Path) -> None:
    said = problems(
        tmp_path,
        space={
            "training.learning_rat": {"uniform": [1, 2]},
            "training.weight_decay": {"uniform": [0.5, 0.1]},
            "training.warmup_steps": {"uniform": [1, 5]},
            "training.learning_rate": {"loguniform": [0, 1]},
            "training.global_batch_size": {"normal": [0, 1]},
            "model.lora.rank": {"choice": [4, "eight"]},
            "model.soft_tokens": {"randint": [0, 4]},
            "model.soft_token_dropout": {"quniform": [0, 0.5]},
            "training.gradient_clip": {"choice": [], "uniform": [0.1, 1.0]},
            "output.root": {"choice": ["a", "b"]},
        },
    )
    for expected in (
        "sweep.space.training.learning_rat\n    no such setting\n    fix: did you mean training.learning_rate?",
        "the lowest value must be below the highest",
        "sweep.space.training.warmup_steps, value 1",
        "loguniform: [LOWEST, HIGHEST], both above 0",
        "there is no distribution normal; required is one of choice, grid, uniform, loguniform, quniform, randint",
        "sweep.space.model.lora.rank, value 'eight'",
        "sweep.space.model.soft_tokens, value 0",
        "quniform: [LOWEST, HIGHEST, STEP]",
        "sweep.space.training.gradient_clip\n    has more than one distribution, or none",
        "sweep.space.output.root\n    is shared by all trials",
    ):
        assert expected in said, said


@pytest.mark.parametrize(
    ("options", "overrides", "expected"),
    [
        ({"num_trials": None}, [], "sweep.num_trials\n    is missing"),
        ({"search": "grid"}, [], "training.learning_rate has no list of values"),
        ({"space": {"model.lora.rank": {"grid": [4, 8]}}}, [], "sweep.search=random\n    model.lora.rank is a grid"),
        ({"space": {}}, [], "nothing varies"),
        ({"scheduler": "asha"}, ["checkpoint.best_of=epochs"], "measured at epochs' ends only"),
        ({"scheduler": "asha", "asha": {"grace_period": 15}}, [], "sweep.asha.grace_period=15\n    must be a multiple"),
        ({"scheduler": "pbt"}, [], "sweep.space.model.lora.rank\n    cannot change while weights stay"),
        ({"scheduler": "pbt", "pbt": {"interval": 15}}, [], "must be a multiple of checkpoint.every_steps=10"),
        ({"scheduler": "pbt", "num_trials": 1}, [], "is not a population"),
        ({"scheduler": "pbt"}, ["output.root=s3://bucket/a"], "all nodes share, and output.root=s3://bucket/a is an object storage"),
        ({}, ["launch.num_workers=[1, 2]"], "each has a fixed number of workers"),
        ({}, ["data.val=null"], "sweep.metric=val/loss\n    is measured on validation records"),
        ({"num_trial": 3}, [], "did you mean sweep.num_trials?"),
        ({"num_trials": 0}, [], "sweep.num_trials"),
        ({}, ["training.max_stepps=3"], "did you mean training.max_steps?"),
        ({}, ["model.lora.rank=2"], "sweep.space.model.lora.rank='{choice: [2]}'"),
        ({"asha": {"reduction_factor": 1}}, [], "sweep.asha.reduction_factor"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options: dict[str, Any], overrides: list[str], expected: str) -> None:
    assert expected in problems(tmp_path, *overrides, **options)


def test_a_problem_of_the_sweep_and_one_of_the_trials_are_reported_together(tmp_path: Path) -> None:
    said = problems(tmp_path, "training.max_stepps=3", num_trial=3)
    assert "sweep.num_trials" in said
    assert "training.max_steps" in said


def test_a_file_without_a_sweep_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text("training: {max_steps: 3}\n")
    with pytest.raises(InputError, match="has no `sweep` group"):
        load_sweep(path)


def test_a_trial_is_started_again_by_the_sweep_alone(tmp_path: Path) -> None:
    said = problems(tmp_path, "launch.max_failures=2")
    assert "launch.max_failures=2" in said
    assert "set launch.max_failures=0 and sweep.max_failures=2" in said


def test_a_grid_of_a_thousand_million_combinations_is_refused_and_never_made(tmp_path: Path) -> None:
    values = {"grid": list(range(1, 1001))}
    space = {"training.warmup_steps": values, "model.lora.rank": values, "model.lora.alpha": values}
    said = problems(tmp_path, search="grid", num_trials=None, space=space)
    assert "the grid has 1,000,000,000 combinations, and at most 10,000 trials are run" in said


@pytest.mark.parametrize(
    ("setting", "distribution", "expected"),
    [
        ("training.warmup_steps", {"choice": list(range(1001))}, "at most 1,000 are taken"),
        ("training.warmup_steps", {"randint": [0, 10**30]}, "less than or equal to"),
        ("training.learning_rate", {"uniform": [1, 10**400]}, "required: uniform"),
        ("training.learning_rate", {"quniform": [0.1, 1, 1e-300]}, "more than 1,000,000,000 steps"),
    ],
)
def test_a_distribution_beyond_all_measure_is_refused(tmp_path: Path, setting: str, distribution: dict[str, Any], expected: str) -> None:
    assert expected in problems(tmp_path, space={setting: distribution})


def test_rungs_that_never_end_and_too_many_trials_are_refused(tmp_path: Path) -> None:
    said = problems(tmp_path, num_trials=10**30, asha={"reduction_factor": 1.0000001})
    assert "sweep.num_trials" in said
    assert "sweep.asha.reduction_factor" in said


def test_a_program_gives_a_dictionary_or_checked_settings_in_place_of_a_file(tmp_path: Path) -> None:
    file = sweep_file(tmp_path)
    assert replace(load_sweep(yaml.safe_load(file.read_text())), path=file) == load_sweep(file)
    with pytest.raises(InputError, match=r"sweep.num_trials\b.* in settings"):
        load_sweep({"sweep": {"num_trials": 0, "space": SPACE}} | BASE)
    phase1 = load_settings(1, None, ["training.max_steps=7", "checkpoint.best_of=saves", "checkpoint.every_steps=5"])
    space = '{"model.hidden": {"choice": [16, 32]}}'
    sweep = load_sweep(as_tree(phase1) | {"sweep": {"phase": 1, "num_trials": 2}}, [f"sweep.space={space}", "sweep.metric=train_loss"])
    assert (sweep.options.phase, [axis.setting for axis in sweep.axes]) == (1, ["model.hidden"])
    assert sweep.base == phase1
