"""A sweep on disk: its table agrees with the trials' runs."""

import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from raytrain2p.config import InputError
from raytrain2p.storage.files import read_json, write_json
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.plots import draw_sweep, study_of
from raytrain2p.sweep.results import (
    Inheritance,
    Trial,
    TrialRecords,
    TrialResult,
    add_inheritance,
    best_result,
    check_unchanged,
    sweep_config,
    sweep_page,
    trial_table,
    write_results,
    write_table,
)
from raytrain2p.sweep.space import Axis, Values
from raytrain2p.tracking.run import EARLY_TAG, Run, launch_record
from raytrain2p.tracking.run_directory import RunDirectory

SETTINGS = ["training.learning_rate", "model.lora.rank"]


def records_in(root: Path) -> TrialRecords:
    """Of a sweep with a run directory, and with a directory for launch records."""
    (root / "sweep").mkdir(exist_ok=True)
    launch_record(str(root), "any").parent.mkdir(exist_ok=True)
    return TrialRecords(root / "sweep", str(root))


def begun(
    root: Path,
    trial_records: TrialRecords,
    number: int,
    status: str,
    reports: list[tuple[int, float]],
    early: str = "",
    values: Values | None = None,
) -> Trial:
    """A trial with a run directory, as a worker leaves it."""
    values = values or {"training.learning_rate": 0.001 * (number + 1), "model.lora.rank": 4 * (number + 1)}
    trial = Trial(number, values, f"sweep-{number}")
    trial_records.begin(trial)
    directory = root / "phase2" / f"{number:032x}_20260101_000000"
    directory.mkdir(parents=True)
    run = Run(directory.name[:32], str(directory), "e", "20260101_000000", trial.launch_id, "phase2", "sqlite:///x")
    write_json(launch_record(str(root), trial.launch_id), asdict(run))
    write_json(directory / "run.json", asdict(run))
    RunDirectory(directory).write_status(status)
    lines = [{"step": step, "name": name, "value": value, "time": 0.0} for step, value in reports for name in ("train_loss", "objective")]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if early:
        run.add_tags({EARLY_TAG: early})
    return trial


@pytest.fixture
def trial_records(tmp_path: Path) -> TrialRecords:
    trial_records = records_in(tmp_path)
    begun(tmp_path, trial_records, 0, "FINISHED", [(10, 2.0), (20, 1.0), (30, 1.5)])
    begun(tmp_path, trial_records, 1, "FINISHED", [(10, 3.0)], early="asha at step 10")
    begun(tmp_path, trial_records, 2, "FAILED", [(10, float("nan"))])
    trial_records.give_up(2, "the reason")
    begun(tmp_path, trial_records, 3, "RUNNING", [])
    trial_records.begin(Trial(4, {"training.learning_rate": 0.1}, "sweep-4"))
    return trial_records


def test_states_come_from_the_runs(trial_records: TrialRecords) -> None:
    assert [result.state for result in trial_records.results()] == ["finished", "stopped early", "failed", "running", "waiting"]
    assert [result.steps for result in trial_records.results()] == [30, 10, 10, 0, 0]


def test_a_run_that_failed_counts_as_begun_until_the_sweep_gives_it_up(tmp_path: Path) -> None:
    trial_records = records_in(tmp_path)
    trial = begun(tmp_path, trial_records, 0, "FAILED", [(10, 2.0)])
    assert trial_records.result(trial).state == "killed", "a driver that resumes tries it again"
    trial_records.give_up(0, "the reason")
    assert trial_records.result(trial).state == "failed"


def test_a_trial_that_failed_before_it_had_a_run_is_failed(tmp_path: Path) -> None:
    trial_records = records_in(tmp_path)
    trial_records.begin(Trial(0, {}, "sweep-0"))
    trial_records.give_up(0, "the reason")
    assert [result.state for result in trial_records.results()] == ["failed"]


def test_a_trial_that_was_given_up_while_its_run_was_out_of_sight_has_the_run_later(tmp_path: Path) -> None:
    trial_records = records_in(tmp_path)
    trial = begun(tmp_path, trial_records, 0, "FAILED", [(10, 2.0)])
    record = launch_record(str(tmp_path), trial.launch_id)
    content = record.read_text()
    record.unlink()
    trial_records.give_up(0, "the reason")
    assert trial_records.result(trial).run is None
    record.write_text(content)
    assert trial_records.result(trial).reports == ((10, 2.0),)


def test_trials_are_known_by_their_numbers_also_beyond_a_thousand(tmp_path: Path) -> None:
    trial_records = records_in(tmp_path)
    for number in (1000, 101, 7):
        trial_records.begin(Trial(number, {}, f"sweep-{number}"))
    assert [trial.number for trial in trial_records.trials()] == [7, 101, 1000]
    assert trial_records.trial(1000).launch_id == "sweep-1000"


