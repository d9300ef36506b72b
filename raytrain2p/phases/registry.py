"""Phase number to its functions: what the driver reads, and what a worker builds, measures and exports."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raytrain2p.config import Settings
from raytrain2p.phases.inputs import PhaseInputs


def read_inputs(settings: Settings, phase: int) -> PhaseInputs:
    """Read and check all that a phase trains on. Imports nothing that trains: the driver starts seconds sooner.

    Raises:
        InputError: every problem with models, records and images.
    """
    from raytrain2p.phases.alignment import data as alignment
    from raytrain2p.phases.instruction import data as instruction

    readers: dict[int, Callable[..., PhaseInputs]] = {1: alignment.read_inputs, 2: instruction.read_inputs}
    return readers[phase](settings)


@dataclass(frozen=True)
class PhaseFunctions:
    """What a worker does in one phase.

    Args:
        build: settings, splits, steps and precision to the LightningModule.
        online: module and splits to splits whose images are encoded in the step.
        evaluate: module, splits, test splits' names and worker group to metrics and tables.
        export: writes the artifact.
    """

    build: Callable[..., Any]
    online: Callable[..., Any]
    evaluate: Callable[..., tuple[dict[str, float], dict[str, Any]]]
    export: Callable[..., None]


def phase_functions(phase: int) -> PhaseFunctions:
    """The functions of a phase; imports Lightning."""
    if phase == 1:
        from raytrain2p.phases.alignment import module as alignment

        return PhaseFunctions(alignment.build, alignment.online, alignment.evaluate, alignment.export)
    from raytrain2p.phases.instruction import evaluate, module

    return PhaseFunctions(module.build, module.online, evaluate.evaluate, module.export)
