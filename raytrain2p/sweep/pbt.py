"""What Ray Tune does about bad trials, with the memory that a sweep needs which goes on after its driver's death."""

from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from raytrain2p.sweep.space import Axis


class ResumablePbt(PopulationBasedTraining):
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
