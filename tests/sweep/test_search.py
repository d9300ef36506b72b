"""Which trials there are: the same ones for the same seed, and none of them twice, wherever the driver is killed."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from raytrain2p.sweep.feasibility import rung_problems
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.pbt import within
from raytrain2p.sweep.results import EARLY, FAILED, FINISHED, KILLED, Trial, TrialResult
from raytrain2p.sweep.schedulers import ResumableAsha
from raytrain2p.sweep.search import Search, TrialQueue, open_journal
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Axis, Values
from raytrain2p.sweep.tuner import share_of_head
from raytrain2p.worker.ray_reports import comparable

SPACE = {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}, "model.lora.rank": {"choice": [4, 8, 16]}}


def sweep_of(folder: Path, *overrides: str, **options: Any) -> Sweep:
    path = folder / "sweep.yaml"
    tree = {"sweep": {"num_trials": 6, "space": SPACE} | options, "checkpoint": {"every_steps": 10, "best_of": "saves"}}
    path.write_text(yaml.safe_dump(tree | {"training": {"max_steps": 100}}))
    return load_sweep(path, overrides)


def begin(number: int, values: Values) -> Trial:
    return Trial(number, values, f"s-{number}")


def result_of(number: int, values: Values, state: str, *reports: tuple[int, float]) -> TrialResult:
    return TrialResult(begin(number, values), state, None, reports, values=values)


def search_in(sweep: Sweep, *known: TrialResult) -> Search:
    return Search(sweep, InMemoryStorage(), known)


def all_values(search: Search, first: int = 0) -> list[Values]:
    """All that a search proposes."""
    found: list[Values] = []
    while (values := search.propose(first + len(found))) is not None:
        found.append(values)
    return found


def drained(queue: TrialQueue) -> list[Trial]:
    found = []
    while (trial := queue.next_trial()) is not None:
        found.append(trial)
    return found


def test_random_trials_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    values = all_values(search_in(sweep_of(tmp_path)))
    assert values == all_values(search_in(sweep_of(tmp_path)))
    assert values != all_values(search_in(sweep_of(tmp_path, seed=1)))
    assert len({str(each) for each in values}) == 6


@pytest.mark.parametrize(
    ("distribution", "arguments", "inside"),
    [
        ("uniform", (0.0, 0.5), lambda value: 0 <= value <= 0.5),
        ("loguniform", (1e-5, 1e-2), lambda value: 1e-5 <= value <= 1e-2),
        ("randint", (2, 5), lambda value: value in (2, 3, 4)),
        ("quniform", (0.0, 0.5, 0.1), lambda value: value in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)),
        ("quniform", (0.05, 0.5, 0.2), lambda value: value in (0.05, 0.25, 0.45)),
        ("quniform", (10, 40, 10), lambda value: value in (10, 20, 30, 40) and isinstance(value, int)),
        ("choice", ([1], [2, 3]), lambda value: value in ([1], [2, 3])),
    ],
)
@pytest.mark.parametrize("kind", ["random", "optuna"])
def test_draws_lie_inside_and_are_the_same_for_the_same_seed(
    tmp_path: Path, kind: str, distribution: str, arguments: tuple[Any, ...], inside: Any
) -> None:
    sweep = replace(sweep_of(tmp_path, search=kind, num_trials=200, seed=4), axes=(Axis("training.x", distribution, arguments),))
    drawn = [values["training.x"] for values in all_values(search_in(sweep))]
    assert len(drawn) == 200
    assert all(map(inside, drawn))
    assert len({str(value) for value in drawn}) > 1
    assert drawn == [values["training.x"] for values in all_values(search_in(sweep))]


def test_a_loguniform_draw_favours_no_order_of_magnitude(tmp_path: Path) -> None:
    drawn = [values["training.learning_rate"] for values in all_values(search_in(sweep_of(tmp_path, num_trials=1000)))]
    assert sum(value < 1e-3 for value in drawn) / 1000 == pytest.approx(0.5, abs=0.05)


def test_the_defaults_come_first_and_count(tmp_path: Path) -> None:
    values = all_values(search_in(sweep_of(tmp_path, try_defaults=True)))
    assert values[0] == {"training.learning_rate": 1e-3, "model.lora.rank": 16}
    assert len(values) == 6


GRID: dict[str, Any] = {"model.lora.rank": {"grid": [4, 8]}, "training.warmup_steps": {"choice": [1, 2, 3]}}


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    values = all_values(search_in(sweep_of(tmp_path, search="grid", num_trials=None, space=GRID)))
    assert len(values) == 6
    assert {(each["model.lora.rank"], each["training.warmup_steps"]) for each in values} == {(a, b) for a in (4, 8) for b in (1, 2, 3)}
    assert len(all_values(search_in(sweep_of(tmp_path, search="grid", num_trials=4, space=GRID)))) == 4


def test_a_grid_has_the_defaults_first_and_no_second_time(tmp_path: Path) -> None:
    space = {"model.lora.rank": {"grid": [4, 8]}, "model.lora.dropout": {"grid": [0, 0.1]}}
    sweep = sweep_of(tmp_path, search="grid", num_trials=None, space=space, try_defaults=True)
    for rank, count in ((8, 4), (16, 5)):
        defaults = {"model.lora.rank": rank, "model.lora.dropout": 0.0}
        values = all_values(search_in(replace(sweep, base=sweep.settings(defaults))))
        assert values[0] == defaults
        assert values.count(defaults) == 1
        assert len(values) == count


def test_unfinished_trials_come_first_under_their_own_numbers(tmp_path: Path) -> None:
    undisturbed = all_values(search_in(sweep_of(tmp_path)))
    known = [begin(number, undisturbed[number]) for number in range(3)]
    search = search_in(sweep_of(tmp_path), *(TrialResult(trial, values=trial.values) for trial in known))
    trials = drained(TrialQueue(known[1:], 3, search, begin, TrialResult))
    assert [trial.number for trial in trials] == [1, 2, 3, 4, 5]
    assert trials[0] == known[1]
    assert trials[2].values == undisturbed[3], "as it would have been without the kill"


def test_optuna_goes_to_where_it_was_good(tmp_path: Path) -> None:
    search = search_in(sweep_of(tmp_path, search="optuna", num_trials=60, seed=1))
    found = []
    for number in range(60):
        values = search.propose(number)
        assert values is not None
        found.append(values)
        loss = abs(values["training.learning_rate"] - 2e-3) + (0 if values["model.lora.rank"] == 8 else 0.01)
        search.learn(number, [(10, loss)], finished=True)
    late = found[40:]
    assert sum(values["model.lora.rank"] == 8 for values in late) > 12
    assert search.propose(60) is None


@pytest.mark.parametrize("state", [FINISHED, EARLY, FAILED, KILLED])
def test_what_an_earlier_driver_found_out_is_learnt(tmp_path: Path, state: str) -> None:
    sweep = sweep_of(tmp_path, search="optuna", try_defaults=True)
    values = {"training.learning_rate": 1e-3, "model.lora.rank": 4}
    search = search_in(sweep, *(result_of(number, values, state, (10, 1.0)) for number in range(2)))
    known = {FINISHED: TrialState.COMPLETE, EARLY: TrialState.PRUNED, KILLED: TrialState.RUNNING}
    assert [trial.state for trial in search.study.trials] == ([] if state == FAILED else [known[state]] * 2)
    assert all(trial.params["training.learning_rate"] == 1e-3 for trial in search.study.trials)


def test_a_trial_that_diverged_teaches_optuna_that_it_failed(tmp_path: Path) -> None:
    search = search_in(sweep_of(tmp_path, search="optuna"))
    for number, reports in enumerate([[(10, float("nan"))], [(10, float("nan")), (20, 2.0)]]):
        assert search.propose(number) is not None
        search.learn(number, reports, finished=True)
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert search.study.trials[1].value == 2.0


def test_defaults_outside_the_space_are_tried_and_not_learnt(tmp_path: Path) -> None:
    outside = {"training.learning_rate": 1.0, "model.lora.rank": 5}
    sweep = sweep_of(tmp_path, search="optuna", try_defaults=True)
    sweep = replace(sweep, base=sweep.settings(outside))
    search = search_in(sweep)
    assert search.propose(0) == outside
    search.learn(0, [(10, 1.0)], finished=True)
    assert search.study.trials == []
    assert search_in(sweep, result_of(0, outside, FINISHED, (10, 1.0))).study.trials == []
    assert search.propose(1) is not None


@pytest.mark.parametrize("options", [{}, {"search": "optuna"}, {"search": "grid", "num_trials": None, "space": GRID}])
@pytest.mark.parametrize("lost", ["the record", "the journal"])
def test_a_driver_killed_between_the_study_and_the_record_repeats_nothing(tmp_path: Path, options: dict[str, Any], lost: str) -> None:
    sweep, journal = sweep_of(tmp_path, **options), tmp_path / "study.jsonl"
    undisturbed = all_values(search_in(sweep))
    search = Search(sweep, open_journal(journal), [])
    values = [search.propose(number) for number in range(3)]
    search.learn(0, [(10, 1.0)], finished=True)
    known = [result_of(number, each, FINISHED if number == 0 else KILLED, (10, 1.0)) for number, each in enumerate(values) if each]
    if lost == "the record":
        known.pop()
    else:
        journal.unlink()
    resumed = Search(sweep, open_journal(journal), known)
    assert {trial.user_attrs.get("trial") for trial in resumed.study.trials if trial.state != TrialState.FAIL} == set(range(len(known)))
    assert sum(trial.state == TrialState.FAIL for trial in resumed.study.trials) == (1 if lost == "the record" else 0)
    for result in known[1:]:
        resumed.learn(result.trial.number, result.reports, finished=True)
    rest = all_values(resumed, first=len(known))
    assert len(known) + len(rest) == 6
    if sweep.options.search != "optuna":
        assert [result.values for result in known] + rest == undisturbed
    again = Search(sweep, open_journal(journal), [replace(result, state=FINISHED) for result in known])
    states = [trial.state for trial in again.study.trials]
    assert states.count(TrialState.COMPLETE) == len(known), "each is there once"
    assert TrialState.RUNNING not in states
    assert TrialState.WAITING not in states


def test_an_enqueued_trial_that_was_not_begun_is_not_run_as_another(tmp_path: Path) -> None:
    sweep, journal = sweep_of(tmp_path, search="grid", num_trials=None, space=GRID), tmp_path / "study.jsonl"
    undisturbed = all_values(search_in(sweep))
    Search(sweep, open_journal(journal), []).study.enqueue_trial({"model.lora.rank": "8", "training.warmup_steps": "3"})
    assert all_values(Search(sweep, open_journal(journal), [])) == undisturbed


def test_the_journal_is_text_and_a_torn_one_is_written_anew(tmp_path: Path) -> None:
    sweep, journal = sweep_of(tmp_path, search="optuna"), tmp_path / "study.jsonl"
    search = Search(sweep, open_journal(journal), [])
    known = []
    for number in range(3):
        values = search.propose(number)
        assert values is not None
        search.learn(number, [(10, 1.0 + number)], finished=True)
        known.append(result_of(number, values, FINISHED, (10, 1.0 + number)))
    whole = journal.read_text()
    assert all(isinstance(json.loads(line), dict) for line in whole.splitlines())
    middle = whole.index("\n", len(whole) // 2)
    for torn in (whole[:-20], whole[: middle - 20] + whole[middle + 1 :]):
        journal.write_text(torn)
        resumed = Search(sweep, open_journal(journal), known)
        assert [trial.value for trial in resumed.study.trials] == [1.0, 2.0, 3.0]


KILLED_IN_A_WRITE = """
import os, signal, sys
from optuna.storages.journal import JournalFileBackend
from raytrain2p.sweep.search import open_journal
storage = open_journal(__import__("pathlib").Path(sys.argv[1]))
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
storage._backend.append_logs([{"op_code": 1, "study_id": 99, "worker_id": "x"}])
"""


@pytest.mark.parametrize("relative", [False, True])
def test_the_lock_of_a_driver_that_was_killed_in_a_write_does_not_hold_up_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Path("study.jsonl") if relative else tmp_path / "study.jsonl"
    done = subprocess.run([sys.executable, "-c", KILLED_IN_A_WRITE, str(journal)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert Path(f"{journal}.lock").exists(), "or this is not a test"
    journal.write_text("")  # what it wrote is no operation
    start = time.monotonic()
    assert Search(sweep_of(tmp_path), open_journal(journal), []).propose(0) is not None
    assert time.monotonic() - start < 5


def test_what_is_not_a_number_is_worse_than_any(tmp_path: Path) -> None:
    scheduler = asha(tmp_path, [])
    assert decision(scheduler, 0, 10, 5.0) == TrialScheduler.CONTINUE
    assert decision(scheduler, 1, 10, comparable(float("nan"), "min")) == TrialScheduler.STOP
    assert comparable(float("inf"), "max") < -1e20


class FakeTrial:
    """What ASHA asks of a trial."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.config = f"tune-{number}", {"trial": number}