def test_the_best_report_counts_not_the_last_and_nan_never(trial_records: TrialRecords) -> None:
    results = trial_records.results()
    assert results[0].best("min") == (20, 1.0)
    assert results[0].best("max") == (10, 2.0)
    assert results[2].best("min") is None
    assert best_result(results, "min") == results[0]
    assert best_result(results, "max") == results[0], "one that was stopped early has no result"
    assert best_result(results[1:], "max") == results[1]
    assert best_result(results[3:], "min") is None


def test_the_csv_has_a_line_for_each_trial(trial_records: TrialRecords, tmp_path: Path) -> None:
    write_results(tmp_path / "sweep", trial_records.results(), SETTINGS, "min", 2)
    with (tmp_path / "sweep" / "trials.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["trial"], line["objective"], line["at_step"]) for line in lines] == [
        ("0", "1.0", "20"),
        ("1", "3.0", "10"),
        ("2", "", ""),
        ("3", "", ""),
        ("4", "", ""),
    ]
    assert lines[1]["stopped_early"] == "asha at step 10"
    assert lines[0]["model.lora.rank"] == "4"
    assert lines[4]["run_id"] == ""
    best = read_json(tmp_path / "sweep" / "best.json")
    assert best["trial"] == 0
    assert best["command"] == f"python -m raytrain2p.train --phase 2 --config {best['directory']}/config.json launch.cpus_per_worker=null"


def test_values_are_written_as_mlflow_has_them(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"a": [1, 2], "b": True, "c": "text, with a comma"}])
    with (tmp_path / "t.csv").open(newline="") as stream:
        assert list(csv.DictReader(stream)) == [{"a": "[1, 2]", "b": "True", "c": "text, with a comma"}]


def test_an_empty_sweep_has_an_empty_table_and_no_best(tmp_path: Path) -> None:
    assert write_results(tmp_path, [], SETTINGS, "min", 2) is None
    assert (tmp_path / "trials.csv").is_file()
    assert not (tmp_path / "best.json").exists()


def test_a_trial_that_took_over_weights_has_the_settings_that_it_continues_with(trial_records: TrialRecords, tmp_path: Path) -> None:
    run = trial_records.results()[0].run
    assert run is not None
    add_inheritance(run.path, Inheritance(20, 1, "f" * 32, 20, {"training.learning_rate": 0.5}))
    add_inheritance(run.path, Inheritance(30, 3, "e" * 32, 30, {"training.learning_rate": 0.7}))
    (result, *_) = records_in(tmp_path).results()
    assert result.values == {"training.learning_rate": 0.7, "model.lora.rank": 4}
    assert [each.from_trial for each in result.lineage] == [1, 3]
    assert trial_table([result], SETTINGS, "min")[0]["training.learning_rate"] == 0.7


def test_tags_that_are_added_stay_beside_those_that_are_there(trial_records: TrialRecords) -> None:
    run = trial_records.results()[0].run
    assert run is not None
    run.add_tags({"one": "1"})
    first = (run.files.read_record() or {})["described"]
    run.add_tags({"two": "2"})
    assert run.files.tags() == {"one": "1", "two": "2"}
    assert (run.files.read_record() or {})["described"] > first, "or MLflow would not get them: sync would not send them"


def test_a_resumed_sweep_may_have_more_trials_and_no_other_space(tmp_path: Path) -> None:
    sweep = load_sweep(None, ["tracking.uri=sqlite:////x/m.db"])
    run = Run("a" * 32, str(tmp_path), "e", "t", "sweep-1", "sweeps", "u")
    path = tmp_path / "config.json"
    write_json(path, sweep_config(sweep))
    check_unchanged(run, load_sweep(path, ["sweep.num_trials=20", "sweep.max_concurrent=1"]), read_json(path))
    with pytest.raises(InputError) as caught:
        check_unchanged(run, load_sweep(path, ["sweep.seed=3", "training.max_steps=70"]), read_json(path))
    assert "sweep.seed=3\n    cannot change: sweep aaaaaaaa began with 0" in str(caught.value)
    assert "training.max_steps=70" in str(caught.value)


def test_a_sweep_of_an_older_version_goes_on_with_the_defaults_of_what_it_did_not_have(tmp_path: Path) -> None:
    sweep = load_sweep(None, ["sweep.phase=2", "tracking.uri=sqlite:////x/m.db"])
    run = Run("a" * 32, str(tmp_path), "e", "t", "sweep-1", "sweeps", "u")
    before = sweep_config(sweep)
    del before["model"]["rate_factors"], before["sweep"]["seed"]
    check_unchanged(run, sweep, before)
    with pytest.raises(InputError, match=r"rate_factors\.projector=2\.0\n    cannot change: sweep aaaaaaaa began with None"):
        check_unchanged(
            run, load_sweep(None, ["sweep.phase=2", "tracking.uri=sqlite:////x/m.db", "model.rate_factors={projector: 2}"]), before
        )


def test_a_password_is_not_in_a_sweeps_settings() -> None:
    sweep = load_sweep(None, ["tracking.uri=postgresql://me:secret@host/db"])
    assert "secret" not in json.dumps(sweep_config(sweep))


