"""What Ray Tune does about bad trials, with the memory that a sweep needs which goes on after its driver's death."""

from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from raytrain2p.phases.inputs import planned_steps
from raytrain2p.sweep.pbt import ResumablePbt, domain_of, within
from raytrain2p.sweep.results import OVER, TrialResult
from raytrain2p.sweep.settings import Sweep
from raytrain2p.worker.ray_reports import comparable

NO_LIMIT = 10**9  # a trial ends by itself, and writes down how: Tune must not end it for being old


def scheduler_of(sweep: Sweep, known: list[TrialResult], records: int) -> TrialScheduler:
    """The scheduler that a sweep asks for.

    Args:
        sweep: the sweep.
        known: trials of an earlier driver.
        records: training records.
    """
    options = sweep.options
    if options.scheduler == "asha":
        return ResumableAsha(sweep, known, records)
    if options.scheduler == "pbt":
        ranges = {axis.setting: axis for axis in sweep.axes}
        return ResumablePbt(
            max((row.steps for row in known if row.state not in OVER), default=0),
            time_attr="step",
            perturbation_interval=options.pbt.interval,
            quantile_fraction=options.pbt.quantile,
            hyperparam_mutations={setting: domain_of(axis) for setting, axis in ranges.items()},
            custom_explore_fn=lambda config: within(config, ranges),
            synch=True,  # all at one step: a trial's steps stay one sequence, whosever weights it goes on with
            require_attrs=False,
            log_config=False,
        )
    return FIFOScheduler()


def steps_per_epoch(sweep: Sweep, values: dict[str, Any], records: int) -> int:
    """Of a trial with these values."""
    return max(1, records // sweep.settings(values).training.global_batch_size)


def longest(sweep: Sweep, records: int) -> int:
    """Steps or epochs, whichever rungs are counted in, of a whole trial with the base's settings."""
    steps = planned_steps(sweep.base.training, records)
    by_step = sweep.options.scheduler == "pbt" or sweep.options.asha.time_attr == "step"
    return steps if by_step else -(-steps // steps_per_epoch(sweep, {}, records))


class ResumableAsha(ASHAScheduler):
    """ASHA, which knows the rungs that trials reached under an earlier driver of the sweep.

    Rungs are at grace_period x reduction_factor^k below the end of training: at the end there is nothing to be saved.

    Args:
        sweep: the sweep.
        known: trials of an earlier driver.
        records: training records.
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
            for row in known:
                unit = 1 if options.time_attr == "step" else steps_per_epoch(sweep, row.trial.values, records)
                reached = [comparable(value, sweep.options.mode) for step, value in row.reports if step // unit >= milestone]
                recorded.update({self._name(row.trial.number): sign * value for value in reached[:1]})
            bracket._rungs.insert(0, (milestone, recorded))  # from the last one to the first, as ASHA has them
            milestone *= options.reduction_factor

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A trial that goes on keeps its places under its new name."""
        super().on_trial_add(tune_controller, trial)
        name = self._name(trial.config["trial"])
        for bracket in self._brackets:
            for _, recorded in bracket._rungs:
                if name in recorded:
                    recorded[trial.trial_id] = recorded.pop(name)

    @staticmethod
    def _name(number: int) -> str:
        return f"of an earlier driver: {number}"
