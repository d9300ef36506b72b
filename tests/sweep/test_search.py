"""Which trials there are: the same ones for the same seed, and none of them twice."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from raytrain2p.sweep.feasibility import rung_problems
from raytrain2p.sweep.load import load_sweep
from raytrain2p.sweep.pbt import within
from raytrain2p.sweep.results import EARLY, FAILED, FINISHED, Trial, TrialResult
from raytrain2p.sweep.schedulers import ResumableAsha
from raytrain2p.sweep.search import Tpe, TrialQueue, learn_from, listed_values, search_of
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Axis
from raytrain2p.sweep.tuner import share_of_head
from raytrain2p.worker.ray_reports import comparable

SPACE = {"training.learning_rate": {"loguniform": [1e-4, 1e-2]}, "model.lora.rank": {"choice": [4, 8, 16]}}


def sweep_of(folder: Path, *overrides: str, **options: Any) -> Sweep:
    path = folder / "sweep.yaml"
    tree = {"sweep": {"num_trials": 6, "space": SPACE} | options, "checkpoint": {"every_steps": 10, "best_of": "saves"}}
    path.write_text(yaml.safe_dump(tree | {"training": {"max_steps": 100}}))
    return load_sweep(path, overrides)


def begin(number: int, values: dict[str, Any]) -> Trial:
    return Trial(number, values, f"s-{number}")


def drained(queue: TrialQueue) -> list[Trial]:
    found = []
    while (trial := queue.next_trial()) is not None:
        found.append(trial)
    return found


def test_random_trials_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    assert listed_values(sweep_of(tmp_path)) == listed_values(sweep_of(tmp_path))
    assert listed_values(sweep_of(tmp_path)) != listed_values(sweep_of(tmp_path, seed=1))
    assert len({str(values) for values in listed_values(sweep_of(tmp_path))}) == 6


def test_the_defaults_come_first_and_count(tmp_path: Path) -> None:
    values = listed_values(sweep_of(tmp_path, try_defaults=True))
    assert values[0] == {"training.learning_rate": 1e-3, "model.lora.rank": 16}
    assert len(values) == 6


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    space = {"model.lora.rank": {"grid": [4, 8]}, "training.warmup_steps": {"choice": [1, 2, 3]}}
    values = listed_values(sweep_of(tmp_path, search="grid", num_trials=None, space=space))
    assert len(values) == 6
    assert {(one["model.lora.rank"], one["training.warmup_steps"]) for one in values} == {(a, b) for a in (4, 8) for b in (1, 2, 3)}
    assert len(listed_values(sweep_of(tmp_path, search="grid", num_trials=4, space=space))) == 4


def test_unfinished_trials_come_first_under_their_own_numbers(tmp_path: Path) -> None:
    known = [begin(0, {"a": 0}), begin(1, {"a": 1}), begin(2, {"a": 2})]
    queue = TrialQueue(known[1:], 3, search_of(sweep_of(tmp_path), 3), begin, TrialResult)
    trials = drained(queue)
    assert [trial.number for trial in trials] == [1, 2, 3, 4, 5]
    assert trials[0] == known[1]
    assert trials[2].values == listed_values(sweep_of(tmp_path))[3], "as it would have been without the death"


def test_optuna_goes_to_where_it_was_good(tmp_path: Path) -> None:
    search = Tpe(sweep_of(tmp_path).axes, 60, "min", 0, None)
    found = []
    for number in range(60):
        values = search.propose(number)
        assert values is not None
        found.append(values)
        loss = abs(values["training.learning_rate"] - 2e-3) + (0 if values["model.lora.rank"] == 8 else 0.01)
        search.learn(number, values, [(10, loss)], whole=True)
    late = found[40:]
    assert sum(values["model.lora.rank"] == 8 for values in late) > 12
    assert search.propose(60) is None


@pytest.mark.parametrize("state", [FINISHED, EARLY, FAILED])
def test_what_an_earlier_driver_found_out_is_learnt(tmp_path: Path, state: str) -> None:
    sweep = sweep_of(tmp_path, search="optuna", try_defaults=True)
    search = search_of(sweep, 2)
    assert isinstance(search, Tpe)
    rows = [
        TrialResult(begin(number, {"training.learning_rate": 1e-3, "model.lora.rank": 4}), state, None, ((10, 1.0),)) for number in range(2)
    ]
    learn_from(search, rows)
    known = {FINISHED: TrialState.COMPLETE, EARLY: TrialState.PRUNED}
    assert [trial.state for trial in search.study.trials] == ([] if state == FAILED else [known[state]] * 2)
    assert all(trial.params["training.learning_rate"] == 1e-3 for trial in search.study.trials)


def test_a_trial_that_diverged_teaches_optuna_that_it_failed(tmp_path: Path) -> None:
    search = Tpe(sweep_of(tmp_path).axes, 6, "min", 0, None)
    for number, reports in enumerate([[(10, float("nan"))], [(10, float("nan")), (20, 2.0)]]):
        values = search.propose(number)
        assert values is not None
        search.learn(number, values, reports, whole=True)
    assert [trial.state for trial in search.study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert search.study.trials[1].value == 2.0


def test_what_is_no_number_is_worse_than_any(tmp_path: Path) -> None:
    scheduler = asha(tmp_path, [])
    assert decision(scheduler, 0, 10, 5.0) == TrialScheduler.CONTINUE
    assert decision(scheduler, 1, 10, comparable(float("nan"), "min")) == TrialScheduler.STOP
    assert comparable(float("inf"), "max") < -1e20


def test_defaults_outside_the_space_are_tried_and_not_learnt(tmp_path: Path) -> None:
    search = Tpe(sweep_of(tmp_path).axes, 6, "min", 0, {"training.learning_rate": 1.0, "model.lora.rank": 5})
    values = search.propose(0)
    assert values == {"training.learning_rate": 1.0, "model.lora.rank": 5}
    search.learn(0, values, [(10, 1.0)], whole=True)
    assert search.study.trials == []


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


def test_a_sweep_that_goes_on_compares_with_the_trials_before_it(tmp_path: Path) -> None:
    known = [TrialResult(begin(0, {}), FINISHED, None, ((10, 1.0), (20, 0.9)))]
    assert decision(asha(tmp_path, known), 1, 10, 2.0) == TrialScheduler.STOP
    assert decision(asha(tmp_path, []), 1, 10, 2.0) == TrialScheduler.CONTINUE, "without memory it would have gone on"


def test_a_trial_that_goes_on_is_not_compared_with_itself(tmp_path: Path) -> None:
    known = [TrialResult(begin(0, {}), FINISHED, None, ((10, 1.0),)), TrialResult(begin(1, {}), "running", None, ((10, 0.5),))]
    scheduler = asha(tmp_path, known)
    assert decision(scheduler, 1, 10, 3.0) == TrialScheduler.CONTINUE, "it passed that rung before"
    assert decision(scheduler, 1, 20, 3.0) == TrialScheduler.CONTINUE, "the first on its rung"


def test_a_report_without_a_number_holds_its_place_after_the_drivers_death(tmp_path: Path) -> None:
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
    inputs = {"": SimpleNamespace(records=1600)}
    for interval, count in ((50, 0), (100, 1)):
        only_rate = {"training.learning_rate": SPACE["training.learning_rate"]}
        pbt = sweep_of(tmp_path, scheduler="pbt", pbt={"interval": interval}, space=only_rate)
        assert len(rung_problems(pbt, inputs)) == count
        late = sweep_of(tmp_path, scheduler="asha", asha={"grace_period": interval})
        assert len(rung_problems(late, inputs)) == count
