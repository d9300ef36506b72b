"""Settings: each has metadata, and the lists that follow from it; the global batch and how it is divided."""

from typing import Any

import pytest
from pydantic import BaseModel

from raytrain2p.config import AlignmentSettings, InputError, InstructionSettings, Problem, load_settings
from raytrain2p.config.metadata import FIXED, FREE, LIVE, SHARED, belongs_to, known_keys, metadata_of, settings_where
from raytrain2p.config.settings import NAMES_A_MODEL, TrainingSettings
from raytrain2p.sweep.results import may_change
from raytrain2p.sweep.settings import SweepSettings

SEARCH = {"sweep.num_trials", "sweep.max_concurrent", "sweep.time_budget_s", "sweep.max_failures"}
TRAINING = {"training.global_batch_size", "training.learning_rate", "training.warmup_steps", "training.weight_decay"}
FOUND_BY = {"checkpoint.monitor", "checkpoint.mode", "launch.strategy", "output.root", "tracking.uri", "tracking.experiment"}
DATA = {f"data.{name}" for name in ("train", "val", "test", "loss_on", "too_long", "features", "feature_store")} | {
    "data.feature_workers",
    "data.loader_workers",
}
SHARED_GROUPS = ("output", "tracking", "launch", "checkpoint", "evaluation", "data.feature_store", "data.val", "data.test", "model.init")
KINDS = (AlignmentSettings, InstructionSettings)


ENCODER_NAMES = {f"encoders.{modality}.name" for modality in ("image", "audio", "text")}


@pytest.mark.parametrize("kind", [*KINDS, SweepSettings])
def test_every_setting_has_metadata(kind: type[BaseModel]) -> None:
    for key, field in known_keys(kind).items():
        assert isinstance(field.json_schema_extra, dict), f"{key} has no metadata: define it with config.metadata.setting"
        metadata_of(field)


def model(*names: str) -> set[str]:
    return {f"model.{name}" for name in names}


ENCODER_SETTINGS = model(
    *ENCODER_NAMES,
    *(name.removesuffix("name") + "precision" for name in ENCODER_NAMES),
    *("encoders.image.size", "encoders.audio.pool", "encoders.text.layer", "encoders.text.pooled"),
)


@pytest.mark.parametrize(
    ("kind", "of_the_model"),
    [
        (AlignmentSettings, ENCODER_SETTINGS | model("dimension", "hidden", "dropout", "input_norm", "loss")),
        (
            InstructionSettings,
            ENCODER_SETTINGS
            | model("language_model", "aligner", "train_aligner", "projector", "soft_tokens", "soft_token_dropout", "tuning")
            | model("recall_texts", "recall_tokens", "recall_dropout", "rate_factors", "quantization")
            | model("lora.rank", "lora.alpha", "lora.dropout", "lora.target_modules", "system_prompt", "max_length"),
        ),
    ],
)
def test_what_a_resumed_run_must_keep(kind: type[BaseModel], of_the_model: set[str]) -> None:
    fixed = settings_where(kind, lambda metadata: metadata.resume == FIXED)
    assert set(fixed) == {"seed", "data.train", "data.loss_on", "data.too_long"} | {"model.init"} | TRAINING | FOUND_BY | of_the_model


@pytest.mark.parametrize(
    ("kind", "of_the_model"),
    [
        (AlignmentSettings, ENCODER_SETTINGS),
        (
            InstructionSettings,
            ENCODER_SETTINGS
            | model(
                "language_model", "soft_tokens", "recall_texts", "recall_tokens", "system_prompt", "max_length", "aligner", "quantization"
            ),
        ),
    ],
)
def test_what_prepared_splits_depend_on(kind: type[BaseModel], of_the_model: set[str]) -> None:
    splits = settings_where(kind, lambda metadata: metadata.splits)
    assert set(splits) == {"seed", "evaluation.max_records", "model.init"} | DATA | of_the_model


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_trials_share(kind: type[BaseModel]) -> None:
    shared = settings_where(kind, lambda metadata: metadata.trial == SHARED)
    assert set(shared) == {key for key in known_keys(kind) if belongs_to(key, SHARED_GROUPS)}


@pytest.mark.parametrize(
    ("kind", "of_the_model"),
    [(AlignmentSettings, model("dropout")), (InstructionSettings, model("soft_token_dropout", "recall_dropout", "lora.dropout"))],
)
def test_what_may_change_while_weights_stay(kind: type[BaseModel], of_the_model: set[str]) -> None:
    live = settings_where(kind, lambda metadata: metadata.trial == LIVE)
    assert set(live) == {"training.learning_rate", "training.weight_decay", "training.gradient_clip"} | of_the_model


