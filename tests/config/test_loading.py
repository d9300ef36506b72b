"""Settings from YAML files and `key=value` overrides: what is refused, in which words, and what paths become."""

import itertools
import os
import pickle
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from raytrain2p.config import (
    AlignmentSettings,
    Findings,
    InputError,
    InstructionSettings,
    Problem,
    base_directory,
    cache_directory,
    flatten,
    load_settings,
)
from raytrain2p.config.metadata import known_keys
from raytrain2p.config.paths import outputs_line, packaged_config
from raytrain2p.config.problems import MOST_ALIKE
from raytrain2p.config.settings import SETTINGS_OF_PHASE, Source
from raytrain2p.sweep.load import load_sweep

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def paths(sources: list[Source] | None) -> list[str]:
    return [source.path for source in sources or []]


def problems_of(*overrides: str, phase: int = 2, config: Path | None = None) -> list[Problem]:
    with pytest.raises(InputError) as caught:
        load_settings(phase, config, overrides)
    return caught.value.problems


def only_problem(*overrides: str, phase: int = 2, config: Path | None = None) -> Problem:
    (problem,) = problems_of(*overrides, phase=phase, config=config)
    return problem


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_file_loads_in_its_phase(config: Path) -> None:
    if config.name == "sweep.yaml":
        load_sweep(config)
        return
    phase = re.match(r"phase(\d)", config.name)
    assert phase is not None, f"{config.name} does not say its phase"
    settings = load_settings(int(phase[1]), config)
    assert isinstance(settings, {"1": AlignmentSettings, "2": InstructionSettings}[phase[1]])


@pytest.mark.parametrize("phase", [1, 2])
def test_without_a_file_the_packaged_one_of_the_phase_is_taken(phase: int) -> None:
    assert load_settings(phase) == load_settings(phase, packaged_config(f"phase{phase}"))


def test_files_ship_for_both_phases() -> None:
    assert {"phase1.yaml", "phase2.yaml"} <= {path.name for path in CONFIGS}


def test_an_unknown_key_suggests_the_nearest_valid_one() -> None:
    problem = only_problem("training.learnin_rate=3")
    assert problem.where == "training.learnin_rate=3"
    assert problem.what == "no such setting"
    assert problem.fix == "did you mean training.learning_rate?"


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("system_prompt=hello", "model.system_prompt"),
        ("model.rank=4", "model.lora.rank"),
        ("max_steps=4", "training.max_steps"),
        ("training.num_workers=4", "launch.num_workers"),
    ],
)
def test_a_key_in_the_wrong_group_suggests_where_it_belongs(override: str, meant: str) -> None:
    assert only_problem(override).fix == f"did you mean {meant}?"


def test_a_key_like_no_other_points_to_the_help() -> None:
    assert only_problem("zzqqxx=1").fix == "`--help` lists every setting"


def test_a_setting_of_the_other_phase_is_refused() -> None:
    assert only_problem("model.dimension=3", phase=2).what == "no such setting"
    assert only_problem("model.soft_tokens=3", phase=1).what == "no such setting"


@pytest.mark.parametrize(
    ("override", "required"),
    [
        ("training.global_batch_size=many", "int"),
        ("training.global_batch_size=16.5", "int"),
        ("training.max_epochs=often", "int | null"),
        ("training.learning_rate=fast", "float"),
        ("evaluation.shuffled=1", "true | false"),
        ("data.train=3", "list of path or {path, weight}"),
        ("data.test=3", "dict of list of path or {path, weight}"),
        ("training.precision=bf32", "auto | bf16 | float32"),
    ],
)
def test_a_wrong_type_is_refused_and_the_required_one_named(override: str, required: str) -> None:
    problem = only_problem(override)
    assert problem.where == override
    assert problem.what.endswith(f"(required: {required})")


@pytest.mark.parametrize(
    "override",
    [
        "training.global_batch_size=0",
        "training.learning_rate=-1e-3",
        "seed=-1",
        "model.lora.dropout=1.0",
        "launch.num_workers=0",
        "data.train=",
    ],
)
def test_a_value_out_of_range_is_refused_in_the_words_of_the_user(override: str) -> None:
    assert only_problem(override).where == override


def test_a_wrong_type_of_a_setting_with_two_forms_is_one_problem_with_the_override_named() -> None:
    problem = only_problem("model.lora.target_modules=3")
    assert problem.where == "model.lora.target_modules=3"