def asha(tmp_path: Path, known: list[TrialResult], **options: Any) -> ResumableAsha:
    sweep = sweep_of(tmp_path, scheduler="asha", asha={"grace_period": 10, "reduction_factor": 2} | options)
    scheduler = ResumableAsha(sweep, known, 1600)
    scheduler.set_search_properties("objective", "min")
    return scheduler


def decision(scheduler: ResumableAsha, number: int, step: int, value: float) -> str:
    trial = FakeTrial(number)
    if trial.trial_id not in scheduler._trial_info:
        scheduler.on_trial_add(None, trial)
    return scheduler.on_trial_result(None, trial, {"step": step, "epoch": step // 100, "objective": value})


def test_rungs_lie_below_the_end_and_the_worse_half_stops_there(tmp_path: Path) -> None:
    scheduler = asha(tmp_path, [])
    assert [milestone for milestone, _ in scheduler._brackets[0]._rungs] == [80, 40, 20, 10]
    assert decision(scheduler, 0, 10, 1.0) == TrialScheduler.CONTINUE
    assert decision(scheduler, 1, 10, 2.0) == TrialScheduler.STOP
    assert decision(scheduler, 2, 10, 0.5) == TrialScheduler.CONTINUE
    assert decision(scheduler, 0, 100, 9.0) == TrialScheduler.CONTINUE, "its own end is no rung"


def test_a_resumed_sweep_compares_with_the_trials_before_it(tmp_path: Path) -> None:
    known = [TrialResult(begin(0, {}), FINISHED, None, ((10, 1.0), (20, 0.9)))]
    assert decision(asha(tmp_path, known), 1, 10, 2.0) == TrialScheduler.STOP
    assert decision(asha(tmp_path, []), 1, 10, 2.0) == TrialScheduler.CONTINUE, "without the earlier trials it would have continued"


def test_a_resumed_trial_is_not_compared_with_itself(tmp_path: Path) -> None:
    known = [TrialResult(begin(0, {}), FINISHED, None, ((10, 1.0),)), TrialResult(begin(1, {}), "running", None, ((10, 0.5),))]
    scheduler = asha(tmp_path, known)
    assert decision(scheduler, 1, 10, 3.0) == TrialScheduler.CONTINUE, "it passed that rung before"
    assert decision(scheduler, 1, 20, 3.0) == TrialScheduler.CONTINUE, "the first on its rung"


def test_a_report_without_a_number_holds_its_place_after_its_driver_was_killed(tmp_path: Path) -> None:
    known = [TrialResult(begin(0, {}), "running", None, ((10, float("nan")),))]
    ((_, recorded),) = [rung for rung in asha(tmp_path, known)._brackets[0]._rungs if rung[0] == 10]
    assert list(recorded.values()) == [-comparable(float("nan"), "min")], "as it was when it came"


def test_exploring_stays_within_the_limits(tmp_path: Path) -> None:
    axes = {axis.setting: axis for axis in sweep_of(tmp_path, space={"training.learning_rate": {"loguniform": [1e-4, 1e-2]}}).axes}
    assert within({"training.learning_rate": 0.012, "trial": 3}, axes) == {"training.learning_rate": 1e-2, "trial": 3}
    whole = {"training.gradient_clip": Axis("training.gradient_clip", "uniform", (1, 10))}
    clipped = within({"training.gradient_clip": 0.8}, whole)["training.gradient_clip"]
    assert (clipped, type(clipped)) == (1.0, float), "Tune rounds what is an integer once"
    counted = {"training.warmup_steps": Axis("training.warmup_steps", "randint", (1, 11))}
    assert within({"training.warmup_steps": 12}, counted) == {"training.warmup_steps": 10}


@pytest.mark.parametrize("at_once", [1, 2, 9, 10, 64])
def test_shares_of_the_head_bound_a_population_and_leave_some_for_others(at_once: int) -> None:
    share = share_of_head("pbt", at_once)
    assert int(1 / share) == at_once
    assert 1 - at_once * share > 0.005


def test_rungs_and_exchanges_after_the_end_are_refused(tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"": SimpleNamespace(records=1600)}
    for interval, count in ((50, 0), (100, 1)):
        only_rate = {"training.learning_rate": SPACE["training.learning_rate"]}
        pbt = sweep_of(tmp_path, scheduler="pbt", pbt={"interval": interval}, space=only_rate)
        assert len(rung_problems(pbt, inputs)) == count
        late = sweep_of(tmp_path, scheduler="asha", asha={"grace_period": interval})
        assert len(rung_problems(late, inputs)) == count


@pytest.mark.parametrize(
    "content", [b"", bytes(100), b"[1]\n", b'{"a": 1}\n', b'{"op_code": 99, "worker_id": "x"}\n', b"\xff\n", b"[" * 99_999]
)
def test_a_damaged_journal_is_made_again_and_said(tmp_path: Path, content: bytes) -> None:
    journal, said = tmp_path / "study.jsonl", list[str]()
    journal.write_bytes(content)
    assert Search(sweep_of(tmp_path), open_journal(journal, said.append), []).propose(0) is not None
    assert len(said) == bool(content)


def test_a_directory_in_place_of_a_journal_is_made_a_journal(tmp_path: Path) -> None:
    (tmp_path / "study.jsonl").mkdir()
    said: list[str] = []
    assert Search(sweep_of(tmp_path), open_journal(tmp_path / "study.jsonl", said.append), []).propose(0) is not None
    assert "is damaged" in said[0]