def test_what_a_resumed_sweep_may_change() -> None:
    assert set(may_change(SweepSettings, "sweep.")) == SEARCH
    for kind in KINDS:
        assert set(may_change(kind)) == {
            "data.feature_workers",
            "launch.cpus_per_worker",
            "launch.placement_strategy",
            "launch.wait_for_nodes_s",
            "launch.object_store_mb",
        }


def test_what_may_change_on_resume_besides() -> None:
    free = settings_where(InstructionSettings, lambda metadata: metadata.resume == FREE)
    assert {"model.attention", "tracking.system_metrics", "training.micro_batch_size", "launch.num_workers"} <= set(free)


@pytest.mark.parametrize(
    ("kind", "names"),
    [(AlignmentSettings, ENCODER_NAMES), (InstructionSettings, {"language_model"} | ENCODER_NAMES)],
)
def test_what_names_a_model(kind: type[BaseModel], names: set[str]) -> None:
    assert {key for key, field in known_keys(kind).items() if NAMES_A_MODEL in field.metadata} == model(*names)


def test_entries_of_a_mapping_belong_to_its_setting() -> None:
    assert belongs_to("data.test.mine", ["data.test"])
    assert not belongs_to("model.soft_token_dropout", ["model.soft_tokens", "model.soft_token"])


@pytest.mark.parametrize(
    ("micro", "workers", "expected"),
    [(None, 1, (16, 1)), (None, 2, (8, 1)), (None, 4, (4, 1)), (4, 1, (4, 4)), (4, 2, (4, 2)), (4, 4, (4, 1)), (1, 16, (1, 1))],
)
def test_micro_batch_and_accumulation_follow_from_the_global_batch(micro: int | None, workers: int, expected: tuple[int, int]) -> None:
    training = TrainingSettings(max_steps=1, global_batch_size=16, micro_batch_size=micro)
    assert (training.micro_batch(workers), training.gradient_accumulation_steps(workers)) == expected