def test_several_problems_are_told_at_once() -> None:
    problems = problems_of("training.global_batch_size=abc", "training.max_step=3", "nonsense", "model.lora.rank=-1")
    assert {problem.where for problem in problems} == {
        "training.global_batch_size=abc",
        "training.max_step=3",
        "nonsense",
        "model.lora.rank=-1",
    }


def test_a_wrong_type_does_not_hide_settings_that_contradict_each_other() -> None:
    problems = problems_of("model.lora.rank=abc", "checkpoint.monitor=val/loss", "data.val=null")
    told = " ".join(map(str, problems))
    assert "model.lora.rank=abc" in told
    assert "data.val is not set" in told


def test_the_message_counts_the_problems_and_shows_what_where_and_how_to_fix() -> None:
    text = str(InputError([Problem("a=1", "is bad", "do b"), Problem("c=2", "is worse")]))
    assert text.startswith("2 problems; nothing was started\n")
    assert "a=1\n    is bad\n    fix: do b" in text
    assert text.endswith("c=2\n    is worse")
    assert str(InputError(Problem("a", "b"))).startswith("1 problem;")


def test_a_very_long_list_of_problems_is_cut_but_counted() -> None:
    text = str(InputError([Problem(f"line <{number}>", "is bad") for number in range(MOST_ALIKE + 7)]))
    assert f"{MOST_ALIKE + 7} problems" in text
    assert f"line <{MOST_ALIKE - 1}>" in text
    assert f"line <{MOST_ALIKE}>" not in text
    assert text.endswith("... and 7 more like it")


def test_an_input_error_survives_a_process_boundary() -> None:
    error = InputError([Problem("a=1", "is bad", "do b"), Problem("c=2", "is worse")])
    copy = pickle.loads(pickle.dumps(error))
    assert copy.problems == error.problems
    assert str(copy) == str(error)


def test_findings_collect_input_errors_once_each_and_let_bugs_through() -> None:
    findings = Findings()
    for _ in range(2):
        with findings:
            raise InputError(Problem("here", "is bad"))
    with pytest.raises(ZeroDivisionError), findings:
        raise ZeroDivisionError
    with pytest.raises(InputError) as caught:
        findings.raise_any()
    assert caught.value.problems == [Problem("here", "is bad")]


def test_findings_without_a_problem_raise_nothing() -> None:
    Findings().raise_any()


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("2.5e-4", 2.5e-4), ("5.e-4", 5e-4), ("1e+2", 100.0), ("3", 3.0), ("0.1", 0.1)]
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    assert load_settings(2, None, [f"training.learning_rate={text}"]).training.learning_rate == value


