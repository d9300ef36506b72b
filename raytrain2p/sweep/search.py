"""Where the next trial's settings come from. What has been proposed once is on disk, and is never proposed differently."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from raytrain2p.sweep.results import EARLY, FINISHED, Trial, TrialResult
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Axis

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Proposals(Protocol):
    """A search."""

    def propose(self, number: int) -> dict[str, Any] | None:
        """Values of a new trial, by setting; None: the search is at its end."""

    def learn(self, number: int, values: dict[str, Any], reports: Sequence[tuple[int, float]], whole: bool) -> None:
        """How a trial did that is over.

        Args:
            number: of the trial.
            values: as proposed.
            reports: (step, objective); empty if it failed.
            whole: whether it came to its end.
        """


class Listed:
    """Trials that are known from the beginning: at random, or every combination."""

    def __init__(self, values: Sequence[dict[str, Any]]) -> None:
        self.values = values

    def propose(self, number: int) -> dict[str, Any] | None:
        return self.values[number] if number < len(self.values) else None

    def learn(self, number: int, values: dict[str, Any], reports: Sequence[tuple[int, float]], whole: bool) -> None:
        """There is nothing to learn."""


class Tpe:
    """Optuna's tree-structured Parzen estimator: new values near those that did well.

    Args:
        axes: what varies.
        trials: how many there will be.
        mode: `min` or `max`.
        seed: of the search. A sweep that goes on draws from another one, not the first trials again.
        defaults: values of the first trial; None: nothing special about it.
    """

    def __init__(self, axes: Sequence[Axis], trials: int, mode: str, seed: int, defaults: dict[str, Any] | None) -> None:
        self.trials, self.mode, self.defaults = trials, mode, defaults
        self.distributions = {axis.setting: distribution_of(axis) for axis in axes}
        self.choices = {axis.setting: axis.values for axis in axes if axis.values is not None}
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, min(10, trials // 4)), constant_liar=True)
        self.study = optuna.create_study(direction="minimize" if mode == "min" else "maximize", sampler=sampler)
        self.asked: dict[int, optuna.Trial] = {}

    def propose(self, number: int) -> dict[str, Any] | None:
        if number >= self.trials:
            return None
        if number == 0 and self.defaults is not None:
            return self.defaults
        self.asked[number] = self.study.ask(self.distributions)
        params = self.asked[number].params
        return {key: self.choices[key][value] if key in self.choices else value for key, value in params.items()}

    def learn(self, number: int, values: dict[str, Any], reports: Sequence[tuple[int, float]], whole: bool) -> None:
        reports = [(step, value) for step, value in reports if math.isfinite(value)]
        asked = self.asked.pop(number, None)
        state = TrialState.FAIL if not reports else TrialState.COMPLETE if whole else TrialState.PRUNED
        if asked is not None:
            for step, value in reports:
                asked.report(value, step)
            self.study.tell(asked, _best(reports, self.mode) if state == TrialState.COMPLETE else None, state)
        elif (known := self.frozen(values, reports, state)) is not None:
            self.study.add_trial(known)

    def frozen(self, values: dict[str, Any], reports: Sequence[tuple[int, float]], state: TrialState) -> FrozenTrial | None:
        """A trial that was not asked for here; None if its values lie outside the space: the defaults may."""
        try:
            return optuna.trial.create_trial(
                state=state,
                value=_best(reports, self.mode) if state == TrialState.COMPLETE else None,
                params={key: self.choices[key].index(value) if key in self.choices else value for key, value in values.items()},
                distributions=self.distributions,
                intermediate_values=dict(reports),
            )
        except ValueError:
            return None


def _best(reports: Sequence[tuple[int, float]], mode: str) -> float:
    return (min if mode == "min" else max)(value for _, value in reports)


def distribution_of(axis: Axis) -> BaseDistribution:
    """As Optuna has it. Choices are numbered: they may be lists."""
    if axis.values is not None:
        return CategoricalDistribution(list(range(len(axis.values))))
    low, high = axis.arguments[:2]
    if axis.distribution == "randint":
        return IntDistribution(low, high - 1)
    if axis.distribution == "quniform":
        whole = all(isinstance(one, int) for one in axis.arguments)
        return (IntDistribution if whole else FloatDistribution)(low, high, step=axis.arguments[2])
    return FloatDistribution(low, high, log=axis.distribution == "loguniform")


def search_of(sweep: Sweep, known: int) -> Proposals:
    """The search that a sweep asks for.

    Args:
        sweep: the sweep.
        known: trials that there are already.
    """
    options = sweep.options
    if options.search == "optuna":
        assert options.num_trials is not None
        defaults = sweep.default_values() if options.try_defaults else None
        return Tpe(sweep.axes, options.num_trials, options.mode, options.seed + known, defaults)
    return Listed(listed_values(sweep))


def listed_values(sweep: Sweep) -> list[dict[str, Any]]:
    """Every trial of a search at random, or of a grid: the same list for the same seed."""
    options, axes = sweep.options, sweep.axes
    first = [sweep.default_values()] if options.try_defaults else []
    if options.search == "grid":
        combinations = itertools.product(*(axis.values or () for axis in axes))
        every = [dict(zip((axis.setting for axis in axes), values, strict=True)) for values in combinations]
        return (first + [values for values in every if values not in first])[: options.num_trials]
    draw = random.Random(options.seed)  # noqa: S311 - a seeded draw, no secret
    assert options.num_trials is not None
    drawn = [{axis.setting: axis.sample(draw) for axis in axes} for _ in range(options.num_trials)]
    return (first + drawn)[: options.num_trials]


class TrialQueue(Searcher):
    """Hands Tune the trials that are to be run: first those that were begun and are not over, then new ones.

    Args:
        unfinished: begun by a driver that died.
        first_new: number of the first new trial.
        search: where new ones come from.
        begin: writes a trial down; returns it.
        rows: what is known of a trial.
    """

    def __init__(
        self,
        unfinished: Sequence[Trial],
        first_new: int,
        search: Proposals,
        begin: Callable[[int, dict[str, Any]], Trial],
        row: Callable[[Trial], TrialResult],
    ) -> None:
        super().__init__()
        self.unfinished, self.next_number, self.search = list(unfinished), first_new, search
        self.begin, self.row = begin, row
        self.trials: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self.next_trial()
        if trial is None:
            return Searcher.FINISHED
        self.trials[trial_id] = trial
        return config_of(trial)

    def next_trial(self) -> Trial | None:
        """The next one, written down; None at the end."""
        if self.unfinished:
            return self.unfinished.pop(0)
        values = self.search.propose(self.next_number)
        if values is None:
            return None
        self.next_number += 1
        return self.begin(self.next_number - 1, values)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if (trial := self.trials.get(trial_id)) is not None:
            reports = () if error else self.row(trial).reports
            self.search.learn(trial.number, trial.values, reports, whole=bool((result or {}).get("last")))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what counts is on disk in the sweep's directory."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""


def config_of(trial: Trial) -> dict[str, Any]:
    """A trial as Tune has it: flat."""
    return {"trial": trial.number} | trial.values


def learn_from(search: Proposals, rows: Sequence[TrialResult]) -> None:
    """What earlier drivers of the sweep found out."""
    for row in rows:
        if row.state in (FINISHED, EARLY):
            search.learn(row.trial.number, row.trial.values, row.reports, whole=row.state == FINISHED)
