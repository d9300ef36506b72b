"""Two-phase training of multimodal language models, from a laptop to a Ray cluster. The Python API: docs/python.md."""

import sys
from typing import TYPE_CHECKING, Any

from raytrain2p.interrupts import end_at_once, handle

if TYPE_CHECKING:
    from raytrain2p.config.problems import InputError
    from raytrain2p.config.settings import AlignmentSettings, InstructionSettings
    from raytrain2p.inference.predictor import Predictor
    from raytrain2p.launch.api import TrainModule
    from raytrain2p.launch.monitor import TrainingFailedError
    from raytrain2p.sweep.api import SweepModule
    from raytrain2p.sweep.results import SweepOutcome
    from raytrain2p.tracking.find import find
    from raytrain2p.tracking.run_directory import RunDirectory
    from raytrain2p.worker.job import Outcome

    train: TrainModule
    sweep: SweepModule

__version__ = "0.1.0"
__all__ = [
    "AlignmentSettings",
    "InputError",
    "InstructionSettings",
    "Outcome",
    "Predictor",
    "RunDirectory",
    "SweepOutcome",
    "TrainingFailedError",
    "find",
    "sweep",
    "train",
]
# The module of a name, imported when the name is first used. `train` and `sweep` are modules themselves, which can be called.
_MODULES = {
    "AlignmentSettings": "config.settings",
    "InputError": "config.problems",
    "InstructionSettings": "config.settings",
    "Outcome": "worker.job",
    "Predictor": "inference.predictor",
    "RunDirectory": "tracking.run_directory",
    "SweepOutcome": "sweep.results",
    "TrainingFailedError": "launch.monitor",
    "find": "tracking.find",
}

if sys.argv[:1] == ["-m"] or sys.argv[0].endswith("/bin/raytrain2p"):  # imported by Python as the package of a command
    handle(end_at_once)


if not TYPE_CHECKING:  # type checkers would take any name

    def __getattr__(name: str) -> Any:
        import importlib

        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(f"raytrain2p.{_MODULES.get(name, name)}")
        return getattr(module, name) if name in _MODULES else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