def test_an_exponent_without_a_dot_is_a_number_in_a_file_too(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("data:\n  train: emoji:train\ntraining:\n  max_steps: 3\n  learning_rate: 3e-4\n")
    assert load_settings(1, config).training.learning_rate == 3e-4


def test_a_text_that_only_looks_a_little_like_a_number_stays_text() -> None:
    settings = load_settings(2, None, ["tracking.experiment=e3-run", "model.system_prompt=1e-3 is small"])
    assert isinstance(settings, InstructionSettings)
    assert settings.tracking.experiment == "e3-run"
    assert settings.model.system_prompt == "1e-3 is small"


def test_an_override_beats_the_file_and_a_later_one_beats_an_earlier_one() -> None:
    assert load_settings(2).seed == 0
    assert load_settings(2, None, ["seed=7", "training.max_steps=5", "seed=8"]).seed == 8


def test_the_last_of_several_bad_values_is_the_one_that_is_told() -> None:
    assert only_problem("seed=a", "seed=b").where == "seed=b"


def test_an_override_of_one_key_keeps_the_rest_of_its_group() -> None:
    before, after = flatten(load_settings(2)), flatten(load_settings(2, None, ["training.max_steps=5", "data.test.extra=emoji:val"]))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed == {"training.max_steps", "data.test.extra"}


def test_an_override_may_hold_an_equals_sign() -> None:
    settings = load_settings(2, None, ["tracking.uri=postgresql://db/mlflow?sslmode=require"])
    assert settings.tracking.uri == "postgresql://db/mlflow?sslmode=require"


@pytest.mark.parametrize("override", ["nonsense", "=3", "training.max_steps"])
def test_a_malformed_override_is_refused_with_an_example(override: str) -> None:
    problem = only_problem(override)
    assert problem.where == override
    assert problem.what == "is not of the form key=value"
    assert "training.max_steps=200" in problem.fix


@pytest.mark.parametrize(("text", "steps"), [("010", 10), ("0x10", 16), ("+7", 7)])
def test_whole_numbers_are_what_they_look_like(text: str, steps: int) -> None:
    """YAML 1.1 reads 010 as 8."""
    assert load_settings(2, None, [f"training.max_steps={text}"]).training.max_steps == steps


@pytest.mark.parametrize("text", ["1:30", "1_000", "yes", "9" * 5000])
def test_what_yaml_1_1_would_convert_is_no_number(text: str) -> None:
    assert only_problem(f"training.max_steps={text}").where.startswith(f"training.max_steps={text[:100]}")


@pytest.mark.parametrize("name", ["2026-11-31", "on", "12:30", "no"])
def test_text_that_looks_like_a_date_or_a_switch_stays_text(name: str) -> None:
    assert load_settings(2, None, [f"tracking.experiment={name}"]).tracking.experiment == name


def test_a_key_that_a_file_has_twice_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("data: {train: emoji:train}\ntraining:\n  max_steps: 1\ndata: {train: emoji:val}\n")
    assert "has `data` twice in one group" in only_problem(config=config).what
    config.write_text("base: &base {max_steps: 1}\ndata: {train: emoji:train}\ntraining:\n  <<: *base\n  max_steps: 2\n")
    assert only_problem(config=config).where.startswith("base"), "a merged group may be overridden"


def test_yaml_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "deep.yaml"
    config.write_text("data: " + "[" * 20_000)
    assert only_problem(config=config).what.startswith("is not YAML")


def test_an_override_that_is_not_yaml_is_refused() -> None:
    problem = only_problem("data.train=[a")
    assert problem.where == "data.train=[a"
    assert problem.what == "the value is not YAML"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    problem = only_problem(config=tmp_path / "absent.yaml")
    assert problem.where == f"--config {tmp_path / 'absent.yaml'}"
    assert "No such file" in problem.what


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"training: [", "is not YAML"),
        (b"\xff\xfe\xfa", "is not YAML"),
        (b"- a\n- b\n", "contains no settings"),
        (b"", "contains no settings"),
    ],
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, content: bytes, what: str) -> None:
    config = tmp_path / "odd.yaml"
    config.write_bytes(content)
    problem = only_problem(config=config)
    assert str(config) in problem.where
    assert problem.what.startswith(what)


