"""Where the values of new trials come from: an Optuna study, whose journal is in the sweep's directory.

The records of the trials (`TrialRecords`) are the truth. A driver that starts makes the study agree with them.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial
from ray.tune.search import Searcher

from raytrain2p.config.cli import report as print_line
from raytrain2p.storage.errors import StorageError
from raytrain2p.sweep.results import FAILED, FINISHED, OVER, Trial, TrialResult
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Axis, Values

optuna.logging.set_verbosity(optuna.logging.WARNING)

STUDY = "sweep"
NUMBER = "trial"  # attribute of a study's trial: the number of the sweep's trial. A study counts its orphaned trials too


class Search:
    """Proposes the values of new trials, and learns from those that are over.

    The defaults and the combinations of a grid are fixed values; Optuna samples all others. Each trial's sampler is seeded by the
    sweep's seed and the trial's number, so that a resumed sweep draws what it would have drawn without the interruption.

    GridSampler is not used: it counts a combination as visited if its trial failed, runs a combination again that was enqueued
    as the defaults, and raises RuntimeError from `tell` after the last one.

    Args:
        storage: of the study, which is created in it if it is not there.
        known: the trials of earlier drivers.
    """

    def __init__(self, sweep: Sweep, storage: BaseStorage, known: Sequence[TrialResult]) -> None:
        self.options, self.axes = sweep.options, {axis.setting: axis for axis in sweep.axes}
        self.distributions = {axis.setting: distribution_of(axis) for axis in sweep.axes}
        self.fixed = fixed_values(sweep)
        self.count = len(self.fixed) if self.options.search == "grid" else self.options.num_trials or 0
        direction = StudyDirection.MINIMIZE if self.options.mode == "min" else StudyDirection.MAXIMIZE
        self.study = optuna.create_study(storage=storage, study_name=STUDY, direction=direction, load_if_exists=True)
        self.running: dict[int, optuna.Trial] = {}
        self._reconcile(known)

    def propose(self, number: int) -> Values | None:
        """Values of a new trial; None if the search is at its end."""
        if number >= self.count:
            return None
        if number < len(self.fixed):
            params = self._params(self.fixed[number])
            if params is None:  # defaults outside the space are tried, but the study cannot hold them
                return self.fixed[number]
            self.study.enqueue_trial(params)
        self.study.sampler = self._sampler(number)
        trial = self.study.ask(self.distributions)
        trial.set_user_attr(NUMBER, number)
        self.running[number] = trial
        return {setting: value_of(self.axes[setting], param) for setting, param in trial.params.items()}

    def learn(self, number: int, reports: Sequence[tuple[int, float]], finished: bool) -> None:
        """Add what came of a trial that is over to the study.

        Args:
            reports: (step, objective); empty if the trial failed.
            finished: whether it trained to its end.
        """
        trial = self.running.pop(number, None)
        if trial is None:
            return
        finite = {step: value for step, value in reports if math.isfinite(value)}
        for step, value in finite.items():
            trial.report(value, step)
        if finite and finished:
            self.study.tell(trial, (min if self.options.mode == "min" else max)(finite.values()))
        else:
            self.study.tell(trial, state=TrialState.PRUNED if finite else TrialState.FAIL)

    def learn_all(self, results: Sequence[TrialResult]) -> None:
        """Add every trial that is over."""
        for result in results:
            if result.state in OVER:
                self.learn(result.trial.number, () if result.state == FAILED else result.reports, result.state == FINISHED)

    def _sampler(self, number: int) -> BaseSampler:
        seed = int(np.random.SeedSequence((self.options.seed, number)).generate_state(1)[0])
        if self.options.search == "optuna":
            return TPESampler(seed=seed, n_startup_trials=max(2, min(10, self.count // 4)))
        return RandomSampler(seed=seed)

    def _reconcile(self, known: Sequence[TrialResult]) -> None:
        """Make the study agree with the records, wherever an earlier driver was killed."""
        for _ in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.ask()  # enqueued, but not begun: it fails below
        alive = {trial.user_attrs.get(NUMBER): trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.FAIL}
        for result in known:
            trial = alive.get(result.trial.number)
            if trial is None and result.state != FAILED and (params := self._params(result.trial.values)) is not None:
                attributes = {NUMBER: result.trial.number}
                self.study.add_trial(
                    create_trial(state=TrialState.RUNNING, params=params, distributions=self.distributions, user_attrs=attributes)
                )
                trial = self.study.get_trials(deepcopy=False)[-1]
            if trial is not None and trial.state == TrialState.RUNNING:
                self.running[result.trial.number] = optuna.Trial(self.study, trial._trial_id)
        recorded = {trial.number for trial in self.running.values()}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in recorded:
                self.study.tell(trial.number, state=TrialState.FAIL)
        self.learn_all(known)

    def _params(self, values: Values) -> Values | None:
        """A trial's values as the study holds them; None if one is outside the space, as defaults may be."""
        try:
            params = {setting: param_of(axis, values[setting]) for setting, axis in self.axes.items()}
            create_trial(state=TrialState.RUNNING, params=params, distributions=self.distributions)
        except ValueError:
            return None
        return params


