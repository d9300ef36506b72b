"""Population-based training that can be resumed."""

from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from raytrain2p.sweep.space import Axis, Values


class ResumablePbt(PopulationBasedTraining):
    """Synchronous population-based training that stays synchronous when a trial fails and when the sweep is resumed.

    Args:
        farthest: the largest step of a resumed trial: the next exchange is the first one after it.
        options: of PopulationBasedTraining.
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
        """Tune copies the whole configuration: restore the trial's own number."""
        number = trial.config["trial"]
        super()._exploit(tune_controller, trial, trial_to_clone)
        trial.set_config(trial.config | {"trial": number})

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Tune lets the others wait for a trial that failed."""
        super().on_trial_error(tune_controller, trial)
        live = tune_controller.get_live_trials()
        live.discard(trial)
        if live and all(self._trial_state[one].last_train_time >= self._next_perturbation_sync for one in live):
            self._next_perturbation_sync += self._perturbation_interval  # they continue, without this exchange


def domain_of(axis: Axis) -> Any:
    """The values of an axis as Tune has them, for the case that it draws a new one."""
    if axis.values is not None:
        return list(axis.values)
    low, high = axis.arguments[:2]
    kinds = {"uniform": tune.uniform, "loguniform": tune.loguniform, "randint": tune.randint}
    return kinds[axis.distribution](low, high) if axis.distribution in kinds else tune.quniform(low, high, axis.arguments[2])


def within(config: Values, ranges: dict[str, Axis]) -> Values:
    """Move values into their ranges: Tune multiplies by 0.8 and 1.2, whatever the limits."""
    for setting, axis in ranges.items():
        if axis.distribution in ("uniform", "loguniform", "randint"):
            low, high = axis.arguments[0], axis.arguments[1] - (axis.distribution == "randint")  # its upper limit is excluded
            within_limits = min(max(config[setting], low), high)
            config[setting] = within_limits if axis.distribution == "randint" else float(within_limits)
        elif axis.distribution == "quniform":
            config[setting] = axis.rounded(config[setting])
    return config