def test_a_bad_value_in_a_file_is_told_with_key_value_and_file(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("data:\n  train: emoji:train\ntraining:\n  max_steps: soon\n")
    assert only_problem(config=config).where == f"training.max_steps = 'soon' in {config}"


def test_a_missing_required_setting_is_told_with_its_meaning(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("data:\n  val: emoji:val\ntraining:\n  max_steps: 3\n")
    problem = only_problem(config=config)
    assert problem.where == f"data.train in {config}"
    assert problem.what == "is missing"
    assert "records to train on" in problem.fix


def test_ranking_checkpoints_by_validation_without_validation_records_is_refused() -> None:
    problem = only_problem("checkpoint.monitor=val/loss", "data.val=null")
    assert "checkpoint.monitor=val/loss" in problem.where
    assert "data.val is not set" in problem.what


def test_ranking_checkpoints_by_validation_with_validation_records_is_accepted() -> None:
    assert load_settings(2, None, ["checkpoint.monitor=val/loss"]).checkpoint.monitor == "val/loss"


@pytest.mark.parametrize("phase", [1, 2])
def test_training_without_an_end_is_refused(phase: int) -> None:
    problem = only_problem("training.max_epochs=null", "training.max_steps=null", phase=phase)
    assert "training.max_epochs" in problem.what
    assert "training.max_steps" in problem.what
    assert "no end" in problem.what


@pytest.mark.parametrize("end", ["training.max_epochs=2", "training.max_steps=2"])
def test_one_end_is_enough(end: str) -> None:
    load_settings(2, None, ["training.max_epochs=null", "training.max_steps=null", end])


def test_settings_are_frozen() -> None:
    settings = load_settings(2)
    with pytest.raises(ValidationError):
        settings.training.global_batch_size = 3  # type: ignore[misc]


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAYTRAIN2P_HOME", raising=False)
    overrides = ["data.train=a/b.jsonl", "data.val=c.parquet", "data.test={mine: d.jsonl}", "data.feature_store=store", "output.root=out"]
    settings = load_settings(2, None, [*overrides, "tracking.uri=sqlite:///track/m.db"])
    assert paths(settings.data.train) == [str(tmp_path / "a/b.jsonl")]
    assert paths(settings.data.val) == [str(tmp_path / "c.parquet")]
    assert {name: paths(sources) for name, sources in settings.data.test.items()} == {"mine": [str(tmp_path / "d.jsonl")]}
    assert settings.data.feature_store == str(tmp_path / "store")
    assert settings.output.root == str(tmp_path / "out")
    assert settings.tracking.uri == f"sqlite:///{tmp_path}/track/m.db"


def test_absolute_paths_uris_and_the_embedded_set_stay_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTRAIN2P_HOME", "/elsewhere")
    overrides = [f"output.root={tmp_path}/out", f"tracking.uri=sqlite:///{tmp_path}/m.db", "data.feature_store=/features"]
    settings = load_settings(2, None, overrides)
    assert settings.output.root == f"{tmp_path}/out"
    assert settings.tracking.uri == f"sqlite:///{tmp_path}/m.db"
    assert settings.data.feature_store == "/features"
    assert paths(settings.data.train) == ["emoji:train"]
    assert load_settings(2, None, ["tracking.uri=http://server:5000"]).tracking.uri == "http://server:5000"


def test_an_object_storage_is_a_path_in_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("RAYTRAIN2P_SCRATCH", str(tmp_path))
    for url, path in (("s3://bucket", "s3/bucket"), ("s3://bucket/a/b/", "s3/bucket/a/b"), ("gs://bucket/a", "gs/bucket/a")):
        assert load_settings(1, None, [f"output.root={url}"]).output.root == str(tmp_path / path)


def test_urls_that_are_no_object_storage_and_a_feature_store_in_one_are_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as raised:
        load_settings(1, None, ["output.root=ftp://host/a", "data.feature_store=s3://bucket/features"])
    assert [problem.where for problem in raised.value.problems] == ["output.root=ftp://host/a", "data.feature_store=s3://bucket/features"]
    assert "s3://BUCKET/PREFIX" in str(raised.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package obstore\s+fix: pip install 'raytrain2p\[object-storage\]'"):
        load_settings(1, None, ["output.root=s3://bucket/a"])


def test_a_tilde_is_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load_settings(2, None, ["data.train=~/a.jsonl", "output.root=~/out"])
    assert paths(settings.data.train) == [str(tmp_path / "a.jsonl")]
    assert settings.output.root == str(tmp_path / "out")


def test_raytrain2p_home_moves_relative_outputs_but_not_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("RAYTRAIN2P_HOME", str(home))
    settings = load_settings(2, None, ["data.train=a.jsonl", "data.feature_store=store"])
    assert settings.output.root == str(home / "checkpoints")
    assert settings.tracking.uri == f"sqlite:///{home}/mlflow.db"
    assert settings.data.feature_store == str(home / "store")
    assert paths(settings.data.train) == [str(here / "a.jsonl")]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a submitted job: Ray's copy of `--working-dir`."""
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    for name in ("RAYTRAIN2P_HOME", "RAYTRAIN2P_FEATURES", "RAYTRAIN2P_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    return copy


def test_in_a_submitted_job_outputs_leave_the_copy_that_ray_deletes(tmp_path: Path, copy: Path) -> None:
    settings = load_settings(2, None, ["data.train=a.jsonl"])
    assert settings.output.root == str(tmp_path / "user" / "raytrain2p" / "checkpoints")
    assert outputs_line(settings) == f"outputs go to {tmp_path}/user/raytrain2p (RAYTRAIN2P_HOME is not set)"
    assert paths(settings.data.train) == [str(copy / "a.jsonl")]


OUTPUTS = {"output.root": "out", "data.feature_store": "store", "tracking.uri": "sqlite:///m.db"}


def test_in_a_submitted_job_relative_outputs_are_refused_all_at_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTRAIN2P_CACHE", "cache")
    with pytest.raises(InputError) as caught:
        load_settings(2, None, [f"{name}={path}" for name, path in OUTPUTS.items()])
    assert {problem.where for problem in caught.value.problems} == {"RAYTRAIN2P_CACHE=cache", *(f"{k}={v}" for k, v in OUTPUTS.items())}
    assert "or set RAYTRAIN2P_HOME" in str(caught.value)
    monkeypatch.setenv("RAYTRAIN2P_HOME", "results")
    with pytest.raises(InputError, match="RAYTRAIN2P_HOME=results"):
        base_directory()


def test_in_a_submitted_job_outputs_are_relative_to_raytrain2p_home(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTRAIN2P_HOME", "/shared")
    settings = load_settings(2, None, [f"{name}={path}" for name, path in OUTPUTS.items()])
    assert settings.output.root == "/shared/out"
    assert settings.data.feature_store == "/shared/store"
    assert settings.tracking.uri == "sqlite:////shared/m.db"
    assert outputs_line(settings) is None


def test_absolute_outputs_are_fine_in_a_submitted_job(copy: Path) -> None:
    overrides = ["output.root=/out", "data.feature_store=~/store", "tracking.uri=http://server:5000"]
    assert outputs_line(load_settings(2, None, overrides)) is None


def test_a_folder_of_rays_name_outside_a_job_is_a_folder_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "runtime_resources"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("RAYTRAIN2P_HOME", raising=False)
    assert load_settings(2, None, ["output.root=out"]).output.root == str(here / "out")


def test_features_lie_in_the_cache_unless_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYTRAIN2P_FEATURES", raising=False)
    monkeypatch.setenv("RAYTRAIN2P_CACHE", str(tmp_path / "cache"))
    assert cache_directory() == tmp_path / "cache"
    assert load_settings(2).data.feature_store == str(tmp_path / "cache" / "features")
    monkeypatch.setenv("RAYTRAIN2P_FEATURES", str(tmp_path / "shared"))
    assert load_settings(2).data.feature_store == str(tmp_path / "shared")
    assert load_settings(2, None, [f"data.feature_store={tmp_path}/mine"]).data.feature_store == f"{tmp_path}/mine"


def test_flattened_settings_name_each_one_by_its_path() -> None:
    flat = flatten(load_settings(2))
    assert flat["model.lora.rank"] == 16
    assert flat["data.test.test_concept"] == "emoji:test_concept"
    assert flat["training.max_epochs"] is None
    assert not any(isinstance(value, dict) and value for value in flat.values())


def test_records_of_a_users_own_are_validated_and_evaluated_on_nothing() -> None:
    """The packaged splits go with the packaged records."""
    own = load_settings(2, None, ["data.train=mine.jsonl"]).data
    assert (own.val, own.test) == (None, {})
    given = load_settings(2, None, ["data.train=mine.jsonl", "data.val=emoji:val", "data.test.new=more.jsonl"]).data
    assert (paths(given.val), list(given.test)) == (["emoji:val"], ["new"])
    for train in ("emoji:val", "{path: emoji:val, weight: 3}", "[emoji:val, {path: emoji:train}]"):
        packaged = load_settings(2, None, [f"data.train={train}"]).data
        assert paths(packaged.val) == ["emoji:val"]
        assert list(packaged.test) == ["test_drawing", "test_concept"]
    assert load_settings(2, None, ["data.train=[emoji:val, mine.jsonl]"]).data.val is None


def test_several_sources_may_have_weights_and_are_written_as_short_as_possible(tmp_path: Path) -> None:
    data = load_settings(2, None, ["data.train=[emoji:train, {path: emoji:val, weight: 0.5}]"]).data
    assert [(source.path, source.weight) for source in data.train] == [("emoji:train", None), ("emoji:val", 0.5)]
    dumped = data.model_dump(mode="json")
    assert dumped["train"] == ["emoji:train", {"path": "emoji:val", "weight": 0.5}]
    assert load_settings(2).data.model_dump(mode="json")["train"] == "emoji:train"
    only = load_settings(2, None, ["data.train={path: emoji:val, weight: 3}"])
    assert flatten(only)["data.train"] == [{"path": "emoji:val", "weight": 3.0}]  # one value, which a resumed run must have too
    for wrong in ("[]", "[{weight: 1}]", "[{path: a, weight: 0}]", "[{path: a, share: 1}]", "{path: a, weight: .inf}"):
        assert only_problem(f"data.train={wrong}").where.startswith("data.train")
    for where, given in (("data.val", "val={path: a, weight: 2}"), ("data.test.new", "test.new=[{path: a, weight: 2}]")):
        assert f"{where} has a weight" in str(only_problem(f"data.{given}"))


def test_an_encoder_may_be_its_name_alone_and_another_override_adds_to_it(tmp_path: Path) -> None:
    config = tmp_path / "one.yaml"
    config.write_text(
        "data: {train: emoji:train}\ntraining: {max_steps: 1}\nmodel: {encoders: {image: some/encoder, audio: other/encoder}}\n"
    )
    given: Any = load_settings(1, config, ["model.encoders.image.size=64", "model.encoders.text=null"]).model.encoders
    assert (given.image.name, given.image.size) == ("some/encoder", 64)
    assert list(given.by_modality()) == ["image", "audio"]
    default: Any = load_settings(1, None, ["model.encoders.image.size=64"]).model.encoders
    assert (default.image.name, default.image.size, default.text.name) == ("efficientnet-lite0", 64, "all-minilm-l6-v2")
    assert load_settings(2).model.encoders.by_modality() == {}, "those of the aligner"


@pytest.mark.parametrize("phase", SETTINGS_OF_PHASE)
@pytest.mark.parametrize("value", [".inf", ".nan", "1" + "0" * 400, "-1"])
def test_no_number_is_infinite_absurd_or_negative(phase: int, value: str) -> None:
    numbers = [key for key, field in known_keys(SETTINGS_OF_PHASE[phase]).items() if {int, float} & set(_types(field.annotation))]
    assert len(numbers) > 20
    encoders = [f"model.encoders.{modality}=x" for modality in ("image", "audio", "text")]
    with pytest.raises(InputError) as caught:
        load_settings(phase, None, [*encoders, *(f"{key}={value}" for key in numbers)])
    named = {problem.where.partition("=")[0] for problem in caught.value.problems}
    assert named.issuperset(numbers), set(numbers) - named


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in typing.get_args(annotation):
        yield from _types(inner)


@pytest.mark.parametrize("key", ["output.root", "tracking.uri", "tracking.experiment", "data.train", "model.aligner"])
def test_a_place_or_a_name_is_not_empty(key: str) -> None:
    assert only_problem(f"{key}=''").where.startswith(key)


@pytest.mark.parametrize("text", [r'"a\0b"', r'"\ud800"', "\udcff"])
def test_text_that_neither_a_path_nor_utf_8_can_hold_is_refused(text: str) -> None:
    assert only_problem(f"output.root={text}").where.startswith("output.root=")


@pytest.mark.parametrize("uri", ["mlruns", "./mlruns", "/data/mlruns", "foo://bar", "mlflow.db", "user:secret@host"])
def test_a_tracking_uri_that_names_no_store_of_mlflow_is_refused(uri: str) -> None:
    problem = only_problem(f"tracking.uri={uri}")
    assert problem.where.startswith("tracking.uri=")
    assert "is not a URI of an MLflow store" in problem.what


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "large", "aliases", "itself", "deep"])
def test_a_file_that_cannot_be_settings_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    config = tmp_path / "mine.yaml"
    if kind == "pipe":
        os.mkfifo(config)  # to read it would block
    elif kind == "device":
        config.symlink_to("/dev/zero")
    elif kind == "directory":
        config.mkdir()
    else:
        repeated = [f"{name}: &{name} [{', '.join([f'*{under}'] * 10)}]" for under, name in itertools.pairwise("abcdefghij")]
        texts = {
            "large": "a: 1\n" * 300_000,
            "aliases": "\n".join(["a: &a [1]", *repeated]),  # a thousand million values
            "itself": "data: &data {train: *data}",
            "deep": "a: " + "[" * 100_000,
        }
        config.write_text(texts[kind])
    assert only_problem(config=config).where == f"--config {config}"


def test_a_long_value_is_cut_in_the_message() -> None:
    assert len(only_problem(f"data.test={'[' * 300}{']' * 300}").where) < 300


def test_a_micro_batch_that_does_not_divide_a_very_large_batch_is_refused_at_once() -> None:
    problem = only_problem("training.global_batch_size=2147483646", "training.micro_batch_size=4")
    assert problem.fix == "set training.micro_batch_size=3 or 6"
