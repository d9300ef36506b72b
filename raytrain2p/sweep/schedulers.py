"""Schedulers, which end bad trials early, with the results of trials under earlier drivers of the sweep."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raytrain2p.phases.inputs import planned_steps
from raytrain2p.sweep.pbt import ResumablePbt, domain_of, within
from raytrain2p.sweep.results import OVER, TrialResult
from raytrain2p.sweep.settings import Sweep
from raytrain2p.sweep.space import Values
from raytrain2p.worker.ray_reports import comparable

NO_LIMIT = 10**9  # Tune must not end a trial for its steps: the trial ends, and records that, itself


def scheduler_of(sweep: Sweep, known: list[TrialResult], records: int) -> TrialScheduler:
    """The scheduler in the settings.

    Args:
        known: the trials of earlier drivers.
        records: number of training records.
    """
    options = sweep.options
    if options.scheduler == "asha":
        return ResumableAsha(sweep, known, records)
    if options.scheduler == "pbt":
        ranges = {axis.setting: axis for axis in sweep.axes}
        return ResumablePbt(
            max((result.steps for result in known if result.state not in OVER), default=0),
            time_attr="step",
            perturbation_interval=options.pbt.interval,
            quantile_fraction=options.pbt.quantile,
            hyperparam_mutations={setting: domain_of(axis) for setting, axis in ranges.items()},
            custom_explore_fn=lambda config: within(config, ranges),
            synch=True,  # all at one step: a trial's steps stay one sequence, whichever weights it continues with
            require_attrs=False,
            log_config=False,
        )
    return FIFOScheduler()


def steps_per_epoch(sweep: Sweep, values: Values, records: int) -> int:
    """Of a trial with these values."""
    return max(1, records // sweep.settings(values).training.global_batch_size)


def longest(sweep: Sweep, records: int) -> int:
    """Length of a trial with the base's settings, in the unit in which trials are compared: steps or epochs."""
    steps = planned_steps(sweep.base.training, records)
    by_step = sweep.options.scheduler == "pbt" or sweep.options.asha.time_attr == "step"
    return steps if by_step else -(-steps // steps_per_epoch(sweep, {}, records))


class ResumableAsha(ASHAScheduler):
    """ASHA with the rungs that trials reached under earlier drivers of the sweep.

    Rungs are at grace_period x reduction_factor^k, below the end of training: stopping a trial there would save nothing.

    Args:
        known: the trials of earlier drivers.
        records: number of training records.
    """

    def __init__(self, sweep: Sweep, known: list[TrialResult], records: int) -> None:
        options = sweep.options.asha
        super().__init__(
            time_attr=options.time_attr, max_t=NO_LIMIT, grace_period=options.grace_period, reduction_factor=options.reduction_factor
        )
        (bracket,) = self._brackets
        bracket._rungs = []
        milestone, end = float(options.grace_period), longest(sweep, records)
        sign = 1 if sweep.options.mode == "max" else -1
        while milestone < end:
            recorded = {}
            for result in known:
                unit = 1 if options.time_attr == "step" else steps_per_epoch(sweep, result.trial.values, records)
                reached = [comparable(value, sweep.options.mode) for step, value in result.reports if step // unit >= milestone]
                recorded.update({self._name(result.trial.number): sign * value for value in reached[:1]})
            bracket._rungs.insert(0, (milestone, recorded))  # ASHA has the last one first
            milestone *= options.reduction_factor

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Tune gives a resumed trial a new name: its places on the rungs are moved to that."""
        super().on_trial_add(tune_controller, trial)
        name = self._name(trial.config["trial"])
        for bracket in self._brackets:
            for _, recorded in bracket._rungs:
                if name in recorded:
                    recorded[trial.trial_id] = recorded.pop(name)

    @staticmethod
    def _name(number: int) -> str:
        return f"earlier driver: {number}"
