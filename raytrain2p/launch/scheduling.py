"""What Ray Tune does about bad trials, with the memory that a sweep needs which goes on after its driver's death."""

from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from raytrain2p.config.space import Axis
from raytrain2p.config.sweep import Sweep
from raytrain2p.launch.reporting import comparable
from raytrain2p.phases.survey import planned_steps
from raytrain2p.tracking.sweeps import OVER, Row

NO_LIMIT = 10**9  # a trial ends by itself, and writes down how: Tune must not end it for being old


def scheduler_of(sweep: Sweep, known: list[Row], records: int) -> TrialScheduler:
    """The scheduler that a sweep asks for.

    Args:
        sweep: the sweep.
        known: trials of an earlier driver.
        records: training records.
    """
    options = sweep.options
    if options.scheduler == "asha":
        return RememberingAsha(sweep, known, records)
    if options.scheduler == "pbt":
        ranges = {axis.setting: axis for axis in sweep.axes}
        return SteppedPbt(
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
    settings = sweep.settings(values)
    return max(1, records // (settings.training.batch_size * settings.training.accumulate * settings.launch.num_workers))


def longest(sweep: Sweep, records: int) -> int:
    """Steps or epochs, whichever rungs are counted in, of a whole trial with the base's settings."""
    steps = planned_steps(sweep.base.training, records, sweep.base.launch.num_workers)
    by_step = sweep.options.scheduler == "pbt" or sweep.options.asha.time_attr == "step"
    return steps if by_step else -(-steps // steps_per_epoch(sweep, {}, records))


class SteppedPbt(PopulationBasedTraining):
    """Population-based training in step, also after a trial has failed and after the death of the sweep's driver.

    Args:
        farthest: step that the farthest of the trials that go on has reached: they meet at the first exchange after it.
        options: as PopulationBasedTraining takes them.
    """

    def __init__(self, farthest: int, **options: Any) -> None:
        super().__init__(**options)
        interval = options["perturbation_interval"]
        self._next_perturbation_sync = (farthest // interval + 1) * interval

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        state = self._trial_state[trial]
        state.last_perturbation_time = self._next_perturbation_sync - self._perturbation_interval
        state.last_train_time = state.last_perturbation_time

    def _exploit(self, tune_controller: Any, trial: Any, trial_to_clone: Any) -> None:
        """Tune hands over the whole configuration: the heir keeps its own number."""
        number = trial.config["trial"]
        super()._exploit(tune_controller, trial, trial_to_clone)
        trial.set_config(trial.config | {"trial": number})

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Tune counts a trial that failed among those that the others wait for."""
        super().on_trial_error(tune_controller, trial)
        live = tune_controller.get_live_trials()
        live.discard(trial)
        if live and all(self._trial_state[one].last_train_time >= self._next_perturbation_sync for one in live):
            self._next_perturbation_sync += self._perturbation_interval  # they go on; the exchange that it was waited with falls out


class RememberingAsha(ASHAScheduler):
    """ASHA, which knows the rungs that trials reached under an earlier driver of the sweep.

    Rungs are at grace_period x reduction_factor^k below the end of training: at the end there is nothing to be saved.

    Args:
        sweep: the sweep.
        known: trials of an earlier driver.
        records: training records.
    """

    def __init__(self, sweep: Sweep, known: list[Row], records: int) -> None:
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


def domain_of(axis: Axis) -> Any:
    """A range as Tune has it, to draw anew from."""
    if axis.values is not None:
        return list(axis.values)
    low, high = axis.arguments[:2]
    kinds = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
    return kinds[axis.distribution](low, high) if axis.distribution in kinds else tune.quniform(low, high, axis.arguments[2])


def within(config: dict[str, Any], ranges: dict[str, Axis]) -> dict[str, Any]:
    """Tune multiplies by 0.8 and 1.2, whatever the limits."""
    for setting, axis in ranges.items():
        if axis.distribution in ("uniform", "loguniform", "randint"):
            low, high = axis.arguments[0], axis.arguments[1] - (axis.distribution == "randint")  # its highest is left out
            within_limits = min(max(config[setting], low), high)
            config[setting] = within_limits if axis.distribution == "randint" else float(within_limits)
        elif axis.distribution == "quniform":
            config[setting] = axis.rounded(config[setting])
    return config