def problems_of(phase: int, *overrides: str) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        load_settings(phase, None, overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("phase", "size", "micro", "workers", "fix"),
    [
        (2, 16, None, 3, "set training.global_batch_size=15 or 18"),
        (1, 16, None, 3, "set training.global_batch_size=15 or 18"),
        (2, 2, None, 3, "set training.global_batch_size=3"),
        (2, 16, 2, 3, "set training.global_batch_size=12 or 18"),
        (2, 16, 3, 2, "set training.micro_batch_size=2 or 4"),
        (2, 24, 5, 2, "set training.micro_batch_size=4 or 6"),
        (2, 16, 8, 4, "set training.micro_batch_size=4"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_nearest_numbers_that_can(
    phase: int, size: int, micro: int | None, workers: int, fix: str
) -> None:
    options = {"training.global_batch_size": size, "training.micro_batch_size": micro, "launch.num_workers": workers}
    written: list[str] = [f"{key}={'null' if value is None else value}" for key, value in options.items()]
    (problem,) = problems_of(phase, *written)
    assert problem.fix == fix
    setting, _, numbers = fix.removeprefix("set ").partition("=")
    for number in numbers.split(" or "):
        load_settings(phase, None, [*written, f"{setting}={number}"])


def test_both_settings_that_do_not_divide_are_named() -> None:
    (problem,) = problems_of(2, "launch.num_workers=3", "training.global_batch_size=16")
    assert problem.where == "launch.num_workers=3 with training.global_batch_size=16"
    assert problem.what == "16 records cannot be divided evenly among 3 workers"


def test_a_global_batch_that_cannot_be_divided_is_reported_beside_other_problems() -> None:
    problems = problems_of(2, "launch.num_workers=3", "checkpoint.monitor=val/loss", "data.val=null", "model.lora.rank=abc")
    assert [problem.where for problem in problems] == [
        "model.lora.rank=abc",
        "checkpoint.monitor=val/loss",
        "launch.num_workers=3 with training.global_batch_size=16",
    ]


def test_phase_1_takes_a_step_in_one_pass() -> None:
    sizes: list[Any] = ["training.global_batch_size=16", "launch.num_workers=2"]
    (problem,) = problems_of(1, *sizes, "training.micro_batch_size=4")
    assert problem.where == "training.micro_batch_size=4"
    assert "compares all records of one pass" in problem.what
    assert "training.micro_batch_size=null" in problem.fix
    assert load_settings(1, None, [*sizes, "training.micro_batch_size=8"]).training.gradient_accumulation_steps(2) == 1


@pytest.mark.parametrize(
    ("old", "new"), [("training.batch_size=8", "training.global_batch_size"), ("training.accumulate=2", "training.micro_batch_size")]
)
def test_renamed_settings_are_hinted_at(old: str, new: str) -> None:
    (problem,) = problems_of(2, old)
    assert problem.fix.startswith(f"set {new}: ")


@pytest.mark.parametrize(
    ("phase", "workers", "size", "micro", "counts"),
    [
        (2, "3", 6, None, [3]),
        (2, "[1, 4]", 16, None, [1, 2, 4]),
        (2, "[2, 6]", 12, 2, [2, 3, 6]),
        (1, "[1, 3]", 12, None, [1, 2, 3]),
        (2, "[2, 2]", 16, None, [2]),
    ],
)
def test_numbers_of_workers_that_do_not_divide_the_batch_are_never_used(
    phase: int, workers: str, size: int, micro: int | None, counts: list[int]
) -> None:
    micro_batch = "null" if micro is None else str(micro)
    batch = [f"training.global_batch_size={size}", f"training.micro_batch_size={micro_batch}"]
    settings = load_settings(phase, None, [f"launch.num_workers={workers}", *batch])
    assert settings.worker_counts == counts
    assert (settings.launch.min_workers, settings.launch.max_workers) == (counts[0], counts[-1])
    assert settings.launch.is_elastic == (len(counts) > 1)


@pytest.mark.parametrize(
    "setting", ["launch.strategy=fsdp", "launch.placement_strategy=STRICT_PACK", "launch.placement_strategy=STRICT_SPREAD"]
)
def test_a_range_of_workers_is_neither_sharded_nor_placed_strictly(setting: str) -> None:
    load_settings(2, None, ["launch.num_workers=2", setting])
    with pytest.raises(InputError, match=rf"{setting} with launch.num_workers=\[1, 2\]"):
        load_settings(2, None, ["launch.num_workers=[1,2]", setting])


def test_weights_in_4_bits_are_not_sharded() -> None:
    with pytest.raises(InputError, match=r"launch.strategy=fsdp with model.quantization=nf4\n.*\n    fix: set launch.strategy=ddp"):
        load_settings(2, None, ["launch.strategy=fsdp", "model.quantization=nf4"])


def test_weights_are_sharded_within_groups_that_divide_the_workers() -> None:
    sharded = ["launch.strategy=fsdp", "launch.num_workers=12", "training.global_batch_size=12"]
    assert load_settings(2, None, sharded).launch.sharing == 12
    assert load_settings(2, None, [*sharded, "launch.shard_workers=4"]).launch.sharing == 4
    assert load_settings(2, None, ["launch.strategy=fsdp", "launch.shard_workers=4"]).launch.sharing == 1, "of one worker"
    with pytest.raises(InputError, match=r"12 workers cannot be divided into groups of 5\n    fix: sizes that can: 3, 4, 6, 12"):
        load_settings(2, None, [*sharded, "launch.shard_workers=5"])
    with pytest.raises(InputError, match=r"launch.shard_workers=4 with launch.strategy=ddp"):
        load_settings(2, None, [*sharded[1:], "launch.shard_workers=4"])


@pytest.mark.parametrize(
    ("phase", "workers", "micro", "what", "fix"),
    [
        (2, [3, 6], None, "among 3 and 6 workers", "set launch.num_workers=4"),
        (2, [1, 6], None, "among 6 workers", "set launch.num_workers=[1, 4]"),
        (2, [5, 7], None, "among 5 and 7 workers", "numbers of workers that can: 2, 4, 8, 16"),
        (2, [1, 8], 4, "among 8 workers", "set launch.num_workers=[1, 4]"),
        (1, [2, 4], 4, "among 2 workers", "set launch.num_workers=4"),
        (2, [4, 2], None, "required: a number greater than 0, or a range of two such as [1, 4]", ""),
        (2, [0, 2], None, "required: a number greater than 0, or a range of two such as [1, 4]", ""),
        (2, [], None, "required: a number greater than 0, or a range of two such as [1, 4]", ""),
    ],
)
def test_a_range_of_workers_that_cannot_be_is_refused_with_the_numbers_that_can(
    phase: int, workers: list[int], micro: int | None, what: str, fix: str
) -> None:
    micro_batch = "null" if micro is None else str(micro)
    batch = ["training.global_batch_size=16", f"training.micro_batch_size={micro_batch}"]
    with pytest.raises(InputError) as raised:
        load_settings(phase, None, [f"launch.num_workers={workers}", *batch])
    (problem,) = raised.value.problems
    assert what in problem.what
    assert fix in problem.fix