def open_journal(path: Path, report: Callable[[str], None] = print_line) -> JournalStorage:
    """The storage of a study. The caller holds the sweep's launch lock: no other process writes to it.

    A lock file is thus one that a killed driver left: Optuna would wait 30 s for it. A damaged journal is started again:
    all that it held is in the records too.

    Args:
        report: called with a line for the user about a damaged journal.
    """
    Path(f"{path}.lock").unlink(missing_ok=True)
    if path.exists() and not is_intact(path):
        report(f"{path} is damaged: the study is made again from the records of the trials")
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return _storage(path)


def is_intact(journal: Path) -> bool:
    """Whether each line is whole, and Optuna can read them: a disk that is full cuts one off."""
    try:
        content = journal.read_bytes()
        _storage(journal)
    except Exception:  # whatever Optuna raises for a foreign line
        return False
    return not content or content.endswith(b"\n")


def _storage(path: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))


def fixed_values(sweep: Sweep) -> list[Values]:
    """Values that are not sampled, in the order of their trials: the defaults, then every combination of a grid."""
    options = sweep.options
    first = [sweep.default_values()] if options.try_defaults else []
    if options.search != "grid":
        return first
    combinations = itertools.product(*(axis.values or () for axis in sweep.axes))
    every = (dict(zip((axis.setting for axis in sweep.axes), values, strict=True)) for values in combinations)
    return list(itertools.islice(itertools.chain(first, (values for values in every if values not in first)), options.num_trials))


def distribution_of(axis: Axis) -> BaseDistribution:
    """An axis as Optuna has it. Choices are JSON text: they may be lists, which Optuna cannot hold."""
    if axis.values is not None:
        return CategoricalDistribution([json.dumps(value) for value in axis.values])
    low, high = axis.arguments[:2]
    if axis.distribution == "randint":
        return IntDistribution(low, high - 1)
    if axis.distribution == "quniform":
        whole = all(isinstance(one, int) for one in axis.arguments)
        return (IntDistribution if whole else FloatDistribution)(low, axis.rounded(high), step=axis.arguments[2])
    return FloatDistribution(low, high, log=axis.distribution == "loguniform")


def param_of(axis: Axis, value: Any) -> Any:
    """A setting's value as Optuna has it.

    Raises:
        ValueError: it is not among the choices.
    """
    return json.dumps(axis.values[axis.values.index(value)]) if axis.values is not None else value


def value_of(axis: Axis, param: Any) -> Any:
    """A setting's value, from what Optuna has."""
    if axis.values is not None:
        return json.loads(param)
    return axis.rounded(param) if axis.distribution == "quniform" else param


class TrialQueue(Searcher):
    """Gives Tune the trials to run: first those that an earlier driver began and that are not over, then new ones.

    Args:
        first_new: number of the first new trial.
        begin: writes the record of a new trial, and returns it.
        read_result: reads what has come of a trial.
    """

    def __init__(
        self,
        unfinished: Sequence[Trial],
        first_new: int,
        search: Search,
        begin: Callable[[int, Values], Trial],
        read_result: Callable[[Trial], TrialResult],
    ) -> None:
        super().__init__()
        self.unfinished, self.next_number, self.search = list(unfinished), first_new, search
        self.begin, self.read_result = begin, read_result
        self.trials: dict[str, Trial] = {}

    def suggest(self, trial_id: str) -> Values | str:
        trial = self.next_trial()
        if trial is None:
            finished: str = Searcher.FINISHED
            return finished
        self.trials[trial_id] = trial
        return config_of(trial)

    def next_trial(self) -> Trial | None:
        """The next one, with its record on disk; None at the end."""
        if self.unfinished:
            return self.unfinished.pop(0)
        values = self.search.propose(self.next_number)
        if values is None:
            return None
        self.next_number += 1
        return self.begin(self.next_number - 1, values)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if (trial := self.trials.get(trial_id)) is not None:
            with suppress(OSError, StorageError):  # a failed disk: the next driver finds the result in the trial's run
                reports = () if error else self.read_result(trial).reports
                self.search.learn(trial.number, reports, finished=bool((result or {}).get("last")))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: records and study are in the sweep's directory."""

    def restore(self, checkpoint_path: str) -> None:
        """As `save`."""


def config_of(trial: Trial) -> Values:
    """A trial as Tune has it: flat."""
    return {"trial": trial.number} | trial.values