def test_choices_and_metrics_that_are_no_mathematics_can_be_plotted(trial_records: TrialRecords, tmp_path: Path) -> None:
    hostile = "$\\bad{$ \x1b"
    results = [replace(one, values={"data.train": f"{one.trial.number}{hostile}"}) for one in trial_records.results()]
    draw_sweep(tmp_path / "sweep", results, [Axis("data.train", "choice", ("$", "$$"))], "min", hostile)
    assert (tmp_path / "sweep" / "plots" / "each_setting.png").stat().st_size > 5000


def test_the_page_of_a_sweep_holds_text_as_text(tmp_path: Path) -> None:
    run = Run("a" * 32, str(tmp_path), "`<img src=x>", "t", "sweep-1", "sweeps", "u")
    page = sweep_page(run, "python -m raytrain2p.tune 'x=\n# heading\n<script>'")
    assert "`` `<img src=x> ``" in page
    assert "\n    # heading\n    <script>'\n" in page


def test_plots_are_drawn_of_every_kind_of_setting(trial_records: TrialRecords, tmp_path: Path) -> None:
    draw_sweep(tmp_path / "sweep", trial_records.results(), load_sweep(None).axes, "min", "val/loss")
    made = {path.name: path.stat().st_size for path in (tmp_path / "sweep" / "plots").iterdir()}
    assert set(made) == {"objective_by_trial.png", "learning_curves.png", "parallel_coordinates.png", "each_setting.png"}
    assert min(made.values()) > 5000


def test_importances_are_drawn_from_eight_trials_on(trial_records: TrialRecords, tmp_path: Path) -> None:
    results = [replace(trial_records.results()[0], trial=Trial(number, {}, "s")) for number in range(8)]
    draw_sweep(tmp_path / "sweep", results, load_sweep(None).axes, "max", "val/loss")
    assert (tmp_path / "sweep" / "plots" / "importances.png").is_file()


def test_plots_show_each_trial_under_its_own_number_with_the_choices_own_values() -> None:
    axes = (
        Axis("model.dropout", "uniform", (0.0, 0.5)),
        Axis("training.flag", "choice", (False, True)),
        Axis("training.names", "choice", (["a"], ["b"])),
    )
    values = {"model.dropout": 0.7, "training.flag": True, "training.names": ["b"]}  # the first is outside the space
    results = [
        TrialResult(Trial(0, values, "s-0"), "failed", values=values),
        TrialResult(Trial(1, values, "s-1"), "stopped early", None, ((10, 2.0), (20, float("nan"))), values=values),
        TrialResult(Trial(2, values, "s-2"), "finished", None, ((10, 1.0),), values=values | {"model.dropout": None}),
    ]
    failed, early, finished = study_of(results, axes, "min").trials
    assert (failed.state.name, early.number, early.value, early.intermediate_values) == ("FAIL", 1, 2.0, {10: 2.0})
    assert early.params == {"dropout": 0.7, "flag": True, "names": "['b']"}
    assert finished.params == {"flag": True, "names": "['b']"}


def test_nothing_is_drawn_where_nothing_was_reported(trial_records: TrialRecords, tmp_path: Path) -> None:
    draw_sweep(tmp_path / "sweep", trial_records.results()[2:], load_sweep(None).axes, "min", "val/loss")
    assert not (tmp_path / "sweep" / "plots").exists()


def test_a_damaged_trial_counts_as_failed_and_the_others_are_read(trial_records: TrialRecords, tmp_path: Path) -> None:
    for number, name in ((0, "status.json"), (1, "run.json")):
        (tmp_path / "phase2" / f"{number:032x}_20260101_000000" / name).write_bytes(bytes(30))
    launch_record(str(tmp_path), "sweep-3").write_text("[]")
    results = trial_records.results()
    assert [result.state for result in results] == ["failed", "failed", "failed", "failed", "waiting"]
    assert [bool(result.damage) for result in results] == [True, True, False, True, False]
    assert "status.json has zero bytes alone" in results[0].damage
    assert "sweep-3.json has a list where an object is required" in results[3].damage


def test_every_damaged_record_of_a_trial_is_named(trial_records: TrialRecords, tmp_path: Path) -> None:
    folder = trial_records.folder
    (folder / "000.json").write_text("")
    (folder / "002.json").write_text(json.dumps({"number": "2", "values": []}))
    (folder / "003.json").write_bytes((folder / "001.json").read_bytes())
    with pytest.raises(InputError, match="3 problems") as caught:
        trial_records.results()
    for part in ("000.json\n    is empty", "lacks launch_id", "`number`: Input should be", "003.json\n    is the record of trial 1"):
        assert part in str(caught.value), part


def test_a_damaged_lineage_is_named(trial_records: TrialRecords, tmp_path: Path) -> None:
    lineage = tmp_path / "phase2" / f"{3:032x}_20260101_000000" / "lineage.jsonl"
    for content in (b"\0\0\n", b"[1]\n", b'{"at_step": 1}\n', b"\xff\n"):
        lineage.write_bytes(content)
        assert str(lineage) in records_in(tmp_path).results()[3].damage
